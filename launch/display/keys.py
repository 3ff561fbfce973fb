"""Keys that are pressed while a command draws."""

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Self


class Keys:
    """Reads single keys from the terminal, which gets its settings back at the end. Ctrl-C stays a signal."""

    def __enter__(self) -> Self:
        self._terminal = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._terminal)
        tty.setcbreak(self._terminal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def read(self, timeout_s: float) -> str:
        """Wait for a key. Return it, Ctrl-D if the terminal is gone, or nothing after `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            if select.select([self._terminal], [], [], left)[0]:
                return os.read(self._terminal, 1).decode(errors="replace") or "\x04"
        return ""
