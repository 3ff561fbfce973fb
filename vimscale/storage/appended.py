"""An append-only file whose disk may be full for a while."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class Appended:
    """An append-only file. Bytes that cannot be written stay in memory and are written first the next time."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None
        self._left = bytearray()
        self._warned = False

    def add(self, data: bytes) -> None:
        self._left += data
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            while self._left:
                del self._left[: os.write(self._descriptor, self._left)]
        except OSError as error:
            if not self._warned:
                log.warning("%s could not be written: %s; tried again with each row", self._path, error.strerror)
            self._warned = True

    def close(self) -> None:
        self.add(b"")
        if self._left:
            log.warning("%s lacks its last %d bytes, which could not be written", self._path, len(self._left))
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
