"""Changes of colour and shape drawn for one image: RandAugment, 3-Augment, colour jitter.

What each operation of RandAugment does, and how hard, follows timm's `auto_augment`; all is drawn from the sample's
own generator.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vimscale.recipe.sections import RandAugment, randaugment

_FILL = (124, 116, 104)
"""ImageNet's mean, for what an operation moves into the picture."""
_parsed = lru_cache(randaugment)


def apply(image: Tensor, policy: str | None, jitter: float, rng: np.random.Generator) -> Tensor:
    """uint8 (3, h, w) -> the same: a recipe's `augment.policy`, then its `augment.jitter`."""
    if policy is None and not jitter:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if policy == "3-augment":
        picture = three_augment(picture, rng)
    elif policy is not None:
        rule = _parsed(policy)
        assert rule is not None, "a recipe's policy is checked when it is read"
        picture = rand_augment(picture, rule, rng)
    if jitter:
        picture = colour_jitter(picture, jitter, rng)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def rand_augment(image: Image.Image, rule: RandAugment, rng: np.random.Generator) -> Image.Image:
    """RandAugment (arXiv:1909.13719): so many operations in a row, each of them skipped with a chance of 1/2."""
    operations = list(OPERATIONS.values())
    for i in rng.integers(len(operations), size=rule.operations):
        skipped, negative = rng.random(2) < 0.5
        level = min(max(rng.normal(rule.magnitude, rule.std), 0), 10) / 10
        if not skipped:
            image = operations[i](image, Strength(level, -1 if negative else 1, rule.increasing))
    return image


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """3-Augment of DeiT III (arXiv:2204.07118): grey, solarized or blurred, each with a chance of 1/3."""
    choice, radius = rng.integers(3), rng.uniform(0.1, 2)
    if choice == 0:
        return image.convert("L").convert("RGB")
    return ImageOps.solarize(image) if choice == 1 else image.filter(ImageFilter.GaussianBlur(radius))


def colour_jitter(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in a drawn order, each times a factor in 1 - most to 1 + most."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(1 - most, 1 + most, len(kinds))
    for i in rng.permutation(len(kinds)):
        image = kinds[i](image).enhance(factors[i])
    return image


class Strength(NamedTuple):
    level: float
    """0 to 1."""
    sign: int
    """1 or -1; says nothing to an operation that knows no direction."""
    increasing: bool
    """Whether a higher level changes more for operations that count the other way, or leave the middle alone."""


def _rotate(image: Image.Image, strength: Strength) -> Image.Image:
    """Up to 30 degrees, counter-clockwise where positive."""
    return image.rotate(30 * strength.level * strength.sign, Image.Resampling.BICUBIC, fillcolor=_FILL)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=_FILL)


def _shear_x(image: Image.Image, strength: Strength) -> Image.Image:
    return _affine(image, (1, 0.3 * strength.level * strength.sign, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, strength: Strength) -> Image.Image:
    return _affine(image, (1, 0, 0, 0.3 * strength.level * strength.sign, 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, strength: Strength) -> Image.Image:
    """Up to 0.45 of the width, to the left where positive; by whole pixels, which need no costly resampling."""
    moved = round(0.45 * strength.level * strength.sign * image.width)
    return _affine(image, (1, 0, moved, 0, 1, 0), Image.Resampling.NEAREST)


def _translate_y(image: Image.Image, strength: Strength) -> Image.Image:
    moved = round(0.45 * strength.level * strength.sign * image.height)
    return _affine(image, (1, 0, 0, 0, 1, moved), Image.Resampling.NEAREST)


def _posterize(image: Image.Image, strength: Strength) -> Image.Image:
    """Keeps 1 to 4 bits of each value."""
    bits = int(4 * strength.level)
    return ImageOps.posterize(image, max(4 - bits if strength.increasing else bits, 1))


def _solarize(image: Image.Image, strength: Strength) -> Image.Image:
    """Inverts what is at least as bright as a threshold."""
    threshold = int(256 * strength.level)
    return ImageOps.solarize(image, 256 - threshold if strength.increasing else threshold)


def _solarize_add(image: Image.Image, strength: Strength) -> Image.Image:
    """Lightens the darker half of all values by up to 110."""
    added = int(110 * strength.level)
    return image.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, Strength], Image.Image]:
    """Times a factor: 0.1 to 1.9 with the level, or, increasing, away from 1 in either direction."""

    def operation(image: Image.Image, strength: Strength) -> Image.Image:
        away = max(1 + 0.9 * strength.level * strength.sign, 0.1)
        return kind(image).enhance(away if strength.increasing else 0.1 + 1.8 * strength.level)

    return operation


OPERATIONS: dict[str, Callable[[Image.Image, Strength], Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
}
