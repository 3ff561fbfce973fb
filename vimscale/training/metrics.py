"""Figures of a run: what rank 0 writes as JSON lines and reports to trackers, and how they are measured."""

import contextlib
import json
import logging
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimscale.data.dataset import Traffic
from vimscale.data.prefetch import Prefetcher
from vimscale.data.stream import Batch
from vimscale.errors import CAUSES, DataError, RunFailed
from vimscale.runtime import distributed, evaluations
from vimscale.runtime.run_folder import RunFolder, read_row
from vimscale.storage.appended import Appended
from vimscale.tracking.trackers import Trackers

log = logging.getLogger(__name__)

_TOO_MANY_FROM = 10
"""Fewer bad images than this never stop a run."""
_NAMED_IN_LOG = 20
"""Bad images that a rank's log names."""


class Metrics:
    """Appends rows to metrics.jsonl, and reports them to trackers. Neither ever ends or blocks a run: what cannot be
    written is tried again with the next row. The first row drops what an interrupted run wrote past `start`, the step
    that this run resumes from; a launch that is stopped before its first row changes nothing.
    """

    def __init__(self, folder: RunFolder, start: int, trackers: Trackers, *, trained: bool = False):
        """`trained`: `start` is the last step. Only the evaluation after it is left to do, and it replaces an earlier
        one.
        """
        self._folder, self._start, self._trained = folder, start, trained
        self.trackers = trackers
        self._rows: Appended | None = None
        self._evaluated: set[int] | None = None

    def _open(self) -> Appended:
        _drop_after(self._folder.metrics, self._start, trained=self._trained)
        self.trackers.open()
        self._rows = Appended(self._folder.metrics)
        return self._rows

    def write(self, row: dict[str, Any]) -> None:
        """`row` has a step and a kind: train, eval, layers or guard.

        Raises:
            RunFailed: on the first row, if the later rows of an interrupted run cannot be dropped.
        """
        rows = self._rows or self._open()
        rows.add(json.dumps(row).encode() + b"\n")
        self.trackers.write(row)

    def add_evaluations(self, step: int) -> None:
        """Write the rows of asynchronous evaluations up to `step` that are not there yet."""
        if self._evaluated is None:
            rows = self._folder.rows()
            self._evaluated = {row["step"] for row in rows if row["kind"] == "eval" and row["step"] <= self._start}
        for at in evaluations.steps(self._folder):
            new = at <= step and at not in self._evaluated
            if new and (row := evaluations.read(self._folder, at)) is not None:
                self._evaluated.add(at)
                self.write(row)

    def go_back(self, step: int) -> None:
        """Continue from an earlier step: the next row drops those past it."""
        self.close()
        self._start, self._trained, self._rows, self._evaluated = step, False, None, None
        self.trackers.go_back(step)

    def close(self) -> None:
        """Close metrics.jsonl; the trackers stay open."""
        if self._rows is not None:
            self._rows.close()


def _drop_after(path: Path, step: int, *, trained: bool) -> None:
    """Drop the rows of steps after `step`, and if `trained` the evaluation after it. Unreadable lines stay, with a
    warning, except for a last line that was cut by a kill.
    """
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    if last and read_row(last) is not None:
        lines.append(last)
    rows = [read_row(line) for line in lines]
    again = [row is not None and trained and (row["kind"], row["step"]) == ("eval", step) for row in rows]
    kept = [
        line
        for line, row, left_out in zip(lines, rows, again, strict=True)
        if row is None or (row["step"] <= step and not left_out)
    ]
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunFailed(
            f"{path} could not be written: {error.strerror}; make room there, and the same command resumes the run"
        ) from None
    there = {row["step"] for row in rows if row is not None and row["kind"] == "train"}
    missing = step - len(there & set(range(1, step + 1)))
    if damaged := rows.count(None):
        log.warning(
            "%s: %d lines cannot be read and are kept as they are; the losses of %d of %d steps are missing",
            *(path, damaged, missing, step),
        )
    elif missing:
        log.warning("%s: the losses of %d of %d steps are missing", path, missing, step)


_TAKEN = frozenset({"kind", "step", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "read_mb_per_s"})
_TAKEN |= {"memory_gb", "gpu_busy", "fetched_mb_per_s", "cache_hits", "epoch", "time"}
"""Names in a line that an objective's figures cannot have."""


class Curve:
    """Losses, learning rates and the objective's figures of the steps since the last line, kept on the device."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._sums: dict[str, Tensor] = {}
        self._micros = 0

    def add_figures(self, figures: Mapping[str, Tensor]) -> None:
        """Add the objective's figures for one micro-batch.

        Raises:
            RunFailed: a figure has a name that the line itself uses.
        """
        if taken := sorted(name for name in figures if name in _TAKEN or name.startswith("bad_")):
            raise RunFailed(f"the objective names a figure {taken[0]}, as lines of metrics.jsonl already do; rename it")
        for name, value in figures.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micros += 1

    def add(self, loss: Tensor, rate: float) -> None:
        """Add a finished step."""
        self._losses.append(loss)
        self._rates.append(rate)

    def read(self, step: int, world: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """(a row for each step up to `step`, the means of the figures over ranks and micro-batches); starts again.
        Waits for the device. All ranks call it.
        """
        first = step - len(self._losses) + 1
        rows: list[dict[str, Any]] = [
            {"kind": "train", "step": first + i, "loss": loss, "lr": rate}
            for i, (loss, rate) in enumerate(zip(torch.stack(self._losses).tolist(), self._rates, strict=True))
        ]
        means = {}
        if self._sums:
            totals = distributed.total(torch.stack(list(self._sums.values()))) / (self._micros * world)
            means = dict(zip(self._sums, totals.tolist(), strict=True))
        self._clear()
        return rows, means


class Meter:
    """Measures all ranks between two log lines: images per second, time spent waiting for data, bytes read. An image
    that `context` ranks share counts once; its bytes count as often as they are read.
    """

    def __init__(self, prefetcher: Prefetcher, max_bad: float, context: int):
        self._prefetcher, self._max_bad, self._context = prefetcher, max_bad, context
        self._seen = self._warned = 0.0
        self._bad = dict.fromkeys(CAUSES, 0.0)
        self._named: set[str] = set()
        self.restart()

    def add(self, batch: Batch) -> None:
        self._images += len(batch.keys)
        self._traffic += batch.traffic
        for cause, description in batch.bad:
            self._new[cause] += 1
            if description not in self._named and len(self._named) < _NAMED_IN_LOG:
                self._named.add(description)
                log.warning("replaced: %s", description)

    def read(self, world: int) -> dict[str, float]:
        """Figures since the last call, summed or averaged over the ranks; starts again. All ranks call it.

        Raises:
            DataError: on all ranks, if more images were bad since the launch than data.max_bad allows.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        traffic = asdict(self._traffic)
        counted = distributed.counts_images(self._context)
        bad = [number * counted for number in self._new.values()]
        own = [self._images * counted, self._prefetcher.waited(), *traffic.values(), *bad]
        images, waited, *rest = distributed.total(self._prefetcher.tensor(own)).tolist()
        totals = dict(zip([*traffic, *self._new], rest, strict=True))
        row = {
            "images_per_s": images / elapsed,
            "data_wait": min(waited / world / elapsed, 1.0),
            "read_mb_per_s": totals["bytes"] / elapsed / 1e6,
            "memory_gb": _memory_bytes() / 1e9,
            "time": round(time.time(), 1),
        }
        if (busy := _gpu_busy()) is not None:
            row["gpu_busy"] = busy
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
        if bad >= _TOO_MANY_FROM and bad > self._max_bad * self._seen:
            raise DataError(
                f"{found}, more than data.max_bad {self._max_bad:g} allows; logs/ names them, `vimscale data verify"
                " --deep` lists all there are, `vimscale data repair` drops them"
            )
        if distributed.rank() == 0:
            log.warning("%s", found)

    def restart(self) -> None:
        self._images, self._traffic, self._new = 0, Traffic(), dict.fromkeys(CAUSES, 0)
        self._prefetcher.waited()
        self._since = time.perf_counter()


def _memory_bytes() -> float:
    """Peak memory of this rank: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gpu_busy() -> float | None:
    """The fraction of the last moments in which this rank's GPU computed, by its driver; None if nothing reads it."""
    return torch.cuda.utilization() / 100 if _reads_utilization() else None


@cache
def _reads_utilization() -> bool:
    if not torch.cuda.is_available() or find_spec("amdsmi" if torch.version.hip else "pynvml") is None:
        return False
    try:
        torch.cuda.utilization()
    except Exception as error:  # of a library that may be missing; a part of a GPU (MIG), for one, has no such figure
        log.info("the driver does not say how busy the GPU is: %s", error)
        return False
    return True
