"""Shards on disk: a folder of webdataset tars, an index beside each, and the manifest that says what is whole.

    train/  manifest.json  00000.tar  00000.tar.idx  00001.tar  00001.tar.idx ...

A `.tar.idx` is n + 1 little-endian uint64: where each sample starts in the tar, and where the last one ends.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vimscale.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of. Written last: a folder without one is not a data set."""

    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of images in [0, 1]: what the model's input is normalised with."""
    source: str = ""
    licence: str = ""
    base: str = ""
    """Folder or address of the shards where they do not stand beside the manifest."""
    labels: tuple[int, ...] = ()
    """Samples of each class; empty if nobody counted."""
    sides: dict[str, int] = field(default_factory=dict)
    """Histogram of the images' shorter sides in pixels: from the key on, up to the next."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Inputs that did not become samples, by cause."""
    plan: str = ""
    """sha256 of what the set was made from and how: the same plan gives the same bytes."""
    format: int = FORMAT
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest, wherever its shards are: a run resumes on the very data it was started on."""
        return hashlib.sha256(replace(self, base="").to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Raises:
        DataError: the text is no manifest; `where` names it.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise DataError(f"data {where}: {MANIFEST} cannot be read: {error}") from None
        try:
            if tree["format"] != FORMAT:
                raise DataError(f"data {where}: manifest format {tree['format']}, this version reads {FORMAT}")
            samples = tree.pop("samples")
            shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
            tree |= {key: tuple(tree[key]) for key in ("classes", "mean", "std")}
            tree["labels"] = tuple(tree.get("labels", ()))
            manifest = cls(shards=shards, **tree)
        except (KeyError, TypeError) as error:
            raise DataError(f"data {where}: {MANIFEST} is not of format {FORMAT}: {error!r}") from None
        if manifest.samples != samples or not samples:
            raise DataError(f"data {where}: {MANIFEST} says {samples} samples, its shards {manifest.samples}")
        return manifest


def write(
    folder: Path,
    samples: Iterable[dict[str, Any]],
    *,
    per_shard: int,
    name: str,
    classes: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    source: str,
    licence: str,
) -> Manifest:
    """Write webdataset samples (`__key__` and one entry an extension) as shards; the same samples give the same bytes.

    All is written beside `folder` and renamed over in one go: a crash leaves no half data set under its name.

    Raises:
        DataError: `folder` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"data {folder}: the folder is not empty; give a new one, or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[Shard] = []
    batch: list[dict[str, Any]] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == per_shard:
            shards.append(write_shard(partial / f"{len(shards):05d}.tar", batch))
            batch = []
    if batch:
        shards.append(write_shard(partial / f"{len(shards):05d}.tar", batch))
    manifest = Manifest(name, classes, tuple(shards), mean, std, source, licence)
    (partial / MANIFEST).write_text(manifest.to_json())
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return manifest


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> Shard:
    """Write samples as one tar and its index; the same samples give the same bytes."""
    from webdataset import TarWriter

    offsets = []
    # mtime 0 and fixed owners: the bytes depend on nothing but the samples
    with path.open("wb") as file, TarWriter(file, mtime=0, user="vimscale", group="vimscale") as tar:
        for sample in samples:
            offsets.append(tar.tarstream.offset)
            tar.write(sample)
        offsets.append(tar.tarstream.offset)
    np.array(offsets, dtype="<u8").tofile(path.with_name(f"{path.name}.idx"))
    data = path.read_bytes()
    return Shard(path.name, len(offsets) - 1, len(data), hashlib.sha256(data).hexdigest())
