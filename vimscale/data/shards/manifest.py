"""Shards on disk: a folder of webdataset tars, an index beside each, and the manifest that says what is whole.

    train/  manifest.json  00000.tar  00000.tar.idx  00001.tar  00001.tar.idx ...

A `.tar.idx` is n + 1 little-endian uint64: where each sample starts in the tar, and where the last one ends.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vimscale.errors import DataError, brief
from vimscale.storage import untrusted
from vimscale.storage.files import naming, sync

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
    image: tuple[str, ...] = ()
    """Extensions of the image among a sample's members, first match first, where the usual ones do not say it."""
    format: int = FORMAT
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))

    def to_json(self) -> str:
        tree = asdict(self)
        if not self.image:  # manifests of before have none, and keep their fingerprints
            del tree["image"]
        return json.dumps(tree, indent=1) + "\n"

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
            tree = untrusted.loads(text)
        except ValueError as error:
            raise DataError(f"data {where}: {MANIFEST} cannot be read: {error}") from None
        if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
            found = brief(tree["format"])
            raise DataError(f"data {where}: manifest format {found}, this version reads {FORMAT}")
        try:
            said = tree.pop("samples", None) if isinstance(tree, dict) else None
            manifest = untrusted.build(cls, tree)
            _check(manifest)
            untrusted.build(int, said, "samples")
        except ValueError as error:
            raise DataError(f"data {where}: {MANIFEST} is not of format {FORMAT}: {error}") from None
        if manifest.samples != said or not said:
            raise DataError(f"data {where}: {MANIFEST} says {said} samples, its shards {manifest.samples}")
        return manifest


def _check(manifest: Manifest) -> None:
    """What the types of a manifest do not say; raises ValueError."""
    names = Counter(checked_name(shard.name) for shard in manifest.shards)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"the shard {twice[0]} is there twice")
    for shard in manifest.shards:
        # every sample has a header, and its index is read in one piece
        if not 0 <= shard.samples <= min(shard.bytes // 512, untrusted.SMALL // 8 - 1) or shard.bytes >> 60:
            raise ValueError(f"{shard.name} cannot hold {shard.samples:,} samples in {shard.bytes:,} bytes")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{shard.name} has {brief(shard.sha256)} as its sha256")
    if any(value <= 0 for value in manifest.std):
        raise ValueError(f"std is {list(manifest.std)}, and images are divided by it")
    if manifest.labels and (len(manifest.labels) != len(manifest.classes) or min(manifest.labels) < 0):
        raise ValueError(f"labels does not count the samples of {len(manifest.classes):,} classes")
    if strange := [side for side in manifest.sides if not re.fullmatch("[0-9]{1,9}", side)]:
        raise ValueError(f"sides has {brief(strange[0])}, which is no number of pixels")
    if re.search(r"[\x00-\x1f\x7f]", manifest.base):
        raise ValueError(f"base is {brief(manifest.base)}, which is no folder or address")


def checked_name(name: str) -> str:
    """A shard's name: its own or a path below the set's folder, and never that of an index or a manifest.

    Raises:
        ValueError: it is not one.
    """
    if not untrusted.file_path(name).endswith(".tar"):
        raise ValueError(f"the name {brief(name)} cannot be used: shards end in .tar")
    return name


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
    offsets = []
    partial = _partial(path)
    try:
        with naming(path), partial.open("wb") as file:
            tee: Any = _Hashing(file)
            # webdataset's own writer passes over members whose extension begins with _
            with tarfile.open(fileobj=tee, mode="w|") as tar:
                for sample in samples:
                    offsets.append(tar.offset)
                    for extension in sorted(sample.keys() - {"__key__"}):
                        _add(tar, f"{sample['__key__']}.{extension}", sample[extension])
                offsets.append(tar.offset)
            file.flush()
            os.fsync(file.fileno())
        write_index(path, np.array(offsets))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    return Shard(path.name, len(offsets) - 1, tee.bytes, tee.sha256.hexdigest())


def _add(tar: tarfile.TarFile, name: str, value: bytes | int) -> None:
    """A member that depends on nothing but these: mtime 0, fixed owners."""
    data = str(value).encode() if isinstance(value, int) else value
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = len(data), 0o444, "vimscale", "vimscale"
    tar.addfile(member, io.BytesIO(data))


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
