"""What DINO makes of an image: crops of two sizes, each changed in color, and masks for iBOT. On the host; a pure
function of the image and the sample's generator.

Colors are fp32, but every number is a multiple of a power of two that leaves all products and sums exact. So neither
threads nor the order of a sum change a bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.data.images import augment
from vimscale.recipe.comparison import DistillationOptions

GLOBAL = 2
"""Crops that the teacher sees, too."""
_ASPECT = 4 / 3
_BLUR = (1.0, 0.1, 0.5)
"""Chances of a blur: of the first global crop, of the second, of a local one."""
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)
_STRENGTHS = (0.4, 0.4, 0.2, 0.1)
"""Largest changes of brightness, contrast, saturation and hue."""
_TAIL = 1e-3
"""Weight at each end of a blur that is left out: a quarter of a gray level at most."""
_BITS = 12
"""Of a factor's fraction; a color has 8 bits, between the passes of a blur 12, and fp32 24."""


def crops(
    image: Tensor, size: augment.Size, options: DistillationOptions, rng: np.random.Generator
) -> dict[str, Tensor]:
    """`global` (2, 3, *size) and, if there are any, `local` (n, 3, s, s), from an image (3, h, w)."""
    found = {"global": _crops(image, size, options.global_area, range(GLOBAL), options, rng)}
    if options.local_crops:
        side, kinds = (options.local_size, options.local_size), [GLOBAL] * options.local_crops
        found["local"] = _crops(image, side, options.local_area, kinds, options, rng)
    return found


def _crops(
    image: Tensor,
    size: augment.Size,
    area: tuple[float, float],
    kinds: Sequence[int],
    options: DistillationOptions,
    rng: np.random.Generator,
) -> Tensor:
    """One crop for each of `kinds`, uint8 (n, 3, *size): 0 and 1 are the global ones, 2 is a local one."""
    x = torch.empty(len(kinds), 3, *size)
    changes: list[list[tuple[int, float]]] = []
    later = []
    for plane, kind in zip(x, kinds, strict=True):
        cut = augment.resize(augment.random_crop(image, size, area, _ASPECT, rng), *size)
        flipped, jittered, gray, blurred, solarized = rng.random(5).tolist()
        plane.copy_(cut.flip(-1) if flipped < options.flip else cut)
        changes.append(_jitter(rng) if jittered < options.jitter else [])
        sigma = rng.uniform(0.1, 2) if blurred < _BLUR[kind] * options.blur else None
        later.append((gray < options.gray, sigma, kind == 1 and solarized < options.solarize))
    x = recolored(x, changes)
    for plane, (gray, sigma, solarized) in zip(x, later, strict=True):
        made = plane
        if gray:
            made = _rounded(torch.from_numpy(_exact(_LUMA)) @ plane.flatten(1)).view(1, *size)
        if sigma is not None:
            made = blur(made, sigma)
        plane.copy_(torch.minimum(made, 255 - made) if solarized else made)
    return x.to(torch.uint8)


def _exact(factors: np.ndarray) -> np.ndarray:
    return (np.rint(factors * 2**_BITS) / 2**_BITS).astype(np.float32)


def _rounded(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_()


def _jitter(rng: np.random.Generator) -> list[tuple[int, float]]:
    """Changes of brightness, contrast, saturation and hue, for `recolored`, in a drawn order."""
    amounts = [1 + rng.uniform(-most, most) for most in _STRENGTHS]
    return [(i, amounts[i]) for i in rng.permutation(len(_STRENGTHS)).tolist()]


def recolored(x: Tensor, changes: Sequence[list[tuple[int, float]]]) -> Tensor:
    """Change the colors of images, whole numbers from 0 to 255 in fp32 (n, 3, h, w). The changes of each are pairs of a
    kind and a factor: 0, of brightness; 1, of contrast; 2, of saturation; 3, of hue, where 1.1 is a tenth of a turn
    about the gray axis.

    Each is an affine map of a pixel's color, so all of them are one pass. The original takes one per change, rounds and
    clips in between, and turns the hue in HSV.
    """
    means = x.mean(dim=(2, 3), dtype=torch.float64).numpy()
    maps = _exact(np.stack([_map(each, mean) for each, mean in zip(changes, means, strict=True)]))
    matrix, shift = torch.from_numpy(maps).split((3, 1), dim=2)
    return _rounded(torch.baddbmm(shift, matrix, x.flatten(2)).clamp_(0, 255)).view_as(x)


def _map(changes: list[tuple[int, float]], mean: np.ndarray) -> np.ndarray:
    """Changes of an image of this mean color as one affine map, (3, 4)."""
    matrix, shift = np.eye(3), np.zeros(3)
    for kind, factor in changes:
        if kind < 2:
            matrix, shift = matrix * factor, shift * factor
            if kind == 1:  # keeps the mean, as it is before this change
                before = (matrix @ mean + shift) / factor
                shift = shift + _LUMA @ before * (1 - factor)
        else:
            change = factor * np.eye(3) + (1 - factor) * _LUMA if kind == 2 else _turned(factor)
            matrix, shift = change @ matrix, change @ shift
    return np.column_stack([matrix, shift])


def _turned(turns: float) -> np.ndarray:
    """Turn the chroma of YIQ."""
    angle = 2 * math.pi * turns
    rotation = np.eye(3)
    rotation[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return _RGB @ rotation @ _YIQ


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blur an image, whole numbers in fp32 (c, h, w), as Pillow's GaussianBlur does: by three boxes in each direction,
    whose ends are weighted so that their variance is sigma squared. Here the three are one filter.
    """
    weights = _three_boxes(sigma)
    r, (h, w) = len(weights) // 2, x.shape[1:]
    padded = F.pad(x, (0, 0, r, r), mode="replicate")
    x = _summed([padded[:, i : i + h] for i in range(2 * r + 1)], weights)
    padded = F.pad(_rounded(x.mul_(16)).div_(16), (r, r, 0, 0), mode="replicate")
    return _rounded(_summed([padded[:, :, i : i + w] for i in range(2 * r + 1)], weights))


def _three_boxes(sigma: float) -> list[float]:
    """The weights of one pass that does what three boxes do, without tails."""
    variance = sigma**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([part, *[1.0] * (2 * whole + 1), part])
    weights = np.convolve(np.convolve(box, box), box)
    weights /= weights.sum()
    tail = int((np.cumsum(weights) < _TAIL).sum())
    weights = _exact(weights[tail : len(weights) - tail] / weights[tail : len(weights) - tail].sum())
    weights[len(weights) // 2] += 1 - weights.sum()
    return weights.tolist()


def _summed(shifted: list[Tensor], weights: list[float]) -> Tensor:
    total = shifted[0] * weights[0]
    for each, weight in zip(shifted[1:], weights[1:], strict=True):
        total.add_(each, alpha=weight)
    return total


def masks(grid: tuple[int, int], options: DistillationOptions, rng: np.random.Generator) -> Tensor:
    """Which patches of each global crop iBOT hides: (2, l) bool. A crop is masked with probability 1/2, by a share that
    is drawn between 0.1 and 0.5; the original draws both for a batch, so that they depend on how it is divided.
    """
    made = np.zeros((GLOBAL, grid[0] * grid[1]), dtype=bool)
    least, most = options.mask_ratio
    for mask in made:
        masked, share = rng.random(2)
        if masked < options.mask_chance:
            mask[:] = block_mask(grid, int(grid[0] * grid[1] * (least + (most - least) * share)), rng).ravel()
    return torch.from_numpy(made)


def most_masked(patches: int, options: DistillationOptions) -> int:
    """The most patches of a crop that `masks` hides."""
    return int(patches * options.mask_ratio[1])


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Hide `count` cells of a grid, in rectangles as BEiT draws them (arXiv:2106.08254), and the rest one by one."""
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    while (left := count - int(mask.sum())) > 0:
        for _ in range(10):
            u_area, u_aspect, u_top, u_left = rng.random(4).tolist()
            area = min(4, left) + (left - min(4, left)) * u_area
            aspect = math.exp((2 * u_aspect - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < rows and 0 < w < columns):
                continue
            top, start = int(u_top * (rows - h + 1)), int(u_left * (columns - w + 1))
            block = mask[top : top + h, start : start + w]
            if 0 < h * w - int(block.sum()) <= left:
                block[:] = True
                break
        else:
            break
    free = np.flatnonzero(~mask.ravel())
    mask.ravel()[rng.permutation(free)[: max(count - int(mask.sum()), 0)]] = True
    return mask
