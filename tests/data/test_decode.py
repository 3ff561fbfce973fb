"""Image files of every kind, intact and damaged, become upright RGB."""

import contextlib
import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vimscale.data.images import decode
from vimscale.errors import BadSample
from vimscale.prepare import shapes
from vimscale.prepare.inputs.rows import Files

RED = Image.new("RGB", (20, 10), (200, 30, 40))
NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _no_warning_leaks() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        yield


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _grey16() -> Image.Image:
    return Image.fromarray(np.full((10, 20), 200 * 256 + 17, dtype=np.uint16))


def _half_clear(mode: str) -> Image.Image:
    image = Image.new("RGBA", (20, 10), (200, 30, 40, 255))
    image.paste((0, 0, 0, 0), (10, 0, 20, 10))
    return image.convert(mode)


KINDS = {
    "jpeg": (_encoded(RED, "JPEG", quality=95), (200, 30, 40)),
    "jpeg, progressive": (_encoded(RED, "JPEG", quality=95, progressive=True), (200, 30, 40)),
    "jpeg, grey": (_encoded(Image.new("L", (20, 10), 77), "JPEG"), (77, 77, 77)),
    "jpeg, cmyk, inverted as Adobe does": (_encoded(RED.convert("CMYK"), "JPEG", quality=95), (200, 30, 40)),
    "jpeg, stored as rgb": (_encoded(RED, "JPEG", quality=95, keep_rgb=True), (200, 30, 40)),
    "png": (_encoded(RED, "PNG"), (200, 30, 40)),
    "png, alpha": (_encoded(RED.convert("RGBA"), "PNG"), (200, 30, 40)),
    "png, palette": (_encoded(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), (200, 30, 40)),
    "png, grey": (_encoded(Image.new("L", (20, 10), 77), "PNG"), (77, 77, 77)),
    "png, grey with alpha": (_encoded(Image.new("LA", (20, 10), (77, 255)), "PNG"), (77, 77, 77)),
    "png, 16 bits": (_encoded(_grey16(), "PNG"), (200, 200, 200)),
    "png, 1 bit": (_encoded(Image.new("1", (20, 10), 1), "PNG"), (255, 255, 255)),
    "webp": (_encoded(RED, "WEBP", lossless=True), (200, 30, 40)),
    "webp, alpha": (_encoded(RED.convert("RGBA"), "WEBP", lossless=True), (200, 30, 40)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_rgb(kind: str) -> None:
    data, colour = KINDS[kind]
    image, label = decode.decode({"__key__": "k", "png": data, "cls": b"7"}, "shard", 10)
    assert (image.shape, image.dtype, label) == ((3, 10, 20), torch.uint8, 7)
    off = (image.float() - torch.tensor(colour)[:, None, None]).abs().max()
    assert off <= (3 if "jpeg" in kind else 0), "JPEG rounds colours"
    assert decode.size_of(data) == (10, 20)


CLEAR = {
    "rgba": _encoded(_half_clear("RGBA"), "PNG"),
    "palette": _encoded(_half_clear("RGBA").quantize(), "PNG"),
    "grey and alpha": _encoded(_half_clear("LA"), "PNG"),
    "one colour of rgb": _encoded(_half_clear("RGB"), "PNG", transparency=(0, 0, 0)),
    "one grey": _encoded(_half_clear("L"), "PNG", transparency=0),
    "webp": _encoded(_half_clear("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_become_white_and_others_stay(kind: str) -> None:
    image = decode.pixels(CLEAR[kind])
    colour = (84, 84, 84) if "grey" in kind else (200, 30, 40)
    assert (image[:, :, 10:] == 255).all()
    assert (image[:, :, :10].int() - torch.tensor(colour)[:, None, None]).abs().max() <= 2


# ---- upright

STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera that writes this orientation has transformed the upright image."""


def _quarters() -> Image.Image:
    """48 x 32 pixels with quarters of four colours: each of the eight orientations looks different."""
    image = Image.new("RGB", (48, 32), (250, 0, 0))
    image.paste((0, 250, 0), (24, 0, 48, 16))
    image.paste((0, 0, 250), (0, 16, 24, 32))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "JPEG, grey", "JPEG, cmyk"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_rotated_photograph_is_turned_upright(kind: str, orientation: int) -> None:
    upright = _quarters().convert({"JPEG, grey": "L", "JPEG, cmyk": "CMYK"}.get(kind, "RGB"))
    turn = STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if "JPEG" in kind else {}
    data = _encoded(stored, kind.split(",")[0], exif=exif.tobytes(), **lossless)
    image = decode.pixels(data)
    assert decode.size_of(data) == image.shape[1:] == (32, 48)
    expected = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    assert (image.int() - expected.int()).abs().max() < 12


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50, b"Exif\0\0MM\0*\0\0\1"]
)
def test_nonsensical_metadata_is_ignored(exif: bytes) -> None:
    data = _encoded(RED, "JPEG", exif=exif)
    assert decode.pixels(data).shape == (3, 10, 20)
    assert decode.size_of(data) == (10, 20)


# ---- damage

WHOLE = {
    "jpeg": _encoded(NOISE, "JPEG"),
    "jpeg, progressive": _encoded(NOISE, "JPEG", progressive=True),
    "jpeg, grey": _encoded(NOISE.convert("L"), "JPEG"),
    "jpeg, cmyk": _encoded(NOISE.convert("CMYK"), "JPEG"),
    "png": _encoded(NOISE, "PNG"),
    "png, palette": _encoded(NOISE.quantize(), "PNG"),
    "webp": _encoded(NOISE, "WEBP"),
}


def _cause(data: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decode.pixels(data)
    return caught.value.cause


@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_file_is_bad_wherever_it_ends(kind: str) -> None:
    data = WHOLE[kind]
    assert decode.pixels(data).shape == (3, 40, 60)
    last = len(data) - 40  # a PNG can lack its last, empty chunk
    assert {_cause(data[:length]) for length in (0, 1, 3, 11, 30, *range(200, last, last // 20), last)} == {"image"}


def test_a_jpeg_that_lost_its_middle_is_bad() -> None:
    data = bytearray(WHOLE["jpeg"])
    middle = len(data) // 2
    data[middle : middle + 60] = b"\xff\xd9" * 30
    assert _cause(bytes(data)) == "image"


def test_a_jpeg_with_an_odd_header_is_read_as_other_decoders_do() -> None:
    data = bytearray(WHOLE["jpeg"])
    scan = data.index(b"\xff\xda")
    end = scan + 2 + struct.unpack_from(">H", data, scan + 2)[0]
    assert data[end - 3 : end] == b"\0\x3f\0"
    data[end - 2] = 0  # spectral selection has no meaning in a sequential file
    assert torch.equal(decode.pixels(bytes(data)), decode.pixels(WHOLE["jpeg"]))


def test_other_files_are_not_images_whatever_their_name() -> None:
    for data in (b"", b"<html>not found</html>", _encoded(RED, "GIF"), _encoded(RED, "EPS"), _encoded(RED, "TIFF")):
        assert _cause(data) == "image"


def _without(chunk: bytes) -> bytes:
    """A palette PNG that lacks one of its chunks."""
    data = WHOLE["png, palette"]
    start = data.index(chunk) - 4
    return data[:start] + data[start + 12 + struct.unpack_from(">I", data, start)[0] :]


def test_a_png_without_a_chunk_it_needs_is_bad() -> None:
    for chunk in (b"PLTE", b"IHDR", b"IDAT"):
        assert _cause(_without(chunk)) == "image"
    with pytest.raises(BadSample, match=r"cannot be decoded: \w"):
        decode.pixels(_without(b"PLTE"))


@pytest.mark.parametrize("raised", [AssertionError(), KeyError("tag"), RecursionError(), NotImplementedError("mode")])
@pytest.mark.parametrize("where", ["open", "load", "getexif"])
def test_any_exception_of_a_decoder_means_a_damaged_image(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, where: str
) -> None:
    from PIL import PngImagePlugin

    def fail(*arguments: object) -> None:
        raise raised

    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encoded(RED, "PNG", exif=exif)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, {"open": "_open"}.get(where, where), fail)
    if where == "getexif":
        assert decode.pixels(data).shape == (3, 10, 20), "metadata alone"
    else:
        assert _cause(data) == "image"


def test_a_memory_error_does_not_mean_a_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_decode_any", fail)
    with pytest.raises(MemoryError):
        decode.pixels(KINDS["png"][0])


@pytest.mark.parametrize("kind", WHOLE)
def test_a_flipped_byte_makes_an_image_bad_or_different_and_nothing_else(kind: str) -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(WHOLE[kind])
        data[draw.integers(len(data) if draw.random() < 0.5 else 80)] = draw.integers(256)
        with contextlib.suppress(BadSample):
            decode.pixels(bytes(data))


def _png_header(side: int) -> bytes:
    """A PNG that claims side x side pixels, in a hundred bytes."""
    data = bytearray(_encoded(RED, "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _jpeg_header(side: int, exif: bytes = b"") -> bytes:
    data = bytearray(_encoded(RED, "JPEG", exif=exif))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("side", [8001, 10_000, 65_500])
def test_an_image_of_too_many_pixels_is_refused_from_its_header(side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (_png_header(side), _jpeg_header(side), _jpeg_header(side, exif.tobytes())):
        assert _cause(data) == "pixels"
        with pytest.raises(BadSample, match="the image is too large"):
            decode.size_of(data)


# Pillow counts all chunks of a WebP when it opens it
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "webp"])
def test_the_size_needs_no_more_than_the_header(kind: str) -> None:
    assert decode.size_of(WHOLE[kind][: max(len(WHOLE[kind]) // 2, 1200)]) == (40, 60)


# ---- samples


@pytest.mark.parametrize(
    ("sample", "cause", "expected"),
    [
        ({"png": _png_header(9000), "cls": b"1"}, "pixels", "9000 x 9000 pixels; at most 64,000,000 are read"),
        ({"jpg": WHOLE["jpeg"][:700], "cls": b"1"}, "image", "cannot be decoded"),
        ({"png": KINDS["png"][0]}, "no label", "member .cls"),
        ({"png": KINDS["png"][0], "cls": b"cat"}, "no label", "member .cls"),
        ({"png": KINDS["png"][0], "cls": b"10"}, "label", "label 10 is not one of the 10 classes, 0 to 9"),
        ({"png": KINDS["png"][0], "cls": b"-1"}, "label", "label -1 is not one"),
        ({"png": KINDS["png"][0], "cls": b"9" * 4000}, "label", r"label 9{51} … 9{26} is not one"),
        ({"png": KINDS["png"][0], "cls": b"9" * 5000}, "no label", "member .cls"),
        ({"txt": b"a caption", "cls": b"1"}, "no image", "no image among its members"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard_and_key(sample: dict, cause: str, expected: str) -> None:
    with pytest.raises(BadSample, match=expected) as caught:
        decode.decode({"__key__": "n0123", **sample}, "train/00007.tar", 10)
    assert "train/00007.tar, sample n0123" in str(caught.value)
    assert caught.value.cause == cause


class _Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_pickles_in_a_sample_are_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hostile = pickle.dumps(_Hostile(trace))
    others = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "npy", "json"), hostile)
    assert decode.decode({"__key__": "k", "png": KINDS["png"][0], "cls": b"1", **others}, "s", 10)[1] == 1
    for sample in (others, {"png": hostile}, {"png": KINDS["png"][0], "cls": hostile}):
        with pytest.raises(BadSample):
            decode.decode({"__key__": "k", "cls": b"1", **sample}, "s", 10)
    assert not trace.exists()
    pickle.loads(hostile)
    assert trace.exists(), "it would have left a trace"


# ---- hostile files


def _many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = _encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more + b"\xff\xd9"


def _behind(data: bytes, at: int, part: bytes, times: int) -> bytes:
    return data[:at] + part * times + data[at:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PLAIN = {kind: _encoded(Image.new("RGB", (40, 60)), kind) for kind in ("JPEG", "PNG")}
EXIF = b"\xff\xe1\0\2"  # makes Pillow read the header
MANY = 100_001
BOMBS = {
    "scans": (_many_scans(16, 91), "it has 101 scans; at most 100 are read"),
    "fewer scans of more pixels": (_many_scans(4000, 71), "it has 81 scans; at most 80 are read"),
    "scans behind a thumbnail": (_behind(_many_scans(16, 91), 2, EXIF, 1), "it has 101 scans"),
    "scans behind fill bytes": (_many_scans(16, 91).replace(b"\xff\xda", b"\xff\xff\xff\xda"), "it has 101 scans"),
    "scans behind segments": (_behind(_many_scans(16, 91), 2, b"\xff\xfe\0\2", MANY), "more than 100,000 parts"),
    "segments": (_behind(PLAIN["JPEG"], 2, EXIF, MANY), "more than 100,000 parts"),
    "chunks": (_behind(PLAIN["PNG"], 33, _chunk(b"abCd", b""), MANY), "more than 100,000 parts"),
    "chunks at the end": (_behind(PLAIN["PNG"], -12, _chunk(b"abCd", b""), MANY), "more than 100,000 parts"),
    "a colour profile": (
        _behind(PLAIN["PNG"], 33, _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000))), 1),
        "cannot be decoded",
    ),
    "texts": (
        _behind(PLAIN["PNG"], 33, _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2_000_000))), 3),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_small_file_that_costs_minutes_is_refused(case: str) -> None:
    data, expected = BOMBS[case]
    with pytest.raises(BadSample, match=expected) as caught:
        decode.pixels(data)
    assert caught.value.cause == "image"
    assert len(str(caught.value)) < 300


def test_a_harmless_file_that_looks_like_a_bomb_is_read() -> None:
    kept = decode.pixels(_many_scans(16, 90))
    assert kept.shape == (3, 16, 16)
    marks = b"\xff\xe2" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000  # metadata may hold anything
    for data in (_many_scans(16, 0), PLAIN["JPEG"]):
        assert torch.equal(decode.pixels(_behind(data, 2, marks, 20)), decode.pixels(data))
    assert torch.equal(decode.pixels(PLAIN["JPEG"] + b"\xff\xda" * 9999), decode.pixels(PLAIN["JPEG"]))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_thousands_of_frames_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (250 if i == 0 else 0, i % 256, i // 256)) for i in range(1000)]
    data = _encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    extension, _, height, width, image = shapes.shape(data, "here", "a", shapes.Options(), measure=True)
    assert (extension, height, width) == ("png" if kind == "GIF" else kind.lower(), 8, 8)
    assert image is not None
    assert image[0].min() > 200


def test_a_gif_of_only_comments_is_refused() -> None:
    data = _encoded(Image.new("P", (8, 8)), "GIF")
    with pytest.raises(BadSample, match="more than 100,000 parts"):
        shapes.header(_behind(data, data.index(b","), b"!\xfe\1c\0", 50_001), "here")


def test_pipes_and_devices_are_not_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (str(tmp_path / "pipe.png"), "/dev/zero"):
        with pytest.raises(BadSample, match="not a regular file"):
            Files().read(path)
