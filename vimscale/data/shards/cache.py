"""The node's cache: whole shards of remote data sets, shared by all processes of a machine.

    $VIMSCALE_CACHE/  KEY.tar  KEY.tar.idx  KEY.part  lock

A shard is downloaded into KEY.part by whoever holds that file's lock, and gets its name once its sha256 is right; the
others wait for the lock. Locks go with their process, so a part that nobody holds is a dead download's. Only shards'
sizes and times of use, as the file system has them, decide what goes when room is needed: there is no list to mend.
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

from vimscale.data.shards.manifest import Shard
from vimscale.data.shards.shard_reader import ShardReader, offsets
from vimscale.errors import DataError
from vimscale.recipe.sections import size_bytes
from vimscale.storage.store import Folder, Missing, Remote, open_store

log = logging.getLogger(__name__)

_DOWNLOADS = 3
"""So often a shard is fetched whose bytes turn out not to be those of the manifest."""


def folder() -> Path:
    """$VIMSCALE_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("VIMSCALE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "vimscale" / "shards"


class Found(NamedTuple):
    """A shard in the cache."""

    opened: ShardReader
    fetched: int
    """Bytes that this call downloaded."""
    there: bool
    """Whether it was in the cache without waiting."""


class _Entry(NamedTuple):
    used: int
    bytes: int
    path: Path


class Cache:
    """At most `limit` bytes of shards; the least recently opened go first."""

    def __init__(self, limit: int):
        self.limit = limit

    def open(self, store: Remote, shard: Shard, home: Folder | Remote) -> Found:
        """The shard, opened. Its index is at `home`, or else beside it.

        Raises:
            DataError: it cannot be had, is not what the manifest says, or does not fit in.
        """
        key = _key(store.where(shard.name), shard.sha256)
        where = store.where(shard.name)
        try:
            opened = self._held(key, shard, where)
            return Found(opened, 0, True) if opened else self._fetch(key, store, shard, home)
        except OSError as error:
            raise self._unwritable(error, where) from None

    def path(self, store: Remote, shard: Shard, home: Folder | Remote) -> Path:
        """The shard's file, fetched if need be. It stays there until others need its room."""
        self.open(store, shard, home)
        return folder() / f"{_key(store.where(shard.name), shard.sha256)}.tar"

    def copy(self, store: Remote, name: str) -> Path:
        """A file that no manifest speaks of, fetched anew each time."""
        target = folder() / f"{_key(store.where(name), '')}.tar"
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

    def _held(self, key: str, shard: Shard, where: str) -> ShardReader | None:
        path = folder() / f"{key}.tar"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            index = path.with_suffix(".tar.idx").read_bytes()
            whole = os.fstat(descriptor).st_size == shard.bytes
        except OSError:  # missing, or the disk fails
            whole = False
        if not whole:
            os.close(descriptor)
            return None
        try:
            opened = ShardReader(descriptor, index, shard, where)
        except DataError as error:
            log.warning("the cache's copy of %s is damaged and fetched again: %s", where, error)
            return None
        _use(descriptor)
        return opened

    def drop_damaged(self, store: Remote, shard: Shard, home: Folder | Remote) -> None:
        """Remove the shard from the cache unless its bytes are those of the manifest, and its index is the set's.

        Raises:
            DataError: the index cannot be had.
        """
        where = store.where(shard.name)
        path = folder() / f"{_key(where, shard.sha256)}.tar"
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            index = path.with_suffix(".tar.idx").read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:  # of the disk
            sha256, index = f"not readable: {error.strerror}", b""
        if sha256 == shard.sha256 and index == read_index(shard, home, store):
            return
        log.warning("the cache's copy of %s is damaged and fetched again", where)
        path.unlink(missing_ok=True)
        path.with_suffix(".tar.idx").unlink(missing_ok=True)

    def _fetch(self, key: str, store: Remote, shard: Shard, home: Folder | Remote) -> Found:
        where = store.where(shard.name)
        path = folder() / f"{key}.part"
        part = _claim(path)
        try:
            if opened := self._held(key, shard, where):  # by whom was waited for
                return Found(opened, 0, False)
            index = read_index(shard, home, store)
            if shard.bytes + len(index) > self.limit:
                raise DataError(
                    f"{where} has {shard.bytes:,} bytes and the cache holds {self.limit:,}; enlarge data.cache"
                )
            self._make_room(shard.bytes + len(index), part)
            fetched = _download(store, shard, part)
            opened = ShardReader(os.dup(part), index, shard, where)
            opened.check()
            path.with_suffix(".tar").unlink(
                missing_ok=True
            )  # if any, damaged; and nobody reads the index before its shard
            _write(path.with_suffix(".tar.idx"), index)
            path.rename(path.with_suffix(".tar"))
            _use(part)
            return Found(opened, fetched + len(index), False)
        finally:
            _release(part, path)

    def _make_room(self, need: int, part: int | None = None) -> None:
        """Remove shards until `need` bytes more fit in, and allot them to `part`."""
        while True:
            lock = _claim(folder() / "lock")
            try:
                kept, parts = _contents()
                total = sum(size for _, size, _ in kept) + sum(size for _, size in parts)
                for _, size, path in kept:
                    if total + need <= self.limit:
                        break
                    log.info("%s makes room", path)
                    path.unlink(missing_ok=True)
                    path.with_suffix(".tar.idx").unlink(missing_ok=True)
                    total -= size
                if part is None:
                    return
                if total + need <= self.limit:
                    os.ftruncate(part, need)
                    return
            finally:
                os.close(lock)
            # the downloads of others take up the rest: their shards can go once they are whole
            os.close(_claim(parts[0][0]))

    def _unwritable(self, error: OSError, where: str) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"no room for {where} in the cache" if full else f"{where} cannot be cached"
        way_out = f"make room there, set data.cache below {self.limit:,} bytes" if full else "make it writable"
        return DataError(f"{what} {folder()} ({error.strerror}); {way_out}, or set VIMSCALE_CACHE to another folder")


def _contents() -> tuple[list[_Entry], list[tuple[Path, int]]]:
    """Shards in the cache, least recently used first, and parts that are being downloaded; dead ones are removed."""
    kept, parts = [], []
    for entry in os.scandir(folder()):
        try:
            size, used = entry.stat().st_size, entry.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        path = Path(entry.path)
        if path.suffix == ".tar":
            index = path.with_suffix(".tar.idx")
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
    """Remove the part if no process works on it."""
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
    """The file `path`, made or emptied, for this thread alone of all on this machine; waits until it can be had."""
    path.parent.mkdir(0o700, parents=True, exist_ok=True)  # what is in it may need a key where it came from
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        if _is(descriptor, path):
            os.ftruncate(descriptor, 0)  # of what a dead process wrote
            return descriptor
        os.close(descriptor)  # it was renamed or removed by the one who had it


def _release(descriptor: int, path: Path) -> None:
    """Give a claim up, and remove the file unless it got another name."""
    if _is(descriptor, path):
        path.unlink()
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a duplicate lives on
    os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _use(descriptor: int) -> None:
    """Said with the time of writing: that of access is not kept everywhere, and the kernel's clock ticks too slowly."""
    os.utime(descriptor, ns=(now := time.time_ns(), now))


def _key(where: str, sha256: str) -> str:
    """Shards of the same name elsewhere, or of other content, are others."""
    return hashlib.sha256(f"{where}\n{sha256}".encode()).hexdigest()


def read_index(shard: Shard, home: Folder | Remote, store: Folder | Remote) -> bytes:
    """The shard's index, which stands at `home` beside the manifest, or at `store` beside the shard.

    Raises:
        DataError: it is at neither place, or of another shard.
    """
    name = f"{shard.name}.idx"
    try:
        index = home.get(name)
    except Missing:
        try:
            index = store.get(name)
        except Missing:
            way_out = "upload it, or write it with `vimscale data index`"
            raise DataError(f"{store.where(shard.name)} has no index (.idx) beside it; {way_out}") from None
    offsets(index, shard, store.where(shard.name))
    return index


def _download(store: Remote, shard: Shard, part: int) -> int:
    """Write the shard's bytes to the file `part`, and say how many were fetched."""
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
        f" bytes of sha256 {shard.sha256}; upload the shard again, or write the manifest anew"
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def local_copy(url: str, cache: str = "100GB") -> Path:
    """The file `url` on this machine: itself if it is there, else fetched into the node's cache, anew each time.

    Raises:
        DataError: it cannot be had.
    """
    place, _, name = url.rpartition("/")
    store = open_store(place) if "://" in place else Folder(Path(url).parent)
    if isinstance(store, Folder):
        return store.path / Path(url).name
    limit = size_bytes(cache)
    assert limit is not None
    return Cache(limit).copy(store, name)


class Ahead:
    """Fetches what is wanted soon, in the background, and forgets what was asked for earlier and has not begun."""

    def __init__(self, fetch: Callable[[int], None], threads: int = 4):
        self._fetch = fetch
        self._threads = threads
        self._running = 0
        self._wanted: deque[int] = deque()
        self._lock = threading.Lock()

    def want(self, numbers: Iterable[int]) -> None:
        with self._lock:
            self._wanted = deque(numbers)
            for _ in range(min(self._threads - self._running, len(self._wanted))):
                self._running += 1
                threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    return
                number = self._wanted.popleft()
            try:
                self._fetch(number)
            except DataError as error:  # whoever reads the shard tries again, and raises
                log.warning("fetching ahead: %s", error)
