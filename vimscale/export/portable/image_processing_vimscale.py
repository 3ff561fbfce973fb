"""The preprocessing of an exported Vision Mamba, for transformers: the pixels that it was evaluated on, to the bit.

transformers' own processors round otherwise when they resize, and enlarge images that already have the model's size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class VimscaleImageProcessor(BaseImageProcessor):
    """Resize to cover the size / `crop_pct` (bicubic, antialiased), crop the center, scale to [0, 1], normalize."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' name and type

    def __init__(
        self,
        crop_size: Mapping[str, int] | None = None,
        crop_pct: float = 0.875,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.crop_size = dict(crop_size or {"height": 224, "width": 224})
        self.crop_pct = crop_pct
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Return `pixel_values` (b, 3, height, width), fp32, of one or several images: PIL images, or uint8 arrays or
        tensors (h, w), (h, w, 3) or (3, h, w). `crop_size`, `crop_pct`, `image_mean` and `image_std` overrule those of
        the processor.

        Raises:
            ValueError: an image is not one of these.
        """
        batched = isinstance(images, list | tuple) or (hasattr(images, "ndim") and images.ndim == 4)
        crop = kwargs.get("crop_size") or self.crop_size
        size = (int(crop["height"]), int(crop["width"]))
        crop_pct = kwargs.get("crop_pct") or self.crop_pct
        mean, std = (
            torch.tensor(kwargs.get(name) or getattr(self, name))[:, None, None] for name in ("image_mean", "image_std")
        )
        pixels = []
        for image in images if batched else [images]:
            cropped = _cropped(_uint8(image), size, crop_pct)
            pixels.append(cropped.float().div_(255).sub_(mean).div_(std))
        return BatchFeature({"pixel_values": [each.numpy() for each in pixels]}, tensor_type=return_tensors)


def _uint8(image: Any) -> Tensor:
    """Return an image as (3, h, w)."""
    if hasattr(image, "convert"):
        image = np.array(image.convert("RGB"))
    found = torch.as_tensor(np.array(image))
    if found.ndim == 2:
        found = found.expand(3, -1, -1)
    elif found.ndim == 3 and found.shape[-1] == 3 and found.shape[0] != 3:
        found = found.permute(2, 0, 1)
    if found.ndim != 3 or found.shape[0] != 3 or found.dtype != torch.uint8:
        raise ValueError(f"an image is {tuple(found.shape)} {found.dtype}; pass a PIL image or uint8 with 3 channels")
    return found.contiguous()


def _cropped(image: Tensor, size: tuple[int, int], crop_pct: float) -> Tensor:
    """Resize to cover `size` / crop_pct and crop the center; an image of exactly `size` stays as it is."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    tall, wide = (int(side / crop_pct) for side in size)
    if tall * width >= wide * height:
        wide = max(int(tall * width / height), size[1])
    else:
        tall = max(int(wide * height / width), size[0])
    if (height, width) != (tall, wide):
        image = F.interpolate(image[None], (tall, wide), mode="bicubic", antialias=True)[0]
    top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]
