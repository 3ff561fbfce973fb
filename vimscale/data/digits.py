"""The embedded data set: 1,797 scans of handwritten digits, 8 x 8 pixels, 16 grey levels, 10 classes.

The table is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn distributes it: one line per image,
64 pixels and the class.
"""

import io
import logging
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vimscale.data.shards.manifest import MANIFEST, Manifest, index_of, sha256_of, write_set
from vimscale.data.shards.shard_reader import ShardReader
from vimscale.errors import DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
_SIDE = 32
_VERSION = 2
"""Version of the written set; caches of other versions stay untouched."""
_SOURCE = "UCI Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49"


def write(folder: Path, seed: int = 0) -> dict[str, Manifest]:
    """Write train/ (four fifths of each class) and val/ (the rest) below `folder` as shards of 32 x 32 PNGs.

    Raises:
        DataError: train/ or val/ exists already.
    """
    pixels, labels = _table()
    grey = pixels[_split(labels, seed)["train"]] / 16  # mean and std are of the training images only
    mean, std = round(float(grey.mean()), 4), round(float(grey.std()), 4)
    written = {}
    for split, rows in _split(labels, seed).items():
        written[split] = write_set(
            folder / split,
            _samples(pixels, labels, rows),
            per_shard=180,
            name=f"digits-{split}",
            classes=tuple(str(digit) for digit in range(10)),
            mean=(mean, mean, mean),
            std=(std, std, std),
            source=_SOURCE,
            licence="CC BY 4.0",
        )
    return written


def cached() -> Path:
    """Return the set in this user's cache folder; write it on first use, and again if it is damaged.

    The bytes are the same on every machine.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vimscale" / f"digits-{_VERSION}"
    if folder.exists() and (fault := _damage(folder)) is not None:
        log.warning("the embedded set is damaged and will be written again: %s", fault)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".digits-") as aside:
            folder.rename(Path(aside) / "damaged")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".digits-") as unfinished:
            write(Path(unfinished) / "set")
            try:
                (Path(unfinished) / "set").rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # another rank was faster; its set is complete and has the same bytes
    return folder


def _damage(folder: Path) -> str | None:
    """Describe the first fault of the written set; None if it is intact."""
    try:
        for split in SPLITS:
            text = (folder / split / MANIFEST).read_bytes()
            for shard in Manifest.from_json(text, str(folder / split)).shards:
                path = folder / split / shard.name
                if sha256_of(path) != shard.sha256:
                    return f"{path} does not have the sha256 that its manifest says"
                index = index_of(path).read_bytes()
                ShardReader(os.open(path, os.O_RDONLY | os.O_CLOEXEC), index, shard, str(path)).check()
    except (OSError, DataError) as error:
        return str(error)
    return None


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (1797, 8, 8) in 0..16, and labels (1797)."""
    with resources.as_file(resources.files("vimscale.data") / "digits.csv.gz") as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def _split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
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
        grey = Image.fromarray((pixels[row] * 15.9375).astype(np.uint8))
        png = io.BytesIO()
        grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(png, "PNG")
        yield {"__key__": f"{row:04d}", "png": png.getvalue(), "cls": int(labels[row])}
