"""`vimscale lr-range`: one short run whose learning rate rises exponentially; the losses say which rates train."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import LaunchError, RunFailed
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..processes.signals import StopSignal
from ..supervise import progress
from ..sweeps import trials, unattended
from .arguments import Overrides, RecipeArgument

_WIDTH = 0.03
"""Standard deviation of the smoothing, as a share of the steps: on both sides, so that nothing comes late."""
_LOST = 0.5
"""A loss that has lost this share of what it had gained diverges."""
_NOISE = 5.0
"""A fall or a rise counts from this many standard deviations of the smoothed losses' noise."""
_CEILING = 1.25
"""Losses count as at most this many times the largest one of the first tenth, or one explosion would cover what came
before it.
"""
_MARGIN = 10.0
"""The suggestion stays this factor below the rate that diverges."""
_SHOWN = 12
"""Rows of the table."""


@dataclass(frozen=True)
class Found:
    """What a range test says. The rates rise in the order of the fields."""

    smooth: list[float]
    """Smoothed losses, as far as they are finite."""
    steepest: float | None
    """The rate at which the loss falls fastest before it is lowest; None if it does not fall by more than its noise."""
    lowest: float
    """The rate at which the smoothed loss is lowest before it diverges."""
    diverges: float | None
    """The rate from which on it diverges; None if it does not."""

    @property
    def suggested(self) -> float | None:
        """Where the loss falls fastest, well below where it diverges; two digits, rounded down."""
        if self.steepest is None:
            return None
        rate = min(self.steepest, self.diverges / _MARGIN if self.diverges is not None else math.inf)
        digits, exponent = f"{rate:.17e}".split("e")
        return float(f"{math.floor(float(digits) * 10) / 10}e{exponent}")

    @property
    def story(self) -> str:
        """In one sentence."""
        ends = f"diverges from {self.diverges:.1e} on" if self.diverges is not None else "diverges nowhere up to --to"
        if self.steepest is None:
            return f"falls at none of these rates by more than its noise, {ends}"
        return f"falls fastest at {self.steepest:.1e}, is lowest at {self.lowest:.1e}, {ends}"


def lr_range(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--from", help="The first learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="The last one.")] = 1.0,
    steps: Annotated[int, typer.Option(min=20, help="Length of the run.")] = 100,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; absent: one a GPU, or two on CPUs.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs' folders are.")] = Path("runs"),
) -> None:
    """Find the learning rates that train a recipe, in one short run; nothing else of the recipe changes."""
    from vimscale.data.training_set import TrainingSet
    from vimscale.export import starting

    from .. import hardware
    from ..processes.num_ranks import sizes
    from . import memory_check

    if not 0 < low < high:
        raise LaunchError(f"--from {low:g} --to {high:g}: the rate rises, so write 0 < --from < --to")
    trials.check_installed("matplotlib")
    chosen = rising(recipes.load(recipe, overrides or ()), low, high, steps)
    folder = RunFolder(runs / chosen.name)
    console = progress.console()
    stop = StopSignal()
    if folder.finished(chosen) is None:
        train_set = TrainingSet.open(chosen.data)
        starting.check(chosen, folder, train_set.manifest)
        asked = str(workers) if workers is not None else None
        (world,) = sizes(asked, chosen, hardware.cpus(), hardware.gpus(), "this machine")
        memory_check.check(chosen, train_set, world, ray=False)
        with stop.installed():
            folder.claim(chosen)
            try:
                code = unattended.run(chosen, folder, world, console, stop)
            except RunFailed as error:
                if not _diverged(folder):
                    raise
                first = str(error).splitlines()[0]
                console.print(f"the run has diverged, as it may: {first}", highlight=False, soft_wrap=True)
            else:
                if code:
                    folder.withdraw()
                    console.print("stopped on request; the same command continues", highlight=False)
                    raise typer.Exit(code)
    rows = [row for row in trials.rows(folder) if row["kind"] == "train"]
    show([row["lr"] for row in rows], [row["loss"] for row in rows], chosen, folder, console)


def rising(chosen: Recipe, low: float, high: float, steps: int) -> Recipe:
    """The recipe as a range test: the guard, which would leave out what is looked for, only ends it."""
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
        "log.every": min(chosen.log.every, 10),
    }
    tree = chosen.model_dump()
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (tree[section] if section else tree)[last] = value
    return Recipe.model_validate(tree)


def _diverged(folder: RunFolder) -> bool:
    """Whether what ended it was a loss or gradient that is not finite."""
    last = trials.rows(folder)[-1:]
    return any(not math.isfinite(value) for row in last for key, value in row.items() if key in ("loss", "grad_norm"))


def read(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """What losses at rising rates say. What comes after the divergence says nothing more."""
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if finite == 0:
        return Found([], None, rates[0], rates[0])
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
    return Found(smooth, rates[steepest] if steepest is not None else None, rates[lowest], diverges)


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of one step's loss about the curve, by the median change from step to step."""
    changes = [abs(after - before) for before, after in pairwise(losses)]
    return statistics.median(changes) / (0.6745 * math.sqrt(2)) if changes else 0.0


def _smooth(values: Sequence[float], width: float) -> list[float]:
    reach = math.ceil(3 * width)
    weights = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    found = []
    for at in range(len(values)):
        near = range(max(at - reach, 0), min(at + reach + 1, len(values)))
        shares = [weights[i - at + reach] for i in near]
        found.append(sum(share * values[i] for share, i in zip(shares, near, strict=True)) / sum(shares))
    return found


def show(rates: Sequence[float], losses: Sequence[float], chosen: Recipe, folder: RunFolder, console: Console) -> None:
    """The losses as a short table and a picture, and what follows from them."""
    from ..display import plots

    found = read(rates, losses)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("learning rate", "loss", "smoothed"):
        table.add_column(title, justify="right")
    apart = max(len(rates) // _SHOWN, 1)
    for at in range(apart - 1, len(rates), apart):
        smooth = f"{found.smooth[at]:.4f}" if at < len(found.smooth) else "-"
        table.add_row(f"{rates[at]:.1e}", f"{losses[at]:.4f}", smooth)
    console.print(table)
    picture = folder.path / "lr_range.png"
    plots.lr_range(rates, losses, found, f"{chosen.name}: batch {chosen.batch}", picture)
    console.print(found.story, highlight=False, soft_wrap=True)
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
    if found.suggested is None:
        raise RunFailed(f"the loss {found.story}; give another --from and --to, or more --steps")
    console.print(f"suggested: optim.lr={found.suggested:.1e}", style="bold", highlight=False)
