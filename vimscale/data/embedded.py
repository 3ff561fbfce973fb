"""Data sets that the package can write itself: real scans of digits, and large images of them."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vimscale.data.shards.manifest import MANIFEST, Manifest, index_of, sha256_of
from vimscale.data.shards.shard_reader import ShardReader
from vimscale.errors import DataError

log = logging.getLogger(__name__)

NAMES = ("digits", "slides")


def folder_of(source: str) -> Path | None:
    """Return the folder of an embedded data set such as digits:train; None if `source` is not one.

    Raises:
        OSError: it cannot be written to this user's cache folder.
    """
    name, colon, split = source.partition(":")
    return cached(name) / split if colon and name in NAMES else None


def cached(name: str) -> Path:
    """Return a set in this user's cache folder; write it on first use, and again if it is damaged.

    The bytes are the same on every machine with the same libraries.
    """
    version, write = _writer(name)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vimscale" / f"{name}-{version}"
    if folder.exists() and (fault := _damage(folder)) is not None:
        log.warning("the embedded set is damaged and will be written again: %s", fault)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as aside:
            folder.rename(Path(aside) / "damaged")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as unfinished:
            write(Path(unfinished) / "set")
            try:
                (Path(unfinished) / "set").rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # another rank was faster; its set is complete and has the same bytes
    return folder


def _writer(name: str) -> tuple[int, Callable[[Path], Any]]:
    """Return a set's version, and what writes its train/ and val/. Caches of other versions stay untouched."""
    if name == "digits":
        from vimscale.data import digits

        return digits.VERSION, digits.write
    from vimscale.data import slides  # imports torch, which a launcher does not wait for

    return slides.VERSION, slides.write


def _damage(folder: Path) -> str | None:
    """Describe the first fault of a written set; None if it is intact."""
    try:
        for split in ("train", "val"):
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
