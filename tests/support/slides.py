"""Large images of coloured cells on paper, as arrays and as files."""

from pathlib import Path

import numpy as np

PAPER = 240


def scene(height: int, width: int, side: int, cells: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """Return uint8 (height, width, 3): noise in some cells of a grid of `side` pixels, given as (row, column)."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), PAPER, dtype=np.uint8)
    for row, column in cells:
        part = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        part[:] = rng.integers(0, 200, part.shape, dtype=np.uint8)
    return pixels


def write_pyramid(path: Path, pixels: np.ndarray, levels: int = 3, *, big: bool = False, **options: object) -> None:
    """Write a TIFF whose levels, in SubIFDs, are smaller by 2 each."""
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path, bigtiff=big) as tiff:
        about = {"photometric": "rgb", "tile": (64, 64), **options}
        tiff.write(pixels, subifds=levels - 1, **about)
        for level in range(1, levels):
            tiff.write(pixels[:: 2**level, :: 2**level], subfiletype=1, **about)
