"""Augmentation policies for one image: RandAugment, 3-Augment, colour jitter.

The operations of RandAugment and their strengths follow timm's `auto_augment`. All random draws come from the sample's
generator.
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
"""ImageNet's mean, which fills the pixels that an operation moves in from outside the image."""
_parsed = lru_cache(randaugment)


def apply(image: Tensor, policy: str | None, jitter: float, rng: np.random.Generator) -> Tensor:
    """Apply a recipe's `augment.policy`, then its `augment.jitter`: uint8 (3, h, w) -> the same."""
    if policy is None and not jitter:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if policy == "3-augment":
        picture = three_augment(picture, rng)
    elif policy is not None:
        rule = _parsed(policy)
        assert rule is not None, "the recipe's policy is checked when the recipe is loaded"
        picture = rand_augment(picture, rule, rng)
    if jitter:
        picture = colour_jitter(picture, jitter, rng)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def rand_augment(image: Image.Image, rule: RandAugment, rng: np.random.Generator) -> Image.Image:
    """Apply RandAugment (arXiv:1909.13719): `rule.operations` drawn operations, each skipped with probability 1/2."""
    operations = list(OPERATIONS.values())
    for i in rng.integers(len(operations), size=rule.operations):
        skipped, negative = rng.random(2) < 0.5
        level = min(max(rng.normal(rule.magnitude, rule.std), 0), 10) / 10
        if not skipped:
            image = operations[i](image, Strength(level, -1 if negative else 1, rule.increasing))
    return image


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply 3-Augment of DeiT III (arXiv:2204.07118): grey, solarize or blur, each with probability 1/3."""
    choice, radius = rng.integers(3), rng.uniform(0.1, 2)
    if choice == 0:
        return image.convert("L").convert("RGB")
    return ImageOps.solarize(image) if choice == 1 else image.filter(ImageFilter.GaussianBlur(radius))


def colour_jitter(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation in a drawn order, each by a factor between 1 - most and 1 + most."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(1 - most, 1 + most, len(kinds))
    for i in rng.permutation(len(kinds)):
        image = kinds[i](image).enhance(factors[i])
    return image


class Strength(NamedTuple):
    level: float
    """0 to 1."""
    sign: int
    """1 or -1; operations without a direction ignore it."""
    increasing: bool
    """Whether a higher level always changes more, also in the operations that are otherwise reversed (posterize,
    solarize) or have no effect at the middle level (the enhancements)."""


def _rotate(image: Image.Image, strength: Strength) -> Image.Image:
    """Rotate by up to 30 degrees; positive is counter-clockwise."""
    return image.rotate(30 * strength.level * strength.sign, Image.Resampling.BICUBIC, fillcolor=_FILL)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=_FILL)


def _shear_x(image: Image.Image, strength: Strength) -> Image.Image:
    return _affine(image, (1, 0.3 * strength.level * strength.sign, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, strength: Strength) -> Image.Image:
    return _affine(image, (1, 0, 0, 0.3 * strength.level * strength.sign, 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, strength: Strength) -> Image.Image:
    """Translate by up to 0.45 of the width; positive is to the left. Whole pixels avoid costly resampling."""
    moved = round(0.45 * strength.level * strength.sign * image.width)
    return _affine(image, (1, 0, moved, 0, 1, 0), Image.Resampling.NEAREST)


def _translate_y(image: Image.Image, strength: Strength) -> Image.Image:
    moved = round(0.45 * strength.level * strength.sign * image.height)
    return _affine(image, (1, 0, 0, 0, 1, moved), Image.Resampling.NEAREST)


def _posterize(image: Image.Image, strength: Strength) -> Image.Image:
    """Keep 1 to 4 bits of each value."""
    bits = int(4 * strength.level)
    return ImageOps.posterize(image, max(4 - bits if strength.increasing else bits, 1))


def _solarize(image: Image.Image, strength: Strength) -> Image.Image:
    """Invert values at or above a threshold."""
    threshold = int(256 * strength.level)
    return ImageOps.solarize(image, 256 - threshold if strength.increasing else threshold)


def _solarize_add(image: Image.Image, strength: Strength) -> Image.Image:
    """Add up to 110 to values below 128."""
    added = int(110 * strength.level)
    return image.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, Strength], Image.Image]:
    """Make an operation that multiplies by a factor: 0.1 to 1.9 with the level or, if increasing, away from 1."""

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
