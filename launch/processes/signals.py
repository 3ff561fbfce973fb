"""Ctrl-C and its relatives: what asks a command to stop, and what that means at the moment."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

_UNHEARD_S = 1.0
"""How long C code may keep the main thread from a signal."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A stop was asked for where nothing is to be saved. Exit code 3."""

    exit_code = 3


class StopSignal:
    """SIGINT and SIGTERM ask for a checkpoint and an end; a second later, for an end at once.

    What comes within that second is the same request: timeout(1) and Slurm signal a process and its group. SIGUSR1,
    which Slurm is often told to send some time before its SIGTERM, asks for a checkpoint and an end and never for more.
    Nor does the run's time limit, which is `after` seconds from now.
    """

    def __init__(self, after: float = float("inf")) -> None:
        self.count = 0
        self._limit = time.monotonic() + after
        self._warned = False
        self._last = -1.0
        self._raises = False

    @property
    def asked(self) -> bool:
        return self._warned or self.count > 0 or time.monotonic() > self._limit

    @contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self, last_act: Callable[[], object] | None = None) -> Iterator[None]:
        """While this lasts there is nothing to save, and a signal interrupts whatever the main thread does. Where that
        is in C code that does not return within a second, `last_act` is called and the process ends.

        Raises:
            Stopped: a stop is asked for, or was before.
        """
        before, self._raises = self._raises, True
        try:
            with self._insisting(last_act) if last_act is not None else nullcontext():
                if self.asked:
                    raise Stopped
                yield
        except Exception as error:
            if not self.asked:
                raise
            raise Stopped from error  # what C code makes of an exception that it did not expect
        finally:
            self._raises = before

    @contextmanager
    def _insisting(self, last_act: Callable[[], object]) -> Iterator[None]:
        heard, told = os.pipe()
        os.set_blocking(told, False)
        over = threading.Event()

        def insist() -> None:
            with open(heard, "rb", buffering=0) as signals:
                if not signals.read(1) or over.wait(_UNHEARD_S) or self.asked:
                    return
            last_act()
            os.write(2, b"stopped on request\n")
            os._exit(Stopped.exit_code)

        before = signal.set_wakeup_fd(told)  # written to by Python's own C code
        threading.Thread(target=insist, daemon=True, name="stop").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            over.set()
            os.close(told)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._warned = True
        else:
            now = time.monotonic()
            if now - self._last > 1.0:
                self.count += 1
            self._last = now
        if self._raises:
            raise Stopped
