"""Which checkpoints stay, and removing the others."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from vimscale.recipe.recipe import Checkpoint
from vimscale.runtime.run_folder import checkpoints, newest_first, step_of


def surplus(names: Iterable[str], rules: Checkpoint) -> list[str]:
    """Names of the checkpoints to remove, newest first: all but the `keep` newest, multiples of `keep_every`, and the
    newest one at a multiple of `every`, which the guard may roll back to.
    """
    ordered = newest_first(names)
    regular = next((name for name in ordered if step_of(name) % rules.every == 0), None)
    return [name for name in ordered[rules.keep :] if name != regular and not kept_for_good(name, rules)]


def kept_for_good(name: str, rules: Checkpoint) -> bool:
    return rules.keep_every is not None and step_of(name) % rules.keep_every == 0


def remove(checkpoint: Path) -> None:
    """Rename it first, then delete: a crash leaves no partial checkpoint under a checkpoint's name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def remove_after(checkpoint: Path) -> None:
    """Remove the checkpoints that are newer than one that the run rolls back to."""
    for path in checkpoints(checkpoint.parent):
        if step_of(path.name) > step_of(checkpoint.name):
            remove(path)
