"""The guard: which updates to leave out, when to roll back to the last checkpoint, and when to end the run."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vimscale.data.prefetch import Prefetcher
from vimscale.data.stream import Batch
from vimscale.objectives.base import Inputs
from vimscale.recipe import sections
from vimscale.recipe.recipe import Recipe

_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
_FLOOR = 0.01
"""A deviation counts as at least this fraction of the median; after equal values any change would be a spike."""


@dataclass(frozen=True)
class Seen:
    """One step, as all ranks saw it."""

    step: int
    """Its number, counted from 1."""
    row: int
    """Bad steps in a row, up to and including this one; 0 for a good one."""
    loss: float
    grad_norm: float
    loss_z: float
    norm_z: float
    loss_median: float
    norm_median: float

    @property
    def reason(self) -> str:
        """Why the step is bad."""
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            if not math.isfinite(value):
                return f"{name} {value} is not finite"
        parts = []
        if self.loss_z >= self.norm_z:
            parts = [f"loss {self.loss:.4g} is a spike", f"median {self.loss_median:.4g}", f"z {self.loss_z:.1f}"]
        else:
            parts = [f"gradient norm {self.grad_norm:.4g} is a spike", f"median {self.norm_median:.4g}"]
            parts += [f"z {self.norm_z:.1f}"]
        return f"{parts[0]} ({', '.join(parts[1:])})"


@dataclass(frozen=True)
class Micro:
    """A micro-batch as the model got it, by reference."""

    batch: Batch
    draws: Tensor | None
    backward: list[float] | None

    def inputs(self, prefetcher: Prefetcher) -> Inputs:
        """What the objective got."""
        images, targets = prefetcher.prepare(self.batch)
        return Inputs(images, targets, prefetcher.views(self.batch), self.draws, self.backward)


@dataclass(frozen=True)
class Record:
    """What the guard keeps of a step until its verdict is known."""

    step: int
    micros: list[Micro]
    broken_gradients: Callable[[], list[str]]


class Judge:
    """Decides on the device whether a step is bad; nothing waits for the answer."""

    def __init__(self, options: sections.Guard, device: torch.device):
        self._spike = math.inf if options.spike is None else options.spike
        self._window = torch.zeros(2, options.window, device=device)
        self._good = torch.zeros(1, dtype=torch.int64, device=device)
        self._row = torch.zeros(1, device=device)

    def __call__(self, seen: Tensor) -> Tensor:
        """Judge a step. seen (2): loss and gradient norm, the same on every rank -> (8): 1 if bad, else 0; bad steps in
        a row; loss, norm; their z-scores, 0 until the window is full; their medians, nan until then.
        """
        size = self._window.shape[1]
        median = _median(self._window)
        deviation = _median((self._window - median[:, None]).abs()) * _NORMAL
        filling = self._good < size
        z = ((seen - median) / deviation.clamp_min(_FLOOR * median.abs())).masked_fill(filling, 0.0)
        sound = ((seen.abs() < math.inf) & (z <= self._spike)).all()[None]
        slot = self._good % size
        self._window.index_copy_(1, slot, torch.where(sound, seen[:, None], self._window.index_select(1, slot)))
        self._good += sound
        bad = (~sound).to(seen.dtype)
        self._row = (self._row + 1) * bad
        return torch.cat([bad, self._row, seen, z, median.masked_fill(filling, math.nan)])

    def forget(self) -> None:
        """Empty the window: old statistics no longer apply."""
        self._good.zero_()

    def state(self) -> dict[str, Any]:
        return {"window": self._window.tolist(), "good": int(self._good)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a judge's `state`; start with an empty window if there is none, or if its length differs."""
        self._row.zero_()
        self.forget()
        window = torch.tensor(state.get("window", ()))
        if window.shape == self._window.shape:
            self._window.copy_(window)
            self._good.fill_(state["good"])


def _median(values: Tensor) -> Tensor:
    """Lower median of each row, (r, n) -> (r). It sorts, which needs no host synchronization."""
    return values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]


class Guard:
    """One rank's part of the guard. Every rank judges the same numbers, so all decide the same in the same step.

    The device decides at once whether to leave out an update. The host reads the verdict when that costs nothing: at
    once on a CPU, one step late on a GPU, while the device computes the next step. The result of a run does not depend
    on this: a run rolls back from the step in which the device counted one bad step too many, and later steps are
    undone.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        self._recipe, self._options = recipe, recipe.guard
        self._judge = Judge(recipe.guard, device)
        self._late = 1 if device.type == "cuda" else 0
        self._verdict = torch.zeros(8, device=device)
        self._records: deque[tuple[Record, Tensor, torch.cuda.Event | None]] = deque()
        self._fresh = {phase.step for phase in recipe.phases} | {change.step for change in recipe.data.reweight}
        self.good: Record | None = None
        """The last step known to be good, to compare bad ones with."""
        self.row = 0
        """Bad steps in a row, as far as the host knows."""
        self.rollbacks = 0
        self.lower_until = 0

    def factor(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` finished ones. Call it once per step."""
        if step in self._fresh:  # images of other sizes or sources have another loss
            self._judge.forget()
        return self._options.lower_lr if step < self.lower_until else 1.0

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge the step: 1 if its update must be left out, else 0, on the device. `loss`: this rank's mean."""
        seen = torch.stack([loss, norm.to(loss)])
        world = dist.get_world_size()
        if world > 1:
            dist.all_reduce(seen)
            seen /= world
        self._verdict = self._judge(seen)
        return self._verdict[0]

    @property
    def loss(self) -> Tensor:
        """Loss of the last judged step, averaged over the ranks, on the device."""
        return self._verdict[2]

    @property
    def applied(self) -> Tensor:
        """1 if the last judged step's update was made, else 0, on the device."""
        return 1 - self._verdict[0]

    def keep(self, record: Record) -> None:
        """Keep the record of the step that was judged last."""
        if not self._late:
            self._records.append((record, self._verdict, None))
            return
        copied = torch.cuda.Event()
        verdict = torch.empty(self._verdict.shape, pin_memory=True).copy_(self._verdict, non_blocking=True)
        copied.record()
        self._records.append((record, verdict, copied))

    def read(self, wait: bool) -> list[tuple[Seen, Record]]:
        """The bad steps among those whose verdict has arrived; the same on all ranks. `wait`: for all verdicts."""
        found = []
        while len(self._records) > (0 if wait else self._late):
            record, verdict, copied = self._records.popleft()
            if copied is not None:
                copied.synchronize()
            bad, row, *figures = verdict.tolist()
            self.row = int(row)
            if bad:
                found.append((Seen(record.step, self.row, *figures), record))
            else:
                self.good = record
        return found

    def state(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "lower_until": self.lower_until, **self._judge.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the `state` that a checkpoint holds."""
        self.rollbacks, self.lower_until = state.get("rollbacks", 0), state.get("lower_until", 0)
        self._judge.restore(state)

    def go_back(self, step: int, state: dict[str, Any]) -> None:
        """Count a rollback to the checkpoint of `step`, which holds `state`."""
        self._records.clear()
        self._judge.restore(state)
        self.good, self.row = None, 0
        self.rollbacks += 1
        self.lower_until = step + self._options.lower_steps


def pass_over(recipe: Recipe, skipped: Sequence[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """`skipped` (see `Order`), extended by whatever steps [first, last) read."""
    inside = [(at, images) for at, images in skipped if first < at < last]
    images = recipe.consumed(last) - recipe.consumed(first) + sum(images for _, images in inside)
    return sorted([pair for pair in skipped if pair not in inside] + [(first, images)])
