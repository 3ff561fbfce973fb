"""The second place of a run's checkpoints: a folder, or an address such as s3://bucket/runs; whole or not there too.

PLACE/NAME/step_00002000/   the same files; a folder is renamed when it is whole, at an address the manifest is last
"""

import logging
import shutil
import threading
from pathlib import Path
from typing import Protocol

from vimscale import manifest, run_folder
from vimscale.data.store import WRITTEN, Folder, Remote, Web, open_store, shown
from vimscale.errors import CheckpointError, DataError

log = logging.getLogger(__name__)


class Place(Protocol):
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

    def get(self, checkpoint: str, name: str, target: Path) -> None: ...

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
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content)
        manifest.sync(target)

    def finish(self, checkpoint: str, listing: bytes) -> None:
        self.put(checkpoint, manifest.NAME, listing)
        manifest.sync(self._partial(checkpoint))
        if (self._path / checkpoint).exists():
            self.remove(checkpoint)
        self._partial(checkpoint).rename(self._path / checkpoint)
        manifest.sync(self._path)

    def get(self, checkpoint: str, name: str, target: Path) -> None:
        shutil.copyfile(self._path / checkpoint / name, target)

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
        return sorted((name for name in whole if name.startswith("step_")), reverse=True)

    def begin(self, checkpoint: str) -> None:
        self.remove(checkpoint)

    def put(self, checkpoint: str, name: str, content: Path | bytes) -> None:
        self._remote.put(f"{checkpoint}/{name}", content)

    def finish(self, checkpoint: str, listing: bytes) -> None:
        self.put(checkpoint, manifest.NAME, listing)

    def get(self, checkpoint: str, name: str, target: Path) -> None:
        with target.open("wb") as file:
            file.writelines(self._remote.stream(f"{checkpoint}/{name}"))

    def remove(self, checkpoint: str) -> None:
        mine = [name for name in self._remote.listed() if name.startswith(f"{checkpoint}/")]
        for name in sorted(mine, key=lambda name: not name.endswith(manifest.NAME)):  # the manifest first
            self._remote.delete(name)


def open_place(second: str | None, run: str) -> Place | None:
    """The place of this run's checkpoints under a recipe's `checkpoint.second`.

    Raises:
        CheckpointError: it is no address that can be written to.
    """
    if second is None:
        return None
    try:
        opened = open_store(f"{second.rstrip('/')}/{run}")
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


def fetch(place: Place, name: str, folder: Path) -> None:
    """Bring a checkpoint into a run's folder, where it is looked at before it is used like any other.

    Raises:
        OSError, DataError: it cannot be had.
    """
    partial = folder / f".{name}.fetched"
    partial.mkdir(parents=True)
    try:
        place.get(name, manifest.NAME, partial / manifest.NAME)
        for entry in _entries(partial):
            place.get(name, entry, partial / entry)
            manifest.sync(partial / entry)
        manifest.sync(partial)
        partial.rename(folder / name)
        manifest.sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _entries(folder: Path) -> list[str]:
    try:
        return [entry["name"] for entry in manifest.files(folder)]
    except ValueError as error:
        raise OSError(f"{manifest.NAME} cannot be read ({error})") from None


class Copier:
    """Copies checkpoints to the second place in a thread; one that is no longer the newest is passed over."""

    def __init__(self, place: Place, keep: int, keep_every: int | None):
        self._place, self._keep, self._keep_every = place, keep, keep_every
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: Path | None = None
        self._now: Path | None = None

    def offer(self, checkpoint: Path) -> None:
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint-copy")
                self._thread.start()

    def needed(self) -> set[str]:
        """Checkpoints that must not be removed yet."""
        with self._lock:
            return {path.name for path in (self._now, self._next) if path is not None}

    def wait(self) -> None:
        """Until everything offered is copied or given up."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._now, self._next = self._next, None
                if self._now is None:
                    self._thread = None
                    return
            try:
                self._copy(self._now)
            except (OSError, DataError) as error:
                where = self._place.where(self._now.name)
                log.warning("checkpoint %s could not be copied to %s: %s", self._now, where, error)

    def _copy(self, checkpoint: Path) -> None:
        self._place.begin(checkpoint.name)
        for name in _entries(checkpoint):
            self._place.put(checkpoint.name, name, checkpoint / name)
        self._place.finish(checkpoint.name, (checkpoint / manifest.NAME).read_bytes())
        for name in run_folder.surplus(self._place.names(), self._keep, self._keep_every):
            self._place.remove(name)
