"""What a sweep consists of: dimensions read from the command line, a trial for each point, and how each one ended.

The trials' run folders are all that is known of a sweep; whoever asks again reads them again.
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
    """A key of the recipe and the values that are tried; of a range, how many are drawn from it."""

    key: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    point: dict[str, str]
    """Its value of each dimension, as written on the command line."""
    recipe: Recipe
    folder: RunFolder

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The point but for the seed: trials of one setting are to be averaged."""
        return tuple((key, value) for key, value in self.point.items() if key != "seed")

    def stop(self, step: int) -> None:
        """Write down that the sweep has given it up."""
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
    """By trial, the first one of its setting: the seed that is judged for all seeds of the setting."""
    settings: dict[tuple, Trial] = {}
    return {one.name: settings.setdefault(one.setting, one) for one in trials}


def read(overrides: Iterable[str], samples: int | None, seed: int = 0) -> tuple[list[str], list[Dimension]]:
    """(plain overrides, dimensions): a=1,2 is a dimension of two values, a=1e-4..1e-2 of `samples` drawn ones.

    Raises:
        LaunchError: no dimension, or ranges without a number of samples.
    """
    plain, dimensions = [], []
    for text in overrides:
        key, _, value = text.partition("=")
        values = _split(value)
        if samples is not None and (ends := _range(value)) is not None:
            values = [_draw(*ends, key, number, seed) for number in range(samples)]
        elif _range(value) is not None:
            raise LaunchError(f"{text}: how many values of this range are to be tried? add --samples 8")
        if len(values) != len(set(values)):
            raise LaunchError(f"{text}: a value is there twice; leave one out")
        if len(values) > 1:
            dimensions.append(Dimension(key, tuple(values)))
        else:
            plain.append(text)
    if not dimensions:
        raise LaunchError("nothing to try: give some key several values, as optim.lr=1e-4,3e-4,1e-3")
    return plain, dimensions


def _split(text: str) -> list[str]:
    """At commas outside of brackets and quotes."""
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
        raise LaunchError(f"range {text}: values are drawn by their logarithm, so write LOW..HIGH with 0 < LOW < HIGH")
    return ends


def _draw(low: float, high: float, key: str, number: int, seed: int) -> str:
    """A function of its number: more samples add to those that were drawn before."""
    luck = random.Random(f"{seed} {key} {number}").random()
    return f"{math.exp(math.log(low) + luck * (math.log(high) - math.log(low))):.3g}"


def plan(source: str, overrides: Iterable[str], samples: int | None, runs: Path) -> tuple[Path, list[Trial]]:
    """The sweep's folder, and a trial for each point: the grid of all values; ranges are drawn together, not crossed.

    Raises:
        RecipeError: with the faults of every trial that cannot be.
        LaunchError: see `read`; or the sweep's folder is a run's.
    """
    plain, dimensions = read(overrides, samples)
    named = any(text.startswith("name=") for text in plain)
    base = recipes.load(source, plain)
    sweep = base.name if named else f"{base.name}-sweep"
    folder = (runs / sweep).absolute()
    if (folder / "recipe.yaml").exists():
        raise LaunchError(f"{folder} is a run, and the sweep's trials would be inside; choose another name=")
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
            # a mirror knows runs by this name alone
            full = _short(f"{sweep}.{name}")
            trials.append(
                Trial(name, point, recipes.load(source, [*plain, *changes, f"name={full}"]), _at(folder, name))
            )
        except RecipeError as error:
            faults += [f"{', '.join(changes)}: {fault}" for fault in error.faults]
    if faults:
        raise RecipeError(f"sweep {sweep}", faults)
    return folder, trials


def _at(folder: Path, name: str) -> RunFolder:
    return RunFolder(folder / name)


def _names(points: Sequence[dict[str, str]]) -> list[str]:
    """A folder's name for each point, made of its values."""
    keys = {key: key.rpartition(".")[2] for key in points[0]}
    plain = [
        "_".join(f"{keys[key]}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}" for key, value in point.items())
        for point in points
    ]
    names = []
    for point, name in zip(points, plain, strict=True):
        own = f"-{zlib.crc32(repr(point).encode()):08x}" if plain.count(name) > 1 else ""
        names.append(_short(name.replace("+", "") + own, 80))
    return names


def _short(name: str, most: int = 100) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}-{zlib.crc32(name.encode()):08x}"


def check_installed(*modules: str) -> None:
    """Before anything is begun.

    Raises:
        LaunchError: what a sweep or its picture needs is not there.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise LaunchError(f"{', '.join(missing)} is not installed: pip install 'vimscale[sweep]'")


# ---- what came of them


@dataclass(frozen=True)
class Outcome:
    """How far a trial has come, and how good it is by what trials are compared by."""

    trial: Trial
    status: Literal["finished", "stopped", "unfinished"]
    step: int
    value: float | None
    """None where there is nothing to compare yet."""
    losses: list[float]
    images_per_s: float | None
    words: str
    """Why it is not finished, if it said so."""


def figures(rows: Sequence[dict[str, Any]], by: By, every: int) -> list[tuple[int, float]]:
    """(step, value) for every `every` steps: evaluations, or the mean loss since the one before."""
    if by == "top1":
        return [(row["step"], row["top1"]) for row in rows if row["kind"] == "eval" and row["step"] % every == 0]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return [(end, statistics.fmean(losses[end - every : end])) for end in range(every, len(losses) + 1, every)]


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """What a run that may go on has written down so far."""
    return folder.rows()


def outcome(trial: Trial, by: By, every: int) -> Outcome:
    written = rows(trial.folder)
    losses = [row["loss"] for row in written if row["kind"] == "train"]
    known = figures(written, by, every)
    result = trial.folder.result()
    value = known[-1][1] if known else None
    if result is not None:
        value = result["top1"] if by == "top1" else statistics.fmean(losses[-every:])
    speeds = [row["images_per_s"] for row in written if "images_per_s" in row]
    return Outcome(
        trial,
        "finished" if result is not None else "stopped" if trial.stopped else "unfinished",
        len(losses),
        value,
        losses,
        statistics.median(speeds) if speeds else None,
        "" if result is not None or trial.stopped else unattended.last_words(trial.folder.path),
    )


@dataclass(frozen=True)
class Group:
    """Trials that differ in nothing but their seed."""

    outcomes: list[Outcome]
    by: By

    @property
    def finished(self) -> list[float]:
        return [one.value for one in self.outcomes if one.status == "finished" and one.value is not None]

    @property
    def mean(self) -> float | None:
        """Of those that finished; of all, if none did."""
        values = self.finished or [one.value for one in self.outcomes if one.value is not None]
        return statistics.fmean(values) if values else None

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.finished) if len(self.finished) > 1 else None

    @property
    def rank(self) -> tuple:
        """To sort by, the best first: settings all of whose seeds finished, then those with some, then those that came
        far; each by its mean.
        """
        mean = self.mean
        sound = mean is not None and math.isfinite(mean)
        value = (mean if self.by == "loss" else -mean) if sound and mean is not None else math.inf
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
