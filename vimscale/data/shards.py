"""Shards on disk: a folder of webdataset tars, an index beside each, and the manifest that says what is whole.

    train/  manifest.json  00000.tar  00000.tar.idx  00001.tar  00001.tar.idx ...

A `.tar.idx` is n + 1 little-endian uint64: where each sample starts in the tar, and where the last one ends.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vimscale.errors import DataError
from vimscale.files import naming
from vimscale.manifest import sync

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


def new_folder(folder: Path) -> Path:
    """The folder's full path.

    Raises:
        DataError: it is there and not empty.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "the folder is not empty"
        raise DataError(f"data {folder}: {what}; give a new one, or remove it")
    return Path(os.path.abspath(folder))


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
    """Write webdataset samples (`__key__`; bytes or a number by extension) as shards: the same samples, the same bytes.

    All is written beside `folder` and renamed over in one go: a crash leaves no half data set under its name.

    Raises:
        DataError: `folder` exists and is not empty.
    """
    folder = new_folder(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts = Counter[int]()
    shards: list[Shard] = []
    remaining = iter(samples)
    try:
        while batch := list(islice(remaining, per_shard)):
            shards.append(write_shard(partial / shard_name(len(shards)), batch))
            counts.update(int(sample["cls"]) for sample in batch)
        labels = tuple(counts[label] for label in range(len(classes)))
        manifest = Manifest(name, classes, tuple(shards), mean, std, source, licence, labels=labels)
        write_file(partial / MANIFEST, manifest.to_json().encode())
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its name."""
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    sync(folder.parent)


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> Shard:
    """Write samples as one tar and its index; the same samples give the same bytes.

    Neither has its name before it is whole and on disk: a crash leaves nothing but files that begin with a dot.
    """
    from webdataset import TarWriter

    offsets = []
    partial = _partial(path)
    try:
        with naming(path), partial.open("wb") as file:
            tee = _Hashing(file)
            # mtime 0 and fixed owners: the bytes depend on nothing but the samples
            with TarWriter(tee, mtime=0, user="vimscale", group="vimscale", encoder=False) as tar:
                for sample in samples:
                    offsets.append(tar.tarstream.offset)
                    # webdataset's own encoder would take a .json for something to be encoded once more
                    tar.write(
                        {key: str(value).encode() if isinstance(value, int) else value for key, value in sample.items()}
                    )
                offsets.append(tar.tarstream.offset)
            file.flush()
            os.fsync(file.fileno())
        write_index(path, np.array(offsets))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    return Shard(path.name, len(offsets) - 1, tee.bytes, tee.sha256.hexdigest())


def index_of(path: Path) -> Path:
    """Where the index of a shard stands."""
    return path.with_name(f"{path.name}.idx")


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Write the `.idx` of the shard at `path`: where its n samples start, and where the last one ends."""
    write_file(index_of(path), offsets.astype("<u8").tobytes())


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is either not there, as it was, or whole."""
    partial = _partial(path)
    with naming(path), partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


class _Hashing:
    """A file to write to that knows its sha256."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.bytes
