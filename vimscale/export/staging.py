"""Write a folder completely or not at all, and replace an older export by it."""

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vimscale.errors import CheckpointError
from vimscale.storage import files

REPORT = "parity.json"
"""In every export; its "files" are what the folder holds besides."""
_OLDER = {"config.json", "model.safetensors", "objective.safetensors", "model.pth", "preprocessing.json"}
"""Files of exports that have no REPORT."""
_OLD, _LOCK = "old", "lock"
_MOST = 1 << 20
"""Bytes of free space below which a disk counts as full."""


def check(target: Path) -> None:
    """Refuse to write to `target` what would replace something else than an export.

    Raises:
        CheckpointError: it is a file, holds files of somebody else's, or is the current folder or holds it.
    """
    if target.is_file():
        raise CheckpointError(f"{target} is a file, and the model's folder would have its name; give another --output")
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} is the current folder, or holds it; name a new one with --output")
    if foreign := sorted(_found(target) - _of_export(target)):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise CheckpointError(
            f"{target} holds {', '.join(foreign[:3])}{more}, which no export wrote, and an export replaces the whole"
            " folder; move them, or give another --output"
        )


def contents(folder: Path) -> list[str]:
    """List the files in a folder and below it, by their paths in it."""
    return sorted(_found(folder) - {REPORT})


def _found(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def _of_export(folder: Path) -> set[str]:
    try:
        names = json.loads((folder / REPORT).read_bytes())["files"]
        return {REPORT, *map(str, names)}
    except FileNotFoundError:
        return _OLDER
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


@dataclass
class Staging:
    """A folder that takes the place of another one once it is complete."""

    folder: Path
    """Where to write; it has the name of the target."""
    target: Path
    """What it replaces; can be set to another path in the same folder."""


@contextmanager
def replacing(target: Path) -> Iterator[Staging]:
    """Give an empty folder to write to; at the end it takes the place of `target`, whose parents are made. If anything
    fails before that, what was there stays. A process that is killed leaves `.NAME.partial-PID` next to it, which the
    next call removes.

    Raises:
        CheckpointError: see `check`.
        OSError: names the file, as it would be called in `target`.
    """
    check(target)
    target = target.resolve()
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    staged = staging / target.name
    lock: IO[str] | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        staging.mkdir()
        lock = (staging / _LOCK).open("a")
        _lock(lock)
        staged.mkdir()
        made = Staging(staged, target)
        yield made
        for path in [*staged.rglob("*"), staged]:
            files.sync(path)
        check(made.target)
        _swap(staged, made.target)
        files.sync(target.parent)
    except OSError as error:
        _rename(error, staged, target)
        _rename(error, staging, target)
        raise
    except CheckpointError:
        raise
    except Exception as error:  # libraries of formats report a full disk in their own words
        full = _full(staging)
        if full is None:
            raise
        raise OSError(full, os.strerror(full), str(target)) from error
    finally:
        if lock is not None:
            lock.close()
        with suppress(OSError):  # the first error says why
            if staging.is_dir():
                shutil.rmtree(staging)


def _clear(target: Path) -> None:
    """Remove what killed exports to `target` left; one that was between two renames gives back what was there."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        try:
            with (left / _LOCK).open("a") as lock:
                if not _lock(lock):
                    continue
                if (left / _OLD).is_dir() and not target.exists():
                    (left / _OLD).rename(target)
                shutil.rmtree(left)
        except OSError:
            continue  # another user's, or another export removes it


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _swap(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; what was there is then in the folder of `staged`."""
    if not target.exists():
        staged.rename(target)
        return
    if _exchange(staged, target):
        return
    old = staged.with_name(_OLD)
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _rename(error: OSError, staged: Path, target: Path) -> None:
    """Let the error name a file as it would be called in `target`."""
    for name in ("filename", "filename2"):
        if (path := getattr(error, name)) is not None and Path(os.fsdecode(path)).is_relative_to(staged):
            setattr(error, name, str(target / Path(os.fsdecode(path)).relative_to(staged)))
    if error.filename is None and error.errno is not None:
        error.filename = str(target)


def _full(folder: Path) -> int | None:
    """ENOSPC if the disk of a folder is full; EFBIG if a file in it has reached the limit of this process."""
    if shutil.disk_usage(folder).free < _MOST:
        return errno.ENOSPC
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return errno.EFBIG if limit >= 0 and any(size >= limit for size in sizes) else None
