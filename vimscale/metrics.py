"""Figures of a run: JSON lines and TensorBoard, written by rank 0."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from vimscale.run_folder import RunFolder


class Metrics:
    """Appends rows to metrics.jsonl; what an interrupted run wrote past the step it resumes from is dropped."""

    def __init__(self, folder: RunFolder, start: int):
        _drop_after(folder.metrics, start)
        self._file = folder.metrics.open("a", buffering=1)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder.tensorboard), purge_step=start or None)

    def write(self, row: dict[str, Any]) -> None:
        """`row` has a step and a kind: train or eval."""
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "kind") and isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut in half
        if row["step"] <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    partial.rename(path)


class Meter:
    """Images a second and the share of time spent waiting for data, between two lines of the log."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._images = 0
        self._since = time.perf_counter()

    def add(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        """Figures since the last reading, and a fresh start."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        row = {
            "images_per_s": self._images / elapsed,
            "data_wait": min(self.waited / elapsed, 1.0),
            "memory_gb": _memory_bytes() / 1e9,
        }
        self.restart()
        return row

    def restart(self) -> None:
        self.waited, self._images, self._since = 0.0, 0, time.perf_counter()


def _memory_bytes() -> float:
    """Peak memory of this rank: the device's where there is one, the process's otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
