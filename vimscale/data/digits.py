"""The embedded data set: 1,797 scans of handwritten digits, 8 x 8 pixels, 16 grey levels, 10 classes.

The table is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn distributes it: one line per image,
64 pixels and the class.
"""

import io
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vimscale.data.shards.manifest import Manifest, write_set

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
_SIDE = 32
VERSION = 2
SOURCE = "UCI Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49"


def write(folder: Path, seed: int = 0) -> dict[str, Manifest]:
    """Write train/ (four fifths of each class) and val/ (the rest) below `folder` as shards of 32 x 32 PNGs.

    Raises:
        DataError: train/ or val/ exists already.
    """
    pixels, labels = table()
    grey = pixels[split(labels, seed)["train"]] / 16  # mean and std are of the training images only
    mean, std = round(float(grey.mean()), 4), round(float(grey.std()), 4)
    written = {}
    for part, rows in split(labels, seed).items():
        written[part] = write_set(
            folder / part,
            _samples(pixels, labels, rows),
            per_shard=180,
            name=f"digits-{part}",
            classes=tuple(str(digit) for digit in range(10)),
            mean=(mean, mean, mean),
            std=(std, std, std),
            source=SOURCE,
            licence="CC BY 4.0",
        )
    return written


def table() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (1797, 8, 8) in 0..16, and labels (1797)."""
    with resources.as_file(resources.files("vimscale.data") / "digits.csv.gz") as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of each split, shuffled; every class contributes a fifth of its images to val."""
    rng = np.random.Generator(np.random.Philox(seed))
    train, val = [], []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        held_out = round(len(rows) / 5)
        val.append(rows[:held_out])
        train.append(rows[held_out:])
    return {"train": rng.permutation(np.concatenate(train)), "val": rng.permutation(np.concatenate(val))}


def _samples(pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator[dict]:
    for row in rows:
        png = io.BytesIO()
        enlarged(pixels[row], _SIDE).save(png, "PNG")
        yield {"__key__": f"{row:04d}", "png": png.getvalue(), "cls": int(labels[row])}


def enlarged(scan: np.ndarray, side: int) -> Image.Image:
    """Return a scan (8, 8), in 0..16, as a grey image of side x side pixels."""
    grey = Image.fromarray((scan * 15.9375).astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC)
