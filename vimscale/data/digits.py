"""The embedded data set: 1,797 scans of handwritten digits, 8 x 8 pixels, 16 grey levels, 10 classes.

The table is the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn distributes it: a line an image, 64
pixels and the class.
"""

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from vimscale.data.shards import manifest
from vimscale.data.shards.shard_reader import ShardReader
from vimscale.errors import DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
_SIDE = 32
_VERSION = 2
"""Of what is written; a cache of another is left alone."""
_SOURCE = "UCI Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49"


def write(folder: Path, seed: int = 0) -> dict[str, manifest.Manifest]:
    """Write train/ (four fifths of each class) and val/ (the rest) below `folder` as shards of 32 x 32 PNGs.

    Raises:
        DataError: one of the two exists already.
    """
    pixels, labels = _table()
    grey = pixels[_split(labels, seed)["train"]] / 16  # of the training images alone
    mean, std = round(float(grey.mean()), 4), round(float(grey.std()), 4)
    written = {}
    for split, rows in _split(labels, seed).items():
        written[split] = manifest.write(
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
    """The set in this user's cache folder, written there on first use, and again if it is damaged. The bytes are the
    same on every machine.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vimscale" / f"digits-{_VERSION}"
    if folder.exists() and (fault := _damage(folder)) is not None:
        log.warning("the embedded set is damaged and written again: %s", fault)
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
                # another rank was faster; its set has the same bytes, and is as whole
    return folder


def _damage(folder: Path) -> str | None:
    try:
        for split in SPLITS:
            text = (folder / split / manifest.MANIFEST).read_bytes()
            for shard in manifest.Manifest.from_json(text, str(folder / split)).shards:
                path = folder / split / shard.name
                if hashlib.sha256(path.read_bytes()).hexdigest() != shard.sha256:
                    return f"{path} does not have the sha256 that its manifest says"
                index = path.with_name(f"{shard.name}.idx").read_bytes()
                ShardReader(os.open(path, os.O_RDONLY | os.O_CLOEXEC), index, shard, str(path)).check()
    except (OSError, DataError) as error:
        return str(error)
    return None


def _table() -> tuple[np.ndarray, np.ndarray]:
    """pixels (1797, 8, 8) in 0..16, labels (1797)."""
    with resources.as_file(resources.files("vimscale.data") / "digits.csv.gz") as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def _split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows of each split, shuffled; every class gives a fifth of its images to val."""
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
