"""The node's cache: complete shards of remote data sets, shared by all processes of a machine.

    $VIMSCALE_CACHE/  KEY.tar  KEY.tar.idx  KEY.part  lock

The process that holds the lock on KEY.part downloads the shard into it, and renames it once its sha256 is right; others
wait for the lock. A lock ends with its process, so a part without a lock is left over from a dead download. Eviction
depends only on the sizes and times of use that the file system records, so there is no list that could be damaged.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from vimscale.data.shards.manifest import Shard, index_of, sha256_of, write_synced
from vimscale.data.shards.shard_reader import ShardReader, offsets
from vimscale.errors import DataError
from vimscale.recipe.sections import size_bytes
from vimscale.storage.store import Folder, Missing, Remote, open_store

log = logging.getLogger(__name__)

_DOWNLOADS = 3
"""Downloads of a shard before its bytes, which differ from the manifest, are an error."""


def folder() -> Path:
    """Return $VIMSCALE_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("VIMSCALE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "vimscale" / "shards"


class Found(NamedTuple):
    """A shard in the cache."""

    reader: ShardReader
    fetched: int
    """Bytes that this call downloaded."""
    hit: bool
    """Whether the shard was in the cache without waiting."""


class _Entry(NamedTuple):
    used: int
    bytes: int
    path: Path


class Cache:
    """At most `limit` bytes of shards; evicts the least recently opened first."""

    def __init__(self, limit: int):
        self.limit = limit

    def open(self, store: Remote, shard: Shard, home: Folder | Remote) -> Found:
        """Open the shard; fetch it first if necessary. Its index is at `home`, or else next to it.

        Raises:
            DataError: the shard is unavailable, differs from the manifest, or does not fit into the cache.
        """
        where = store.where(shard.name)
        path = _path(where, shard.sha256)
        try:
            reader = self._cached(path, shard, where)
            return Found(reader, 0, True) if reader else self._fetch(path, store, shard, home)
        except OSError as error:
            raise self._unwritable(error, where) from None

    def path(self, store: Remote, shard: Shard, home: Folder | Remote) -> Path:
        """Return the shard's file; fetch it if necessary. It stays until the cache needs room for others."""
        self.open(store, shard, home)
        return _path(store.where(shard.name), shard.sha256)

    def copy(self, store: Remote, name: str) -> Path:
        """Fetch a file that is in no manifest; each call fetches it again."""
        target = _path(store.where(name), "")
        try:
            path = target.with_suffix(".part")
            part = _claim(path)
            try:
                with open(part, "wb", closefd=False) as file:
                    for piece in store.stream(name, self.limit):
                        file.write(piece)
                self._make_room(0)
                path.rename(target)
            finally:
                _release(part, path)
        except OSError as error:
            raise self._unwritable(error, store.where(name)) from None
        return target

    def _cached(self, path: Path, shard: Shard, where: str) -> ShardReader | None:
        """Open the shard if the cache has a complete copy of it."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            index = index_of(path).read_bytes()
            complete = os.fstat(descriptor).st_size == shard.bytes
        except OSError:  # missing, or the disk fails
            complete = False
        if not complete:
            os.close(descriptor)
            return None
        try:
            reader = ShardReader(descriptor, index, shard, where)
        except DataError as error:
            log.warning("the cache's copy of %s is damaged and will be fetched again: %s", where, error)
            return None
        _touch(descriptor)
        return reader

    def drop_damaged(self, store: Remote, shard: Shard, home: Folder | Remote) -> None:
        """Remove the shard from the cache unless its bytes match the manifest and its index matches the set's.

        Raises:
            DataError: the set's index is unavailable.
        """
        where = store.where(shard.name)
        path = _path(where, shard.sha256)
        try:
            sha256 = sha256_of(path)
            index = index_of(path).read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:  # the disk fails
            sha256, index = f"not readable: {error.strerror}", b""
        if sha256 == shard.sha256 and index == read_index(shard, home, store):
            return
        log.warning("the cache's copy of %s is damaged and will be fetched again", where)
        _remove(path)

    def _fetch(self, target: Path, store: Remote, shard: Shard, home: Folder | Remote) -> Found:
        where = store.where(shard.name)
        path = target.with_suffix(".part")
        part = _claim(path)
        try:
            if reader := self._cached(target, shard, where):  # another process fetched it while this one waited
                return Found(reader, 0, False)
            index = read_index(shard, home, store)
            if shard.bytes + len(index) > self.limit:
                raise DataError(
                    f"{where} has {shard.bytes:,} bytes and the cache holds {self.limit:,}; enlarge data.cache"
                )
            self._make_room(shard.bytes + len(index), part)
            fetched = _download(store, shard, part)
            reader = ShardReader(os.dup(part), index, shard, where)
            reader.check()
            # a shard of that name is damaged; it goes first, since nobody reads an index without its shard
            target.unlink(missing_ok=True)
            write_synced(index_of(target), index)
            path.rename(target)
            _touch(part)
            return Found(reader, fetched + len(index), False)
        finally:
            _release(part, path)

    def _make_room(self, need: int, part: int | None = None) -> None:
        """Remove shards until `need` more bytes fit, and reserve them by extending `part`."""
        while True:
            lock = _claim(folder() / "lock")
            try:
                kept, parts = _contents()
                total = sum(size for _, size, _ in kept) + sum(size for _, size in parts)
                for _, size, path in kept:
                    if total + need <= self.limit:
                        break
                    log.info("removing %s to make room", path)
                    _remove(path)
                    total -= size
                if part is None:
                    return
                if total + need <= self.limit:
                    os.ftruncate(part, need)
                    return
            finally:
                os.close(lock)
            # other downloads take up the rest: wait for one, whose shard can then be removed
            os.close(_claim(parts[0][0]))

    def _unwritable(self, error: OSError, where: str) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"no room for {where} in the cache" if full else f"{where} cannot be cached in"
        fix = f"make room there, set data.cache below {self.limit:,} bytes" if full else "make it writable"
        return DataError(f"{what} {folder()} ({error.strerror}); {fix}, or set VIMSCALE_CACHE to another folder")


def _contents() -> tuple[list[_Entry], list[tuple[Path, int]]]:
    """List shards, least recently used first, and parts that are being downloaded; remove what dead downloads left."""
    kept, parts = [], []
    for entry in os.scandir(folder()):
        try:
            size, used = entry.stat().st_size, entry.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        path = Path(entry.path)
        if path.suffix == ".tar":
            index = index_of(path)
            size += index.stat().st_size if index.exists() else 0
            kept.append(_Entry(used, size, path))
        elif path.suffix == ".part" and not _remove_dead(path) and size:
            parts.append((path, size))
        elif path.suffix == ".idx":
            shard = path.with_suffix("")
            if not shard.with_suffix(".part").exists() and not shard.exists():
                path.unlink()
    return sorted(kept), parts


def _remove_dead(part: Path) -> bool:
    """Remove the part if no process is downloading it; return whether it is gone."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _release(descriptor, part)
    return True


def _claim(path: Path) -> int:
    """Create or empty the file `path` and lock it; wait while another thread on this machine holds the lock."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)  # its contents may be private where they came from
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        if _is(descriptor, path):
            os.ftruncate(descriptor, 0)  # drop what a dead process wrote
            return descriptor
        os.close(descriptor)  # the process that held the lock renamed or removed the file


def _release(descriptor: int, path: Path) -> None:
    """Release a claim, and remove the file unless it was renamed."""
    if _is(descriptor, path):
        path.unlink()
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a duplicate descriptor is open
    os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _touch(descriptor: int) -> None:
    """Record a use in mtime: not every file system keeps atime, and the kernel's own clock is too coarse."""
    os.utime(descriptor, ns=(now := time.time_ns(), now))


def _path(where: str, sha256: str) -> Path:
    """Return a shard's file in the cache: another address or other content gives another file."""
    key = hashlib.sha256(f"{where}\n{sha256}".encode()).hexdigest()
    return folder() / f"{key}.tar"


def _remove(path: Path) -> None:
    """Remove a shard, then its index."""
    path.unlink(missing_ok=True)
    index_of(path).unlink(missing_ok=True)


def read_index(shard: Shard, home: Folder | Remote, store: Folder | Remote) -> bytes:
    """Read the shard's index, which is at `home` next to the manifest, or at `store` next to the shard.

    Raises:
        DataError: it is at neither, or belongs to another shard.
    """
    name = f"{shard.name}.idx"
    try:
        index = home.get(name)
    except Missing:
        try:
            index = store.get(name)
        except Missing:
            fix = "upload it, or write it with `vimscale data index`"
            raise DataError(f"{store.where(shard.name)} has no index (.idx) next to it; {fix}") from None
    offsets(index, shard, store.where(shard.name))
    return index


def _download(store: Remote, shard: Shard, part: int) -> int:
    """Download the shard into the file `part`; return the number of bytes fetched."""
    fetched = 0
    for attempt in range(1, _DOWNLOADS + 1):
        size, sha256 = 0, hashlib.sha256()
        with open(part, "wb", closefd=False) as file:
            file.seek(0)
            for piece in store.stream(shard.name):
                size += len(piece)
                if size > shard.bytes:
                    break
                sha256.update(piece)
                file.write(piece)
        fetched += size
        if (size, sha256.hexdigest()) == (shard.bytes, shard.sha256):
            os.ftruncate(part, size)
            os.fsync(part)
            return fetched
        found = (
            f"{size:,} bytes of sha256 {sha256.hexdigest()}" if size <= shard.bytes else f"over {shard.bytes:,} bytes"
        )
        log.warning("%s: download %d gave %s", store.where(shard.name), attempt, found)
    raise DataError(
        f"{store.where(shard.name)}: downloaded {_DOWNLOADS} times, it has {found}; the manifest says {shard.bytes:,}"
        f" bytes of sha256 {shard.sha256}; upload the shard again, or write the manifest again"
    )


def local_copy(url: str, cache: str = "100GB") -> Path:
    """Return a local file for `url`: itself if it is local, else a copy in the node's cache, fetched on every call.

    Raises:
        DataError: the file is unavailable.
    """
    parent, _, name = url.rpartition("/")
    store = open_store(parent) if "://" in parent else Folder(Path(url).parent)
    if isinstance(store, Folder):
        return store.path / Path(url).name
    limit = size_bytes(cache)
    assert limit is not None
    return Cache(limit).copy(store, name)


class BackgroundFetch:
    """Fetches shards in the background. A new request replaces the part of the last one that has not started."""

    def __init__(self, fetch: Callable[[int], None], threads: int = 4):
        self._fetch = fetch
        self._threads = threads
        self._running = 0
        self._requested: deque[int] = deque()
        self._lock = threading.Lock()

    def request(self, numbers: Iterable[int]) -> None:
        """Fetch these shards in this order."""
        with self._lock:
            self._requested = deque(numbers)
            for _ in range(min(self._threads - self._running, len(self._requested))):
                self._running += 1
                threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._requested:
                    self._running -= 1
                    return
                number = self._requested.popleft()
            try:
                self._fetch(number)
            except DataError as error:  # the reader of the shard tries again, and raises
                log.warning("fetching ahead: %s", error)
