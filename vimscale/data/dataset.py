"""An open data set: any sample of any shard costs one read, once the shard is on this machine."""

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from vimscale.data import embedded
from vimscale.data.shards.cache import BackgroundFetch, Cache, read_index
from vimscale.data.shards.manifest import MANIFEST, Manifest
from vimscale.data.shards.shard_reader import ShardReader
from vimscale.errors import DataError
from vimscale.recipe.sections import size_bytes
from vimscale.storage.addresses import shown
from vimscale.storage.store import Folder, Missing, Remote, Retry, beside, open_store, with_secrets

_FIRST_CONTACT = Retry(tries=4)
"""An address that has never answered is more likely wrong than temporarily down."""
_OPEN = 128
"""Shards that a process keeps open; the index of each takes 8 bytes per sample."""


@dataclass
class Traffic:
    """What this process has read since it opened the data set."""

    bytes: int = 0
    """Bytes of samples."""
    fetched: int = 0
    """Bytes downloaded."""
    hits: int = 0
    """Shards opened that were already in the node's cache."""
    misses: int = 0
    """Shards opened that had to be fetched, or waited for, first."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Dataset:
    """Shards and their manifest. Unpickling opens new files and connections."""

    def __init__(self, home: Folder | Remote, store: Folder | Remote, manifest: Manifest, cache: Cache):
        self.home = home
        """Where the manifest is, and the indexes unless they are next to the shards."""
        self.store = store
        self.manifest = manifest
        self.counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self.traffic = Traffic()
        self._cache = cache
        self._rechecked: set[int] = set()
        self._lock = Lock()
        self._background = BackgroundFetch(self._fetch)
        # an open file takes up disk space even after it leaves the cache, so open files stay within the cache's limit
        largest = max(shard.bytes for shard in manifest.shards)
        kept = _OPEN if isinstance(store, Folder) else min(max(cache.limit // max(largest, 1), 1), _OPEN)
        self._reader = lru_cache(maxsize=kept)(self._open)

    def __reduce__(self) -> tuple:
        return Dataset, (self.home, self.store, self.manifest, self._cache)

    @classmethod
    def open(cls, source: str, cache: str = "100GB", retry: Retry | None = None) -> "Dataset":
        """Open `source`: a folder, an address, or the name of an embedded set such as digits:train.

        `cache` limits the size of the node's cache, which holds shards that are not on this machine. `retry` says how
        long to wait for the network.

        Raises:
            DataError: there is no manifest, or a shard is missing or has another size than the manifest says.
        """
        limit = size_bytes(cache)
        if limit is None:
            raise DataError(f"data.cache {cache!r} is not a size; write 500MB, 100GB or 2TB")
        url = _embedded(source) or with_secrets(source)
        store = open_store(url, retry)
        source = shown(source)
        try:
            text = open_store(url, retry or _FIRST_CONTACT).get(MANIFEST)
        except Missing:
            exists = isinstance(store, Remote) or store.path.is_dir()
            what = f"has no {MANIFEST}" if exists else "is not there"
            fix = "`vimscale data index` makes one for tars, `vimscale data prepare` makes data sets from images"
            raise DataError(f"data {source}: {shown(store.url)} {what}; {fix}") from None
        except DataError as error:
            raise DataError(f"data {source}: {error}") from None
        manifest = Manifest.from_json(text, source)
        shards = open_store(beside(url, manifest.base), retry) if manifest.base else store
        dataset = cls(store, shards, manifest, Cache(limit))
        dataset.check()
        return dataset

    @property
    def remote(self) -> bool:
        """Whether shards are fetched into the node's cache."""
        return isinstance(self.store, Remote)

    def where(self, number: int) -> str:
        """Return the shard's full name, for messages."""
        return self.store.where(self.manifest.shards[number].name)

    def path(self, number: int) -> Path:
        """Return the shard's file on this machine; fetch it if necessary. The cache may remove it later to make room.

        Raises:
            DataError: the shard is unavailable.
        """
        shard = self.manifest.shards[number]
        return (
            self.store.path / shard.name
            if isinstance(self.store, Folder)
            else self._cache.path(self.store, shard, self.home)
        )

    def check(self) -> None:
        """Check that every shard and its index exist with the sizes that follow from the manifest.

        A web server cannot answer that in one request, so its shards are checked when they are fetched.

        Raises:
            DataError: files are missing or have other sizes; names the first ten.
        """
        expected: dict[str, int] = {}
        for shard in self.manifest.shards:
            expected |= {shard.name: shard.bytes, f"{shard.name}.idx": shard.index_bytes}
        found = self.store.sizes(expected)
        if found is None:
            return
        if self.manifest.base:
            found |= self.home.sizes(f"{shard.name}.idx" for shard in self.manifest.shards) or {}
        faults = [
            f"{name} has {found[name]:,} bytes, not {size:,}" if name in found else f"{name} is missing"
            for name, size in expected.items()
            if found.get(name) != size
        ]
        if faults:
            first = "".join(f"\n  {fault}" for fault in faults[:10])
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            fix = "copy the damaged files again, or see what `vimscale data repair` can save"
            raise DataError(
                f"data {shown(self.store.url)}: {len(faults)} files of {len(self.counts)} shards are damaged"
                f"{first}{more}\n{fix}"
            )

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch shards that are needed soon, in this order and in the background, as many as the cache holds at once.

        Replaces the request of an earlier call, except for downloads that have started.
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
        self._background.request(fitting)

    def read(self, number: int, i: int) -> dict[str, Any]:
        """Read sample i of shard `number` as webdataset parses it: `__key__`, and each member's bytes by extension.

        Raises:
            DataError: the shard is unavailable, or the bytes are not a sample; names shard and offset.
        """
        reader = self._reader(number)
        try:
            sample, size = reader.read(i)
        except (DataError, OSError) as error:
            if self.recheck(number):
                return self.read(number, i)
            if isinstance(error, OSError):
                raise DataError(f"{self.where(number)} cannot be read: {error.strerror}") from None
            raise
        self.traffic.bytes += size
        return sample

    def recheck(self, number: int) -> bool:
        """Check the cache's copy of a shard in which something is unusable, and drop it if it differs from the set.

        Returns whether to read again: once per shard.
        """
        if isinstance(self.store, Folder) or number in self._rechecked:
            return False
        self._rechecked.add(number)
        self._cache.drop_damaged(self.store, self.manifest.shards[number], self.home)
        self._reader.cache_clear()
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
        reader, hit = self._get(number)
        with self._lock:
            self.traffic.hits += hit
            self.traffic.misses += not hit
        return reader

    def _fetch(self, number: int) -> None:
        self._get(number)

    def _get(self, number: int) -> tuple[ShardReader, bool]:
        assert isinstance(self.store, Remote)
        reader, fetched, hit = self._cache.open(self.store, self.manifest.shards[number], self.home)
        with self._lock:
            self.traffic.fetched += fetched
        return reader, hit


def _embedded(source: str) -> str | None:
    try:
        folder = embedded.folder_of(source)
        return None if folder is None else str(folder)
    except OSError as error:
        fix = "set XDG_CACHE_HOME to a writable folder"
        raise DataError(f"data {source}: the embedded set cannot be unpacked ({error}); {fix}") from None
