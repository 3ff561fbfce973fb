"""Plots by matplotlib: a sweep's curves and results, loss over learning rate, memory and time of a plan, confusion and
calibration of a classifier.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from vimscale.errors import LaunchError, shortened
from vimscale.estimate.calibration import RATES
from vimscale.storage import files

if TYPE_CHECKING:
    from vimscale.estimate.planner import Outlook, Planner
    from vimscale.evaluation.tally import Tally

    from ..sweeps.lr_range import RangeResult
    from ..sweeps.trials import By, Group

_SMOOTH = 0.95
"""Factor of the exponential average of losses."""
_NAMED = 10
"""The most curves that a legend names, and values that an axis names."""
_IN_SIGHT = 4
"""Available memory is drawn as a line if it is at most this many times the memory needed."""
_LOG_FACTOR = 4
"""Values that differ by this factor or more get a logarithmic axis."""

_FAMILIES = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Arial Unicode MS", "PingFang SC", "Microsoft YaHei", "MS Gothic"),
)
"""Fonts to look for a character in, in this order; the first comes with matplotlib."""
_LETTERS = 40
"""The most characters of a user's value in a plot."""
_ROWS, _CELLS, _TICK = 40, 20, 18
"""The most classes that a confusion matrix names, and writes shares for; the most characters of such a name."""


@cache
def _families() -> tuple[list[str], frozenset[int]]:
    """The installed fonts of _FAMILIES, and the code points that they cover."""
    from matplotlib import font_manager

    installed = [name for name in _FAMILIES if name in font_manager.get_font_names()]
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in installed]
    return installed, frozenset(letter for font in fonts for letter in font.get_charmap())


def plain(text: str) -> str:
    """A user's text for a plot: without formulas, and without characters that no font has."""
    known = _families()[1]
    drawn = "".join(x if ord(x) in known else ascii(x)[1:-1] for x in shortened(text, _LETTERS))
    return drawn.replace("$", r"\$")


def _figure(panels: int) -> tuple[Any, list[Any]]:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["font.family"] = _families()[0]

    figure, axes = pyplot.subplots(1, panels, figsize=(1.2 + 4.6 * panels, 4.2), squeeze=False, layout="constrained")
    for one in axes[0]:
        one.grid(visible=True, alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    """Write a figure; its file name says the format.

    Raises:
        LaunchError: matplotlib cannot write this format.
        OSError: the file cannot be written; names it.
    """
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in known:
        raise LaunchError(f"plot {path}: .{kind} is not an image format; use one of {', '.join(sorted(known))}")
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=kind)
    from matplotlib import pyplot

    pyplot.close(figure)  # pyplot keeps it otherwise


def smoothed(values: Sequence[float], factor: float = _SMOOTH) -> list[float]:
    """The exponential average, corrected for its start. It ends before the first value that is not finite."""
    average, weight, found = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            break
        average = factor * average + (1 - factor) * value
        weight = factor * weight + 1 - factor
        found.append(average / weight)
    return found


def sweep(groups: "Sequence[Group]", by: "By", title: str, path: Path) -> None:
    """Plot the losses of all trials, one color per setting, the best one thickest; and the results per dimension."""
    keys = [key for key, _ in groups[0].outcomes[0].trial.setting] or ["seed"]
    figure, (curves, *results) = _figure(1 + len(keys))
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    for number, group in enumerate(groups):
        colour = shades(0.9 * number / max(len(groups) - 1, 1))
        name = plain(", ".join(value for _, value in group.outcomes[0].trial.setting)) if number < _NAMED else None
        for one in group.outcomes:
            line = smoothed(one.losses)
            curves.plot(range(1, len(line) + 1), line, color=colour, lw=2 if number == 0 else 1.2, label=name)
            name = None
            if one.status != "finished" and line:
                curves.plot(len(line), line[-1], "o", color=colour, mfc="white", ms=5)
    curves.set(
        xlabel="step",
        ylabel="training loss, smoothed",
        title="losses; a circle marks an early end",
    )
    curves.legend(frameon=False, fontsize=8, title="best first", title_fontsize=8)
    for key, axes in zip(keys, results, strict=True):
        _results(axes, key, groups, by, shades)
    figure.suptitle(title)
    _save(figure, path)


def _results(axes: Any, key: str, groups: "Sequence[Group]", by: "By", shades: Any) -> None:
    """Plot each finished trial's result over its value of `key`. Numbers stand at their value, words side by side.
    Trials that ended early are crosses at the bottom, since their results are from other steps.
    """
    values = list(dict.fromkeys(one.trial.point[key] for group in groups for one in group.outcomes))
    try:
        positions = {value: float(value) for value in values}
    except ValueError:
        positions = {value: float(number) for number, value in enumerate(sorted(values))}
        axes.margins(x=0.2)
    else:
        if min(positions.values()) > 0 and max(positions.values()) / min(positions.values()) >= _LOG_FACTOR:
            axes.set_xscale("log")
            axes.minorticks_off()
    if len(positions) <= _NAMED:
        names = list(map(plain, positions))
        axes.set_xticks(list(positions.values()), names, rotation=20 if max(map(len, names)) > 6 else 0)
    for number, group in enumerate(groups):
        colour = shades(0.9 * number / max(len(groups) - 1, 1))
        for one in group.outcomes:
            x = positions[one.trial.point[key]]
            if one.status == "finished":
                axes.plot(x, one.value, "o", color=colour, ms=7)
            else:
                axes.plot(x, 0.03, "x", color=colour, transform=axes.get_xaxis_transform())
    if by == "top1":
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel=key, ylabel="top-1" if by == "top1" else "loss", title="results; a cross marks an early end")


def lr_range(rates: Sequence[float], losses: Sequence[float], result: "RangeResult", title: str, path: Path) -> None:
    """Plot losses over the learning rate, raw and smoothed, with the rates of the result."""
    figure, (axes,) = _figure(1)
    figure.set_size_inches(7.5, 4.6)
    axes.plot(rates, losses, color="C0", alpha=0.3, lw=1)
    smooth, diverges = result.smooth, result.diverges
    axes.plot(rates[: len(smooth)], smooth, color="C0", lw=2)
    if result.suggested is not None:
        axes.axvline(result.suggested, color="C2", ls="--", label=f"suggested: {result.suggested:.1e}")
        axes.axvline(result.lowest, color="0.5", ls=":", label=f"lowest at {result.lowest:.1e}")
    if diverges is not None:
        axes.axvline(diverges, color="C3", ls="--", label=f"diverges from {diverges:.1e} on")
        axes.axvspan(diverges, rates[-1], color="C3", alpha=0.08, lw=0)
    before = [i for i, rate in enumerate(rates[: len(smooth)]) if diverges is None or rate < diverges]
    if shown := [value for i in before for value in (losses[i], smooth[i])]:
        low, high = min(shown), max(shown)
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + (3 if diverges is not None else 1) * margin)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="training loss, raw and smoothed")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        axes.set_title(result.sentence, fontsize=9)
    figure.suptitle(title)
    _save(figure, path)


def plan(planner: "Planner", rows: "Sequence[Outlook]", path: Path) -> None:
    """Plot a rank's memory at its peak over the number of ranks; on GPUs also the days and GPU hours."""
    device, available = planner.target.device, planner.target.room
    what = "GPUs" if device is not None else "ranks"
    figure, (memory, *others) = _figure(2 if device is not None else 1)
    counts = [row.world for row in rows]
    parts = {
        "states": [row.need.held.between_steps for row in rows],
        "gradients": [row.need.gradients for row in rows],
        "buckets, gathered": [row.need.buckets + row.need.gathered for row in rows],
        "activations": [row.need.activations + row.need.images for row in rows],
    }
    most = max(row.need.total for row in rows)
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    below = [0.0] * len(rows)
    for label, sizes in parts.items():
        memory.bar([f"{count:,}" for count in counts], [size / unit for size in sizes], bottom=below, label=label)
        below = [low + size / unit for low, size in zip(below, sizes, strict=True)]
    in_sight = available <= _IN_SIGHT * most
    if in_sight:
        memory.axhline(available / unit, color="k", linestyle=":", label=f"available: {available / 1e9:,.1f} GB")
    else:
        memory.plot([], [], " ", label=f"available: {available / 1e9:,.1f} GB, far above")
    memory.set(xlabel=what, ylabel=f"{name} per {what[:-1]} at its peak")
    memory.set_title(f"{planner.recipe.name} on {planner.target.name}")
    memory.set_ylim(0, 1.5 * max(most, available if in_sight else 0) / unit)
    memory.margins(x=0.3 if len(rows) < 3 else 0.05)
    memory.tick_params(axis="x", rotation=45 if len(rows) > 4 else 0)
    memory.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for time in others:
        time.loglog(counts, [row.days for row in rows], "o-", label="days")
        time.loglog(counts, [row.rank_hours / 1000 for row in rows], "s--", label="thousand GPU hours")
        calibrated = device is not None and device.name in RATES
        time.set(xlabel="GPUs", title="predicted" + ("" if calibrated else ", not calibrated"))
        time.legend(frameon=False, fontsize=8)
    _save(figure, path)


def confusion(tally: "Tally", title: str, path: Path) -> None:
    """Plot which share of each class's images is taken for which class. Classes without images have no row."""
    from matplotlib.colors import PowerNorm

    assert tally.confusion is not None
    here = tally.images > 0
    shares = (tally.confusion[here] / tally.images[here][:, None]).numpy()
    rows = [name for name, there in zip(tally.classes, here.tolist(), strict=True) if there]
    figure, (axes,) = _figure(1)
    wide, high = (min(max(0.34 * len(names), 4.0), 9.0) for names in (tally.classes, rows))
    figure.set_size_inches(wide + 2.4, high + 1.4)
    axes.grid(visible=False)
    # where shares are not written, a power makes rare mistakes visible
    norm = PowerNorm(1.0 if len(tally.classes) <= _CELLS else 0.4, vmin=0, vmax=1)
    shown = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto")
    figure.colorbar(shown, label="share of the true class's images")
    axes.set(xlabel="chosen class", ylabel="true class", title=plain(title))
    for names, axis in ((tally.classes, axes.xaxis), (rows, axes.yaxis)):
        if len(names) <= _ROWS:
            axis.set_ticks(range(len(names)), [plain(shortened(name, _TICK)) for name in names])
    if len(tally.classes) <= _ROWS:
        axes.tick_params(axis="x", rotation=90 if max(map(len, tally.classes)) > 3 else 0)
    if len(tally.classes) <= _CELLS:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                color = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=color, fontsize=7)
    _save(figure, path)


def calibration(tally: "Tally", title: str, path: Path) -> None:
    """Plot accuracy over the probability of the chosen class (a reliability diagram), and how full each bin is."""
    images, hits, probability = tally.bins.numpy().T
    there, width = images > 0, 1 / len(images)
    centers = (np.arange(len(images)) + 0.5) * width
    figure, (reliability, counts) = _figure(2)
    reliability.bar(centers[there], hits[there] / images[there], 0.94 * width, color="C0", alpha=0.6, label="accuracy")
    mean = probability[there] / images[there]
    reliability.plot(mean, hits[there] / images[there], "o", color="C0", ms=4)
    reliability.plot([0, 1], [0, 1], "k:", label="calibrated")
    reliability.set(xlabel="probability of the chosen class", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    reliability.set_title(f"expected calibration error {tally.calibration_error:.4f}", fontsize=10)
    reliability.legend(framealpha=0.9, edgecolor="none", loc="upper left")
    counts.bar(centers, images / images.sum(), 0.94 * width, color="0.5")
    counts.set(xlabel="probability of the chosen class", ylabel="share of the images", xlim=(0, 1))
    counts.set_title(f"{int(images.sum()):,} images", fontsize=10)
    figure.suptitle(plain(title))
    _save(figure, path)
