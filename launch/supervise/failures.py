"""The record of a run's failures, runs/NAME/failures.json; whether to try again; and why a launch gave up."""

import contextlib
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vimscale.errors import RunFailed, UserError, shortened
from vimscale.runtime.run_folder import RunFolder, checkpoints, set_aside, step_of
from vimscale.storage import files

from ..processes.rank import Cause, Ending

log = logging.getLogger(__name__)

_SAME = 3
"""The same failure at the same step this many times ends a run."""
_NEAR = 2
"""Failures up to this many steps apart count as at the same step: how far a rank that died had come is known from the
other ranks, to a step or two.
"""
_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses before restarts without a new checkpoint in between; the last one repeats."""
_CAUSES_FIRST: tuple[Cause, ...] = ("died", "memory", "device", "user", "run", "hung", "error", "lost")
_REMEDIES: dict[Cause, str] = {
    "died": "look in logs/ and in the host's own log (dmesg) for what ends the process",
    "memory": "lower parallel.micro_batch, raise parallel.zero or parallel.recompute, or use more --workers",
    "device": "look in the host's own log for its GPU; leave that host out if it is always the same one",
    "hung": "logs/stacks_*.txt show where every rank was; a run that is only slow needs a larger --hang-after",
    "lost": "the ranks cannot reach each other; check the network between the hosts, and run `vimscale doctor`",
}


@dataclass(frozen=True)
class Failure:
    """One unrequested end of a group of ranks."""

    time: str
    step: int | None
    """The last step known to be finished; None if no step has finished since the start."""
    saved: int
    """The step of the newest checkpoint, 0 if there is none."""
    world: int
    cause: Cause
    rank: int
    host: str
    exception: str
    message: str
    others: list[dict[str, Any]]
    """The same for the ranks that failed with it."""

    @property
    def shape(self) -> tuple[str, str, str]:
        """What two failures with one reason share: numbers and addresses differ."""
        return self.cause, self.exception, re.sub(r"0x[0-9a-f]+|\d[\d.,:]*", "#", self.message)

    def same_as(self, other: "Failure") -> bool:
        """Return whether this later failure may be the other again: at the same step, with nothing saved past it."""
        if self.shape != other.shape or (self.step is None) != (other.step is None):
            return False
        if self.step is None or other.step is None:
            return self.saved == other.saved
        return abs(self.step - other.step) <= _NEAR and self.saved <= other.step

    def is_past(self, other: "Failure") -> bool:
        """Return whether this one came past the step of the other: nothing at that step stops the run every time."""
        if other.step is None:
            return self.step is not None
        return self.step is not None and self.step > other.step + _NEAR


def _earlier(path: Path) -> list[Any]:
    """Return the failures on file. Set a damaged file aside and start a new record."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, list):
            raise ValueError("it is not a list")
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        aside = set_aside(path)
        log.warning("%s is damaged and set aside as %s: %s", path, aside.name, error)
        return []
    return found


@contextlib.contextmanager
def noted(folder: RunFolder) -> Iterator[None]:
    """Record in environment.json why a launch fails. The next launch replaces the file."""
    try:
        yield
    except Exception as error:
        text, code = f"{type(error).__name__}: {error}", 1
        if isinstance(error, UserError | RunFailed):
            text, code = str(error), error.exit_code
        message = shortened("; ".join(line.strip() for line in text.splitlines() if line.strip()), 450)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        failed = {"time": now, "message": message, "exit_code": code}
        try:
            folder.add_to_environment({"failed": failed})
        except (OSError, ValueError) as problem:
            log.warning("environment.json does not say why the run failed: %s", problem)
        raise


def first_cause(failures: list[Ending]) -> Ending:
    """Return the failure that caused the others: a death before an exception before the loss of a peer."""
    return min(failures, key=lambda ending: (_CAUSES_FIRST.index(ending.cause or "lost"), ending.time))


class Failures:
    """The failures of a run: those on file, and those of this launch. Only the latter count for decisions."""

    def __init__(self, folder: RunFolder, restarts: int, within: int):
        self._folder, self._restarts, self._within = folder, restarts, within
        self._file = folder.path / "failures.json"
        self._earlier = _earlier(self._file)
        self._own: list[Failure] = []

    def record(self, endings: list[Ending], reached: dict[int, int | None], world: int) -> Failure:
        """Record that ranks failed. `reached`: the last step that each rank reported as finished."""
        newest = checkpoints(self._folder.checkpoints)[:1]
        first = first_cause(endings)
        steps = [ending.step for ending in endings] + list(reached.values())
        failure = Failure(
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(first.time)),
            step=max((step for step in steps if step is not None), default=None),
            saved=step_of(newest[0].name) if newest else 0,
            world=world,
            cause=first.cause or "lost",
            rank=first.rank,
            host=first.host,
            exception=first.exception,
            message=first.message,
            others=[
                {key: getattr(e, key) for key in ("rank", "host", "step", "cause", "exception", "message")}
                for e in endings
                if e is not first
            ],
        )
        self._own.append(failure)
        try:
            files.write(self._file, json.dumps(self._earlier + [asdict(f) for f in self._own], indent=1) + "\n")
        except OSError as error:  # this launch keeps it in memory, and writes it with the next failure
            log.warning("%s could not be written: %s", self._file, error.strerror)
        return failure

    def hopeless(self) -> str | None:
        """Return why another try would not help, for a person to read; None if it may help."""
        last = self._own[-1]
        since = itertools.takewhile(lambda f: not f.is_past(last), reversed(self._own))
        alike = [f for f in since if last.same_as(f)][::-1]
        if len(alike) >= _SAME:
            return self._common(alike)
        if self._recent() > self._restarts:
            return (
                f"{self._restarts} restarts did not bring the run {self._within:,} steps further;"
                f" all failures are in {self._file}, the ranks' output in {self._folder.path}/logs"
            )
        return None

    def pause(self) -> float:
        """Return the seconds to wait before the next try."""
        idle = sum(f.saved == self._own[-1].saved for f in self._own)
        return _PAUSES_S[min(idle, len(_PAUSES_S)) - 1]

    def count(self) -> str:
        return f"restart {self._recent()}, at most {self._restarts} in {self._within:,} steps"

    def _recent(self) -> int:
        return sum(self._own[-1].saved - f.saved < self._within for f in self._own)

    def _common(self, alike: list[Failure]) -> str:
        """Return a report on repeats of the same failure."""
        last = alike[-1]
        steps = sorted({f.step for f in alike if f.step is not None})
        where = f"at step {steps[0]:,}" if steps else "before the first step"
        where += f" to {steps[-1]:,}" if len(steps) > 1 else ""
        lines = [f"the same failure {len(alike)} times {where}; they share"]
        lines.append(f"  cause: {last.cause}" + (f", {last.exception}" if last.exception else ""))
        for name in ("rank", "host"):
            values = Counter(getattr(f, name) for f in alike)
            counts = ", ".join(f"{value} ({n} times)" for value, n in values.most_common())
            lines.append(f"  {name}: {next(iter(values))} each time" if len(values) == 1 else f"  {name}s: {counts}")
        lines.append(f"  times: {', '.join(f.time for f in alike)}")
        lines.append(f"all failures are in {self._file}; {_REMEDIES[last.cause]}")
        return "\n  ".join(lines)
