"""A run's folder: what is where in runs/NAME, and whether it may be used."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from vimscale.errors import CheckpointError, LaunchError, RecipeError
from vimscale.recipe import own_code
from vimscale.recipe.recipe import Checkpoint, Recipe, load
from vimscale.runtime import manifest
from vimscale.storage import files

log = logging.getLogger(__name__)

_MAY_CHANGE = ("parallel", "checkpoint", "guard", "evaluate", "log", "data.workers", "data.cache", "data.max_bad")
"""Sections and keys of a recipe that a resumed run may give anew: they decide how it runs, not what it computes."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def is_checkpoint(name: str) -> bool:
    """Whether it is a checkpoint's name; others may have made step_latest or step_7."""
    return re.fullmatch(r"step_(\d{8}|[1-9]\d{8,17})", name, re.ASCII) is not None


def surplus(names: Iterable[str], rules: Checkpoint) -> list[str]:
    """Of checkpoints by name, those to remove: all but the `keep` newest, multiples of `keep_every`, and the newest
    regular one, which the guard may go back to.
    """
    ordered = sorted(names, reverse=True)
    goal = next((name for name in ordered if step_of(name) % rules.every == 0), None)
    return [name for name in ordered[rules.keep :] if name != goal and not stays(name, rules)]


def stays(name: str, rules: Checkpoint) -> bool:
    """Whether a checkpoint is kept for good."""
    return rules.keep_every is not None and step_of(name) % rules.keep_every == 0


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, beside those of the same step that were set aside before."""
    number, aside = 1, checkpoint.with_name(f"damaged_{checkpoint.name}")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}_{number}")
    checkpoint.rename(aside)
    return aside


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under `folder` that have a manifest, newest first; `damage` says which are complete."""
    found = (path.parent for path in folder.glob(f"step_*/{manifest.NAME}"))
    return sorted((path for path in found if is_checkpoint(path.name)), reverse=True)


def faults(checkpoint: Path, part: int = 0, of: int = 1, *, glance: bool = False) -> Iterator[str]:
    """What is wrong with a checkpoint: `manifest.faults`, and that its name is another step's.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    found = False
    for fault in manifest.faults(checkpoint, part, of, glance=glance):
        found = True
        yield fault
    if not found and (name := _name_fault(checkpoint)) is not None:
        yield name


def _name_fault(checkpoint: Path) -> str | None:
    try:
        return misnamed(checkpoint.name, (checkpoint / "trainer.json").read_bytes())
    except OSError as error:
        return f"trainer.json cannot be read ({error.strerror})"


def damage(checkpoint: Path, part: int = 0, of: int = 1) -> str | None:
    """The first of a checkpoint's `faults`, or None."""
    return next(faults(checkpoint, part, of), None)


def misnamed(name: str, train_state: bytes) -> str | None:
    """What is wrong with the name of a checkpoint, whose trainer.json says which step it is of."""
    try:
        content = json.loads(train_state)
    except (ValueError, RecursionError) as error:
        return f"trainer.json cannot be read ({error})"
    step = content.get("step") if isinstance(content, dict) else None
    if type(step) is not int or step < 0:
        return "trainer.json names no step"
    return None if checkpoint_name(step) == name else f"it is of step {step}; its name would be {checkpoint_name(step)}"


_NUMBERS = {"train": ("loss", "lr"), "eval": ("images", "loss")}
"""Figures that all rows of a kind have; an evaluation's others depend on the objective."""


def read_row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is not what this package writes: damaged, or somebody else's."""
    try:
        row = json.loads(line.strip(b"\0"))  # which a power failure leaves where nothing had been written yet
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    return row if _has_numbers(row, row["kind"]) else None


def _has_numbers(row: dict[str, Any], kind: str) -> bool:
    names = {*_NUMBERS.get(kind, ())} | (row.keys() - {"kind", "status"} if kind == "eval" else set())
    return all(isinstance(row.get(name), (int, float)) for name in names)


class RunFolder:
    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.guard = path / "guard"
        self.errors = path / "errors.txt"
        self._recipe = path / "recipe.yaml"
        self._environment = path / "environment.json"
        self._result = path / "result.json"
        self._warned = False
        self._before: _Before | None = None

    @classmethod
    def of(cls, run: str) -> "RunFolder":
        """The folder of an existing run, given by path or by name under runs/.

        Raises:
            CheckpointError: there is no such run.
        """
        for path in (Path(run), Path("runs") / run):
            if (path / "recipe.yaml").is_file():
                return cls(path)
        known = sorted(path.parent.name for path in Path("runs").glob("*/recipe.yaml"))
        here = f"runs here: {', '.join(known)}" if known else "there are no runs under ./runs"
        raise CheckpointError(f"run {run}: no recipe.yaml in it; {here}")

    def recipe(self, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe as the launch resolved it, with `overrides` put on top.

        Raises:
            RecipeError: the file is damaged, or of another version.
        """
        try:
            return load(self._recipe, overrides)
        except RecipeError as error:
            way_out = "it is the run's own copy: bring it back, or remove it and launch the same recipe again"
            raise RecipeError(
                f"recipe {self._recipe}", [*error.faults[:-1], f"{error.faults[-1]}\n{way_out}"]
            ) from None

    def result(self) -> dict[str, Any] | None:
        """How the run ended; None while it has not, or if the file is damaged: the last steps' checkpoint gives it
        again.
        """
        if not self._result.is_file():
            return None
        try:
            found = json.loads(self._result.read_bytes())
        except (ValueError, RecursionError):
            found = None
        sound = isinstance(found, dict) and type(found.get("step")) is type(found.get("steps")) is int
        if sound and (found.keys() <= {"status", "step", "steps"} or _has_numbers(found, "eval")):
            return found
        if not self._warned:
            self._warned = True
            log.warning("%s is damaged and not used; launching the run again writes it again", self._result)
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl that can be read, of a run that may be going on."""
        if not self.metrics.exists():
            return []
        found = (read_row(line) for line in self.metrics.read_bytes().split(b"\n")[:-1])
        return [row for row in found if row is not None]

    def finish(self, result: dict[str, Any]) -> None:
        files.write(self._result, json.dumps(result, indent=1) + "\n")

    def newest_checkpoint(self, step: int | None = None) -> Path:
        """The newest checkpoint that is whole, or the one of `step`.

        Raises:
            CheckpointError: there is none.
        """
        candidates = checkpoints(self.checkpoints)
        if step is not None:
            candidates = [path for path in candidates if path.name == checkpoint_name(step)]
        faults: list[str] = []
        for path in candidates:
            fault = damage(path)
            if fault is None:
                for damaged in faults:
                    log.warning("not whole, so %s is taken instead: %s", path.name, damaged)
                return path
            faults.append(f"{path.name}: {fault}")
        if faults:
            raise CheckpointError(f"run {self.path}: no checkpoint is whole\n  " + "\n  ".join(faults))
        others = ", ".join(path.name for path in checkpoints(self.checkpoints)) or "none"
        wanted = f"no checkpoint of step {step}" if step is not None else "no checkpoint yet"
        raise CheckpointError(f"run {self.path}: {wanted}; there are: {others}")

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """How this run of the recipe ended; None if there is something left to do. Changes nothing.

        Raises:
            LaunchError: the folder holds a run of another recipe.
        """
        self._check(recipe)
        return self.result()

    def hold(self, otherwise: str, wait_s: float = 0.0) -> None:
        """Keep other launches out for as long as this object lives; `otherwise`: what to do if one is in, `wait_s`: how
        long that one has to end.

        Raises:
            LaunchError: one is, or the folder cannot be written.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        there = set(os.listdir(self.path)) if self.path.is_dir() else set[str]()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise LaunchError(
                f"run folder {self.path} cannot be written: {error.strerror}; choose another with --runs"
            ) from None
        until = time.monotonic() + wait_s
        while not _locked(self._lock):
            if time.monotonic() >= until:
                raise LaunchError(f"run folder {self.path} is in use by a launch; {otherwise}")
            time.sleep(0.05)
        self._before = _Before(made, there, self._steps(), _kept(self._recipe), _kept(self._environment))

    def claim(self, recipe: Recipe, wait_s: float = 0.0) -> Recipe:
        """Make the folder this run's, for as long as this object lives; write down what runs and where. `wait_s`: how
        long another launch that uses it has to end. Returns the recipe to run: one that names a user's own file names
        the copy of it in this folder.

        Raises:
            LaunchError: it cannot be written, another launch is using it, or it holds a run of another recipe.
        """
        self.hold("end that one, or choose another name=", wait_s)
        self._check(recipe)
        try:
            recipe, text = self._with_own_code(recipe)
            files.write(self._recipe, text)
            files.write(self._environment, json.dumps(_environment(), indent=1) + "\n")
        except OSError:
            self.withdraw()
            raise
        return recipe

    def _with_own_code(self, recipe: Recipe) -> tuple[Recipe, str]:
        """Copy the user's own file that the recipe names, if it names one: (the recipe that names the copy by its full
        path, the text of recipe.yaml, which names it relative to itself).
        """
        parts = own_code.split(recipe.objective.kind)
        if parts is None:
            return recipe, recipe.to_yaml()
        source, name = parts
        copy = self.path.absolute() / source.name
        if source != copy:
            files.write(copy, source.read_text())
        return _with_kind(recipe, f"{copy}:{name}"), _with_kind(recipe, f"{copy.name}:{name}").to_yaml()

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def withdraw(self) -> bool:
        """Undo `claim` and what ranks did since, but for their logs, unless a step was finished in between; whether it
        is undone. To be called when no rank is left.
        """
        before = self._before
        if before is None or self._steps() != before.steps:
            return False
        self._before = None
        for name in set(os.listdir(self.path)) - before.there:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, kept in ((self._recipe, before.recipe), (self._environment, before.environment)):
            if kept is not None:
                files.write(path, kept.content)
                os.utime(path, ns=kept.times)
        with contextlib.suppress(OSError):  # another run may be there by now
            for folder in before.made:
                folder.rmdir()
        return True

    def _check(self, recipe: Recipe) -> None:
        if not self._recipe.exists() or self._steps() == _NO_STEPS:
            return  # a launch that never came so far leaves nothing to protect
        changed = _differences(_portable(self.recipe()).model_dump(), _portable(recipe).model_dump())
        if changed:
            raise LaunchError(
                f"run folder {self.path} holds a run of another recipe; changed are\n  "
                + "\n  ".join(changed)
                + "\nchoose another name=, or remove the folder"
            )

    def _steps(self) -> "_Steps":
        """What is written of the run's steps."""
        rows = self.metrics.stat() if self.metrics.exists() else None
        written = (rows.st_size, rows.st_mtime_ns) if rows else None
        return _Steps(written, tuple(path.name for path in checkpoints(self.checkpoints)))


@dataclass(frozen=True)
class _Steps:
    """What changes when a run is trained."""

    metrics: tuple[int, int] | None
    """Bytes and time of the last row."""
    checkpoints: tuple[str, ...]


_NO_STEPS = _Steps(None, ())


@dataclass(frozen=True)
class _Kept:
    """A file as it was."""

    content: bytes
    times: tuple[int, int]


@dataclass(frozen=True)
class _Before:
    """A run's folder before a launch."""

    made: list[Path]
    """Folders that were not there, the innermost first."""
    there: set[str]
    steps: _Steps
    recipe: _Kept | None
    environment: _Kept | None


def _kept(path: Path) -> _Kept | None:
    if not path.is_file():
        return None
    about = path.stat()
    return _Kept(path.read_bytes(), (about.st_atime_ns, about.st_mtime_ns))


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _with_kind(recipe: Recipe, kind: str) -> Recipe:
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"kind": kind})})


def _portable(recipe: Recipe) -> Recipe:
    """The recipe with the content of a user's own file in place of the file's path."""
    return _with_kind(recipe, own_code.identity(recipe.objective.kind))


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    lines = []
    for key in old.keys() | new.keys():
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if name in _MAY_CHANGE or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{name}.")
        else:
            lines.append(f"{name}: {before} -> {after}")
    return sorted(lines)


def _environment() -> dict[str, Any]:
    packages = ("vimscale", "torch", "triton", "deepspeed", "ray", "webdataset", "numpy")
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages if name in installed},
    }
