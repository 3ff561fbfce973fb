"""Shards on disk: a folder of webdataset tars, an index next to each, and the manifest that describes them.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vimscale.errors import DataError, brief
from vimscale.storage import untrusted
from vimscale.storage.files import naming, replacing, sync

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index_bytes(self) -> int:
        """Size of its index: n + 1 uint64."""
        return 8 * (self.samples + 1)


@dataclass(frozen=True)
class Bags:
    """The tiles of a set whose samples are large images, cut into tiles."""

    side: int
    """Of a tile, in pixels."""
    least: int
    """Fewest tiles of an image."""
    most: int
    total: int


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of. It is written last: a folder without one is not a data set."""

    name: str
    classes: tuple[str, ...]
    """Names in the order of the labels; empty: the samples have no labels."""
    shards: tuple[Shard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of images in [0, 1]; they normalise the model's input."""
    source: str = ""
    licence: str = ""
    base: str = ""
    """Folder or address of the shards, if they are not next to the manifest."""
    labels: tuple[int, ...] = ()
    """Samples of each class; empty if not counted."""
    sides: dict[str, int] = field(default_factory=dict)
    """Histogram of the images' shorter sides in pixels: each key is a bin's lower edge, the next key its upper edge."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Inputs that did not become samples, by cause."""
    plan: str = ""
    """sha256 of what the set was made from and how: the same plan gives the same bytes."""
    image: tuple[str, ...] = ()
    """Extensions of the image among a sample's members, first match first; empty: the usual ones."""
    tiles: Bags | None = None
    """If set, each sample is a bag of tiles of one large image, see `data.images.bags`."""
    captions: int = 0
    """Samples with a caption: a member .txt that is not empty."""
    format: int = FORMAT
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))

    def class_name(self, label: int) -> str:
        """Return the name of a label's class; empty for samples without labels."""
        return self.classes[label] if 0 <= label < len(self.classes) else ""

    def to_json(self) -> str:
        tree = asdict(self)
        for key in ("image", "tiles", "captions"):  # older manifests lack them, and must keep their fingerprints
            if not tree[key]:
                del tree[key]
        return json.dumps(tree, indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest without `base`: a run resumes only on the data it started on, wherever that is."""
        return hashlib.sha256(replace(self, base="").to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Raises:
            DataError: the text is not a manifest; `where` names it.
        """
        try:
            tree = untrusted.loads(text)
        except ValueError as error:
            raise DataError(f"data {where}: {MANIFEST} cannot be read: {error}") from None
        if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
            found = brief(tree["format"])
            raise DataError(f"data {where}: manifest format {found}, this version reads {FORMAT}")
        try:
            samples = tree.pop("samples", None) if isinstance(tree, dict) else None
            manifest = untrusted.build(cls, tree)
            _check(manifest)
            untrusted.build(int, samples, "samples")
        except ValueError as error:
            raise DataError(f"data {where}: {MANIFEST} is not of format {FORMAT}: {error}") from None
        if manifest.samples != samples or not samples:
            raise DataError(f"data {where}: {MANIFEST} says {samples} samples, its shards {manifest.samples}")
        return manifest


def _check(manifest: Manifest) -> None:
    """Check what the types of a manifest do not.

    Raises:
        ValueError: names the field, its value and the rule.
    """
    names = Counter(checked_name(shard.name) for shard in manifest.shards)
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"the shard {duplicates[0]} is listed twice")
    for shard in manifest.shards:
        # every sample has a header, and its index is read in one piece
        if not 0 <= shard.samples <= min(shard.bytes // 512, untrusted.SMALL // 8 - 1) or shard.bytes >> 60:
            raise ValueError(f"{shard.name} cannot hold {shard.samples:,} samples in {shard.bytes:,} bytes")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{shard.name} has {brief(shard.sha256)} as its sha256")
    if (bags := manifest.tiles) is not None and not (
        bags.side > 0 and 0 < bags.least <= bags.most and manifest.samples <= bags.total <= bags.most * manifest.samples
    ):
        raise ValueError(f"tiles is {asdict(bags)}, for {manifest.samples:,} images")
    if not 0 <= manifest.captions <= manifest.samples:
        raise ValueError(f"captions is {manifest.captions:,}, for {manifest.samples:,} samples")
    if any(value <= 0 for value in manifest.std):
        raise ValueError(f"std is {list(manifest.std)}, and must be positive: images are divided by it")
    if manifest.labels and (len(manifest.labels) != len(manifest.classes) or min(manifest.labels) < 0):
        raise ValueError(f"labels does not count the samples of {len(manifest.classes):,} classes")
    if invalid := [side for side in manifest.sides if not re.fullmatch("[0-9]{1,9}", side)]:
        raise ValueError(f"sides has {brief(invalid[0])}, which is not a number of pixels")
    if re.search(r"[\x00-\x1f\x7f]", manifest.base):
        raise ValueError(f"base is {brief(manifest.base)}, which is not a folder or address")


def checked_name(name: str) -> str:
    """Return a shard's name: a file name or a path below the set's folder, never the name of an index or a manifest.

    Raises:
        ValueError: it is not such a name.
    """
    if not untrusted.file_path(name).endswith(".tar"):
        raise ValueError(f"the name {brief(name)} cannot be used: shards end in .tar")
    return name


def new_folder(folder: Path) -> Path:
    """Return the full path of a folder that is to be written.

    Raises:
        DataError: it exists and is not empty, or is a file.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "the folder is not empty"
        raise DataError(f"data {folder}: {what}; give a new folder, or remove this one")
    return Path(os.path.abspath(folder))


def write_set(
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
    tiles: Bags | None = None,
) -> Manifest:
    """Write webdataset samples (`__key__`; bytes or a number by extension) as shards.

    The same samples give the same bytes. The set appears under its name in one rename, so a crash leaves no incomplete
    data set there.

    Raises:
        DataError: `folder` exists and is not empty.
    """
    counts = Counter[int]()
    shards: list[Shard] = []
    remaining = iter(samples)
    with new_set(folder) as partial:
        while batch := list(islice(remaining, per_shard)):
            shards.append(write_shard(partial / shard_name(len(shards)), batch))
            counts.update(int(sample["cls"]) for sample in batch)
        labels = tuple(counts[label] for label in range(len(classes)))
        manifest = Manifest(name, classes, tuple(shards), mean, std, source, licence, labels=labels, tiles=tiles)
        write_file(partial / MANIFEST, manifest.to_json().encode())
    return manifest


@contextmanager
def new_set(folder: Path) -> Iterator[Path]:
    """Make a folder next to `folder` to write a set into; rename it to `folder` at the end, or remove it on an error.

    Raises:
        DataError: `folder` exists and is not empty.
    """
    folder = new_folder(folder)
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def publish(partial: Path, folder: Path) -> None:
    """Rename a finished folder to its final name."""
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    sync(folder.parent)


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> Shard:
    """Write samples as one tar and its index; the same samples give the same bytes.

    Both get their names once they are complete and on disk: a crash leaves only files whose names begin with a dot.
    """
    offsets = []
    partial = _partial(path)
    try:
        with naming(path), partial.open("wb") as file:
            tee: Any = _Hashing(file)
            # webdataset's own writer skips members whose extension begins with _
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
    """Add a member whose bytes depend only on its name and value: mtime 0, fixed owners."""
    data = str(value).encode() if isinstance(value, int) else value
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = len(data), 0o444, "vimscale", "vimscale"
    tar.addfile(member, io.BytesIO(data))


def index_of(path: Path) -> Path:
    """Return the path of the index next to a shard."""
    return path.with_name(f"{path.name}.idx")


def write_index(path: Path, offsets: np.ndarray) -> None:
    """Write the `.idx` of the shard at `path`: where its n samples start, and where the last one ends."""
    write_file(index_of(path), offsets.astype("<u8").tobytes())


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: a crash leaves no file, the old file or the complete new file."""
    with replacing(path) as partial:
        write_synced(partial, data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until its bytes are on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


class _Hashing:
    """A writable file that computes the sha256 of what is written."""

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
