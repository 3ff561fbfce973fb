"""Runs at a glance: how each run of a folder is doing, from the ends of its files, however long the run is.

Everything in a run's folder may come from a stranger: see `record`.
"""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vimscale.errors import UserError
from vimscale.recipe.typed_yaml import parse_mapping
from vimscale.report.pace import Pace, Trend, trend
from vimscale.report.record import ended_as, failure, is_active, moment, number, read_json
from vimscale.runtime import run_folder
from vimscale.runtime.run_folder import RunFolder, read_row
from vimscale.storage import untrusted

_TAIL = 512 << 10
"""Bytes at the end of metrics.jsonl that are read."""
_PIECE = 4 << 20
"""Bytes that a search for the last evaluation reads at a time."""
_SEARCHED = 256 << 20
"""Most bytes that it reads."""
_LOSSES = 400
"""Most losses of single steps that are kept."""
_STALLED = (60.0, 10.0)
"""A run stalls if its last row is older than so many seconds, and than so many intervals between progress lines."""


@dataclass(frozen=True)
class Glance:
    """How a run is doing; figures are None where nobody knows them."""

    name: str
    state: str
    """starting, running, stalled, finished, stopped, failed, died or empty; of a job also waiting and stopping."""
    note: str = ""
    """What there is to say about the state."""
    step: int = 0
    """Steps finished."""
    steps: int | None = None
    """Length of the run."""
    step_s: float | None = None
    left_s: float | None = None
    images_per_s: float | None = None
    loss: float | None = None
    trend: Trend | None = None
    losses: tuple[float, ...] = ()
    """Of the last steps, the newest last."""
    evaluation: dict[str, Any] | None = None
    """The newest row of an evaluation."""
    restarts: int = 0
    guard: int = 0
    """Bad steps that the guard reported."""
    ranks: int | None = None
    memory_gb: float | None = None
    """Of rank 0, at its peak."""
    changed: float = 0.0
    """When the last row was written, in seconds since the epoch."""


@dataclass(frozen=True)
class _Tail:
    """What the end of metrics.jsonl says."""

    stamp: tuple[int, int]
    """The file's size in bytes and its mtime in ns."""
    train: list[dict[str, Any]]
    evaluation: dict[str, Any] | None


class Runs:
    """The runs in a folder. A file that has not changed since the last `read` is not read again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._folders: dict[Path, RunFolder] = {}
        self._tails: dict[Path, _Tail] = {}
        self._trees: dict[Path, tuple[int, dict[str, Any]]] = {}

    def read(self) -> list[Glance]:
        """All runs, in no order.

        Raises:
            OSError: the folder cannot be read.
        """
        with os.scandir(self._folder) as entries:
            paths = [Path(entry.path) for entry in entries if os.path.isfile(os.path.join(entry.path, "recipe.yaml"))]
        return [self._glance(self._folders.setdefault(path, RunFolder(path))) for path in paths]

    def _glance(self, folder: RunFolder) -> Glance:
        tail = self._tail(folder.metrics)
        environment = read_json(folder.path / "environment.json", dict, [])
        failures = read_json(folder.path / "failures.json", list, [])
        failures = [one for one in failures if isinstance(one, dict)]
        lines = [row for row in tail.train if number(row.get("images_per_s")) is not None]
        times = [(row["step"], at) for row in lines if (at := number(row.get("time"))) is not None]
        started = moment(environment.get("started")) or 0.0
        since = max([started, *(moment(one.get("time")) or 0.0 for one in failures)])
        pace = Pace()
        for step, at in times:
            if at >= since:
                pace.add(step, at)
        last = tail.train[-1]["step"] if tail.train else 0
        losses = [found for row in tail.train[-_LOSSES:] if (found := number(row["loss"])) is not None]
        changed = max(tail.stamp[1] / 1e9, started)
        state, note = self._state(folder, environment, last, times, since)
        steps = self._steps(folder, environment)
        newest = lines[-1] if lines else {}
        ranks = environment.get("ranks")
        moving = state in ("running", "stalled")
        return Glance(
            folder.path.name, state, note, last, steps, pace.step_s if moving else None,
            pace.left_s(steps) if moving and steps is not None else None,
            number(newest.get("images_per_s")), losses[-1] if losses else None, trend(losses), tuple(losses),
            tail.evaluation, len(failures), sum(1 for _ in folder.guard.glob("step_*")),
            ranks if type(ranks) is int else None, number(newest.get("memory_gb")), changed,
        )  # fmt: skip

    @staticmethod
    def _state(
        folder: RunFolder,
        environment: dict[str, Any],
        last: int,
        times: list[tuple[int, float]],
        since: float,
    ) -> tuple[str, str]:
        if folder.result() is not None:
            return "finished", ""
        if is_active(folder.path, environment.get("host")):
            if not times or times[-1][1] < since:
                return "starting", ""
            each = [b - a for (_, a), (_, b) in pairwise(times)]
            silent = time.time() - times[-1][1]
            usual = statistics.median(each) if each else 0.0
            stalls = silent > max(_STALLED[0], _STALLED[1] * usual)
            return "stalled" if stalls else "running", ""
        state = ended_as(folder, environment, last)
        if state not in ("failed", "died"):
            return state, ""
        saved = run_folder.checkpoints(folder.checkpoints)
        note = f"resumes from {run_folder.step_of(saved[0].name):,}" if saved else "nothing saved"
        if state == "failed":
            note = f"{failure(environment)}; {note}"
        return state, note

    def _tail(self, path: Path) -> _Tail:
        known = self._tails.get(path, _Tail((0, 0), [], None))
        try:
            stat = path.stat()
            stamp = (stat.st_size, stat.st_mtime_ns)
            if stamp == known.stamp:
                return known
            rows = list(_last_rows(path, stat.st_size))
            evaluation = next((row for row in reversed(rows) if row["kind"] == "eval"), None)
            if evaluation is None:
                grown = known.stamp[0] and stat.st_size >= known.stamp[0]
                evaluation = known.evaluation if grown else _last_evaluation(path, stat.st_size)
        except FileNotFoundError:
            return known
        train = [row for row in rows if row["kind"] == "train"]
        self._tails[path] = _Tail(stamp, train, evaluation)
        return self._tails[path]

    def _steps(self, folder: RunFolder, environment: dict[str, Any]) -> int | None:
        if (result := folder.result()) is not None:
            return result["steps"]
        path = folder.path / "recipe.yaml"
        try:
            changed = path.stat().st_mtime_ns
            if self._trees.get(path, (0, {}))[0] != changed:
                self._trees[path] = changed, parse_mapping(untrusted.read(path, 4 << 20).decode())
            tree = self._trees[path][1]
        except (OSError, ValueError, UserError):
            tree = {}
        found = environment.get("steps", tree.get("steps"))
        return found if type(found) is int and found > 0 else None


def _last_rows(path: Path, size: int) -> Iterator[dict[str, Any]]:
    """The valid rows at the end of a file of `size` bytes; a line that is still being written is left out."""
    start = max(size - _TAIL, 0)
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read(size - start).split(b"\n")[:-1]
    for line in lines[1:] if start else lines:
        row = read_row(line)
        if row is not None and row["step"] >= 0:
            yield row


def _last_evaluation(path: Path, size: int) -> dict[str, Any] | None:
    """The newest row of an evaluation, by a search from the end."""
    end = size
    with path.open("rb") as file:
        while end > max(size - _SEARCHED, 0):
            start = max(end - _PIECE, 0)
            file.seek(start)
            piece = file.read(min(end + _TAIL, size) - start)  # with the rest of a line that begins in it
            at = piece.rfind(b'{"kind": "eval"')
            if at >= 0 and (row := read_row(piece[at:].partition(b"\n")[0])) is not None:
                return row
            end = start
    return None
