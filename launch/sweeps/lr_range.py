"""The learning-rate range test: the recipe of its run, and what losses at rising rates say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

_WIDTH = 0.03
"""Standard deviation of the smoothing kernel, as a fraction of the steps. It is symmetric, so that it adds no delay."""
_LOST = 0.5
"""The loss diverges where it has lost this fraction of its largest fall."""
_NOISE = 5.0
"""A fall or a rise counts from this many standard deviations of the smoothed losses' noise."""
_CEILING = 1.25
"""Losses are clipped to this many times the largest one of the first tenth: one explosion would hide what came before.
"""
_MARGIN = 10.0
"""The suggested rate stays below the diverging one by this factor."""


@dataclass(frozen=True)
class RangeResult:
    """What a range test found. The rates rise in the order of the fields."""

    smooth: list[float]
    """The smoothed losses, up to the first that is not finite."""
    steepest: float | None
    """The rate below `lowest` at which the loss falls fastest. None if it never falls by more than its noise."""
    lowest: float
    """The rate at which the smoothed loss is lowest before it diverges."""
    diverges: float | None
    """The lowest rate at which it diverges. None if it does not."""

    @property
    def suggested(self) -> float | None:
        """The steepest rate, kept well below the diverging one; two digits, rounded down."""
        if self.steepest is None:
            return None
        rate = min(self.steepest, self.diverges / _MARGIN if self.diverges is not None else math.inf)
        digits, exponent = f"{rate:.17e}".split("e")
        return float(f"{math.floor(float(digits) * 10) / 10}e{exponent}")

    @property
    def sentence(self) -> str:
        """The result as a sentence about the loss."""
        end = f"diverges from {self.diverges:.1e} on" if self.diverges is not None else "does not diverge up to --to"
        if self.steepest is None:
            return f"falls at none of these rates by more than its noise, {end}"
        return f"falls fastest at {self.steepest:.1e}, is lowest at {self.lowest:.1e}, {end}"


def rising(chosen: Recipe, low: float, high: float, steps: int) -> Recipe:
    """The recipe of a range test. Its guard only ends the run: skipping bad steps would hide the divergence."""
    changes = {
        "name": f"{chosen.name}-lr-range",
        "steps": steps,
        "epochs": None,
        "optim.schedule": "rise",
        "optim.min_lr": low,
        "optim.lr": high,
        "optim.warmup": 0,
        "data.val": None,
        "guard.spike": None,
        "guard.skips": 0,
        "guard.rollbacks": 0,
        "checkpoint.every": steps,
        "checkpoint.mirror": None,
        "evaluate.every": 0,
        "evaluate.asynchronous": False,
        "log.every": min(chosen.log.every, 10),
    }
    tree = chosen.model_dump()
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (tree[section] if section else tree)[last] = value
    return Recipe.model_validate(tree)


def diverged(folder: RunFolder) -> bool:
    """Whether a loss or gradient norm that is not finite ended the run."""
    last = folder.rows()[-1:]
    return any(not math.isfinite(value) for row in last for key, value in row.items() if key in ("loss", "grad_norm"))


def analyze(rates: Sequence[float], losses: Sequence[float]) -> RangeResult:
    """What losses at rising rates say. Losses after the divergence do not count."""
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if finite == 0:
        return RangeResult([], None, rates[0], rates[0])
    width = max(_WIDTH * len(losses), 1.0)
    ceiling = _CEILING * abs(max(losses[: max(finite // 10, 1)]))
    smooth = _smooth([min(loss, ceiling) for loss in losses[:finite]], width)
    calm = next((i for i, loss in enumerate(losses[:finite]) if loss > ceiling), finite)
    noise = _NOISE * _noise(losses[:calm]) / math.sqrt(2 * math.sqrt(math.pi) * width) + 1e-6 * ceiling
    highest = smooth[0]
    lowest, fall, end = 0, 0.0, len(smooth)
    for i, loss in enumerate(smooth):
        highest = max(highest, loss)
        if loss < smooth[lowest]:
            lowest, fall = i, highest - loss
        if loss - smooth[lowest] > max(_LOST * fall, noise):
            end = i
            break
    diverges = rates[end] if end < len(losses) else None
    slopes = {i: (smooth[i + 1] - smooth[i - 1]) / math.log(rates[i + 1] / rates[i - 1]) for i in range(1, lowest)}
    steepest = min(slopes, key=slopes.__getitem__) if slopes and fall > noise else None
    return RangeResult(smooth, rates[steepest] if steepest is not None else None, rates[lowest], diverges)


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of one step's loss around the curve, from the median change between steps."""
    changes = [abs(after - before) for before, after in pairwise(losses)]
    return statistics.median(changes) / (0.6745 * math.sqrt(2)) if changes else 0.0


def _smooth(values: Sequence[float], width: float) -> list[float]:
    """Gaussian smoothing, with the kernel renormalized at the ends."""
    reach = math.ceil(3 * width)
    kernel = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    smooth = []
    for center in range(len(values)):
        near = range(max(center - reach, 0), min(center + reach + 1, len(values)))
        weights = [kernel[i - center + reach] for i in near]
        smooth.append(sum(weight * values[i] for weight, i in zip(weights, near, strict=True)) / sum(weights))
    return smooth
