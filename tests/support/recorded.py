"""Folders of runs that nobody trained: a recipe, and metrics of any length."""

import json
import math
from pathlib import Path
from typing import Any

from vimscale.recipe import recipe as recipes

START = 1_795_765_000.0
"""When such a run starts, in seconds since the epoch."""


def write_run(folder: Path, steps: int = 100, *changes: str, every: int = 10) -> Path:
    """Write a run of the digits with `steps` rows, and a progress line and telemetry `every` so many steps."""
    folder.mkdir(parents=True)
    chosen = recipes.load("vim_digits_cpu", [f"steps={max(steps, 60)}", "epochs=null", *changes])
    (folder / "recipe.yaml").write_text(chosen.to_yaml())
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"kind": "train", "step": step, "loss": 0.5 + 2 * math.exp(-step / 50), "lr": 1e-3}
        rows.append(row)
        if step % every == 0:
            row |= {"grad_norm": 1 + 0.1 * math.sin(step), "images_per_s": 200.0, "data_wait": 0.1, "memory_gb": 0.5}
            row["time"] = START + step / 2
            layers = {"layer": [0, 1, 2, 3], "rms": [1.0, 1.5, 2.0, step / 10], "gate": [1.0, 0.5, 0.1, None]}
            rows.append({"kind": "layers", "step": step, **layers})
    append(folder, *rows)
    return folder


def append(folder: Path, *rows: dict[str, Any]) -> None:
    """Add rows to a run's metrics."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
