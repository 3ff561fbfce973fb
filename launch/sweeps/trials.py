"""The trials of a sweep: dimensions parsed from the command line, one trial per point, and how each trial ended.

A sweep's only state is its trials' run folders, which are read again whenever it is asked for.
"""

import itertools
import json
import math
import random
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vimscale.errors import LaunchError, RecipeError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files

from . import unattended

By = Literal["top1", "loss"]
_STOPPED = "stopped.json"


@dataclass(frozen=True)
class Dimension:
    """A key of the recipe and the values to try; for a range, those drawn from it."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    point: dict[str, str]
    """Its value in each dimension, as written on the command line."""
    recipe: Recipe
    folder: RunFolder

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The point without its seed. Results of one setting's trials are averaged."""
        return tuple((key, value) for key, value in self.point.items() if key != "seed")

    def stop(self, step: int) -> None:
        """Record that the sweep has given it up."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        files.write(self.folder.path / _STOPPED, json.dumps({"step": step}) + "\n")

    @property
    def stopped(self) -> bool:
        return (self.folder.path / _STOPPED).exists()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stopped or self.folder.result() is not None


def firsts(trials: Iterable[Trial]) -> dict[str, Trial]:
    """For each trial, by name, the first trial of its setting: the seed that is judged for all of the setting."""
    settings: dict[tuple, Trial] = {}
    return {one.name: settings.setdefault(one.setting, one) for one in trials}


def parse(overrides: Iterable[str], samples: int | None, seed: int = 0) -> tuple[list[str], list[Dimension]]:
    """(plain overrides, dimensions): a=1,2 is a dimension of two values, a=1e-4..1e-2 one of `samples` drawn values.

    Raises:
        LaunchError: there is no dimension, a value occurs twice, or a range comes without a number of samples.
    """
    plain, dimensions = [], []
    for text in overrides:
        key, _, value = text.partition("=")
        values = _split(value)
        if samples is not None and (ends := _range(value)) is not None:
            values = [_draw(*ends, key, number, seed) for number in range(samples)]
        elif _range(value) is not None:
            raise LaunchError(f"{text}: a range needs a number of values to draw from it; add --samples 8")
        if len(values) != len(set(values)):
            raise LaunchError(f"{text}: the same value occurs twice; leave one out")
        if len(values) > 1:
            dimensions.append(Dimension(key, tuple(values)))
        else:
            plain.append(text)
    if not dimensions:
        raise LaunchError("nothing to try: give some key several values, such as optim.lr=1e-4,3e-4,1e-3")
    return plain, dimensions


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "([{") - (letter in ")]}") if not quote else 0
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _range(text: str) -> tuple[float, float] | None:
    low, dots, high = text.partition("..")
    try:
        ends = (float(low), float(high)) if dots else None
    except ValueError:
        return None
    if ends is not None and not 0 < ends[0] < ends[1]:
        raise LaunchError(f"range {text}: values are drawn log-uniformly, so write LOW..HIGH with 0 < LOW < HIGH")
    return ends


def _draw(low: float, high: float, key: str, number: int, seed: int) -> str:
    """Draw value `number` of a range. It depends on nothing else, so that more samples keep the earlier ones."""
    uniform = random.Random(f"{seed} {key} {number}").random()
    return f"{math.exp(math.log(low) + uniform * (math.log(high) - math.log(low))):.3g}"


def create(source: str, overrides: Iterable[str], samples: int | None, runs: Path) -> tuple[Path, list[Trial]]:
    """The sweep's folder, and one trial per point of the grid of all values. Ranges are drawn together, not crossed.

    Raises:
        RecipeError: lists the faults of every trial whose recipe is invalid.
        LaunchError: see `parse`; or the sweep's folder is a run's.
    """
    plain, dimensions = parse(overrides, samples)
    named = any(text.startswith("name=") for text in plain)
    base = recipes.load(source, plain)
    sweep = base.name if named else f"{base.name}-sweep"
    folder = (runs / sweep).absolute()
    if (folder / "recipe.yaml").exists():
        raise LaunchError(f"{folder} is a run, and the sweep's trials would be inside it; choose another name=")
    drawn = {text.partition("=")[0] for text in overrides if _range(text.partition("=")[2])}
    together = [d for d in dimensions if d.key in drawn]
    axes = [[((d.key, value),) for value in d.values] for d in dimensions if d.key not in drawn]
    axes += [list(zip(*([(d.key, value) for value in d.values] for d in together), strict=True))] if together else []
    points = [dict(itertools.chain(*parts)) for parts in itertools.product(*axes)]
    names = _names(points)
    trials, faults = [], []
    for name, point in zip(names, points, strict=True):
        changes = [f"{key}={value}" for key, value in point.items()]
        try:
            # a mirror of checkpoints knows runs by this name alone
            full = _short(f"{sweep}.{name}")
            chosen = recipes.load(source, [*plain, *changes, f"name={full}"])
            trials.append(Trial(name, point, chosen, RunFolder(folder / name)))
        except RecipeError as error:
            faults += [f"{', '.join(changes)}: {fault}" for fault in error.faults]
    if faults:
        raise RecipeError(f"sweep {sweep}", faults)
    return folder, trials


def _names(points: Sequence[dict[str, str]]) -> list[str]:
    """A folder name for each point, made of its values."""
    keys = {key: key.rpartition(".")[2] for key in points[0]}
    plain = [
        "_".join(f"{keys[key]}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}" for key, value in point.items())
        for point in points
    ]
    names = []
    for point, name in zip(points, plain, strict=True):
        suffix = f"-{zlib.crc32(repr(point).encode()):08x}" if plain.count(name) > 1 else ""
        names.append(_short(name.replace("+", "") + suffix, 80))
    return names


def _short(name: str, most: int = 100) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}-{zlib.crc32(name.encode()):08x}"


def check_installed(*modules: str, extra: str = "sweep") -> None:
    """Check for the packages that a command needs before it starts anything; `extra` brings them.

    Raises:
        LaunchError: one of them is not installed.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise LaunchError(f"{', '.join(missing)} is not installed: pip install 'vimscale[{extra}]'")


# ---- how they ended


@dataclass(frozen=True)
class Outcome:
    """How far a trial has come, and how good it is."""

    trial: Trial
    status: Literal["finished", "stopped", "unfinished"]
    step: int
    value: float | None
    """What trials are compared by; None if there is nothing to compare yet."""
    losses: list[float]
    images_per_s: float | None
    error: str
    """Why it is not finished, in one line; empty if it did not say."""


def figures(rows: Sequence[dict[str, Any]], by: By, every: int) -> list[tuple[int, float]]:
    """(step, value) every `every` steps: the evaluation there, or the mean loss of these steps."""
    if by == "top1":
        return [(row["step"], row["top1"]) for row in rows if row["kind"] == "eval" and row["step"] % every == 0]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return [(end, statistics.fmean(losses[end - every : end])) for end in range(every, len(losses) + 1, every)]


def outcome(trial: Trial, by: By, every: int) -> Outcome:
    rows = trial.folder.rows()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    known = figures(rows, by, every)
    result = trial.folder.result()
    value = known[-1][1] if known else None
    if result is not None:
        value = result["top1"] if by == "top1" else statistics.fmean(losses[-every:])
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return Outcome(
        trial,
        "finished" if result is not None else "stopped" if trial.stopped else "unfinished",
        len(losses),
        value,
        losses,
        statistics.median(speeds) if speeds else None,
        "" if result is not None or trial.stopped else unattended.last_error(trial.folder.path),
    )


@dataclass(frozen=True)
class Group:
    """Trials that differ only in their seed."""

    outcomes: list[Outcome]
    by: By

    @property
    def finished(self) -> list[float]:
        """Values of the trials that finished."""
        return [one.value for one in self.outcomes if one.status == "finished" and one.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean value of the trials that finished; of all, if none did."""
        values = self.finished or [one.value for one in self.outcomes if one.value is not None]
        return statistics.fmean(values) if values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the trials that finished; None for fewer than two."""
        return statistics.stdev(self.finished) if len(self.finished) > 1 else None

    @property
    def rank(self) -> tuple:
        """Sort key, best first: settings with all seeds finished, then with some, then by steps; each by its mean."""
        mean = self.mean
        value = math.inf
        if mean is not None and math.isfinite(mean):
            value = mean if self.by == "loss" else -mean
        complete = len(self.finished) == len(self.outcomes)
        return -complete, -bool(self.finished), 0 if self.finished else -max(one.step for one in self.outcomes), value


def ranked(outcomes: Iterable[Outcome], by: By) -> list[Group]:
    """Trials by setting, the best first."""
    return sorted((Group(found, by) for found in _by_setting(outcomes)), key=lambda group: group.rank)


def _by_setting(outcomes: Iterable[Outcome]) -> Iterator[list[Outcome]]:
    groups: dict[tuple, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.trial.setting, []).append(one)
    yield from groups.values()
