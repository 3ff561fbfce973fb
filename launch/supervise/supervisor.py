"""Keeps a run going: starts a group of ranks, watches it, restarts it when ranks are lost, reports how it ended.

It knows ranks and checkpoints, not tensors. The group knows how to start processes (on_ray, on_local).
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vimscale.errors import RunFailed, UserError
from vimscale.runtime.run_folder import RunFolder, checkpoints

from ..processes.rank import Ending, Event, stacks_file
from ..processes.signals import Stopped, StopSignal
from .evaluations import Evaluations
from .failures import Failures, first_cause, noted
from .progress import Progress
from .watchdog import Watchdog

_HEAR_S = 3.0
"""How long to listen to the other ranks once one has failed: the first to report is often not the first to fail."""
_HEAR_DEATH_S = 0.3
"""The same once a rank has died: a death is the first cause, and the time is better spent on the restart."""
_DUMP_S = 1.0
"""Time for ranks that hang to write their stacks."""
_LEAVING_S = 1.0
"""Interval between checks whether the group must leave its machines."""

Reason = Literal["stop", "grow", "leave"]


@dataclass(frozen=True)
class Policy:
    """Limits of a run; every value can be set on the command line."""

    restarts: int = 10
    within: int = 1000
    """At most `restarts` restarts within `within` steps."""
    hang_after: float | None = None
    """Seconds without progress that are a hang; default: what follows from the time of the run's steps."""
    grace: float | None = None
    """Seconds that ranks have to save and end once a stop is requested; default: as long as they need."""

    @property
    def patience_s(self) -> float:
        """How long ranks wait for each other: a little longer than the watchdog allows."""
        return max(300.0, (self.hang_after or 0.0) + 30.0)


class Group(Protocol):
    """A set of ranks training one recipe."""

    size: int
    """The number of ranks, known once the group is started."""

    def start(self) -> None: ...

    def poll(self, timeout: float) -> list[Event | Ending]:
        """Return what the ranks have sent since the last call; wait up to `timeout` seconds for something."""
        ...

    def request_stop(self) -> None: ...

    def dump_stacks(self) -> None:
        """Have every rank that can do so write its stacks to its `stacks_file`."""
        ...

    def leaving(self) -> str | None:
        """Return why ranks must leave their machines soon, or None."""
        ...

    def room(self) -> int:
        """Return how many ranks a new group would have in place of this one; 0 if it could not start."""
        ...

    def kill(self, *, last: bool = False) -> None:
        """Kill what is left of the group. May be called at any time, and twice. `last`: this process exits with code 3
        next, so that what the group runs on may end with it.
        """
        ...


def supervise(
    make_group: Callable[[], Group],
    folder: RunFolder,
    stop: StopSignal,
    progress: Progress,
    policy: Policy = Policy(),
    evaluations: Evaluations | None = None,
) -> int:
    """Run to the end. Return the exit code: 0 if the run finished, 3 if it stopped on request and saved what it could.
    Before a group's first step there is nothing to save, and the group is killed at once. `evaluations`: those that run
    meanwhile, if the recipe wants that.

    Raises:
        UserError: a rank found the input wrong.
        RunFailed: the run cannot continue; the message names the first cause.
    """
    failures = Failures(folder, policy.restarts, policy.within)
    closing = contextlib.closing(evaluations) if evaluations is not None else contextlib.nullcontext()
    with stop.installed(), noted(folder), closing:
        while True:
            if evaluations is not None:
                evaluations.pause()  # the ranks come first where there is little room
            group = make_group()
            try:
                with stop.at_once(functools.partial(_give_up, group, folder)):
                    group.start()
                watch = _Watch(group, folder, stop, progress, policy, evaluations)
                watch.until_it_ends()
            except Stopped:
                group.kill(last=True)
                return 3
            except BaseException:
                group.kill()
                raise
            group.kill(last=stop.asked and watch.untrained and not watch.endings)
            if stop.count > 1 and not watch.untrained:
                raise RunFailed("ended at once, as requested; the same command resumes from the last checkpoint")
            failed = [ending for ending in watch.endings if ending.status == "failed"]
            if not failed and len(watch.endings) == group.size:
                if watch.endings[0].status == "done":
                    done = evaluations is None or evaluations.finish(watch.endings[0].result, stop)
                    return 0 if done else 3
                if stop.asked or watch.requested is None or not (room := group.room()):
                    return 3
                progress.note("info", f"continuing with {room} instead of {group.size} ranks")
                progress.restart("regrouping")
                continue

            if not failed and watch.untrained:
                return 3
            if not failed:
                raise RunFailed(
                    f"{_ranks(watch.unreported)} did not save and end within {policy.grace:g} s of the request to stop"
                    f" (--grace) and was killed; {how_to_resume(folder)}"
                )
            first = first_cause(failed)
            if first.cause == "user":
                raise UserError(first.message)
            if first.cause == "run":
                raise RunFailed(first.message)
            failures.record(failed, watch.reached, group.size)
            message = f"rank {first.rank}: {first.message}"
            where = f"traceback: {folder.errors}"
            if first.traceback and (problem := _append(folder.errors, f"{message}\n{first.traceback}\n")) is not None:
                where = f"{problem}; the traceback is\n{first.traceback}"
            if first.cause == "error":
                raise RunFailed(f"{message}\n  {where}")
            if stop.asked:
                raise RunFailed(f"{message}, after the request to stop; {how_to_resume(folder)}")
            if (why := failures.hopeless()) is not None:
                raise RunFailed(f"{message}\n  {why}")
            progress.note("warning", f"{message}; restarting from the last checkpoint ({failures.count()})")
            progress.restart("hearing the others")
            _pause(failures.pause(), stop)
            progress.phase("pause")
            if stop.asked:
                return 3


def _give_up(group: Group, folder: RunFolder) -> None:
    group.kill(last=True)
    folder.withdraw()


class _Watch:
    """Watches one group until all of its ranks have ended or there is a reason to kill them."""

    def __init__(
        self,
        group: Group,
        folder: RunFolder,
        stop: StopSignal,
        progress: Progress,
        policy: Policy,
        evaluations: Evaluations | None,
    ):
        self._evaluations = evaluations
        self._group, self._folder, self._stop, self._progress = group, folder, stop, progress
        self._grace = policy.grace
        self._watchdog = Watchdog(group.size, policy.hang_after, time.monotonic())
        self._deadline = float("inf")
        self.endings: list[Ending] = []
        self.reached: dict[int, int | None] = {}
        """The last step that each rank reported as finished."""
        self.requested: Reason | None = None
        """Why the group was requested to stop, if it was."""

    @property
    def unreported(self) -> list[int]:
        """Ranks that have not reported how they ended."""
        return self._watchdog.watched

    @property
    def untrained(self) -> bool:
        """Whether no rank has reported a finished step, so that there is nothing to save."""
        return all(step is None for step in self.reached.values())

    def until_it_ends(self) -> None:
        next_check = time.monotonic() + _LEAVING_S
        while len(self.endings) < self._group.size and time.monotonic() < self._deadline and self._stop.count < 2:
            if self._stop.asked and self.untrained:
                return
            if self._stop.asked and self.requested != "stop":
                self._request(
                    "stop", "stopping: finishing the step and saving a checkpoint (Ctrl-C again ends at once)"
                )
            saved = self._hear()
            if self._evaluations is not None:
                self._evaluations.tend()
            if self.requested is None and saved and (room := self._group.room()) > self._group.size:
                self._request("grow", f"there is room for {room} ranks now")
            if self.requested is None and time.monotonic() > next_check:
                next_check = time.monotonic() + _LEAVING_S
                if (why := self._group.leaving()) is not None:
                    self._request("leave", f"{why}: finishing the step and saving a checkpoint")
            if hung := self._watchdog.hung(time.monotonic()):
                self._dump()
                self.endings += hung
                return

    def _hear(self) -> bool:
        """Process what the ranks have sent; return whether there is a new checkpoint."""
        saved = False
        for report in self._group.poll(timeout=0.2):
            if isinstance(report, Ending):
                self.endings.append(report)
                self._watchdog.ended(report.rank)
                if report.status == "failed":
                    if self._deadline > time.monotonic() + _HEAR_S:
                        self._progress.lap()
                    listen_s = _HEAR_DEATH_S if report.cause == "died" else _HEAR_S
                    self._deadline = min(self._deadline, time.monotonic() + listen_s)
            elif report["kind"] == "heartbeat":
                self._watchdog.heard(report["rank"], report)
                self.reached[report["rank"]] = report["step"]
                if report["rank"] == 0:
                    self._progress.heard(report)
            else:
                saved = saved or report["kind"] == "checkpoint"
                self._progress.show(report)
                if self._evaluations is not None:
                    self._evaluations.heard(report)
        return saved

    def _request(self, reason: Reason, message: str) -> None:
        self._progress.note("info", message)
        self._progress.lap()
        if self.requested is None:
            self._group.request_stop()
        self.requested = reason
        if reason == "stop" and self._grace is not None:
            self._deadline = min(self._deadline, time.monotonic() + self._grace)

    def _dump(self) -> None:
        """Write a note on each rank to its stacks file, and have the rank append its stacks if it can."""
        self._progress.lap()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        problems = []
        for rank in self._watchdog.watched:
            text = f"{now} rank {rank}: {self._watchdog.describe(rank)}\n"
            problems.append(_append(stacks_file(self._folder.path, rank), text))
        self._group.dump_stacks()
        where = f"the stacks of every rank are in {self._folder.path}/logs/stacks_*"
        problem = next(filter(None, problems), None)
        self._progress.note("warning", f"the run hangs; {problem or where}")
        end = time.monotonic() + _DUMP_S
        while time.monotonic() < end:
            self._group.poll(timeout=0.2)


def _append(path: Path, text: str) -> str | None:
    """Append to a file of the run. Return why it could not be written, or None: that must not hide the failure."""
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        return f"{path} could not be written: {error.strerror}"
    return None


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def how_to_resume(folder: RunFolder) -> str:
    newest = checkpoints(folder.checkpoints)[:1]
    where = newest[0].name if newest else "step 0: there is no checkpoint yet"
    return f"the same command resumes from {where}"


def _pause(seconds: float, stop: StopSignal) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.asked:
        time.sleep(0.05)
