"""What DINO makes of an image: crops of two sizes, each changed in color, and masks for iBOT. On the host, in uint8; a
pure function of the image and the sample's generator.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, ImageStat
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
_STRENGTHS = (0.4, 0.4, 0.2, 0.1)
"""Largest changes of brightness, contrast, saturation and hue."""


def crops(
    image: Tensor, size: augment.Size, options: DistillationOptions, rng: np.random.Generator
) -> dict[str, Tensor]:
    """`global` (2, 3, *size) and, if there are any, `local` (n, 3, s, s), from an image (3, h, w)."""
    large = [_crop(image, size, options.global_area, options, rng, i) for i in range(GLOBAL)]
    side = (options.local_size, options.local_size)
    small = [_crop(image, side, options.local_area, options, rng, GLOBAL) for _ in range(options.local_crops)]
    found = {"global": torch.stack(large)}
    return found | {"local": torch.stack(small)} if small else found


def _crop(
    image: Tensor,
    size: augment.Size,
    area: tuple[float, float],
    options: DistillationOptions,
    rng: np.random.Generator,
    kind: int,
) -> Tensor:
    cut = augment.resize(augment.random_crop(image, size, area, _ASPECT, rng), *size)
    flipped, jittered, gray, blurred, solarized = rng.random(5).tolist()
    if flipped < options.flip:
        cut = cut.flip(-1)
    picture = Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy())
    if jittered < options.jitter:
        picture = _jittered(picture, rng)
    if gray < options.gray:
        picture = picture.convert("L").convert("RGB")
    if blurred < _BLUR[kind] * options.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if kind == 1 and solarized < options.solarize:
        picture = ImageOps.solarize(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _jittered(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue in a drawn order."""
    amounts = [1 + rng.uniform(-most, most) for most in _STRENGTHS]
    return recolored(picture, [(int(i), amounts[i]) for i in rng.permutation(len(_STRENGTHS))])


def recolored(picture: Image.Image, changes: list[tuple[int, float]]) -> Image.Image:
    """Apply changes, each a kind and a factor: 0, of brightness; 1, of contrast; 2, of saturation; 3, of hue, where
    1.1 is a tenth of a turn about the gray axis.

    Each is an affine map of a pixel's color, so all of them are one pass. The original takes one per change, rounds and
    clips in between, and turns the hue in HSV.
    """
    matrix, shift = np.eye(3), np.zeros(3)
    mean = np.array(ImageStat.Stat(picture).mean)
    for kind, factor in changes:
        if kind < 2:
            matrix, shift = matrix * factor, shift * factor
            if kind == 1:  # keeps the mean, as it is before this change
                before = (matrix @ mean + shift) / factor
                shift = shift + _LUMA @ before * (1 - factor)
        else:
            change = factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), _LUMA) if kind == 2 else _turned(factor)
            matrix, shift = change @ matrix, change @ shift
    return picture.convert("RGB", tuple(np.column_stack([matrix, shift]).ravel().tolist()))


def _turned(turns: float) -> np.ndarray:
    """Turn the chroma of YIQ."""
    angle = 2 * math.pi * turns
    rotation = np.eye(3)
    rotation[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return np.linalg.inv(_YIQ) @ rotation @ _YIQ


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
