"""Decoding: the bytes of an image file to an upright RGB uint8 tensor (3, h, w)."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vimscale.errors import BadSample, brief

MAX_PIXELS = 64_000_000
"""Larger images are refused on reading the header: a few bytes can request gigabytes."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1
"""The label of samples in a set without labels: no class has this number."""
CAPTION = "txt"
"""Extension of a sample's caption."""
_FORMATS = ("JPEG", "PNG", "WEBP")
"""The only formats that Pillow may try, whatever a member's name: some of its other readers start programs."""
_METADATA = {
    "JPEG": (b"\xff\xe1",),
    "PNG": (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"),
    "WEBP": (b"EXIF", b"XMP "),
}
"""Byte strings, one of which every file with an orientation contains. Asking Pillow costs more: for a PNG, a decode."""
MAX_SCANS = 100
"""Scans of a JPEG; libjpeg writes 10 for a progressive one. A scan of a few bytes costs a pass over all pixels."""
MAX_WORK = 20 * MAX_PIXELS
"""Largest product of scans and pixels."""
_PARTS = 100_000
"""Most segments of a JPEG, chunks of a PNG or blocks of a GIF: each costs time, even if it is empty."""
_T = TypeVar("_T")
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of a TIFF."""
_INTEGER = re.compile(r"[+-]?\d{1,4000}(\.0*)?", re.ASCII)  # int() accepts 4,300 digits


@contextmanager
def damage() -> Iterator[None]:
    """Turn any exception of a decoder into BadSample, except MemoryError, which says nothing about the image.

    Raises:
        BadSample: "image" if the image is damaged; "pixels" if it is too large.
    """
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise BadSample("pixels", f"the image is too large: at most {MAX_PIXELS:,} pixels are read") from None
    except Exception as error:
        why = str(error) or type(error).__name__
        raise BadSample("image", f"the image cannot be decoded: {why}") from None


def decode(sample: dict, where: str, classes: int, image: tuple[str, ...] = ()) -> tuple[Tensor, int]:
    """Return (image, label) of a webdataset sample: its member with an image's extension, and its `cls`.

    `image` lists the extensions to look for, first match first (default: EXTENSIONS). Other members are not read. The
    label must be below `classes`; if there are no classes, it is NO_LABEL.

    Raises:
        BadSample: there is no image or label, or the image cannot be read; names `where` and the sample's key. Causes:
            "no image", "no label", "label", and those of `pixels`.
    """
    where = f"{where}, sample {sample.get('__key__')}"
    data = next((sample[extension] for extension in image or EXTENSIONS if extension in sample), None)
    if data is None:
        known = ", ".join(image or EXTENSIONS)
        raise BadSample("no image", f"{where}: no image among its members; known extensions: {known}")
    label = label_of(sample, where, classes)
    try:
        return pixels(data), label
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None


def label_of(sample: dict, where: str, classes: int) -> int:
    """Return the label of a webdataset sample, its `cls`; NO_LABEL, without looking, if the set has no classes.

    Raises:
        BadSample: "no label" if there is none, "label" if it is not below `classes`; names `where`.
    """
    if not classes:
        return NO_LABEL
    label = whole_number(sample.get("cls", b"").decode("utf-8", "replace"))
    if label is None:
        raise BadSample("no label", f"{where}: no whole number in a member .cls, the label")
    if not 0 <= label < classes:
        raise BadSample(
            "label", f"{where}: label {brief(label)} is not one of the {classes} classes, 0 to {classes - 1}"
        )
    return label


def caption_of(sample: dict[str, Any]) -> str | None:
    """Return the caption of a webdataset sample, its `txt`, without blanks around it; None if there is none, or if it
    is empty. Bytes that are not UTF-8 are replaced.
    """
    return sample.get(CAPTION, b"").decode("utf-8", "replace").strip("\ufeff \t\r\n\0") or None


def whole_number(text: str) -> int | None:
    """Parse a label's text as a whole number; return None if it is not one.

    3 may be written as 3.0 (which a table with missing values does), after a byte order mark, or between blanks.
    """
    text = text.strip("\ufeff \t\r\n")
    return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else None


def pixels(data: bytes) -> Tensor:
    """Decode a JPEG, PNG or WebP file to the upright image (3, h, w); transparent pixels become white.

    Raises:
        BadSample: "image" if it is damaged or has an unknown format; "pixels" if it has more than MAX_PIXELS.
    """
    header = _header(data)
    with damage():
        _check_scans(data, header)
        array = _decode_jpeg(data) if header.image is None else _decode_any(header.image)
    return torch.from_numpy(_upright(array, header.orientation)).permute(2, 0, 1)


def size_of(data: bytes) -> tuple[int, int]:
    """Read (height, width) of the upright image from the file's header.

    Raises:
        BadSample: like `pixels`, as far as the header shows it.
    """
    header = _header(data)
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


class _Header(NamedTuple):
    height: int
    width: int
    orientation: int
    """EXIF's value: 1 is upright; from 5 on, height and width are swapped."""
    image: Image.Image | None
    """The image for Pillow to decode; None: simplejpeg decodes it."""


def _header(data: bytes) -> _Header:
    with damage():
        header = _fast_header(data) or _header_by_pillow(data)
    if header.height * header.width > MAX_PIXELS:
        found = f"{header.width} x {header.height} pixels"
        raise BadSample("pixels", f"the image is too large: {found}; at most {MAX_PIXELS:,} are read")
    return header


def _fast_header(data: bytes) -> _Header | None:
    """Read the header of a grey or RGB JPEG without metadata; return None for other files."""
    if not data.startswith(b"\xff\xd8") or data.find(_METADATA["JPEG"][0], 0, data.find(b"\xff\xda")) > 0:
        return None  # FF DA: the scans follow, long and without metadata
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return _Header(height, width, 1, None) if colours in ("YCbCr", "RGB", "Gray") else None


def _header_by_pillow(data: bytes) -> _Header:
    check_parts(data)
    image = _open(data)
    plain = data.startswith(b"\xff\xd8") and image.mode in ("RGB", "L")
    height, width = image.height, image.width
    if plain:
        with suppress(ValueError):  # take the size from the decoder: Pillow parses headers differently
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return _Header(height, width, _orientation(image, data), None if plain else image)


def _check_scans(data: bytes, header: _Header) -> None:
    """Refuse a JPEG whose scans take minutes to decode.

    Raises:
        ValueError: it has too many scans for its size.
    """
    if not data.startswith(b"\xff\xd8"):
        return
    colours = 0
    for marker, at in _markers(data):
        if marker in (0xC0, 0xC1):
            colours = data[at + 7] if at + 7 < len(data) else 0
        elif marker == 0xDA:
            if colours and data[at + 2 : at + 3] == bytes([colours]):
                return  # not progressive, and the first scan has all colours: there is no second scan
            break
    limit = min(MAX_SCANS, MAX_WORK // max(header.height * header.width, 1))
    if data.count(b"\xff\xda") > limit:  # some may be part of metadata
        scans = sum(marker == 0xDA for marker, _ in _markers(data))
        if scans > limit:
            raise ValueError(f"it has {scans:,} scans; at most {limit} are read for an image of this size")


def check_parts(data: bytes) -> None:
    """Refuse a file with so many parts that opening it takes minutes.

    Raises:
        ValueError: it has more than 100,000 parts.
    """
    kinds: dict[bytes, Callable[[bytes], Iterator[Any]]]
    kinds = {b"\xff\xd8": _markers, b"\x89P": _chunks, b"GI": _extensions}
    if walk := kinds.get(data[:2]):
        for _ in walk(data):
            pass


def _limited(parts: Iterator[_T]) -> Iterator[_T]:
    for count, part in enumerate(parts):
        if count == _PARTS:
            raise ValueError(f"it has more than {_PARTS:,} parts")
        yield part


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset of its payload, which begins with its length) of a JPEG up to its end."""

    def walk() -> Iterator[tuple[int, int]]:
        at = 2
        while (found := _MARKER.search(data, at)) and (marker := found[1][0]) != 0xD9:
            yield marker, found.end()
            # a scan's header is followed by its data, in which a zero follows every 0xff
            bare = marker in (0x01, 0xD8)
            at = found.end() + (0 if bare else int.from_bytes(data[found.end() : found.end() + 2], "big"))

    return _limited(walk())


def _chunks(data: bytes) -> Iterator[int]:
    """Yield the offsets of a PNG's chunks."""

    def walk() -> Iterator[int]:
        at = 8
        while at < len(data):
            yield at
            at += 12 + int.from_bytes(data[at : at + 4], "big")

    return _limited(walk())


def _extensions(data: bytes) -> Iterator[int]:
    """Yield the offsets of the blocks before a GIF's first image."""

    def walk() -> Iterator[int]:
        at = 13 + (3 << (data[10] % 8 + 1) if data[10:11] >= b"\x80" else 0)
        while data[at : at + 1] == b"!":
            at += 2
            while size := int.from_bytes(data[at : at + 1], "big"):
                yield at
                at += 1 + size
            yield at
            at += 1

    return _limited(walk())


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore"):  # `_header` checks the size, and odd metadata is harmless
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:  # its message names the buffer object
            raise ValueError(f"none of {', '.join(_FORMATS)} begins with {data[:12]!r}") from None


def _orientation(image: Image.Image, data: bytes) -> int:
    kind = "JPEG" if data.startswith(b"\xff\xd8") else str(image.format)
    if image.width * image.height > MAX_PIXELS or not any(mark in data for mark in _METADATA[kind]):
        return 1
    try:
        with damage(), warnings.catch_warnings(action="ignore"):
            value = image.getexif().get(0x0112)
    except BadSample:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        if str(error).startswith(("Corrupt", "Premature")):
            raise
        return _decode_any(_open(data))  # an odd header that simplejpeg rejects


def _decode_any(image: Image.Image) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        return np.array(rgb(image))


def rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB with 8 bits per channel, on a white background.

    Raises:
        ValueError: like `eight_bits`.
    """
    image = eight_bits(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts it only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Convert to 8 bits per channel: the upper 8 of 12 or 16 bits; floats from 0 to 1 become 0 to 255.

    Pillow would clip instead: everything above 255 would be white.

    Raises:
        ValueError: the range of the pixels is unknown: they are signed, have 32 bits, or are floats beyond 0 to 1.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose mode alone is not enough
    signed = 2 in tags.get(_SAMPLE_FORMAT, ())
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"from {values.min():g} to {values.max():g}"
            raise ValueError(f"its pixels are floats {found}, but must be from 0 to 1; scale them, or save 8 bits")
        grey = (values * 255 + 0.5).astype(np.uint8)
    elif image.mode.startswith("I") or signed:
        bits = max(tags.get(_BITS, (16,)))
        if signed or bits > 16:
            kind = f"{'signed ' if signed else ''}whole numbers of {bits} bits"
            raise ValueError(f"its pixels are {kind}, whose range is unknown; save it with 8 or 16 bits, unsigned")
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    else:
        return image
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow handles this only for 8 bits
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype("u1")))
    return scaled


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror (h, w, 3) according to the file's orientation."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
