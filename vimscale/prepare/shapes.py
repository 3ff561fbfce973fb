"""One image at preparation: its header is checked, it is decoded once, and shrunk if the options say so."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vimscale.data.images import decode
from vimscale.data.images.cutting import Tiling, encoded
from vimscale.errors import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The only formats that Pillow may try: some of its other readers start programs."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are kept as they are."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Pillow modes that a PNG can store and training reads the same way."""
_JPEG_SIDE = 65_500
"""Longest side in pixels that libjpeg writes."""


@dataclass(frozen=True)
class Options:
    """Everything that determines a prepared set's bytes, besides its inputs."""

    per_shard: int = 1000
    shard_bytes: int | None = None
    """If set, replaces `per_shard`: a shard is full before its inputs exceed this size."""
    seed: int = 0
    shuffle: bool = True
    val: float = 0.0
    """Fraction of each class that becomes the validation set."""
    resize: int | None = None
    """Images with a larger shorter side are shrunk to this side; others keep their bytes."""
    quality: int = 90
    """JPEG quality of shrunk images. An image too long for a JPEG becomes a PNG."""
    min_size: int = 1
    max_aspect: float | None = None
    decode: bool = True
    """Whether to decode every image, to find damaged ones."""
    tiles: Tiling | None = None
    """If set, images become bags of tiles."""


def shape(
    data: bytes, where: str, key: str, options: Options, *, measure: bool
) -> tuple[str, bytes, int, int, Tensor | None]:
    """Return (extension, bytes, height, width, pixels uint8 (3, h, w)) of an image as it goes into a shard.

    Pixels are None if neither `measure` nor the options need them.

    Raises:
        BadSample: the image cannot be read, or its size violates the options.
    """
    name = f"{where}, sample {key}"
    kind, height, width = header(data, name)
    check_size(height, width, name, options)
    short = min(height, width)
    shrink = options.resize is not None and short > options.resize
    if kind in _EXTENSIONS and not shrink and not measure and not options.decode:
        return _EXTENSIONS[kind], data, height, width, None
    if kind not in _EXTENSIONS:
        data, kind = _as_png(data, name), "PNG"
    image = pixels(data, name)
    if shrink:
        assert options.resize is not None
        try:
            kind, data, image = _shrink(image, options.resize, options.quality)
        except (OSError, ValueError) as error:
            raise BadSample("image", f"{name}: it cannot be shrunk: {error}") from None
        height, width = image.shape[1:]
    return _EXTENSIONS[kind], data, height, width, image


def check_size(height: int, width: int, name: str, options: Options) -> None:
    """Check an image's size.

    Raises:
        BadSample: it violates the options.
    """
    short, long = sorted((height, width))
    if short < options.min_size:
        raise BadSample("small", f"{name}: {height} x {width} pixels, but --min-size is {options.min_size}")
    if options.max_aspect is not None and long > options.max_aspect * short:
        raise BadSample("aspect", f"{name}: {height} x {width} pixels, but --max-aspect is {options.max_aspect:g}")


def header(data: bytes, where: str) -> tuple[str, int, int]:
    """Read (format, height, width) of the upright image from its header.

    Raises:
        BadSample: the format is unknown, or the image is too large; names `where`.
    """
    with _naming(where):
        kind, height, width = _stored_size(data)
        if kind in _EXTENSIONS:
            height, width = decode.size_of(data)
    if height * width > decode.MAX_PIXELS:
        raise BadSample("pixels", f"{where}: {height} x {width} pixels; at most {decode.MAX_PIXELS:,} are read")
    return kind, height, width


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put `where` before the message of a BadSample."""
    try:
        yield
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None


def _stored_size(data: bytes) -> tuple[str, int, int]:
    """Read (format, height, width) as stored, before the orientation is applied."""
    with decode.damage(), warnings.catch_warnings(action="ignore"):
        try:
            decode.check_parts(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.format or "", image.height, image.width
        except UnidentifiedImageError:  # its message names the buffer object
            raise ValueError(f"no known image format begins with {data[:12]!r}") from None


def pixels(data: bytes, where: str) -> Tensor:
    """Decode an image to uint8 (3, h, w).

    Raises:
        BadSample: it cannot be decoded; names `where`.
    """
    with _naming(where):
        return decode.pixels(data)


def _as_png(data: bytes, where: str) -> bytes:
    """Convert the first frame of a format that training does not read to a PNG, as training would see it."""
    with (
        _naming(where),
        decode.damage(),
        warnings.catch_warnings(action="ignore"),
        Image.open(io.BytesIO(data), formats=FORMATS) as image,
    ):
        kept = decode.eight_bits(image)
        return encoded(kept if kept.mode in _PNG_MODES else decode.rgb(kept), "PNG")


def _shrink(image: Tensor, side: int, quality: int) -> tuple[str, bytes, Tensor]:
    """Return (format, bytes, pixels) of the image with `side` as its shorter side."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    size = (max(round(width * scale), side), max(round(height * scale), side))
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    kind = "JPEG" if max(size) <= _JPEG_SIDE else "PNG"
    data = encoded(pixels, kind, quality=quality)
    return kind, data, torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
