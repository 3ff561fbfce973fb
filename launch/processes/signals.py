"""Ctrl-C, SIGTERM and SIGUSR1: requests to stop a command, and what a request means at each moment."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

_C_CODE_S = 1.0
"""How long C code may keep the main thread from handling a signal."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """A stop was requested while there is nothing to save. Exit code 3."""

    exit_code = 3


class StopSignal:
    """Collects requests to stop. SIGINT or SIGTERM requests a checkpoint and then an end; another one more than a
    second later requests an end at once.

    Signals within that second count as one request: timeout(1) and Slurm signal both a process and its group. SIGUSR1,
    which Slurm is often configured to send some time before its SIGTERM, requests a checkpoint and an end, never more.
    The run's time limit, `after` seconds from now, does the same.
    """

    def __init__(self, after: float = float("inf")) -> None:
        self.count = 0
        """Requests so far by SIGINT or SIGTERM."""
        self._limit = time.monotonic() + after
        self._warned = False
        self._last = -1.0
        self._raises = False

    @property
    def asked(self) -> bool:
        """Whether a stop was requested, by any signal or by the time limit."""
        return self._warned or self.count > 0 or time.monotonic() > self._limit

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside this context. Outside of the main thread this does nothing."""
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
        """Inside this context there is nothing to save, and a signal interrupts whatever the main thread does. If the
        main thread is in C code that does not return within a second, call `last_act` and end the process.

        Raises:
            Stopped: a stop is requested, or was requested before.
        """
        before, self._raises = self._raises, True
        try:
            with self._forcing(last_act) if last_act is not None else nullcontext():
                if self.asked:
                    raise Stopped
                yield
        except Exception as error:
            if not self.asked:
                raise
            raise Stopped from error  # C code turned Stopped into an exception of its own
        finally:
            self._raises = before

    @contextmanager
    def _forcing(self, last_act: Callable[[], object]) -> Iterator[None]:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        finished = threading.Event()

        def force() -> None:
            with open(reader, "rb", buffering=0) as signals:
                if not signals.read(1) or finished.wait(_C_CODE_S) or self.asked:
                    return
            last_act()
            os.write(2, b"stopped on request\n")
            os._exit(Stopped.exit_code)

        before = signal.set_wakeup_fd(writer)  # Python's own C code writes to it
        threading.Thread(target=force, daemon=True, name="stop").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            finished.set()
            os.close(writer)

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
