"""Bytes of an image file to an upright RGB uint8 tensor (3, h, w)."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vimscale.errors import BadSample

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header alone: a few bytes can ask for gigabytes."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
"""All that Pillow may recognise, whatever a member is called: some of its other readers start programs."""
_METADATA = {
    "JPEG": (b"\xff\xe1",),
    "PNG": (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"),
    "WEBP": (b"EXIF", b"XMP "),
}
"""Bytes without which a file does not say how it is turned. To ask Pillow costs more, for a PNG all of the decoding."""


@contextmanager
def damage() -> Iterator[None]:
    """Whatever a decoder raises in here is damage of the image that it reads; except want of memory, which another try
    may have, and which says nothing about the image.

    Raises:
        BadSample: "image", it is damaged; "pixels", it is too large.
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


def decode(sample: dict, where: str, classes: int) -> tuple[Tensor, int]:
    """(image, label) of a webdataset sample: its member with an image's extension, and its `cls` below `classes`.

    No other member is looked into.

    Raises:
        BadSample: no image or label, or an image that cannot be read; `where` and the sample's key are named. Causes:
            "no image", "no label", "label", and those of `pixels`.
    """
    where = f"{where}, sample {sample.get('__key__')}"
    data = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
    if data is None:
        known = ", ".join(EXTENSIONS)
        raise BadSample("no image", f"{where}: no image among its members; known extensions: {known}")
    try:
        label = int(sample["cls"])
    except (KeyError, ValueError):
        raise BadSample("no label", f"{where}: no whole number in a member .cls, the label") from None
    if not 0 <= label < classes:
        raise BadSample("label", f"{where}: label {label} is none of the {classes} classes, 0 to {classes - 1}")
    try:
        return pixels(data), label
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None


def pixels(data: bytes) -> Tensor:
    """The upright image (3, h, w) in a JPEG, PNG or WebP file; transparent pixels are white.

    Raises:
        BadSample: "image", it is damaged or of no known format; "pixels", it has more than MAX_PIXELS.
    """
    header = _header(data)
    with damage():
        array = _decode_jpeg(data) if header.image is None else _decode_any(header.image)
    return torch.from_numpy(_upright(array, header.orientation)).permute(2, 0, 1)


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image, from the file's header alone.

    Raises:
        BadSample: as `pixels` does, as far as the header shows it.
    """
    header = _header(data)
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


class _Header(NamedTuple):
    height: int
    width: int
    orientation: int
    """As EXIF counts: 1 is upright, from 5 on height and width change places."""
    image: Image.Image | None
    """To be decoded by Pillow; None: by simplejpeg."""


def _header(data: bytes) -> _Header:
    with damage():
        header = _fast_header(data) or _header_by_pillow(data)
    if header.height * header.width > MAX_PIXELS:
        found = f"{header.width} x {header.height} pixels"
        raise BadSample("pixels", f"the image is too large: {found}; at most {MAX_PIXELS:,} are read")
    return header


def _fast_header(data: bytes) -> _Header | None:
    """That of a grey or RGB JPEG without metadata."""
    if not data.startswith(b"\xff\xd8") or data.find(_METADATA["JPEG"][0], 0, data.find(b"\xff\xda")) > 0:
        return None  # FF DA: the scans follow, long and without metadata
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return _Header(height, width, 1, None) if colours in ("YCbCr", "RGB", "Gray") else None


def _header_by_pillow(data: bytes) -> _Header:
    image = _open(data)
    plain = data.startswith(b"\xff\xd8") and image.mode in ("RGB", "L")
    return _Header(image.height, image.width, _orientation(image, data), None if plain else image)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore"):  # the size is checked above, and odd metadata does no harm
        try:
            return Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:  # whose message is of the buffer
            raise ValueError(f"none of {', '.join(_FORMATS)} begins {data[:12]!r}") from None


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
        return _decode_any(_open(data))  # an oddity of the header, which simplejpeg does not let pass


def _decode_any(image: Image.Image) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, 3), turned and mirrored as the file's orientation says."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
