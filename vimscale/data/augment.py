"""What is done to one image on the host, in uint8: a pure function of the image and the sample's own generator."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.recipe import Augment


def for_training(image: Tensor, size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> Tensor:
    """Random resized crop (arXiv:1409.4842) and flip: (3, h, w) -> (3, *size)."""
    if augment.crop_min < 1:
        image = _random_crop(image, augment, rng)
    image = _resize(image, *size)
    return image.flip(-1) if rng.random() < augment.flip else image


def for_evaluation(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resized so that `size` / 0.875 fits in, and its centre, as published; an image of just `size` stays as it is."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    scale = max(size[0] / height, size[1] / width) / 0.875
    image = _resize(image, max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    top, left = (image.shape[1] - size[0]) // 2, (image.shape[2] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def _random_crop(image: Tensor, augment: Augment, rng: np.random.Generator) -> Tensor:
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(augment.crop_min, 1)
        aspect = math.exp(rng.uniform(-1, 1) * math.log(augment.aspect_max))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return image[:, top : top + h, left : left + w]
    side = min(height, width)  # ten tries did not fit: the central square
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    # antialiased bicubic on uint8: within 2/255 of Pillow's
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (b, 3, h, w) on any device -> fp32, per channel (image / 255 - mean) / std."""
    return images.to(torch.float32).div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
