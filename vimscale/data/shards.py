"""Shards on disk: a folder of webdataset tars, an index beside each, and the manifest that says what is whole.

    train/  manifest.json  00000.tar  00000.tar.idx  00001.tar  00001.tar.idx ...

A `.tar.idx` is n + 1 little-endian uint64: where each sample starts in the tar, and where the last one ends.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vimscale.errors import DataError

FORMAT = 1


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
    format: int = FORMAT
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(shard.samples for shard in self.shards))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest: a run resumes on the very data it was started on, or not at all."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class Dataset:
    """A folder of shards, opened: any sample at the cost of one read."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self._index = lru_cache(maxsize=1024)(self._read_index)
        self._file = lru_cache(maxsize=256)(_File)

    def __reduce__(self) -> tuple:
        return Dataset, (self.folder, self.manifest)  # worker processes open their own files

    @classmethod
    def open(cls, source: str) -> "Dataset":
        """The data set `source`: a folder, or an embedded set's name such as digits:train.

        Raises:
            DataError: no manifest there, or shards that are missing or not of the size it says.
        """
        if source.startswith("digits:"):
            from vimscale.data import digits

            try:
                folder = digits.cached() / source.removeprefix("digits:")
            except OSError as error:
                way_out = "set XDG_CACHE_HOME to a folder that can be written"
                raise DataError(f"data {source}: the embedded set cannot be unpacked ({error}); {way_out}") from None
        elif "://" in source:
            raise DataError(
                f"data {source}: only folders can be streamed so far; copy the shards to a disk all ranks see"
            )
        else:
            folder = Path(source)
        dataset = cls(folder, _read_manifest(folder, source))
        dataset.check()
        return dataset

    def check(self) -> None:
        """Every shard is there with the size the manifest says, and has an index that ends inside it."""
        faults = []
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                faults.append(f"{shard.name} is missing")
                continue
            if size != shard.bytes:
                faults.append(f"{shard.name} has {size:,} bytes, the manifest says {shard.bytes:,}")
                continue
            try:
                self._index(number)
            except DataError as error:
                faults.append(str(error))
        if faults:
            shown = "".join(f"\n  {fault}" for fault in faults[:10])
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            way_out = "copy the damaged shards again, or write the data set anew"
            raise DataError(
                f"data {self.folder}: {len(faults)} of {len(self.counts)} shards are damaged{shown}{more}\n{way_out}"
            )

    def _read_index(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        path = self.folder / f"{shard.name}.idx"
        try:
            offsets = np.fromfile(path, dtype="<u8")
        except FileNotFoundError:
            raise DataError(f"{path.name} is missing") from None
        if (
            len(offsets) != shard.samples + 1
            or (np.diff(offsets.astype(np.int64)) <= 0).any()
            or offsets[-1] > shard.bytes
        ):
            raise DataError(f"{path.name} does not index {shard.samples} samples of a {shard.bytes:,} byte shard")
        return offsets

    def read(self, number: int, i: int) -> dict[str, Any]:
        """Sample i of shard `number` as webdataset parses it: `__key__`, and the bytes of each member by extension.

        Raises:
            DataError: the bytes there are no sample; names shard and offset.
        """
        from webdataset.tariterators import (
            group_by_keys,
            tar_file_expander,
        )  # brings torch, which a check does not need

        start, end = (int(offset) for offset in self._index(number)[i : i + 2])
        shard = self.manifest.shards[number]
        data = os.pread(self._file(self.folder / shard.name).descriptor, end - start, start)
        stream = {"url": shard.name, "stream": io.BytesIO(data)}
        try:
            samples = list(group_by_keys(tar_file_expander([stream], handler=_reraise)))
        except Exception as error:  # tarfile and webdataset raise what they like on bytes that are no tar
            raise DataError(f"{self.folder / shard.name}, offset {start}: no sample there ({error})") from error
        if len(samples) != 1:
            raise DataError(f"{self.folder / shard.name}, offset {start}: {len(samples)} samples where one should be")
        return samples[0]


def _reraise(error: Exception) -> bool:
    raise error


class _File:
    """A descriptor that closes with its last user; pread needs no position, so threads may share it."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _read_manifest(folder: Path, source: str) -> Manifest:
    path = folder / "manifest.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        what = "has no manifest.json" if folder.is_dir() else "is not there"
        raise DataError(
            f"data {source}: {folder} {what}; `vimscale data digits DIR` writes a set to start from"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"data {source}: {path} cannot be read: {error}") from None
    try:
        if tree["format"] != FORMAT:
            raise DataError(f"data {source}: manifest format {tree['format']}, this version reads {FORMAT}")
        samples = tree.pop("samples")
        shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
        manifest = Manifest(
            shards=shards,
            classes=tuple(tree.pop("classes")),
            mean=tuple(tree.pop("mean")),
            std=tuple(tree.pop("std")),
            **tree,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"data {source}: {path} is no manifest of format {FORMAT}: {error!r}") from None
    if manifest.samples != samples or not samples:
        raise DataError(f"data {source}: {path} says {samples} samples, its shards {manifest.samples}")
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
            shards.append(_write_shard(partial / f"{len(shards):05d}.tar", batch))
            batch = []
    if batch:
        shards.append(_write_shard(partial / f"{len(shards):05d}.tar", batch))
    manifest = Manifest(name, classes, tuple(shards), mean, std, source, licence)
    (partial / "manifest.json").write_text(manifest.to_json())
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return manifest


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> Shard:
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
    return Shard(path.name, len(samples), len(data), hashlib.sha256(data).hexdigest())
