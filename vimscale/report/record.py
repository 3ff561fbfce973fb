"""What a run's folder holds, as far as it can be read. Everything in it may come from a stranger: nothing is executed,
and what does not have the expected form counts as damaged or is left out.
"""

import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from vimscale.errors import CheckpointError, RecipeError, UserError, brief, shortened
from vimscale.model.presets import VimConfig
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.typed_yaml import parse_mapping
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.run_folder import RunFolder, read_row
from vimscale.storage import own_code, untrusted

_RECENT_S = 120.0
"""A run of another machine whose last row is younger than this is taken to be running."""
_LARGEST_METRICS = 8 << 30
"""Bytes."""
_START = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}) rank 0 of (\d{1,7}): process \d+ on ", re.MULTILINE)
_LAST = 2**31 - 1
"""The largest step that charts can show."""
_LARGEST_LOG = 16 << 20
"""Bytes of rank 0's log that are searched for starts."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run. `step`: the last finished step then; both may be unknown."""

    kind: str
    """launch, failure, skip, rollback, warning, evaluation, damage, end."""
    text: str
    step: int | None
    at: float | None
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    name: str
    step: int | None
    bytes: int
    at: float
    ranks: int | None
    zero: int | None
    fault: str | None
    """What is wrong with it, as far as names and sizes show."""


@dataclass
class Record:
    """One run."""

    folder: RunFolder
    name: str
    tree: dict[str, Any]
    """The resolved recipe as plain values."""
    text: str
    """recipe.yaml."""
    recipe: Recipe | None
    refused: str
    """Why `recipe` is None."""
    rows: dict[str, list[dict[str, Any]]]
    """Rows of metrics.jsonl by kind."""
    damaged: int
    """Lines of metrics.jsonl that cannot be read."""
    environment: dict[str, Any]
    result: dict[str, Any] | None
    failures: list[dict[str, Any]]
    starts: list[tuple[float, int]]
    """(when, ranks) of each group of ranks."""
    saved: list[Saved]
    train_state: dict[str, Any]
    """trainer.json of the newest checkpoint; empty if there is none."""
    origin: dict[str, Any] | None
    other: list[Event] = field(default_factory=list)
    """Faults of files, and evaluations that failed."""
    read_at: float = 0.0

    # ---- how far

    @property
    def last(self) -> int:
        """The last finished step."""
        return max((row["step"] for row in self.rows.get("train", ())), default=0)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The rows of progress lines, which have more figures than the others."""
        return [row for row in self.rows.get("train", ()) if number(row.get("images_per_s")) is not None]

    @property
    def steps(self) -> int | None:
        """The length of the run; None if it depends on data that no checkpoint describes."""
        if self.result is not None:
            return self.result["steps"]
        if type(given := self.environment.get("steps", self.tree.get("steps"))) is int:
            return given
        samples = self.about.get("samples")
        if self.recipe is None or type(samples) is not int or samples < 1:
            return None
        try:
            return self.recipe.length(samples)
        except RecipeError:
            return None

    @property
    def status(self) -> str:
        """finished, running, failed, stopped, died or empty."""
        if self.result is not None:
            return "finished"
        if is_active(self.folder.path, self.environment.get("host")):
            return "running"
        return ended_as(self.folder, self.environment, self.last)

    @property
    def failed(self) -> str:
        """Why the last launch failed; empty if it did not."""
        return failure(self.environment) if self.status == "failed" else ""

    # ---- what it was

    @property
    def world(self) -> int | None:
        """Ranks of the last group."""
        if self.starts:
            return self.starts[-1][1]
        found = self.train_state.get("world")
        return found if type(found) is int and found > 0 else None

    @property
    def about(self) -> dict[str, Any]:
        """What the newest checkpoint says of the training set; before the first one, `TrainingSet.about` if it was put
        there.
        """
        found = self.train_state.get("training_set")
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> VimConfig | None:
        """The model; None if the recipe cannot be used here."""
        if self.recipe is None:
            return None
        classes = self.about.get("classes")
        count = len(classes) if isinstance(classes, list) and classes else 1000
        try:
            return self.recipe.largest(self.recipe.shape(count))
        except (ValueError, UserError):
            return None

    @cached_property
    def times(self) -> tuple[list[int], list[float]]:
        """(steps, seconds since the epoch) of the progress lines that have a time."""
        known = [(row["step"], at) for row in self.lines if (at := number(row.get("time"))) is not None]
        return [step for step, _ in known], [at for _, at in known]

    @cached_property
    def events(self) -> list[Event]:
        """What happened, in the order of time."""
        found = list(self.other)
        steps, times = self.times

        def step_at(at: float | None) -> int | None:
            if at is None or not times:
                return None
            return max((step for step, when in zip(steps, times, strict=True) if when <= at), default=0)

        def time_at(step: int | None) -> float | None:
            return None if step is None else next((t for s, t in zip(steps, times, strict=True) if s >= step), None)

        for i, (began, world) in enumerate(self.starts):
            ranks = "1 rank starts" if world == 1 else f"{world:,} ranks start"
            after = 0 if i == 0 and self.origin is None else step_at(began)
            found.append(Event("launch", ranks + (" again" if i else ""), after, began))
        for failure in self.failures:
            step = failure.get("step") if type(failure.get("step")) is int else None
            message = f"rank {failure.get('rank')} on {failure.get('host')}, {failure.get('cause')}:"
            exception = f"{failure['exception']}: " if failure.get("exception") else ""
            saved = failure.get("saved")
            text = f"{message} {exception}{failure.get('message')}; the newest checkpoint was step {saved}"
            found.append(Event("failure", text, step, moment(failure.get("time"))))
        for row in self.rows.get("guard", ()):
            step, at, first = row["step"], time_at(row["step"]), row.get("first")
            if row.get("action") == "rollback":
                text = f"the guard rolls back to step {row.get('to')}, and skips the data of steps {first} to {step}"
                found.append(Event("rollback", text, step, at))
            else:
                seen = f"loss {_short(row.get('loss'))}, gradient norm {_short(row.get('grad_norm'))}"
                found.append(Event("skip", f"the guard leaves out the update of step {step}: {seen}", step, at))
        for row in self.rows.get("warning", ()):
            found.append(Event("warning", str(row.get("message")), row["step"], time_at(row["step"])))
        if self.failed:
            found.append(
                Event("end", f"failed: {self.failed}", self.last, moment(self.environment["failed"].get("time")))
            )
        if self.result is not None:
            found.append(
                Event(
                    "end",
                    f"finished after {self.result['step']:,} steps",
                    self.result["step"],
                    times[-1] if times else None,
                )
            )
        return sorted(found, key=lambda event: (event.at or time_at(event.step) or 0.0, event.step or 0))


def read(run: str) -> Record:
    """Read the folder of a run, by name under runs/ or by path.

    Raises:
        CheckpointError: there is no such run, or its metrics.jsonl is not a file.
        RecipeError: its recipe.yaml cannot be read.
        OSError: metrics.jsonl cannot be read.
    """
    folder = RunFolder.of(run)
    path = folder.path / "recipe.yaml"
    try:
        text = untrusted.read(path, 4 << 20).decode()
        tree = parse_mapping(text)
    except ValueError as error:
        raise RecipeError(f"recipe {path}", [f"cannot be read: {brief(str(error), 300)}"]) from None
    recipe, refused = _recipe(folder, tree)
    rows, damaged = _rows(folder.metrics)
    other: list[Event] = []
    if damaged:
        other.append(Event("damage", f"{damaged:,} lines of metrics.jsonl cannot be read", None, None))
    failures = read_json(folder.path / "failures.json", list, other)
    environment = read_json(folder.path / "environment.json", dict, other)
    try:
        origin = folder.origin()
    except CheckpointError as error:
        origin = None
        other.append(Event("damage", str(error), None, None))
    for row in _failed_evaluations(folder):
        other.append(
            Event("evaluation", f"evaluation of step {row['step']} failed: {row.get('message')}", row["step"], None)
        )
    saved = list(_saved(folder))
    newest = next((one for one in saved if one.fault is None and one.step is not None), None)
    state = read_json(folder.checkpoints / newest.name / "trainer.json", dict, other) if newest else {}
    failures = [failure for failure in failures if isinstance(failure, dict)]
    return Record(
        folder, folder.path.resolve().name, tree, text, recipe, refused, rows, damaged, environment, folder.result(),
        failures, _starts(folder), saved, state, origin, other, time.time(),
    )  # fmt: skip


def number(value: Any) -> float | None:
    """The value if it is a number that a float can hold, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def moment(value: Any) -> float | None:
    """Seconds since the epoch of a time such as 2026-11-27T07:39:19+0000; None for anything else."""
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def _short(value: Any) -> str:
    found = number(value)
    return "unknown" if found is None else f"{found:.4g}"


def _recipe(folder: RunFolder, tree: dict[str, Any]) -> tuple[Recipe | None, str]:
    """The typed recipe; or None, and why. Files of the user's own that a recipe names are not imported."""
    if any(own_code.split(text) is not None for text in _texts(tree)):
        return None, "the recipe names Python files, which a report does not run"
    try:
        return recipes.load(folder.path / "recipe.yaml"), ""
    except RecipeError as error:
        return None, str(error)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)


def _rows(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """(rows by kind, number of lines that cannot be read). A last line that is still being written does not count."""
    try:
        lines = untrusted.read(path, _LARGEST_METRICS).split(b"\n")
    except FileNotFoundError:
        return {}, 0
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    found: dict[str, list[dict[str, Any]]] = {}
    damaged = 0
    for i, line in enumerate(lines):
        row = read_row(line) if line else None
        if row is not None and 0 <= row["step"] <= _LAST and _is_sound(row):
            found.setdefault(row["kind"], []).append(row)
        elif line and i < len(lines) - 1:
            damaged += 1
    return found, damaged


def _is_sound(row: dict[str, Any]) -> bool:
    """Whether the figures that every row of its kind has are numbers."""
    return row["kind"] != "train" or None not in (number(row["loss"]), number(row["lr"]))


def read_json(path: Path, kind: type, faults: list[Event]) -> Any:
    """The content of a JSON file of this kind; empty if it is missing, or damaged, which is noted in `faults`."""
    try:
        found = untrusted.loads(untrusted.read(path), finite=False)
        if not isinstance(found, kind):
            raise ValueError(f"it is not a {kind.__name__}")
        return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        faults.append(Event("damage", f"{path.name} cannot be read: {brief(str(error), 200)}", None, None))
    return kind()


def _failed_evaluations(folder: RunFolder) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.evaluations.glob("step_*.json")):
        try:
            row = read_row(untrusted.read(path))
        except (OSError, ValueError):
            continue
        if row is not None and row["kind"] == "failed":
            yield row


def _starts(folder: RunFolder) -> list[tuple[float, int]]:
    try:
        with (folder.path / "logs" / "rank_00000.txt").open("rb") as file:
            text = file.read(_LARGEST_LOG)
    except OSError:
        return []
    found = [(moment(at.decode()), int(world)) for at, world in _START.findall(text)]
    return [(at, world) for at, world in found if at is not None and world > 0]


def _saved(folder: RunFolder) -> Iterator[Saved]:
    """Checkpoints, newest first, then those that were set aside as damaged."""
    for path in run_folder.checkpoints(folder.checkpoints):
        state: dict[str, Any] = {}
        size, at, fault = 0, 0.0, None
        try:
            at = (path / manifest.NAME).stat().st_mtime
            fault = next(run_folder.faults(path, sizes_only=True), None)
            size = sum(entry["bytes"] for entry in manifest.files(path))
            loaded = untrusted.loads(untrusted.read(path / "trainer.json"))
            state = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError, UserError) as error:
            fault = fault or brief(str(error), 200)
        world, zero = (state.get(key) if type(state.get(key)) is int else None for key in ("world", "zero"))
        yield Saved(path.name, run_folder.step_of(path.name), size, at, world, zero, fault)
    for path in sorted(folder.checkpoints.glob("damaged_*")):
        yield Saved(path.name, None, 0, path.stat().st_mtime, None, None, "set aside as damaged")


def is_active(folder: Path, host: object) -> bool:
    """Whether a launch uses a run's folder. On this machine its lock tells; asking must not take the lock, since a
    launch that starts would refuse. `host`: the machine of the run; of another one, the age of the last row tells.
    """
    if host != platform.node() and time.time() - changed(folder) < _RECENT_S:
        return True
    try:
        held = Path("/proc/locks").read_text()
        inode = (folder / ".lock").stat().st_ino
    except OSError:
        return False
    return re.search(rf"FLOCK\s+ADVISORY\s+WRITE\s+\d+\s+\S+:{inode}\s", held) is not None


def ended_as(folder: RunFolder, environment: dict[str, Any], last: int) -> str:
    """How a run that is neither active nor finished ended, `last` being its last step: failed, if its launcher said so;
    stopped, if it saved that step, as it does on request; empty, without a step; or died: its launcher was killed.
    """
    if failure(environment):
        return "failed"
    if not last:
        return "empty"
    saved = run_folder.checkpoints(folder.checkpoints)
    return "stopped" if saved and run_folder.step_of(saved[0].name) >= last else "died"


def failure(environment: dict[str, Any]) -> str:
    """Why the last launch failed, as environment.json says; empty if it does not."""
    found = environment.get("failed")
    message = found.get("message") if isinstance(found, dict) else None
    return shortened(message, 450) if isinstance(message, str) else ""


def changed(folder: Path) -> float:
    """When a run last wrote a row."""
    try:
        return (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return 0.0


def json_text(value: Any) -> str:
    """JSON that can stand in a script element: no text in it can close the element."""
    found = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return found.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
