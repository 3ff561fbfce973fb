"""Bytes of an image file to an RGB uint8 tensor (3, h, w)."""

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vimscale.errors import BadSample

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header alone: a few bytes can ask for gigabytes."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def decode(sample: dict, where: str, classes: int) -> tuple[Tensor, int]:
    """(image, label) of a webdataset sample: its member with an image's extension, and its `cls` below `classes`.

    Raises:
        BadSample: no image or label, or an image that cannot be read; `where` and the sample's key are named.
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
        return _pixels(data), label
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        # what Pillow and simplejpeg raise on damaged files
        raise BadSample("image", f"{where}: the image cannot be decoded: {error}") from None


def _pixels(data: bytes) -> Tensor:
    image: Image.Image = Image.open(io.BytesIO(data))  # reads the header only
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
    encoded, upright = image.format, image.getexif().get(0x0112, 1) == 1
    if encoded == "JPEG" and image.mode in ("RGB", "L") and upright:
        array = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    else:
        if not upright:
            image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "P"):
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)
