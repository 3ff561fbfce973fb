"""Pictures drawn by matplotlib: a sweep's curves and results, losses over the learning rate, what a plan foresees."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from vimscale.errors import LaunchError, shortened
from vimscale.storage import files

if TYPE_CHECKING:
    from vimscale.estimate.planner import Outlook, Planner

    from ..commands.lr_range import Found
    from ..sweeps.trials import By, Group

_SMOOTH = 0.95
_NAMED = 10
"""Curves that a legend can name, and values that an axis can."""
_IN_SIGHT = 4
"""The memory that there is, is drawn if it is at most this many times what is needed."""
_DECADES = 4
"""Numbers that differ by this factor stand on a logarithmic axis."""


_FAMILIES = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Droid Sans Fallback", "Arial Unicode MS", "PingFang SC", "Microsoft YaHei", "MS Gothic"),
)
"""Fonts that are asked for a letter in turn, as far as they are here; the first comes with matplotlib."""
_LETTERS = 40
"""Of a value of the user's in a picture."""


@cache
def _families() -> tuple[list[str], frozenset[int]]:
    """The fonts that are here, and the letters that they have."""
    from matplotlib import font_manager

    here = [name for name in _FAMILIES if name in font_manager.get_font_names()]
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in here]
    return here, frozenset(letter for font in fonts for letter in font.get_charmap())


def plain(text: str) -> str:
    """A user's text as a picture can have it: no formula, no letter that would be a box."""
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
    """Raises:
    LaunchError: matplotlib writes no such files.
    OSError: with the file's name.
    """
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in known:
        raise LaunchError(f"picture {path}: .{kind} is not a kind of picture; write one of {', '.join(sorted(known))}")
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=kind)


def smoothed(values: Sequence[float], factor: float = _SMOOTH) -> list[float]:
    """An exponential average, free of the bias of its start; it ends before the first value that is not finite."""
    average, weight, found = 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            break
        average = factor * average + (1 - factor) * value
        weight = factor * weight + 1 - factor
        found.append(average / weight)
    return found


def sweep(groups: "Sequence[Group]", by: "By", title: str, path: Path) -> None:
    """Losses of all trials, one colour a setting, the best one's the strongest; and the result over each dimension."""
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
        title="losses, a circle where trials ended early",
    )
    curves.legend(frameon=False, fontsize=8, title="from the best on", title_fontsize=8)
    for key, axes in zip(keys, results, strict=True):
        _over(axes, key, groups, by, shades)
    figure.suptitle(title)
    _save(figure, path)


def _over(axes: Any, key: str, groups: "Sequence[Group]", by: "By", shades: Any) -> None:
    """Each finished trial's result over its value of `key`: numbers where they are on the axis, words side by side.
    Trials that ended early are crosses at the foot, since their results are of other steps.
    """
    values = list(dict.fromkeys(one.trial.point[key] for group in groups for one in group.outcomes))
    try:
        places = {value: float(value) for value in values}
    except ValueError:
        places = {value: float(number) for number, value in enumerate(sorted(values))}
        axes.margins(x=0.2)
    else:
        if min(places.values()) > 0 and max(places.values()) / min(places.values()) >= _DECADES:
            axes.set_xscale("log")
            axes.minorticks_off()
    if len(places) <= _NAMED:
        names = list(map(plain, places))
        axes.set_xticks(list(places.values()), names, rotation=20 if max(map(len, names)) > 6 else 0)
    for number, group in enumerate(groups):
        colour = shades(0.9 * number / max(len(groups) - 1, 1))
        for one in group.outcomes:
            place = places[one.trial.point[key]]
            if one.status == "finished":
                axes.plot(place, one.value, "o", color=colour, ms=7)
            else:
                axes.plot(place, 0.03, "x", color=colour, transform=axes.get_xaxis_transform())
    if by == "top1":
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel=key, ylabel="top-1" if by == "top1" else "loss", title="results, a cross where trials ended early")


def lr_range(rates: Sequence[float], losses: Sequence[float], found: "Found", title: str, path: Path) -> None:
    """Losses over the learning rate, raw and smoothed, with what was read from them."""
    figure, (axes,) = _figure(1)
    figure.set_size_inches(7.5, 4.6)
    axes.plot(rates, losses, color="C0", alpha=0.3, lw=1)
    axes.plot(rates[: len(found.smooth)], found.smooth, color="C0", lw=2)
    if found.suggested is not None:
        axes.axvline(found.suggested, color="C2", ls="--", label=f"suggested: {found.suggested:.1e}")
        axes.axvline(found.lowest, color="0.5", ls=":", label=f"lowest at {found.lowest:.1e}")
    if found.diverges is not None:
        axes.axvline(found.diverges, color="C3", ls="--", label=f"diverges from {found.diverges:.1e} on")
        axes.axvspan(found.diverges, rates[-1], color="C3", alpha=0.08, lw=0)
    before = [i for i, rate in enumerate(rates[: len(found.smooth)]) if found.diverges is None or rate < found.diverges]
    if shown := [value for i in before for value in (losses[i], found.smooth[i])]:
        low, high = min(shown), max(shown)
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + (3 if found.diverges is not None else 1) * room)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="training loss, and smoothed")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        axes.set_title(found.story, fontsize=9)
    figure.suptitle(title)
    _save(figure, path)


def plan(planner: "Planner", rows: "Sequence[Outlook]", path: Path) -> None:
    """What stands in a rank's memory at its peak, over the number of ranks; on GPUs also the time and the hours."""
    device, room = planner.target.device, planner.target.room
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
    if room <= _IN_SIGHT * most:
        memory.axhline(room / unit, color="k", linestyle=":", label=f"there is: {room / 1e9:,.1f} GB")
    else:
        memory.plot([], [], " ", label=f"there is: {room / 1e9:,.1f} GB, far above")
    memory.set(xlabel=what, ylabel=f"{name} per {what[:-1]} at its peak")
    memory.set_title(f"{planner.recipe.name} on {planner.target.name}")
    memory.set_ylim(0, 1.5 * max([most, *([room] if room <= _IN_SIGHT * most else [])]) / unit)
    memory.margins(x=0.3 if len(rows) < 3 else 0.05)
    memory.tick_params(axis="x", rotation=45 if len(rows) > 4 else 0)
    memory.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for time in others:
        time.loglog(counts, [row.days for row in rows], "o-", label="days")
        time.loglog(counts, [row.rank_hours / 1000 for row in rows], "s--", label="thousand GPU hours")
        time.set(xlabel="GPUs", title="predicted by a roofline")
        time.legend(frameon=False, fontsize=8)
    _save(figure, path)
