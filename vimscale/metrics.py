"""Figures of a run: JSON lines and TensorBoard, written by rank 0."""

import json
import logging
import math
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from vimscale import distributed
from vimscale.data.dataset import Traffic
from vimscale.data.feed import Feed
from vimscale.data.stream import Batch
from vimscale.errors import CAUSES, DataError
from vimscale.run_folder import RunFolder

log = logging.getLogger(__name__)

_FEW = 10
"""So many bad images never stop a run."""
_TOLD = 20
"""So many of them are named in a rank's log."""


class Metrics:
    """Appends rows to metrics.jsonl. With the first one, what an interrupted run wrote past the step it resumes from is
    dropped: a launch that is stopped before changes nothing.
    """

    def __init__(self, folder: RunFolder, start: int):
        self._folder, self._start = folder, start
        self._file: TextIO | None = None

    def _open(self) -> TextIO:
        from tensorboardX import SummaryWriter

        _drop_after(self._folder.metrics, self._start)
        self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=self._start or None)
        self._file = self._folder.metrics.open("a", buffering=1)
        return self._file

    def write(self, row: dict[str, Any]) -> None:
        """`row` has a step and a kind: train, eval, layers or guard."""
        file = self._file or self._open()
        file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "kind") and isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def close(self) -> None:
        if self._file is not None:
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
    """What went on in all ranks between two lines of the log: images a second, waiting for data, what was read."""

    def __init__(self, feed: Feed, max_bad: float):
        self._feed, self._max_bad = feed, max_bad
        self._seen = self._warned = 0.0
        self._bad = dict.fromkeys(CAUSES, 0.0)
        self._told: set[str] = set()
        self.restart()

    def add(self, batch: Batch) -> None:
        self._images += len(batch.keys)
        self._traffic += batch.traffic
        for cause, description in batch.bad:
            self._new[cause] += 1
            if description not in self._told and len(self._told) < _TOLD:
                self._told.add(description)
                log.warning("replaced: %s", description)

    def read(self, world: int) -> dict[str, float]:
        """Figures since the last reading, summed or averaged over the ranks, and a fresh start. Called by all of them.

        Raises:
            DataError: on all ranks alike, if more images were bad since the launch than may be.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        traffic = asdict(self._traffic)
        own = [self._images, self._feed.waited(), *traffic.values(), *self._new.values()]
        images, waited, *rest = distributed.total(self._feed.tensor(own)).tolist()
        totals = dict(zip([*traffic, *self._new], rest, strict=True))
        row = {
            "images_per_s": images / elapsed,
            "data_wait": min(waited / world / elapsed, 1.0),
            "read_mb_per_s": totals["bytes"] / elapsed / 1e6,
            "memory_gb": _memory_bytes() / 1e9,
        }
        if totals["hits"] + totals["misses"]:
            row["fetched_mb_per_s"] = totals["fetched"] / elapsed / 1e6
            row["cache_hits"] = totals["hits"] / (totals["hits"] + totals["misses"])
        self._seen += images
        for cause in CAUSES:
            self._bad[cause] += totals[cause]
        self._judge()
        row |= {f"bad_{cause.replace(' ', '_')}": number for cause, number in self._bad.items() if number}
        self.restart()
        return row

    def _judge(self) -> None:
        bad = sum(self._bad.values())
        if bad == self._warned:
            return
        self._warned = bad
        causes = ", ".join(f"{cause}: {number:,.0f}" for cause, number in self._bad.items() if number)
        found = f"{bad:,.0f} of {self._seen:,.0f} images so far could not be used and were replaced ({causes})"
        if bad >= _FEW and bad > self._max_bad * self._seen:
            raise DataError(
                f"{found}, more than data.max_bad {self._max_bad:g} allows; logs/ names them, `vimscale data verify"
                " --deep` lists all there are, `vimscale data repair` drops them"
            )
        if distributed.rank() == 0:
            log.warning("%s", found)

    def restart(self) -> None:
        self._images, self._traffic, self._new = 0, Traffic(), dict.fromkeys(CAUSES, 0)
        self._feed.waited()
        self._since = time.perf_counter()


def _memory_bytes() -> float:
    """Peak memory of this rank: the device's where there is one, the process's otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
