"""Random erasing, mixup and cutmix: the host draws the parameters, the device that holds the batch applies them.

Axes: b images, c classes, p = b / 2 pairs. Images 2i and 2i + 1 form a pair. So as long as micro-batches are even, the
result for an image does not depend on how a batch is cut.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vimscale.recipe.sections import Augment

Erase = tuple[int, int, int, int, int]
"""top, left, height, width, seed of the noise; all 0 if nothing is erased."""
Mix = tuple[float, float, float, float, float]
"""Weight of an image's own label; then top, left, bottom, right of the box that the pair swaps, empty for mixup."""


def draw_erase(size: tuple[int, int], chance: float, rng: np.random.Generator) -> Erase:
    """Draw random erasing (arXiv:1708.04896): 0.02 to 1/3 of an image of `size`, 0.3 to 3.3 times as wide as high."""
    none = (0, 0, 0, 0, 0)
    if rng.random() >= chance:
        return none
    for _ in range(10):
        u_area, u_aspect, u_top, u_left = rng.random(4).tolist()
        area = size[0] * size[1] * (0.02 + (1 / 3 - 0.02) * u_area)
        aspect = math.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * u_aspect)
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height < size[0] and 0 < width < size[1]:
            top, left = int(u_top * (size[0] - height + 1)), int(u_left * (size[1] - width + 1))
            return top, left, height, width, int(rng.integers(1 << 62))
    return none


def draw_mix(size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> Mix:
    """Draw mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) for a pair of images of `size`."""
    cutmix = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    if not cutmix:
        weight = float(rng.beta(augment.mixup, augment.mixup)) if augment.mixup else 1.0
        return weight, 0.0, 0.0, 0.0, 0.0
    side = math.sqrt(1 - rng.beta(augment.cutmix, augment.cutmix))
    spans = []
    for length in size:
        half, centre = int(length * side) // 2, int(rng.integers(length))
        spans.append((max(centre - half, 0), min(centre + half, length)))
    (top, bottom), (left, right) = spans
    swapped = (bottom - top) * (right - left)  # less than drawn if the border cuts the box
    return 1 - swapped / (size[0] * size[1]), float(top), float(left), float(bottom), float(right)


def apply(
    images: Tensor, labels: Tensor, erase: Tensor | None, mix: Tensor | None, classes: int
) -> tuple[Tensor, Tensor]:
    """Erase, then mix, in place.

    images: normalised fp32 (b, 3, h, w); labels: int64 (b), on the same device. erase: int64 (b, 5) from `draw_erase`;
    mix: fp32 or fp64 (p, 5) from `draw_mix`. Both stay on the host, so that no step waits for the device.
    Returns the images and the targets: the labels (b) or, if pairs are mixed, fp32 (b, c) whose rows sum to 1.
    """
    if erase is not None:
        _erase(images, erase)
    return (images, labels) if mix is None else _mix(images, labels, mix, classes)


def _erase(images: Tensor, erase: Tensor) -> None:
    noise = torch.Generator(images.device)
    for image, (top, left, height, width, seed) in zip(images, erase.tolist(), strict=True):
        if height:
            noise.manual_seed(seed)  # per image, so that any rank draws the same noise
            image[:, top : top + height, left : left + width] = torch.randn(
                (3, height, width), generator=noise, device=images.device
            )


def _mix(images: Tensor, labels: Tensor, mix: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    keeps = mix[:, 0].to(torch.float32).to(images.device, non_blocking=True)[:, None, None, None]  # (p, 1, 1, 1)
    top, left, bottom, right = mix[:, 1:].to(images.device, non_blocking=True).T[:, :, None, None]
    rows = torch.arange(images.shape[2], device=images.device)[:, None]
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)  # (p, h, w)
    boxed = ((bottom > top) & (right > left))[..., None]
    own = torch.where(boxed, (~inside[:, None]).to(torch.float32), keeps)[:, None]  # (p, 1, 1, h, w)
    pairs = images.unflatten(0, (-1, 2))
    others = pairs.flip(1)
    pairs.mul_(own).add_(others.mul_(1 - own))

    # not F.one_hot: on some devices it reads the labels, and so waits for the device
    targets = labels[:, None] == torch.arange(classes, device=labels.device)
    targets = targets.to(torch.float32).unflatten(0, (-1, 2))  # (p, 2, c)
    keeps = keeps.flatten(1)[..., None]
    targets = keeps * targets + (1 - keeps) * targets.flip(1)
    return images, targets.flatten(0, 1)
