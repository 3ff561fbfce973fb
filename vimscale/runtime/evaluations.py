"""Evaluations that do not run on the ranks: a file for each evaluated checkpoint, in runs/NAME/evaluations/.

The launcher writes the files. metrics.jsonl keeps one writer: rank 0 copies new ones into it while it trains, and the
launcher does so after the ranks have ended.
"""

import json
from collections.abc import Iterable
from typing import Any

from vimscale.runtime.run_folder import RunFolder, checkpoint_name, is_checkpoint, read_row, step_of
from vimscale.storage import files


def write(folder: RunFolder, step: int, figures: dict[str, Any]) -> None:
    """Record the figures of a checkpoint."""
    _write(folder, {"kind": "eval", "step": step, "asynchronous": True, **figures})


def write_failure(folder: RunFolder, step: int, message: str) -> None:
    """Record that there are no figures of a checkpoint, so that it need not be kept for them."""
    _write(folder, {"kind": "failed", "step": step, "message": message})


def _write(folder: RunFolder, row: dict[str, Any]) -> None:
    folder.evaluations.mkdir(exist_ok=True)
    files.write(folder.evaluations / f"{checkpoint_name(row['step'])}.json", json.dumps(row) + "\n")


def steps(folder: RunFolder) -> list[int]:
    """Steps of the checkpoints that are done with, in order."""
    names = (path.stem for path in folder.evaluations.glob("step_*.json"))
    return sorted(step_of(name) for name in names if is_checkpoint(name))


def read(folder: RunFolder, step: int) -> dict[str, Any] | None:
    """The row for metrics.jsonl; None if the evaluation failed, or its file is damaged or was just removed."""
    try:
        row = read_row((folder.evaluations / f"{checkpoint_name(step)}.json").read_bytes())
    except OSError:
        return None
    return row if row is not None and row["kind"] == "eval" else None


def forget_after(folder: RunFolder, step: int) -> None:
    """Remove what was found of later steps, which the run has undone."""
    for found in steps(folder):
        if found > step:
            (folder.evaluations / f"{checkpoint_name(found)}.json").unlink(missing_ok=True)


def waiting(folder: RunFolder, every: int, names: Iterable[str]) -> set[str]:
    """Those of the checkpoints `names` that must stay because they have not been evaluated, one in `every` steps."""
    done = set(steps(folder))
    return {name for name in names if every and step_of(name) % every == 0 and step_of(name) not in done}
