"""The second place of a run's checkpoints: a folder, or an address such as s3://bucket/runs; whole or not there too.

PLACE/NAME/step_00002000/   the same files; a folder is renamed when it is whole, at an address the manifest is last
"""

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from vimscale.errors import CheckpointError, DataError
from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.heartbeat import heartbeat
from vimscale.storage import files, untrusted
from vimscale.storage.addresses import shown
from vimscale.storage.store import WRITTEN, Folder, Remote, Web, open_store, with_secrets

log = logging.getLogger(__name__)


class CheckpointStore(Protocol):
    """Where checkpoints of one run are, by their names. All methods raise OSError or DataError."""

    def where(self, checkpoint: str) -> str:
        """Its path or address, for messages."""
        ...

    def names(self) -> list[str]:
        """Those with a manifest, newest first."""
        ...

    def begin(self, checkpoint: str) -> None:
        """Take away what is left of an earlier try."""
        ...

    def put(self, checkpoint: str, name: str, content: Path | bytes) -> None: ...

    def finish(self, checkpoint: str, listing: bytes) -> None:
        """Make it exist: its manifest comes last."""
        ...

    def read(self, checkpoint: str, name: str) -> Iterator[bytes]:
        """A file's content, piece by piece."""
        ...

    def remove(self, checkpoint: str) -> None: ...


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
        remove(self._path / checkpoint)


class _Address:
    def __init__(self, remote: Remote):
        self._remote = remote

    def where(self, checkpoint: str) -> str:
        return self._remote.where(checkpoint)

    def names(self) -> list[str]:
        found = [name.split("/") for name in self._remote.listed()]
        whole = {parts[0] for parts in found if len(parts) == 2 and parts[1] == manifest.NAME}
        return sorted((name for name in whole if run_folder.is_checkpoint(name)), reverse=True)

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


def open_mirror(second: str | None, run: str) -> CheckpointStore | None:
    """The place of this run's checkpoints under a recipe's `checkpoint.second`.

    Raises:
        CheckpointError: it is no address that can be written to.
    """
    if second is None:
        return None
    try:
        opened = open_store(f"{with_secrets(second).rstrip('/')}/{run}")
    except DataError as error:
        raise CheckpointError(f"checkpoint.second {shown(second)}: {error}") from None
    if isinstance(opened, Folder):
        return _Folder(opened.path)
    if isinstance(opened, Web):
        raise CheckpointError(f"checkpoint.second {shown(second)}: web servers are only read; {WRITTEN}")
    return _Address(opened)


def remove(checkpoint: Path) -> None:
    """In two steps, so that a crash leaves no half checkpoint under a checkpoint's name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def remove_after(checkpoint: Path) -> None:
    """Remove what is newer than a checkpoint that the run goes back to, and was saved on the way that it leaves."""
    for path in run_folder.checkpoints(checkpoint.parent):
        if path.name > checkpoint.name:
            remove(path)


def faults(place: CheckpointStore, name: str) -> Iterator[str]:
    """What is wrong with the files of a checkpoint at the second place; reads all of them.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    try:
        entries = manifest.entries(_small(place, name, manifest.NAME), place.where(name))
    except (OSError, DataError, ValueError) as error:
        yield f"{manifest.NAME} cannot be read ({error})"
        return
    found = False
    for entry in entries:
        try:
            if not manifest.holds(entry, _at_most(entry["bytes"], place.read(name, entry["name"]))):
                found = True
                yield f"{entry['name']} does not have the sha256 it was written with"
        except (OSError, DataError) as error:
            found = True
            yield f"{entry['name']} cannot be read ({error})"
    if not found and (fault := _name_fault(place, name)) is not None:
        yield fault


def _name_fault(place: CheckpointStore, name: str) -> str | None:
    try:
        return run_folder.misnamed(name, b"".join(place.read(name, "trainer.json")))
    except (OSError, DataError) as error:
        return f"trainer.json cannot be read ({error})"


def has(place: CheckpointStore, name: str, train_state: bytes) -> bool:
    """Whether this very state, told by its trainer.json, is there and whole: then it is not written again, and no
    instant is without it.
    """
    if name not in place.names():
        return False
    try:
        same = _small(place, name, "trainer.json") == train_state
    except (OSError, DataError):
        return False
    return same and next(faults(place, name), None) is None


def fetch(place: CheckpointStore, name: str, folder: Path) -> None:
    """Bring a checkpoint into a run's folder, where it is looked at before it is used like any other.

    Raises:
        OSError, DataError: it cannot be had.
    """
    partial = folder / f".{name}.fetched"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed meanwhile
    partial.mkdir(parents=True)
    try:
        _bring(place, name, manifest.NAME, untrusted.SMALL, partial)
        for entry in _entries(partial):
            _bring(place, name, entry["name"], entry["bytes"], partial)
        files.sync(partial)
        partial.rename(folder / name)
        files.sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _small(place: CheckpointStore, checkpoint: str, name: str) -> bytes:
    return b"".join(_at_most(untrusted.SMALL, place.read(checkpoint, name)))


def _at_most(most: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, of which there may be no end.

    Raises:
        OSError: there are more than `most` bytes.
    """
    for piece in pieces:
        if (most := most - len(piece)) < 0:
            raise OSError("it has more bytes than it may have")
        yield piece


def _bring(place: CheckpointStore, checkpoint: str, name: str, most: int, folder: Path) -> None:
    with (folder / name).open("wb") as file:
        file.writelines(_at_most(most, place.read(checkpoint, name)))
    files.sync(folder / name)


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        return manifest.files(folder)
    except ValueError as error:
        raise OSError(f"{manifest.NAME} cannot be read ({error})") from None


class Copier:
    """Copies checkpoints to the second place in a thread, the newest first; one that is no longer the newest is passed
    over unless it is kept for good.
    """

    def __init__(self, place: CheckpointStore, rules: Checkpoint):
        self._place, self._rules = place, rules
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: list[Path] = []
        self._now: Path | None = None

    def offer(self, checkpoint: Path) -> None:
        with self._lock:
            self._waiting = [path for path in self._waiting if run_folder.stays(path.name, self._rules)]
            self._waiting.append(checkpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint-copy")
                self._thread.start()

    def needed(self) -> set[str]:
        """Checkpoints that must not be removed yet."""
        with self._lock:
            return {path.name for path in (self._now, *self._waiting) if path is not None}

    def wait(self) -> None:
        """Until everything offered is copied or given up."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._now = self._waiting.pop() if self._waiting else None
                if self._now is None:
                    self._thread = None
                    return
            try:
                self._copy(self._now)
            except (OSError, DataError, CheckpointError) as error:
                where = self._place.where(self._now.name)
                log.warning("checkpoint %s could not be copied to %s: %s", self._now, where, error)

    def _copy(self, checkpoint: Path) -> None:
        name = checkpoint.name
        if not has(self._place, name, (checkpoint / "trainer.json").read_bytes()):
            self._place.begin(name)
            for entry in _entries(checkpoint):
                self._place.put(name, entry["name"], checkpoint / entry["name"])
            self._place.finish(name, (checkpoint / manifest.NAME).read_bytes())
        for old in run_folder.surplus(self._place.names(), self._rules):
            self._place.remove(old)
