"""Large images cut into bags of tiles: which tiles there are, which are background, and what a sample stores."""

import io
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from vimscale.data.images import bags, decode
from vimscale.data.shards.tar import BLOCK, MEMBER_LIMIT, padded
from vimscale.errors import BadSample

_HEADERS = 3 * BLOCK
"""Most bytes of a tar that a member takes in addition to its own: a header, and two for a long name."""
_SPECKS = 1000
"""A tile with fewer pixels of another colour than one in this many is background."""


@dataclass(frozen=True)
class Tiling:
    """How large images become bags of tiles."""

    side: int
    """In pixels."""
    level: int | None = None
    """Level of a pyramid. With neither `level` nor `downsample`, the full image."""
    downsample: float | None = None
    """The level with this many pixels of the full image per pixel, in one direction, within 5 %."""
    background: int = 10
    """Largest difference from a tile's median colour, of 255, at which a pixel counts as plain; 0 keeps every tile."""
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 90
    """Of JPEGs."""


class Level(Protocol):
    """One level of a large image, read in pieces."""

    height: int
    width: int
    number: int
    downsample: float

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return pixels, uint8 (height, width, 3). Pieces are read in the order of rows, then columns.

        Raises:
            Exception: whatever the decoder raises.
        """


def cut(level: Level, tiling: Tiling, where: str) -> tuple[dict[str, bytes], np.ndarray]:
    """Return (members of a sample by extension; how often its tiles have each value, int64 (3, 256)).

    Tiles start at multiples of the side. Those across the right and the lower rim are padded by repeating the image's
    last column and row; the background rule and the counts look at the image's own pixels only. One decoded tile is in
    memory at a time, besides what `level` keeps.

    Raises:
        BadSample: the image is damaged; it has no tiles but background, or its sample would be too large.
    """
    side = tiling.side
    if max(level.height, level.width) > bags.FARTHEST + 1:
        size = f"{level.height:,} x {level.width:,} pixels"
        raise BadSample("pixels", f"{where}: {size}; at most {bags.FARTHEST + 1:,} per side are cut into tiles")
    members: dict[str, bytes] = {}
    corners: list[tuple[int, int]] = []
    counts = np.zeros((3, 256), dtype=np.int64)
    background = total = 0
    for top in range(0, level.height, side):
        for left in range(0, level.width, side):
            with decode.damage():
                pixels = level.read(top, left, min(side, level.height - top), min(side, level.width - left))
            if _flat(pixels, tiling.background):
                background += 1
                continue
            histogram = np.stack([np.bincount(pixels[..., c].reshape(-1), minlength=256) for c in range(3)])
            if is_background(histogram, tiling.background):
                background += 1
                continue
            counts += histogram
            rim = ((0, side - pixels.shape[0]), (0, side - pixels.shape[1]), (0, 0))
            tile = Image.fromarray(np.pad(pixels, rim, mode="edge"))
            data = encoded(tile, "JPEG", quality=tiling.quality) if tiling.format == "jpg" else encoded(tile, "PNG")
            members[bags.name_of(top, left, tiling.format)] = data
            corners.append((top, left))
            total += padded(len(data)) + _HEADERS + 16  # and its corner in tiles.json
            if total > MEMBER_LIMIT // 100 * 99:
                raise BadSample(
                    "large",
                    f"{where}: its tiles take more than {MEMBER_LIMIT:,} bytes, the most that a sample may have; choose"
                    " a smaller level with --downsample, a lower --quality or a higher --background",
                )
    if not members:
        raise BadSample("background", f"{where}: each of its {background:,} tiles is background; lower --background")
    about = bags.Cut((level.height, level.width), side, level.number, round(level.downsample, 4), background)
    return {**members, bags.MEMBER: bags.description(about, corners)}, counts


def _flat(pixels: np.ndarray, tolerance: int) -> bool:
    """Whether no two pixels differ by more than `tolerance`: a cheap test that finds most of the background."""
    values = pixels.max(axis=0).max(axis=0) - pixels.min(axis=0).min(axis=0)  # along rows first, which is faster
    return tolerance > 0 and int(values.max()) <= tolerance


def is_background(histogram: np.ndarray, tolerance: int) -> bool:
    """Whether a tile is plain: in each channel, all but one in 1,000 of its pixels are within `tolerance` of the
    channel's median. So it does not matter which colour the background has, and specks do not count.

    histogram: how often each value occurs, int64 (3, 256).
    """
    if not tolerance:
        return False
    for counts in histogram:
        pixels = int(counts.sum())
        median = int(np.searchsorted(counts.cumsum(), (pixels + 1) // 2))
        plain = int(counts[max(median - tolerance, 0) : median + tolerance + 1].sum())
        if (pixels - plain) * _SPECKS > pixels:
            return False
    return True


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
