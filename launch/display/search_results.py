"""Results of a sweep and of a learning-rate range test: tables, plots, and what they suggest."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vimscale.errors import RunFailed
from vimscale.model.cost import flops
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..sweeps.lr_range import analyze
from ..sweeps.trials import By, Group, Outcome
from . import plots
from .lines import print_line

_ROWS = 12
"""Rows of a range test's table, about."""


def lr_range(
    rates: Sequence[float], losses: Sequence[float], chosen: Recipe, folder: RunFolder, console: Console
) -> None:
    """Print and plot the losses of a range test, and the suggested rate.

    Raises:
        RunFailed: the loss falls by no more than its noise, so there is nothing to suggest.
    """
    result = analyze(rates, losses)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("learning rate", "loss", "smoothed"):
        table.add_column(title, justify="right")
    every = max(len(rates) // _ROWS, 1)
    for i in range(every - 1, len(rates), every):
        smooth = f"{result.smooth[i]:.4f}" if i < len(result.smooth) else "-"
        table.add_row(f"{rates[i]:.1e}", f"{losses[i]:.4f}", smooth)
    console.print(table)
    plot = folder.path / "lr_range.png"
    plots.lr_range(rates, losses, result, f"{chosen.name}: batch {chosen.batch}", plot)
    print_line(console, result.sentence)
    print_line(console, f"plot: {plot}")
    if result.suggested is None:
        raise RunFailed(f"the loss {result.sentence}; give another --from and --to, or more --steps")
    print_line(console, f"suggested: optim.lr={result.suggested:.1e}", style="bold")


def sweep(groups: list[Group], by: By, folder: Path, console: Console) -> None:
    """Print and plot a sweep's settings, the best first."""
    keys = list(groups[0].outcomes[0].trial.point)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for key in keys:
        if key != "seed":
            table.add_column(key, overflow="fold")
    for title in ("top-1" if by == "top1" else "loss", "seeds", "steps", "images/s", "training"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for number, group in enumerate(groups):
        cells = [value for _, value in group.outcomes[0].trial.setting]
        speeds = [one.images_per_s for one in group.outcomes if one.images_per_s is not None]
        table.add_row(
            *cells,
            _score(group, by),
            f"{len(group.finished)}/{len(group.outcomes)}" if "seed" in keys else "",
            " ".join(sorted({f"{one.step:,}" for one in group.outcomes})),
            f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
            _short_flops(sum(map(_training_flops, group.outcomes))),
            _remark(group),
            style="bold green" if number == 0 and group.finished else None,
        )
    console.print(table)
    total = _short_flops(sum(_training_flops(one) for group in groups for one in group.outcomes))
    plot = folder / "sweep.png"
    plots.sweep(groups, by, f"{folder.name}: {len(groups)} settings, {total} of training", plot)
    best = groups[0]
    if best.finished:
        setting = " ".join(shlex.quote(f"{key}={value}") for key, value in best.outcomes[0].trial.setting)
        print_line(console, f"best: {setting or 'any'}, {_score(best, by)}; the whole sweep took {total}")
    print_line(console, f"plot: {plot}")


def _score(group: Group, by: By) -> str:
    """Mean over the seeds ± standard deviation."""
    if group.mean is None:
        return "-"
    form = "{:.2%}" if by == "top1" else "{:.4f}"
    return form.format(group.mean) + (f" ± {form.format(group.spread)}" if group.spread is not None else "")


def _remark(group: Group) -> str:
    """Why trials of the setting did not finish."""
    stopped = sum(one.status == "stopped" for one in group.outcomes)
    error = next((one.error for one in group.outcomes if one.error), "")
    parts = [f"{stopped} given up" if stopped else "", error[:100]]
    parts += ["unfinished"] if any(one.status == "unfinished" for one in group.outcomes) and not error else []
    return "; ".join(part for part in parts if part)


def _training_flops(one: Outcome) -> float:
    """FLOPs of a trial's training, counting a backward pass as two forward passes."""
    recipe = one.trial.recipe
    return 3.0 * flops(recipe.largest(recipe.model.shape(classes=1))) * recipe.consumed(one.step)


def _short_flops(number: float) -> str:
    unit, size = next((u for u in (("E", 1e18), ("P", 1e15), ("T", 1e12)) if number >= u[1]), ("G", 1e9))
    return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}FLOP"
