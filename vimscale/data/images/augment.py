"""Augmentation of one image on the host, in uint8: a pure function of the image and the sample's generator."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.data.images import own, policies
from vimscale.model.tiles import Bag
from vimscale.recipe.sections import Augment

Size = tuple[int, int]
"""Height and width in pixels."""


def for_training(
    image: Tensor,
    size: Size,
    augment: Augment,
    rng: np.random.Generator,
    last: own.Augmentation | None = None,
) -> Tensor:
    """Random resized crop (arXiv:1409.4842), flip, policy, colour jitter, and the user's own augmentation: uint8
    (3, h, w) -> (3, *size). `last`: what `own.build` makes of `augment.own`.

    Raises:
        RecipeError: the user's own augmentation returns something else than an image of that shape.
    """
    assert (last is None) == (augment.own is None), "the caller builds augment.own"
    if augment.crop_min < 1:
        image = random_crop(image, size, (augment.crop_min, 1), augment.aspect_max, rng)
    image = resize(image, *size)
    if rng.random() < augment.flip:
        image = image.flip(-1)
    image = policies.apply(image, augment.policy, augment.jitter, rng)
    return image if last is None else own.apply(last, image, rng)


def for_evaluation(image: Tensor, size: Size) -> Tensor:
    """Resize to cover `size` / 0.875 and crop the centre, as published; an image of exactly `size` stays as it is.

    Sides and corners round as in torchvision's Resize(int(side / 0.875)) and CenterCrop(side), which the published code
    uses: sides down, corners to the nearest even pixel.
    """
    height, width = image.shape[1:]
    if (height, width) == size:
        return image
    covered_height, covered_width = (int(side / 0.875) for side in size)
    if covered_height * width >= covered_width * height:
        covered_width = max(int(covered_height * width / height), size[1])
    else:
        covered_height = max(int(covered_width * height / width), size[0])
    image = resize(image, covered_height, covered_width)
    top, left = round((covered_height - size[0]) / 2), round((covered_width - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]


def buckets(size: Size, patch: int, count: int) -> list[Size]:
    """List the shapes for images that keep their aspect ratio, from the widest to the tallest.

    The `count` ratios from 1:2 to 2:1 are evenly spaced in their logarithm; an odd count includes the square. Sides are
    multiples of `patch`; areas are close to that of `size`, and never larger. Ratios that round to the same shape give
    it once.
    """
    if count == 1:
        return [size]
    patches = (size[0] // patch) * (size[1] // patch)
    fitting = [(rows, patches // rows) for rows in range(1, patches + 1) if patches // (patches // rows) == rows]
    wide = [bucket_for(2**octave, 1, fitting) for octave in np.linspace(-1, 1, count)[: count // 2].tolist()]
    square = [(math.isqrt(patches), math.isqrt(patches))] * (count % 2)
    shapes = dict.fromkeys([*wide, *square, *((columns, rows) for rows, columns in reversed(wide))])
    return [(rows * patch, columns * patch) for rows, columns in shapes]


def bucket_for(height: float, width: float, shapes: Iterable[Size]) -> Size:
    """Return the shape whose log aspect ratio is nearest to that of height x width; of equals, the first."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def random_crop(
    image: Tensor, size: Size, area: tuple[float, float], aspect_max: float, rng: np.random.Generator
) -> Tensor:
    """Crop a random part of the image, between two fractions of its area, with about the aspect ratio of `size`."""
    height, width = image.shape[1:]
    ratio = size[1] / size[0]
    for _ in range(10):
        u_area, u_aspect, u_top, u_left = rng.random(4).tolist()
        pixels = height * width * (area[0] + (area[1] - area[0]) * u_area)
        aspect = ratio * aspect_max ** (2 * u_aspect - 1)
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            return image[:, top : top + h, left : left + w]
    # none of ten tries fits: take the largest central crop of that ratio
    h, w = min(height, max(round(width / ratio), 1)), min(width, max(round(height * ratio), 1))
    top, left = (height - h) // 2, (width - w) // 2
    return image[:, top : top + h, left : left + w]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image uint8 (3, h, w)."""
    if image.shape[1:] == (height, width):
        return image
    # antialiased bicubic on uint8: within 2/255 of Pillow's
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def normalised(images: Tensor | list[Tensor] | list[Bag], mean: Tensor, std: Tensor) -> Any:
    """Normalise a batch's images, of any of these kinds: uint8 -> the same kind in fp32. Corners of tiles stay."""
    if isinstance(images, Tensor):
        return normalise(images, mean, std)
    return [
        Bag(normalise(each.tiles, mean, std), each.at) if isinstance(each, Bag) else normalise(each, mean, std)
        for each in images
    ]


def is_picture(view: Tensor) -> bool:
    """Whether a view of an objective is one or more pictures: uint8 (..., 3, h, w)."""
    return view.dtype == torch.uint8 and view.ndim >= 3 and view.shape[-3] == 3


def normalised_views(views: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Normalise the pictures among an objective's views; the others stay."""
    return {name: normalise(view, mean, std) if is_picture(view) else view for name, view in views.items()}


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Convert uint8 (..., 3, h, w) on any device to fp32: (image / 255 - mean) / std per channel."""
    return images.to(torch.float32).div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])
