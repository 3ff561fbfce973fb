"""`vimscale lr-range`: one short run whose learning rate rises exponentially; the losses say which rates train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vimscale import recipe as recipes
from vimscale.errors import LaunchError, RunFailed
from vimscale.recipe import Recipe
from vimscale.run_folder import RunFolder

from . import trials, unattended
from .arguments import Overrides, RecipeArgument
from .signals import StopSignal

_WIDTH = 0.03
"""Standard deviation of the smoothing, as a share of the steps: on both sides, so that nothing comes late."""
_LOST = 0.5
"""A loss that has lost this share of what it had gained diverges."""
_MARGIN = 10.0
"""The suggestion stays this factor below the rate that diverges."""
_SHOWN = 12
"""Rows of the table."""


@dataclass(frozen=True)
class Found:
    """What a range test says."""

    smooth: list[float]
    """Smoothed losses, as far as they are finite."""
    steepest: float
    """The rate at which the loss falls fastest."""
    diverges: float | None
    """The rate from which on it does not come back; None if it always did."""

    @property
    def suggested(self) -> float:
        """Where the loss falls fastest, well below where it diverges; to two digits."""
        bound = self.diverges / _MARGIN if self.diverges is not None else math.inf
        return float(f"{min(self.steepest, bound):.1e}")


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

    from . import on_local
    from .workers import sizes

    if not 0 < low < high:
        raise LaunchError(f"--from {low:g} --to {high:g}: the rate rises, so write 0 < --from < --to")
    trials.check_installed("matplotlib")
    chosen = rising(recipes.load(recipe, overrides or ()), low, high, steps)
    folder = RunFolder(runs / chosen.name)
    console = Console()
    stop = StopSignal()
    if folder.finished(chosen) is None:
        TrainingSet.open(chosen.data)
        asked = str(workers) if workers is not None else None
        (world,) = sizes(asked, chosen, on_local.cpus(), on_local.gpus(), "this machine")
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
        "checkpoint.second": None,
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
    """What losses at rising rates say.

    Raises:
        RunFailed: nothing; the loss falls nowhere, or it is not finite from the start.
    """
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smooth = _smooth(losses[:finite], max(_WIDTH * len(losses), 1.0))
    slopes = [
        (smooth[i + 1] - smooth[i - 1]) / math.log(rates[i + 1] / rates[i - 1]) for i in range(1, len(smooth) - 1)
    ]
    if not slopes or min(slopes) >= 0:
        raise RunFailed("the loss falls at none of these rates; start with a lower --from")
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    lost = smooth[lowest] + _LOST * (max(smooth[: lowest + 1]) - smooth[lowest])
    late = next((i for i in range(lowest, len(smooth)) if smooth[i] > lost), None)
    if late is None and finite < len(losses):
        late = finite
    steepest = min(range(len(slopes)), key=slopes.__getitem__) + 1
    return Found(smooth, rates[steepest], rates[late] if late is not None else None)


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
    from . import pictures

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
    pictures.lr_range(rates, losses, found, f"{chosen.name}: batch {chosen.batch}", picture)
    ends = f"diverges from {found.diverges:.1e} on" if found.diverges is not None else "diverges nowhere up to --to"
    console.print(f"falls fastest at {found.steepest:.1e}, {ends}", highlight=False, soft_wrap=True)
    console.print(f"suggested: optim.lr={found.suggested:.1e}", style="bold", highlight=False)
    console.print(f"picture: {picture}", highlight=False, soft_wrap=True)
