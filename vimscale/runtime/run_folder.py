"""A run's folder: what runs/NAME holds, which of its checkpoints are intact, and who may use it."""

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from vimscale.errors import CheckpointError, LaunchError, RecipeError, RunFailed
from vimscale.recipe.recipe import Recipe, load
from vimscale.runtime import manifest, recipe_changes
from vimscale.storage import files, own_code

log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def is_checkpoint(name: str) -> bool:
    """Whether this package gives checkpoints such names; users may have added step_latest or step_7."""
    return re.fullmatch(r"step_(\d{8}|[1-9]\d{8,17})", name, re.ASCII) is not None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to damaged_...; a number distinguishes several of the same step."""
    number, aside = 1, checkpoint.with_name(f"damaged_{checkpoint.name}")
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}_{number}")
    checkpoint.rename(aside)
    return aside


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints under `folder` that have a manifest, newest first; `damage` says which are intact."""
    names = (path.parent.name for path in folder.glob(f"step_*/{manifest.NAME}"))
    return [folder / name for name in newest_first(name for name in names if is_checkpoint(name))]


def newest_first(names: Iterable[str]) -> list[str]:
    """Sort checkpoint names by step. As text, step_100000000 would come before step_99999999."""
    return sorted(names, key=step_of, reverse=True)


def intact(here: Iterable[str], mirrored: Iterable[str], is_intact: Callable[[str, bool], bool]) -> Iterator[str]:
    """Yield names of intact checkpoints, newest first. A resume uses the first one, as do all commands by default.

    Args:
        here: names in the run's folder.
        mirrored: names in its mirror.
        is_intact: called as is_intact(name, from_mirror); for the mirror's copy only if the run's own is missing or
            damaged.
    """
    here, mirrored = set(here), set(mirrored)
    for name in newest_first(here | mirrored):
        if (name in here and is_intact(name, False)) or (name in mirrored and is_intact(name, True)):
            yield name


def faults(checkpoint: Path, part: int = 0, of: int = 1, *, sizes_only: bool = False) -> Iterator[str]:
    """Yield what is wrong with a checkpoint: `manifest.faults`, and a name that belongs to another step.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    found = False
    for fault in manifest.faults(checkpoint, part, of, sizes_only=sizes_only):
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
    """Compare a checkpoint's name with the step in its trainer.json; returns what is wrong, or None."""
    try:
        content = json.loads(train_state)
    except (ValueError, RecursionError) as error:
        return f"trainer.json cannot be read ({error})"
    step = content.get("step") if isinstance(content, dict) else None
    if type(step) is not int or step < 0:
        return "trainer.json names no step"
    return None if checkpoint_name(step) == name else f"it is of step {step}; its name would be {checkpoint_name(step)}"


_NUMBERS = {"train": ("loss", "lr"), "eval": ("images", "loss")}
"""Figures in all rows of a kind, and "eval" in a result too if it has an evaluation, whatever the objective."""


def read_row(line: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl; None if it is damaged or this package did not write it."""
    try:
        row = json.loads(line.strip(b"\0"))  # a power failure can leave zeros at the end
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return None
    return row if _has_numbers(row, row["kind"]) else None


def _has_numbers(row: dict[str, Any], kind: str) -> bool:
    names = {*_NUMBERS.get(kind, ())} | (row.keys() - {"kind", "status"} if kind == "eval" else set())
    return all(isinstance(row.get(name), (int, float)) for name in names)


class RunFolder:
    """Paths and files of one run, and the lock that keeps other launches out."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.guard = path / "guard"
        self.errors = path / "errors.txt"
        self.evaluations = path / "evaluations"
        self._fork = path / "fork.json"
        self._recipe = path / "recipe.yaml"
        self._environment = path / "environment.json"
        self._result = path / "result.json"
        self._warned = False
        self._forked = False
        self._before: _Before | None = None
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, run: str) -> "RunFolder":
        """Find the folder of an existing run, by path or by name under runs/.

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
        """Load the recipe as the launch resolved it, with `overrides` on top.

        Raises:
            RecipeError: the file is damaged, or of another version.
        """
        try:
            return load(self._recipe, overrides)
        except RecipeError as error:
            fix = "it is the run's own copy: restore it, or remove it and launch the same recipe again"
            raise RecipeError(f"recipe {self._recipe}", [*error.faults[:-1], f"{error.faults[-1]}\n{fix}"]) from None

    def result(self) -> dict[str, Any] | None:
        """How the run ended; None if it has not, or if the file is damaged. Launching a finished run again writes the
        file from the last checkpoint.
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
            log.warning("%s is damaged and not used; launch the run again to rewrite it", self._result)
        return None

    def rows(self, kind: str = "") -> list[dict[str, Any]]:
        """Read the valid rows of metrics.jsonl, of one kind if given; the run may still be writing it."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")[:-1]
        found = (read_row(line) for line in lines if kind.encode() in line)
        return [row for row in found if row is not None and kind in ("", row["kind"])]

    def add_to_environment(self, found: dict[str, Any]) -> None:
        """Add what only ranks know to environment.json, if a launch wrote one.

        Raises:
            OSError: it cannot be written.
        """
        if self._environment.exists():
            known = json.loads(self._environment.read_bytes())
            files.write(self._environment, json.dumps(known | found, indent=1) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Raises:
        RunFailed: it cannot be written.
        """
        try:
            files.write(self._result, json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise RunFailed(
                f"result.json could not be written: {error.strerror}; make room under {self.path}, and the same"
                " command writes it; the last checkpoint is complete"
            ) from None

    def newest_checkpoint(self, step: int | None = None) -> Path:
        """Find the newest intact checkpoint, or the one of `step`; reads all of its bytes.

        Raises:
            CheckpointError: there is none.
        """
        names = [path.name for path in checkpoints(self.checkpoints)]
        if step is not None:
            names = [name for name in names if name == checkpoint_name(step)]
        faults: list[str] = []

        def is_intact(name: str, from_mirror: bool) -> bool:
            if (fault := damage(self.checkpoints / name)) is not None:
                faults.append(f"{name}: {fault}")
            return fault is None

        chosen = next(intact(names, (), is_intact), None)
        if chosen is not None:
            for fault in faults:
                log.warning("using %s, because a newer checkpoint is damaged: %s", chosen, fault)
            return self.checkpoints / chosen
        if faults:
            raise CheckpointError(f"run {self.path}: no checkpoint is intact\n  " + "\n  ".join(faults))
        others = ", ".join(path.name for path in checkpoints(self.checkpoints)) or "none"
        missing = f"no checkpoint of step {step}" if step is not None else "no checkpoint yet"
        raise CheckpointError(f"run {self.path}: {missing}; there are: {others}")

    def finished(self, recipe: Recipe, *, extend: bool = False) -> dict[str, Any] | None:
        """How this run of the recipe ended; None if steps are left. Changes nothing. `extend`: the recipe may have
        another length than the run.

        Raises:
            LaunchError: the folder holds a run of another recipe.
        """
        self._check(recipe, extend=extend)
        return None if extend and self._is_resized(recipe) else self.result()

    def origin(self) -> dict[str, Any] | None:
        """What fork.json says about the checkpoint that a fork started from: run, step and others; None for any other
        run.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            found = json.loads(self._fork.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(type(found.get(key)) is int for key in ("step", "metrics_bytes")):
            raise CheckpointError(f"{self._fork} is damaged: restore it, or remove the run's folder") from None
        return found

    def record_origin(self, origin: dict[str, Any]) -> None:
        """Write fork.json, before anything that a fork copies."""
        self._forked = True
        files.write(self._fork, json.dumps(origin, indent=1) + "\n")

    @property
    def trained(self) -> bool:
        """Whether a launch has finished a step here."""
        return self._steps() != _NO_STEPS

    def clear_fork(self) -> None:
        """Remove what a fork that has finished no step copied, fork.json last."""
        if (origin := self.origin()) is None or self.trained:
            return
        for copied in self.checkpoints.glob(f"*{checkpoint_name(origin['step'])}*"):
            shutil.rmtree(copied)
        self.metrics.unlink(missing_ok=True)
        self._fork.unlink()

    def hold(self, otherwise: str, wait_s: float = 0.0) -> None:
        """Lock the folder for as long as this object lives, so that no other launch uses it.

        Args:
            otherwise: what a user can do if a launch is using it; ends the message.
            wait_s: how long to wait for that launch to end.

        Raises:
            LaunchError: a launch is using it, or the folder cannot be written.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        existing = set(os.listdir(self.path)) if self.path.is_dir() else set[str]()
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
        kept = {path: _kept(path) for path in (self._recipe, self._environment, self._result)}
        self._before = _Before(made, existing, self._steps(), kept)

    def claim(self, recipe: Recipe, wait_s: float = 0.0, *, extend: bool = False) -> Recipe:
        """`hold` the folder for a run of `recipe`, and record there the recipe and the environment. Returns the recipe
        to run: if it names files of the user's own, it names the copies in this folder. `extend`: the recipe may have
        another length than the run; the run's result is then removed.

        Raises:
            LaunchError: it cannot be written, another launch is still using it after `wait_s`, it holds a run of
                another recipe, or two of the user's own files have the same name.
        """
        recipe_changes.check_own_files(recipe)
        self.hold("end that one, or choose another name=", wait_s)
        self._check(recipe, extend=extend)
        try:
            if self.origin() is not None and not (checkpoints(self.checkpoints) and self._changes(recipe) == {}):
                self.clear_fork()  # it was interrupted, or another recipe takes its place
            if extend and self._is_resized(recipe):
                self._result.unlink(missing_ok=True)  # first: the new recipe must never meet the old result
            recipe, text = self._with_own_code(recipe)
            files.write(self._recipe, text)
            files.write(self._environment, json.dumps(_environment(), indent=1) + "\n")
        except OSError:
            self.withdraw()
            raise
        return recipe

    def _with_own_code(self, recipe: Recipe) -> tuple[Recipe, str]:
        """Copy the user's own files that the recipe names: (the recipe that names the copies by their full paths, the
        text of recipe.yaml, which names them relative to itself).
        """
        recipe = recipe.with_own_classes(lambda reference: own_code.copy(reference, self.path))
        return recipe, recipe.with_own_classes(own_code.without_folder).to_yaml()

    def release(self) -> None:
        """Unlock the folder, if this object holds it."""
        if self._lock is not None:
            self._lock.close()

    def withdraw(self) -> bool:
        """Undo `claim` and remove what ranks wrote since, unless they finished a step; returns whether it did.

        Call it when no rank is left. Logs that an earlier launch began keep what was added to them.
        """
        before = self._before
        if before is None or self._steps() != before.steps:
            return False
        self._before = None
        if self._forked:
            self.clear_fork()
        for name in set(os.listdir(self.path)) - before.existing:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, kept in before.kept.items():
            if kept is not None:
                files.write(path, kept.content)
                os.utime(path, ns=kept.times)
        with contextlib.suppress(OSError):  # another run may be there by now
            for folder in before.made:
                folder.rmdir()
        return True

    def _check(self, recipe: Recipe, *, extend: bool) -> None:
        if not self._recipe.exists() or not self.trained:
            return  # a launch that finished no step leaves nothing to protect
        changed = self._changes(recipe)
        if extend:
            changed = {key: change for key, change in changed.items() if key not in recipe_changes.LENGTH}
        if changed:
            fix = "choose another name=, or remove the folder"
            if changed.keys() <= {*recipe_changes.LENGTH}:
                fix = f"add --extend to train this run to the new length, {fix}"
            elif extend:
                fix = f"--extend changes the length only; --fork starts another run with other settings, or {fix}"
            raise LaunchError(
                f"run folder {self.path} holds a run of another recipe; these keys differ:\n  "
                + "\n  ".join(f"{key}: {change}" for key, change in changed.items())
                + f"\n{fix}"
            )

    def _changes(self, recipe: Recipe) -> dict[str, str]:
        return recipe_changes.between(self.recipe(), recipe)

    def _is_resized(self, recipe: Recipe) -> bool:
        return self._recipe.exists() and any(key in recipe_changes.LENGTH for key in self._changes(recipe))

    def _steps(self) -> "_Steps":
        """Look at what the finished steps have written. What a fork started with is not among it."""
        rows = self.metrics.stat() if self.metrics.exists() else None
        written = (rows.st_size, rows.st_mtime_ns) if rows else None
        names = tuple(path.name for path in checkpoints(self.checkpoints))
        if (origin := self.origin()) is not None:
            copied = names in ((), (checkpoint_name(origin["step"]),))
            if copied and (rows is None or rows.st_size == origin["metrics_bytes"]):
                return _NO_STEPS
        return _Steps(written, names)


@dataclass(frozen=True)
class _Steps:
    """Traces of finished steps."""

    metrics: tuple[int, int] | None
    """Size of metrics.jsonl in bytes, and its mtime in ns."""
    checkpoints: tuple[str, ...]


_NO_STEPS = _Steps(None, ())


@dataclass(frozen=True)
class _Kept:
    """A file before the launch."""

    content: bytes
    times: tuple[int, int]
    """atime and mtime in ns."""


@dataclass(frozen=True)
class _Before:
    """A run's folder before a launch."""

    made: list[Path]
    """Folders that the launch created, innermost first."""
    existing: set[str]
    """Names in the folder."""
    steps: _Steps
    kept: dict[Path, _Kept | None]
    """Files that a launch replaces."""


def _kept(path: Path) -> _Kept | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return _Kept(path.read_bytes(), (stat.st_atime_ns, stat.st_mtime_ns))


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
