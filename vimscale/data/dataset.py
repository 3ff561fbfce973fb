"""A data set opened: any sample of any shard, at the cost of one read once the shard is on this machine."""

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from vimscale.data.shards.cache import Ahead, Cache, read_index
from vimscale.data.shards.manifest import MANIFEST, Manifest
from vimscale.data.shards.shard_reader import ShardReader
from vimscale.errors import DataError
from vimscale.recipe.sections import size_bytes
from vimscale.storage.addresses import shown
from vimscale.storage.store import Folder, Missing, Remote, Retry, beside, open_store, with_secrets

_FIRST_CONTACT = Retry(tries=4)
"""An address that never answered is more likely wrong than out of order."""
_OPEN = 128
"""Shards that a process keeps open, with 8 bytes a sample of index each."""


@dataclass
class Traffic:
    """What was read since the data set was opened in this process."""

    bytes: int = 0
    """Of samples."""
    fetched: int = 0
    """Bytes that came from elsewhere."""
    hits: int = 0
    """Shards opened that were in the node's cache already."""
    misses: int = 0
    """Shards opened that had to be fetched, or waited for, first."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Dataset:
    """Shards and their manifest. Pickled, it opens its files and connections anew."""

    def __init__(self, home: Folder | Remote, store: Folder | Remote, manifest: Manifest, cache: Cache):
        self.home = home
        """Where the manifest is, and the indexes unless they stand beside the shards."""
        self.store = store
        self.manifest = manifest
        self.counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self.traffic = Traffic()
        self._cache = cache
        self._rechecked: set[int] = set()
        self._lock = Lock()
        self._ahead = Ahead(self._fetch)
        # an open file takes up room even if it left the cache, so those of the cache are kept within its limit
        largest = max(shard.bytes for shard in manifest.shards)
        kept = _OPEN if isinstance(store, Folder) else min(max(cache.limit // max(largest, 1), 1), _OPEN)
        self._opened = lru_cache(maxsize=kept)(self._open)

    def __reduce__(self) -> tuple:
        return Dataset, (self.home, self.store, self.manifest, self._cache)

    @classmethod
    def open(cls, source: str, cache: str = "100GB", retry: Retry | None = None) -> "Dataset":
        """The data set `source`: a folder, an address, or an embedded set's name such as digits:train.

        `cache` is the largest size of the node's cache, for shards that are not on this machine; `retry` how patient to
        be with the network.

        Raises:
            DataError: no manifest there, or shards that are missing or not of the size it says.
        """
        limit = size_bytes(cache)
        if limit is None:
            raise DataError(f"data.cache {cache!r} is not a size; write 500MB, 100GB or 2TB")
        place = _embedded(source) if source.startswith("digits:") else with_secrets(source)
        store = open_store(place, retry)
        source = shown(source)
        try:
            text = open_store(place, retry or _FIRST_CONTACT).get(MANIFEST)
        except Missing:
            there = isinstance(store, Remote) or store.path.is_dir()
            what = f"has no {MANIFEST}" if there else "is not there"
            make = "`vimscale data index` makes one for tars, `vimscale data prepare` makes sets of images"
            raise DataError(f"data {source}: {shown(store.url)} {what}; {make}") from None
        except DataError as error:
            raise DataError(f"data {source}: {error}") from None
        manifest = Manifest.from_json(text, source)
        shards = open_store(beside(place, manifest.base), retry) if manifest.base else store
        dataset = cls(store, shards, manifest, Cache(limit))
        dataset.check()
        return dataset

    @property
    def remote(self) -> bool:
        """Whether shards are fetched into the node's cache."""
        return isinstance(self.store, Remote)

    def where(self, number: int) -> str:
        """The shard's full name, for messages."""
        return self.store.where(self.manifest.shards[number].name)

    def path(self, number: int) -> Path:
        """The shard's file on this machine, fetched if need be; one in the cache may have to make room later.

        Raises:
            DataError: it cannot be had.
        """
        shard = self.manifest.shards[number]
        return (
            self.store.path / shard.name
            if isinstance(self.store, Folder)
            else self._cache.path(self.store, shard, self.home)
        )

    def check(self) -> None:
        """Every shard is there with the size the manifest says, beside an index of the size it should have.

        A web server cannot be asked that in one request: there, shards are checked when they are fetched.

        Raises:
            DataError: names the first ten that are not.
        """
        wanted: dict[str, int] = {}
        for shard in self.manifest.shards:
            wanted |= {shard.name: shard.bytes, f"{shard.name}.idx": 8 * (shard.samples + 1)}
        found = self.store.sizes(wanted)
        if found is None:
            return
        if self.manifest.base:
            found |= self.home.sizes(f"{shard.name}.idx" for shard in self.manifest.shards) or {}
        faults = [
            f"{name} has {found[name]:,} bytes, not {size:,}" if name in found else f"{name} is missing"
            for name, size in wanted.items()
            if found.get(name) != size
        ]
        if faults:
            first = "".join(f"\n  {fault}" for fault in faults[:10])
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            way_out = "copy the damaged shards again, or see what `vimscale data repair` can save"
            raise DataError(
                f"data {shown(self.store.url)}: {len(faults)} files of {len(self.counts)} shards are damaged"
                f"{first}{more}\n{way_out}"
            )

    def prefetch(self, numbers: Iterable[int]) -> None:
        """These shards are wanted soon, in this order: have them fetched in the background, as many as the cache can
        hold at once. What an earlier call asked for is given up if it has not begun.
        """
        if isinstance(self.store, Folder):
            return
        fitting = []
        room = self._cache.limit
        for number in numbers:
            room -= self.manifest.shards[number].bytes
            if room < 0:
                break
            fitting.append(number)
        self._ahead.want(fitting)

    def read(self, number: int, i: int) -> dict[str, Any]:
        """Sample i of shard `number` as webdataset parses it: `__key__`, and the bytes of each member by extension.

        Raises:
            DataError: the shard cannot be had, or the bytes there are no sample; names shard and offset.
        """
        opened = self._opened(number)
        try:
            sample, size = opened.read(i)
        except (DataError, OSError) as error:
            if self.recheck(number):
                return self.read(number, i)
            if isinstance(error, OSError):
                raise DataError(f"{self.where(number)} cannot be read: {error.strerror}") from None
            raise
        self.traffic.bytes += size
        return sample

    def recheck(self, number: int) -> bool:
        """Compare a shard in the cache with its set, because something in it cannot be used, and fetch it again if it
        differs. Whether to read again: once for each shard.
        """
        if isinstance(self.store, Folder) or number in self._rechecked:
            return False
        self._rechecked.add(number)
        self._cache.drop_damaged(self.store, self.manifest.shards[number], self.home)
        self._opened.cache_clear()
        return True

    def _open(self, number: int) -> ShardReader:
        shard, where = self.manifest.shards[number], self.where(number)
        if isinstance(self.store, Folder):
            index = read_index(shard, self.home, self.store)
            try:
                descriptor = os.open(self.store.path / shard.name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{where} cannot be read: {error.strerror}") from None
            return ShardReader(descriptor, index, shard, where)
        opened, there = self._get(number)
        with self._lock:
            self.traffic.hits += there
            self.traffic.misses += not there
        return opened

    def _fetch(self, number: int) -> None:
        self._get(number)

    def _get(self, number: int) -> tuple[ShardReader, bool]:
        assert isinstance(self.store, Remote)
        opened, fetched, there = self._cache.open(self.store, self.manifest.shards[number], self.home)
        with self._lock:
            self.traffic.fetched += fetched
        return opened, there


def _embedded(source: str) -> str:
    from vimscale.data import digits

    try:
        return str(digits.cached() / source.removeprefix("digits:"))
    except OSError as error:
        way_out = "set XDG_CACHE_HOME to a folder that can be written"
        raise DataError(f"data {source}: the embedded set cannot be unpacked ({error}); {way_out}") from None
