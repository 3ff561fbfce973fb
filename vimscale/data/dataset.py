"""A data set opened: any sample at the cost of one read."""

import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vimscale.data.shards import MANIFEST, Manifest
from vimscale.errors import DataError


@dataclass
class Traffic:
    """What was read since the process started."""

    bytes: int = 0
    """Of samples."""
    fetched: int = 0
    """Bytes of shards that came from elsewhere."""
    hits: int = 0
    """Shards opened that were in the node's cache already."""
    misses: int = 0
    """Shards opened that had to be fetched."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Dataset:
    """Shards and their manifest, in a folder."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self.traffic = Traffic()
        self._index = lru_cache(maxsize=64)(self._read_index)
        self._file = lru_cache(maxsize=256)(_File)

    def __reduce__(self) -> tuple:
        return Dataset, (self.folder, self.manifest)  # worker processes open their own files

    @classmethod
    def open(cls, source: str, cache: str = "100GB") -> "Dataset":
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
        try:
            text = (folder / MANIFEST).read_text()
        except FileNotFoundError:
            what = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
            raise DataError(
                f"data {source}: {folder} {what}; `vimscale data digits DIR` writes a set to start from"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data {source}: {folder / MANIFEST} cannot be read: {error}") from None
        dataset = cls(folder, Manifest.from_json(text, source))
        dataset.check()
        return dataset

    def where(self, number: int) -> str:
        """The shard's full name, for messages."""
        return str(self.folder / self.manifest.shards[number].name)

    def check(self) -> None:
        """Every shard is there with the size the manifest says, beside an index of the size it should have."""
        faults = []
        for shard in self.manifest.shards:
            faults += [
                fault
                for name, size in ((shard.name, shard.bytes), (f"{shard.name}.idx", 8 * (shard.samples + 1)))
                if (fault := _damage(self.folder / name, size))
            ]
        if faults:
            shown = "".join(f"\n  {fault}" for fault in faults[:10])
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            way_out = "copy the damaged shards again, or write the data set anew"
            raise DataError(
                f"data {self.folder}: {len(faults)} files of {len(self.counts)} shards are damaged"
                f"{shown}{more}\n{way_out}"
            )

    def _read_index(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        path = self.folder / f"{shard.name}.idx"
        offsets = np.fromfile(path, dtype="<u8")
        if (
            len(offsets) != shard.samples + 1
            or (np.diff(offsets.astype(np.int64)) <= 0).any()
            or offsets[-1] > shard.bytes
        ):
            raise DataError(f"{path} does not index {shard.samples} samples of a {shard.bytes:,} byte shard")
        return offsets

    def prefetch(self, numbers: Iterable[int]) -> None:
        """These shards are wanted soon, in this order: have them fetched in the background."""

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
        self.traffic.bytes += len(data)
        stream = {"url": shard.name, "stream": io.BytesIO(data)}
        try:
            samples = list(group_by_keys(tar_file_expander([stream], handler=_reraise)))
        except Exception as error:  # tarfile and webdataset raise what they like on bytes that are no tar
            raise DataError(f"{self.where(number)}, offset {start}: no sample there ({error})") from error
        if len(samples) != 1:
            raise DataError(f"{self.where(number)}, offset {start}: {len(samples)} samples where one should be")
        return samples[0]


def _reraise(error: Exception) -> bool:
    raise error


class _File:
    """A descriptor that closes with its last user; pread needs no position, so threads may share it."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _damage(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return f"{path.name} has {found:,} bytes, not {size:,}" if found != size else None
