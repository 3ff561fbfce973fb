"""Keeps a run going: starts a group of ranks, watches it, starts it anew when ranks are lost, says how it ended.

Knows ranks and checkpoints, nothing of tensors; how processes are made is the group's business (on_ray, on_local).
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from vimscale.errors import RunFailed, UserError
from vimscale.run_folder import RunFolder

from .progress import Progress
from .rank import Ending, Event

RESTARTS = 3
"""Times in a row that a group is started anew without a new checkpoint in between."""
_GRACE_S = 3.0
"""How long other ranks are heard once one has failed: the first to report is often not the first to fail."""


class Group(Protocol):
    """A set of ranks training one recipe."""

    size: int

    def start(self) -> None: ...

    def poll(self, timeout: float) -> list[Event | Ending]:
        """What has come from the ranks since, waiting up to `timeout` seconds for something."""
        ...

    def request_stop(self) -> None: ...

    def kill(self) -> None:
        """End what is left of it. May be called at any time, and twice."""
        ...


class StopSignal:
    """SIGINT and SIGTERM ask for a checkpoint and an end; a second later, for an end at once.

    What comes within that second is the same wish: timeout(1) and Slurm signal a process and its group.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last = -1.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._received) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > 1.0:
            self.count += 1
        self._last = now


def supervise(make_group: Callable[[], Group], folder: RunFolder, stop: StopSignal, progress: Progress) -> int:
    """Run to the end; returns the exit code: 0 finished, 3 stopped on request with a checkpoint saved.

    Raises:
        UserError: a rank found the input wrong.
        RunFailed: the run cannot go on; the message names the first cause.
    """
    restarts = 0
    while True:
        group = make_group()
        try:
            with stop.installed():
                group.start()
                endings, saved = _watch(group, stop, progress)
        finally:
            group.kill()
        if stop.count > 1:
            raise RunFailed("ended at once, as asked; the same command goes on from the last checkpoint")
        failures = [ending for ending in endings if ending.status == "failed"]
        if not failures:
            return 0 if endings[0].status == "done" else 3

        first = first_cause(failures)
        if first.cause == "user":
            raise UserError(first.message)
        if first.cause == "run":
            raise RunFailed(first.message)
        message = f"rank {first.rank}: {first.message}"
        if first.traceback:
            with folder.errors.open("a") as file:
                file.write(f"{message}\n{first.traceback}\n")
        if first.cause == "error":
            raise RunFailed(f"{message}\n  traceback: {folder.errors}")
        restarts = 1 if saved else restarts + 1
        if restarts > RESTARTS:
            raise RunFailed(
                f"{message}\n  {RESTARTS} restarts came no further; output of the ranks: {folder.path}/logs"
            )
        progress.note("warning", f"{message}; starting again from the last checkpoint (try {restarts} of {RESTARTS})")


def first_cause(failures: list[Ending]) -> Ending:
    """The failure that the others follow from: a death before an exception before the loss of a peer."""
    order = ("died", "user", "run", "error", "lost")
    return min(failures, key=lambda ending: (order.index(ending.cause or "lost"), ending.time))


def _watch(group: Group, stop: StopSignal, progress: Progress) -> tuple[list[Ending], bool]:
    """(how ranks ended, whether a checkpoint was written): when all have ended, or some time after one failed."""
    endings: list[Ending] = []
    saved = asked = False
    deadline = float("inf")
    while len(endings) < group.size and time.monotonic() < deadline and stop.count < 2:
        if stop.count and not asked:
            progress.note("info", "stopping: finishing the step and saving a checkpoint (Ctrl-C again ends at once)")
            group.request_stop()
            asked = True
        for report in group.poll(timeout=0.2):
            if isinstance(report, Ending):
                endings.append(report)
                if report.status == "failed":
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            else:
                saved = saved or report["kind"] == "checkpoint"
                progress.show(report)
    return endings, saved
