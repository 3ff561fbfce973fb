"""One image at preparation: looked at, decoded once, and made smaller where that is asked for."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vimscale.data.images import decode
from vimscale.errors import BadSample

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""All that Pillow may take a file for: some of its other readers start programs."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are kept as they are."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes of Pillow's that a PNG holds and training reads alike."""
_JPEG_SIDE = 65_500
"""Pixels of a side that libjpeg writes at most."""


@dataclass(frozen=True)
class Options:
    """What decides a prepared set's bytes."""

    per_shard: int = 1000
    shard_bytes: int | None = None
    """Instead: a shard is full before its inputs exceed this."""
    seed: int = 0
    shuffle: bool = True
    val: float = 0.0
    """Share of each class that becomes the validation set."""
    resize: int | None = None
    """Images with a larger shorter side are made that small; others keep their bytes."""
    quality: int = 90
    """Of the JPEGs that result; a side that is too long for a JPEG makes a PNG."""
    min_size: int = 1
    max_aspect: float | None = None
    decode: bool = True
    """Whether every image is decoded to see if it can be."""


def shape(
    data: bytes, where: str, key: str, options: Options, *, look: bool
) -> tuple[str, bytes, int, int, Tensor | None]:
    """(extension, bytes, height, width, pixels uint8 (3, h, w)) of an image as it goes into a shard.

    Pixels are None where nothing wants them: neither `look` nor the options.

    Raises:
        BadSample: it cannot be read, or is not of the size wanted.
    """
    name = f"{where}, sample {key}"
    kind, height, width = header(data, name)
    short, long = sorted((height, width))
    if short < options.min_size:
        raise BadSample("small", f"{name}: {height} x {width} pixels, and --min-size is {options.min_size}")
    if options.max_aspect is not None and long > options.max_aspect * short:
        raise BadSample("aspect", f"{name}: {height} x {width} pixels, and --max-aspect is {options.max_aspect:g}")
    shrink = options.resize is not None and short > options.resize
    if kind in _EXTENSIONS and not shrink and not look and not options.decode:
        return _EXTENSIONS[kind], data, height, width, None
    if kind not in _EXTENSIONS:
        data, kind = _as_png(data, name), "PNG"
    image = pixels(data, name)
    if shrink:
        assert options.resize is not None
        try:
            kind, data, image = _smaller(image, options.resize, options.quality)
        except (OSError, ValueError) as error:
            raise BadSample("image", f"{name}: it cannot be made smaller: {error}") from None
        height, width = image.shape[1:]
    return _EXTENSIONS[kind], data, height, width, image


def header(data: bytes, where: str) -> tuple[str, int, int]:
    """(format, height, width), upright, from an image's header alone.

    Raises:
        BadSample: no known format, or too large.
    """
    try:
        kind, height, width = _opened(data)
        if kind in _EXTENSIONS:
            height, width = decode.size_of(data)
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None
    if height * width > decode.MAX_PIXELS:
        raise BadSample("pixels", f"{where}: {height} x {width} pixels; at most {decode.MAX_PIXELS:,} are read")
    return kind, height, width


def _opened(data: bytes) -> tuple[str, int, int]:
    """(format, height, width), as it lies in the file."""
    with decode.damage(), warnings.catch_warnings(action="ignore"):
        try:
            decode.check_parts(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return image.format or "", image.height, image.width
        except UnidentifiedImageError:  # whose message is of the buffer
            raise ValueError(f"no format of images begins {data[:12]!r}") from None


def pixels(data: bytes, where: str) -> Tensor:
    """The image, uint8 (3, h, w).

    Raises:
        BadSample: it cannot be decoded; `where` is named.
    """
    try:
        return decode.pixels(data)
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None


def _as_png(data: bytes, where: str) -> bytes:
    """The first frame of a format that training does not read, as training would see it."""
    try:
        with (
            decode.damage(),
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=_FORMATS) as image,
        ):
            kept = decode.eight_bits(image)
            return _saved(kept if kept.mode in _PNG_MODES else decode.rgb(kept), "PNG")
    except BadSample as error:
        raise BadSample(error.cause, f"{where}: {error}") from None


def _smaller(image: Tensor, side: int, quality: int) -> tuple[str, bytes, Tensor]:
    """(format, bytes, pixels) of the image with `side` as its shorter side."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    size = (max(round(width * scale), side), max(round(height * scale), side))
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
    kind = "JPEG" if max(size) <= _JPEG_SIDE else "PNG"
    data = _saved(pixels, kind, quality=quality)
    return kind, data, torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
