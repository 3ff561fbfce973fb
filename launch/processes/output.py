"""Standard output and standard error of a run: a write that fails is dropped and does not end the run."""

import io
import os
from typing import Any, TextIO


def lossy(stream: TextIO) -> TextIO:
    """Return a stream to the same file whose `write` and `flush` never fail: a reader that has gone away or a full disk
    must not end a run. The first failure is reported on standard error. A stream without a file is returned unchanged.
    """
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError):  # closed from the start, or in memory
        return stream
    return writer(descriptor, stream.encoding)


def writer(descriptor: int, encoding: str = "utf-8") -> TextIO:
    """Return such a stream to a descriptor. The descriptor stays open when the stream is closed."""
    raw: Any = _Lossy(descriptor)
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", write_through=True)


class _Lossy(io.RawIOBase):
    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        try:
            _write_all(self._descriptor, data)
        except OSError as error:
            if not self._failed and self._descriptor != _STDERR:
                self._failed = True
                self._report(error)
        return len(data)

    def _report(self, error: OSError) -> None:
        text = f"standard output cannot be written ({error.strerror}); the run continues, and what it prints is lost\n"
        try:
            _write_all(_STDERR, text.encode())
        except OSError:
            return  # there is nowhere left to report it


_STDERR = 2


def _write_all(descriptor: int, data: Any) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
