"""Write files completely or not at all; errors name the file."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vimscale.runtime.heartbeat import heartbeat

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a machine that lacks space or fails, although the path is right."""

_PIECE = 1 << 20


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pieces(content: Path | bytes) -> Iterator[bytes]:
    """Yield content in pieces, and count their bytes in the heartbeat."""
    if isinstance(content, bytes):
        for start in range(0, len(content), _PIECE):
            heartbeat.moved += len(piece := content[start : start + _PIECE])
            yield piece
        return
    with content.open("rb") as file:
        while piece := file.read(_PIECE):
            heartbeat.moved += len(piece)
            yield piece


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file: write and close, which meet a full disk, do not know the name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; at the end it replaces `path`. If that fails, the file there stays.

    Raises:
        OSError: with a file's name.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with naming(path):
        try:
            yield partial
            partial.replace(path)
        except OSError as error:
            if error.filename == str(partial) and error.filename2 is None:
                error.filename = str(path)
            raise
        finally:
            with suppress(OSError):  # the first error says why
                partial.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file: afterwards it is complete, or as it was before.

    Raises:
        OSError: with the file's name.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write a safetensors file: afterwards it is complete, or as it was before.

    Raises:
        OSError: with the file's name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial)
            partial.chmod(mode)  # the library's files are readable by their owner only
        except SafetensorError as error:  # the library reports the system's error in its text only
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def refusal(error: OSError) -> str:
    """Explain an OSError that names a file: the file, what happened, and the fix."""
    fix = _FIXES.get(error.errno or 0, "choose another path")
    copied = error.filename2 is not None and error.errno in (*FULL, errno.EROFS)
    return f"{error.filename2 if copied else error.filename}: {error.strerror}; {fix}"


_PERMISSION = "choose another path, or change its permissions"
_ROOM = "free space there, or choose another path"
_FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "files may not grow that large there (ulimit -f); raise the limit, or choose another path",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EEXIST: "it is in the way; move it, or choose another path",
    errno.ENOTDIR: "a file is where a folder is needed; move it, or choose another path",
    errno.EISDIR: "it is a folder and a file is needed; name a file",
    errno.ENOENT: "its folder does not exist (any more); create it, or choose another path",
}
