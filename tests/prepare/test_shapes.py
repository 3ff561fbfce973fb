"""Images during preparation: pixels wider than 8 bits are scaled, or refused with a reason."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vimscale.data.images import decode
from vimscale.errors import BadSample
from vimscale.prepare.shapes import Options, shape

RAMP = np.linspace(0, 65535, 20 * 10).round().astype(np.uint16).reshape(10, 20)


def _tiff(pixels: bytes, bits: int, *, order: str = "<", white_is_zero: bool = False, kind: int = 1) -> bytes:
    """10 x 20 grey pixels of any kind (1: unsigned, 2: signed, 3: float)."""
    photometric = 0 if white_is_zero else 1
    short = {256: 20, 257: 10, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 10, 339: kind}
    tags = [(tag, 3, value << 16 if order == ">" else value) for tag, value in short.items()]
    tags = sorted([*tags, (273, 4, 8), (279, 4, len(pixels))])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    entries = b"".join(struct.pack(f"{order}HHII", tag, form, 1, value) for tag, form, value in tags)
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def _twelve(values: np.ndarray) -> bytes:
    a, b = values.reshape(-1, 2).astype(int).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _prepared(data: bytes, options: Options = Options()) -> np.ndarray:  # noqa: B008  frozen
    """Prepare an image and return what training sees of it."""
    extension, stored, height, width, _ = shape(data, "in", "k", options, measure=True)
    assert extension in decode.EXTENSIONS
    pixels = decode.pixels(stored)
    assert pixels.shape == (3, height, width)
    return pixels.permute(1, 2, 0).numpy()


WIDE = {
    "tiff, 16 bits": _tiff(RAMP.tobytes(), 16),
    "tiff, 16 bits, big-endian": _tiff(RAMP.astype(">u2").tobytes(), 16, order=">"),
    "tiff, 16 bits, white is 0": _tiff((65535 - RAMP).tobytes(), 16, white_is_zero=True),
    "tiff, 12 bits": _tiff(_twelve(RAMP >> 4), 12),
    "tiff, packed": _saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "png, 16 bits": _saved(Image.fromarray(RAMP), "PNG"),
    "pgm, 16 bits": b"P5 20 10 65535\n" + RAMP.astype(">u2").tobytes(),
    "pgm, 16 bits as text": b"P2 20 10 65535\n" + " ".join(map(str, RAMP.ravel())).encode(),
}


@pytest.mark.parametrize("kind", WIDE)
def test_wide_pixels_keep_their_upper_eight_bits(kind: str) -> None:
    assert np.array_equal(_prepared(WIDE[kind]), np.repeat((RAMP >> 8)[..., None], 3, 2))


def test_pixels_of_another_range_are_scaled_to_8_bits() -> None:
    expected = RAMP / 65535 * 255
    twelve = b"P5 20 10 4095\n" + (RAMP >> 4).astype(">u2").tobytes()
    floats = [_tiff((RAMP / 65535).astype("<f4").tobytes(), 32, kind=3)]
    floats.append(_tiff((1 - RAMP / 65535).astype("<f4").tobytes(), 32, kind=3, white_is_zero=True))
    for data in (twelve, *floats):
        assert abs(_prepared(data)[..., 0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_tiff(RAMP.astype("<u4").tobytes(), 32), "32 bits"),
        (_tiff(RAMP.astype("<i4").tobytes(), 32, kind=2), "signed whole numbers of 32 bits"),
        (_tiff(RAMP.astype("<i2").tobytes(), 16, kind=2), "signed whole numbers of 16 bits"),
        (_tiff(RAMP.astype("i1").tobytes(), 8, kind=2), "signed whole numbers of 8 bits"),
        (_tiff((RAMP / 257).astype("<f4").tobytes(), 32, kind=3), "floats from 0 to 255, but must be from 0 to 1"),
        (_tiff((RAMP / 65535 - 0.5).astype("<f4").tobytes(), 32, kind=3), "floats from -0.5 to 0.5"),
        (_tiff(np.full(200, np.nan, "<f4").tobytes(), 32, kind=3), "floats from nan to nan"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadSample, match=rf"in, sample k: .*{why}") as caught:
        _prepared(data)
    assert caught.value.cause == "image"


def test_a_transparent_grey_value_becomes_white_in_16_bits_too() -> None:
    image = _prepared(_saved(Image.fromarray(RAMP), "PNG", transparency=int(RAMP[3, 4])))
    assert (image[3, 4] == 255).all()
    assert np.array_equal(np.delete(image[..., 0], 64), np.delete(RAMP >> 8, 64))


def test_other_modes_become_the_rgb_that_they_show() -> None:
    red, white = (200, 30, 40), (255, 255, 255)
    clear = Image.new("RGBA", (20, 10), (*red, 255))
    clear.paste((*red, 0), (10, 0, 20, 10))
    flat = Image.new("RGB", (20, 10), red)
    for image, kind in (
        (flat.convert("CMYK"), "TIFF"),
        (flat.convert("YCbCr"), "TIFF"),
        (Image.new("LAB", (20, 10), (110, 190, 166)), "TIFF"),
        (flat.quantize(), "GIF"),
        (flat, "BMP"),
    ):
        assert abs(_prepared(_saved(image, kind))[5, 5].astype(int) - red).max() < 12, image.mode
    for mode in ("RGBA", "LA", "PA"):
        stored = clear.convert("P").convert("PA") if mode == "PA" else clear.convert(mode)
        if mode == "PA":
            stored.putalpha(clear.getchannel("A"))
        seen = _prepared(_saved(stored, "TIFF"))
        assert (seen[5, 15] == white).all(), mode
        assert (seen[5, 5] != white).any(), mode


@pytest.mark.parametrize("side", [(3, 200_000), (200_000, 3)])
def test_a_strip_too_long_for_a_jpeg_becomes_a_png(side: tuple[int, int]) -> None:
    extension, data, height, width, _ = shape(
        _saved(Image.new("RGB", side, (9, 8, 7)), "PNG"), "in", "k", Options(resize=1), measure=False
    )
    assert (extension, sorted((height, width))) == ("png", [1, 66_667])
    assert decode.size_of(data) == (height, width)
