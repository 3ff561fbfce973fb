"""What a launch does before a run continues an earlier one: `--extend` and `--fork`."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimscale.errors import CheckpointError, LaunchError, RecipeError
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import manifest, recipe_changes
from vimscale.runtime.run_folder import RunFolder, checkpoints, read_row, step_of
from vimscale.storage import files

_FREE = (
    *recipe_changes.MAY_CHANGE,
    *recipe_changes.LENGTH,
    "name",
    "phases",  # from the fork's step on, as data.reweight
    "data.val",
    "data.max_tiles",
    "data.reweight",
    "model.weights",
    "model.grow",
    "model.drop_path",
    "model.backward_drop",
    "model.backward_ramp",
)
_ORDER = "it decides the order of the samples; leave it as it is"


def extension(folder: RunFolder, recipe: Recipe) -> list[str]:
    """Describe how `--extend` trains the run in `folder` to the length of `recipe`, line by line; nothing if the run
    has that length already, or has not begun.

    Raises:
        LaunchError: the new length is no longer than the run's.
        RecipeError: the warm-up is as long as the run, or longer.
    """
    newest = checkpoints(folder.checkpoints)[:1]
    if not newest or not folder.trained:
        return []
    old, step, state = folder.recipe(), step_of(newest[0].name), _train_state(newest[0])
    if all(getattr(old, key) == getattr(recipe, key) for key in recipe_changes.LENGTH):
        return []
    before, after = (each.length(_samples(state, newest[0])) for each in (old, recipe))
    if after <= before:
        raise LaunchError(
            f"run folder {folder.path} holds a run of {before:,} steps, and --extend makes it longer, not {after:,};"
            " give more steps or epochs, or choose another name="
        )
    return [
        f"extending {folder.path} from {before:,} to {after:,} steps; it has finished {step:,}",
        _rates(old, before, recipe, after, step),
    ]


def _rates(old: Recipe, before: int, new: Recipe, after: int, step: int) -> str:
    """What happens to the learning rate when a run of `before` steps becomes one of `after`, after `step` of them."""
    from vimscale.engine.optim import learning_rate  # imports torch

    last = learning_rate(old.optim, step - 1, before)
    following = learning_rate(new.optim, step, after)
    why = f"optim.schedule {new.optim.schedule} runs over the new length, and whatever else depends on the length does"
    if new.optim.schedule == "constant":
        why = "optim.schedule constant does not depend on the length"
    return f"learning rate: {last:.3g} in step {step:,}, {following:.3g} in step {step + 1:,}; {why}"


@dataclass(frozen=True)
class Fork:
    """A checkpoint of another run to start from, with its optimizer's state and its position in the data."""

    source: RunFolder
    step: int
    recipe: Recipe
    """What the fork trains."""

    @classmethod
    def of(cls, text: str, recipe: Recipe, runs: Path) -> "Fork":
        """Find the run and the step of `--fork RUN@STEP`, RUN a name under `runs` or a folder.

        Raises:
            CheckpointError: there is no such run, or no step is given.
            RecipeError: `recipe` changes what the run's state means.
        """
        run, at, step = text.rpartition("@")
        known = runs / (run or step)
        source = RunFolder(known) if (known / "recipe.yaml").is_file() else RunFolder.of(run or step)
        if not at or not step.isdecimal():
            there = ", ".join(str(step_of(path.name)) for path in reversed(checkpoints(source.checkpoints)))
            raise CheckpointError(
                f"--fork {text}: write RUN@STEP; {source.path} has these steps: {there or 'none yet'}"
            )
        fork = cls(source, int(step), recipe)
        if faults := list(fork._faults()):
            raise RecipeError(f"fork of {source.path} at step {fork.step:,}", faults)
        return fork

    def check(self, folder: RunFolder) -> None:
        """Check that the run in `folder` is this fork, or has not begun.

        Raises:
            LaunchError: it is another run.
        """
        if folder.path.resolve() == self.source.path.resolve():
            raise LaunchError(f"--fork: {folder.path} would start from itself; choose another name= for the fork")
        if not folder.trained:
            return
        origin = folder.origin()
        if origin is None:
            raise LaunchError(f"run folder {folder.path} holds a run that is not a fork; choose another name=")
        if (origin["run"], origin["step"]) != self._origin:
            was = f"{origin['run']}@{origin['step']}"
            raise LaunchError(f"run folder {folder.path} holds a fork of {was}; choose another name=")

    def into(self, folder: RunFolder) -> list[str]:
        """Copy the checkpoint, and the metrics up to its step, into a claimed folder whose run has not begun. Describe
        it, line by line; nothing if the run has begun, so that it resumes. If the process is killed meanwhile, the
        folder holds no run.

        Raises:
            CheckpointError: the run has no intact checkpoint of the step.
        """
        if folder.trained:
            return []
        folder.clear_fork()
        checkpoint = self.source.newest_checkpoint(self.step)
        state, rows = _train_state(checkpoint), list(self._rows())
        changes = recipe_changes.between(self.source.recipe(), self.recipe, "name".__eq__)
        run, step = self._origin
        folder.record_origin(
            {"run": run, "step": step, "changed": changes, "metrics_bytes": sum(len(row) for row in rows)}
        )
        with files.replacing(folder.metrics) as partial:
            partial.write_bytes(b"".join(rows))
        _copy(checkpoint, folder.checkpoints / checkpoint.name)
        average = ", their moving average" if state["ema"] and self.recipe.optim.ema else ""
        position = f"{state['stream']['samples']:,} images into the data"
        lines = [
            f"forked {self.source.path} at step {step:,} into {folder.path}: weights{average}, the optimizer's state,"
            f" {position}; the folder has its metrics up to there"
        ]
        if self.recipe.optim.ema and not state["ema"]:
            lines.append("that run keeps no moving average (optim.ema): it starts at the weights")
        lines += [f"changed: {key}: {change}" for key, change in changes.items()]
        samples = _samples(state, checkpoint)
        old = self.source.recipe()
        return [*lines, _rates(old, old.length(samples), self.recipe, self.recipe.length(samples), step)]

    @property
    def _origin(self) -> tuple[str, int]:
        return str(self.source.path.resolve()), self.step

    def _rows(self) -> Iterator[bytes]:
        """Lines of the run's metrics up to the step."""
        if not self.source.metrics.exists():
            return
        for line in self.source.metrics.read_bytes().split(b"\n")[:-1]:
            row = read_row(line)
            if row is not None and row["step"] <= self.step:
                yield line + b"\n"

    def _faults(self) -> Iterator[str]:
        """What the recipe changes of the meaning of the checkpoint, with the fix."""
        old, new, step = self.source.recipe(), self.recipe, self.step

        def is_free(key: str) -> bool:
            if key.startswith("optim."):
                return key != "optim.freeze"
            return key in _FREE or (key.startswith("augment.") and key != "augment.repeats")

        weights = f"leave it as it is, or start from the weights alone, with model.weights={self.source.path}"
        later = f"phases=[{{step: {step}, batch: {new.batch}}}]"
        fixes = {
            "batch": f"keep {old.batch} and change it from step {step} on: {later}",
            "data.train": f"data.reweight changes the shares from step {step} on; for other data, {weights}",
        }
        for key, change in recipe_changes.between(old, new, is_free).items():
            is_order = key in ("seed", "augment.repeats") or key.startswith("data.")
            yield f"{key}: {change}: {fixes.get(key, _ORDER if is_order else weights)}"
        for key, ours, theirs in (
            ("phases", new.phases, old.phases),
            ("data.reweight", new.data.reweight, old.data.reweight),
        ):
            if [each for each in ours if each.step < step] != [each for each in theirs if each.step < step]:
                yield f"{key}: what begins before step {step} must stay as it is; only later entries may change"


def _copy(checkpoint: Path, target: Path) -> None:
    """Copy an intact checkpoint; `target` is complete or absent.

    Raises:
        CheckpointError: it is removed or damaged meanwhile.
    """
    partial = target.with_name(f".{target.name}.fork.partial")
    try:
        partial.mkdir(parents=True)
        for name in [*(entry["name"] for entry in manifest.files(checkpoint)), manifest.NAME]:
            shutil.copyfile(checkpoint / name, partial / name)
            files.sync(partial / name)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} was removed while it was copied; fork another step") from None
    if (fault := manifest.damage(partial)) is not None:
        raise CheckpointError(f"the copy of {checkpoint} is damaged: {fault}")
    files.sync(partial)
    os.rename(partial, target)
    files.sync(target.parent)


def _train_state(checkpoint: Path) -> dict[str, Any]:
    """The content of trainer.json, without torch.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_bytes())
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}/trainer.json cannot be read ({error})") from None


def _samples(state: dict[str, Any], checkpoint: Path) -> int:
    """Images of the training set, as the checkpoint records them.

    Raises:
        CheckpointError: an old version wrote it, which did not.
    """
    try:
        return int(state["training_set"]["samples"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{checkpoint} does not say how large its training set is; an old version wrote it"
        ) from None
