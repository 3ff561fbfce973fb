"""The mirror of a run's checkpoints: a folder, or an address such as s3://bucket/runs.

    MIRROR/NAME/step_00002000/   the same files

There, too, a checkpoint is complete or absent: a folder gets its name when it is complete; at an address the manifest
comes last.
"""

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vimscale.checkpoint import retention
from vimscale.errors import CheckpointError, DataError
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.heartbeat import heartbeat
from vimscale.storage import files, untrusted
from vimscale.storage.addresses import shown
from vimscale.storage.store import WRITTEN, Folder, Remote, Web, open_store, with_secrets

log = logging.getLogger(__name__)


class CheckpointStore(Protocol):
    """Checkpoints of one run, by name. All methods raise OSError or DataError."""

    def where(self, checkpoint: str) -> str:
        """The checkpoint's path or address, for messages."""
        ...

    def names(self) -> list[str]:
        """Names of checkpoints with a manifest, newest first."""
        ...

    def begin(self, checkpoint: str) -> None:
        """Remove what an earlier attempt left."""
        ...

    def put(self, checkpoint: str, name: str, content: Path | bytes) -> None:
        """Write the file `name` of a checkpoint that is not finished."""
        ...

    def finish(self, checkpoint: str, listing: bytes) -> None:
        """Write its manifest, `listing`: from now on the checkpoint exists."""
        ...

    def read(self, checkpoint: str, name: str) -> Iterator[bytes]:
        """Yield a file's content, piece by piece."""
        ...

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint; a crash leaves no partial one."""
        ...


class _Folder:
    def __init__(self, path: Path):
        self._path = path

    def where(self, checkpoint: str) -> str:
        return str(self._path / checkpoint)

    def _partial(self, checkpoint: str) -> Path:
        return self._path / f".{checkpoint}.partial"

    def names(self) -> list[str]:
        return [path.name for path in run_folder.checkpoints(self._path)]

    def begin(self, checkpoint: str) -> None:
        for leftover in self._path.glob(".step_*"):
            shutil.rmtree(leftover)

    def put(self, checkpoint: str, name: str, content: Path | bytes) -> None:
        target = self._partial(checkpoint) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.writelines(files.pieces(content))
        files.sync(target)

    def finish(self, checkpoint: str, listing: bytes) -> None:
        self.put(checkpoint, manifest.NAME, listing)
        files.sync(self._partial(checkpoint))
        if (self._path / checkpoint).exists():
            self.remove(checkpoint)
        self._partial(checkpoint).rename(self._path / checkpoint)
        files.sync(self._path)

    def read(self, checkpoint: str, name: str) -> Iterator[bytes]:
        return files.pieces(self._path / checkpoint / name)

    def remove(self, checkpoint: str) -> None:
        retention.remove(self._path / checkpoint)


class _Address:
    def __init__(self, remote: Remote):
        self._remote = remote

    def where(self, checkpoint: str) -> str:
        return self._remote.where(checkpoint)

    def names(self) -> list[str]:
        found = [name.split("/") for name in self._remote.listed()]
        complete = {parts[0] for parts in found if len(parts) == 2 and parts[1] == manifest.NAME}
        return run_folder.newest_first(name for name in complete if run_folder.is_checkpoint(name))

    def begin(self, checkpoint: str) -> None:
        self.remove(checkpoint)

    def put(self, checkpoint: str, name: str, content: Path | bytes) -> None:
        self._remote.put(f"{checkpoint}/{name}", content)

    def finish(self, checkpoint: str, listing: bytes) -> None:
        self.put(checkpoint, manifest.NAME, listing)

    def read(self, checkpoint: str, name: str) -> Iterator[bytes]:
        for piece in self._remote.stream(f"{checkpoint}/{name}"):
            heartbeat.moved += len(piece)
            yield piece

    def remove(self, checkpoint: str) -> None:
        mine = [name for name in self._remote.listed() if name.startswith(f"{checkpoint}/")]
        for name in sorted(mine, key=lambda name: not name.endswith(manifest.NAME)):  # the manifest first
            self._remote.delete(name)


def open_mirror(address: str | None, run: str) -> CheckpointStore | None:
    """Open the mirror of this run's checkpoints under `address`, a recipe's `checkpoint.mirror`; None if it has none.

    Raises:
        CheckpointError: it is not an address that can be written to.
    """
    if address is None:
        return None
    try:
        opened = open_store(f"{with_secrets(address).rstrip('/')}/{run}")
    except DataError as error:
        raise CheckpointError(f"checkpoint.mirror {shown(address)}: {error}") from None
    if isinstance(opened, Folder):
        return _Folder(opened.path)
    if isinstance(opened, Web):
        raise CheckpointError(f"checkpoint.mirror {shown(address)}: a web server cannot be written to; {WRITTEN}")
    return _Address(opened)


def faults(store: CheckpointStore, name: str) -> Iterator[str]:
    """Yield what is wrong with a checkpoint in a mirror; reads all of its files.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    try:
        entries = manifest.entries(_read_small(store, name, manifest.NAME), store.where(name))
    except (OSError, DataError, ValueError) as error:
        yield f"{manifest.NAME} cannot be read ({error})"
        return
    found = False
    for entry in entries:
        try:
            if not manifest.holds(entry, _limited(entry["bytes"], store.read(name, entry["name"]))):
                found = True
                yield f"{entry['name']} does not have the sha256 it was written with"
        except (OSError, DataError) as error:
            found = True
            yield f"{entry['name']} cannot be read ({error})"
    if not found and (fault := _name_fault(store, name)) is not None:
        yield fault


def _name_fault(store: CheckpointStore, name: str) -> str | None:
    try:
        return run_folder.misnamed(name, _read_small(store, name, "trainer.json"))
    except (OSError, DataError) as error:
        return f"trainer.json cannot be read ({error})"


def has(store: CheckpointStore, name: str, train_state: bytes) -> bool:
    """Whether the mirror has an intact checkpoint of this very state, the content of its trainer.json. Then nothing is
    written, and the mirror is never without it.
    """
    if name not in store.names():
        return False
    try:
        same = _read_small(store, name, "trainer.json") == train_state
    except (OSError, DataError):
        return False
    return same and next(faults(store, name), None) is None


def fetch(store: CheckpointStore, name: str, folder: Path) -> None:
    """Copy a checkpoint from a mirror into a run's folder. It is not verified yet: whoever uses it does that.

    Raises:
        OSError, DataError: it cannot be read, or not written.
    """
    partial = folder / f".{name}.fetched"
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        _fetch_file(store, name, manifest.NAME, untrusted.SMALL, partial)
        for entry in _entries(partial):
            _fetch_file(store, name, entry["name"], entry["bytes"], partial)
        files.sync(partial)
        partial.rename(folder / name)
        files.sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_small(store: CheckpointStore, checkpoint: str, name: str) -> bytes:
    return b"".join(_limited(untrusted.SMALL, store.read(checkpoint, name)))


def _limited(most: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pass on pieces of a file that may have no end.

    Raises:
        OSError: there are more than `most` bytes.
    """
    for piece in pieces:
        if (most := most - len(piece)) < 0:
            raise OSError("it has more bytes than it may have")
        yield piece


def _fetch_file(store: CheckpointStore, checkpoint: str, name: str, most: int, folder: Path) -> None:
    with (folder / name).open("wb") as file:
        file.writelines(_limited(most, store.read(checkpoint, name)))
    files.sync(folder / name)


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        return manifest.files(folder)
    except ValueError as error:
        raise OSError(f"{manifest.NAME} cannot be read ({error})") from None


class Copier:
    """Copies checkpoints to a mirror in a thread, newest first. It skips one that is no longer the newest, unless that
    is kept for good.
    """

    def __init__(self, store: CheckpointStore, rules: Checkpoint):
        self._store, self._rules = store, rules
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: list[Path] = []
        self._current: Path | None = None

    def offer(self, checkpoint: Path) -> None:
        """Copy a checkpoint when its turn comes; returns at once."""
        with self._lock:
            self._waiting = [path for path in self._waiting if retention.kept_for_good(path.name, self._rules)]
            self._waiting.append(checkpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint-copy")
                self._thread.start()

    def needed(self) -> set[str]:
        """Names of the checkpoints that must not be removed yet."""
        with self._lock:
            return {path.name for path in (self._current, *self._waiting) if path is not None}

    def wait(self) -> None:
        """Wait until every offered checkpoint is copied, skipped or has failed."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._current = self._waiting.pop() if self._waiting else None
                if self._current is None:
                    self._thread = None
                    return
            try:
                self._copy(self._current)
            except (OSError, DataError, CheckpointError) as error:
                where = self._store.where(self._current.name)
                log.warning("checkpoint %s could not be copied to %s: %s", self._current, where, error)

    def _copy(self, checkpoint: Path) -> None:
        name = checkpoint.name
        if not has(self._store, name, (checkpoint / "trainer.json").read_bytes()):
            self._store.begin(name)
            for entry in _entries(checkpoint):
                self._store.put(name, entry["name"], checkpoint / entry["name"])
            self._store.finish(name, (checkpoint / manifest.NAME).read_bytes())
        for old in retention.surplus(self._store.names(), self._rules):
            self._store.remove(old)
