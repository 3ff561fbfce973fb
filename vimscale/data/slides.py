"""The embedded set of large images: digits scattered over slides of 1,024 x 1,024 pixels, most of them background.

A slide shows zeros and ones, an odd number of them in all, and some other digits. Its label says which of the two occur
more often, so it takes the whole slide to know. Slides are cut into tiles of 64 pixels as `data prepare` cuts images;
each digit lies within one tile, and tiles without one are left out.
"""

from pathlib import Path

import numpy as np

from vimscale.data import digits
from vimscale.data.images.cutting import Tiling, cut
from vimscale.data.shards.manifest import Bags, Manifest, write_set

VERSION = 1
SIDE, TILE, DIGIT = 1024, 64, 32
"""Sides of a slide, a tile and a digit, in pixels."""
COUNTS = {"train": 512, "val": 128}
_PAPER, _INK = np.array((238, 232, 240)), np.array((92, 48, 128))
_GRAIN = 2
"""Largest difference of the paper from its colour, of 255."""
_MOST_RIVALS, _MOST_OTHERS = 9, 5


class _Slide:
    """A drawn slide, as `cut` reads it."""

    height = width = SIDE
    number, downsample = 0, 1.0

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self._pixels[top : top + height, left : left + width]


def write(folder: Path, seed: int = 0) -> dict[str, Manifest]:
    """Write train/ and val/ below `folder` as bags of tiles. Digits of val/ are scans that train/ does not have.

    Raises:
        DataError: train/ or val/ exists already.
    """
    pixels, labels = digits.table()
    scans = np.stack([np.asarray(digits.enlarged(each, DIGIT)) for each in pixels]) / 255
    texture = np.random.Generator(np.random.Philox(seed)).integers(-_GRAIN, _GRAIN + 1, (SIDE, SIDE, 1))
    paper = (_PAPER + texture).astype(np.uint8)
    written: dict[str, Manifest] = {}
    for number, (split, rows) in enumerate(digits.split(labels, seed).items()):
        samples, tiles, seen = [], [], np.zeros((3, 256), dtype=np.int64)
        for i in range(COUNTS[split]):
            rng = np.random.Generator(np.random.Philox(key=[seed, number << 32 | i]))
            slide = _Slide(draw(paper, scans[rows], labels[rows], i % 2, rng))
            members, counts = cut(slide, Tiling(TILE), f"slide {i}")
            samples.append({"__key__": f"{i:04d}", **members, "cls": i % 2})
            tiles.append(len(members) - 1)
            seen += counts
        if split == "train":
            mean = seen @ np.arange(256) / seen.sum(axis=1) / 255
            std = np.sqrt(seen @ np.arange(256) ** 2 / seen.sum(axis=1) / 255**2 - mean**2)
        written[split] = write_set(
            folder / split,
            samples,
            per_shard=64,
            name=f"slides-{split}",
            classes=("more zeros", "more ones"),
            mean=_rounded(mean),
            std=_rounded(std),
            source=f"drawn with scans of {digits.SOURCE}",
            licence="CC BY 4.0",
            tiles=Bags(TILE, min(tiles), max(tiles), sum(tiles)),
        )
    return written


def draw(paper: np.ndarray, scans: np.ndarray, labels: np.ndarray, label: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a slide, uint8 (SIDE, SIDE, 3), with more digits `label`, 0 or 1, than of the other of the two.

    scans: in [0, 1], (n, DIGIT, DIGIT); labels: the digit of each (n).
    """
    rivals = int(rng.integers(1, _MOST_RIVALS // 2 + 1)) * 2 + 1
    winners = int(rng.integers(rivals // 2 + 1, rivals + 1))
    others = rng.integers(2, 10, size=int(rng.integers(1, _MOST_OTHERS + 1)))
    shown = [label] * winners + [1 - label] * (rivals - winners) + others.tolist()
    slide = np.roll(paper, tuple(rng.integers(SIDE, size=2).tolist()), axis=(0, 1))
    cells = rng.choice((SIDE // TILE) ** 2, len(shown), replace=False)
    for digit, cell in zip(shown, cells.tolist(), strict=True):
        down, across = rng.integers(TILE - DIGIT + 1, size=2).tolist()
        top, left = cell // (SIDE // TILE) * TILE + down, cell % (SIDE // TILE) * TILE + across
        ink = scans[rng.choice(np.flatnonzero(labels == digit))][..., None]
        part = slide[top : top + DIGIT, left : left + DIGIT]
        part[:] = np.rint(part * (1 - ink) + _INK * ink)
    return slide


def _rounded(values: np.ndarray) -> tuple[float, float, float]:
    first, second, third = (round(float(value), 4) for value in values)
    return first, second, third
