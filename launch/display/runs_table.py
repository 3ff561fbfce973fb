"""The table of `vimscale top`: one line for each run, as many columns as fit."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vimscale.errors import shortened
from vimscale.report.glance import Glance

from ..supervise.progress import ARROWS, duration, figures, speed

_COLOURS = {
    "running": "green",
    "starting": "cyan",
    "waiting": "cyan",
    "stopping": "yellow",
    "stalled": "bold yellow",
    "stopped": "yellow",
    "failed": "bold red",
    "died": "bold red",
    "empty": "dim",
}
_SPARKS = "▁▂▃▄▅▆▇█"
_POINTS = 12
"""Cells of a sparkline."""
_LONGEST = 32
"""Cells of a run's name, if the table is too wide."""
_SHORTEST = 8
"""Cells of a run's name, at least."""
_NOTES = 5
"""Most lines below the table that say why runs are in their state."""
_GAP = 2


class _Column(NamedTuple):
    title: str
    text: Callable[[Glance], str]
    rank: int
    """The columns of the largest rank are left out first."""
    right: bool = True


def _steps(one: Glance) -> str:
    if not one.steps:
        return f"{one.step:,}" if one.step else ""
    return f"{one.step:,}/{one.steps:,} {100 * one.step // one.steps:3d}%"


def _state(one: Glance) -> str:
    since = f" {duration(time.time() - one.changed)}" if one.state == "stalled" else ""
    return f"{one.state}{since}"


def _evaluation(one: Glance) -> str:
    if one.evaluation is None:
        return ""
    first = {name: value for name, value in one.evaluation.items() if name not in ("images", "asynchronous")}
    return figures(first).partition("  ")[0] + f" @{one.evaluation['step']:,}"


def _loss(one: Glance, arrow: bool = True) -> str:
    if one.loss is None:
        return ""
    return f"{one.loss:.4f}" + (f" {ARROWS[one.trend]}" if one.trend and arrow else "")


_COLUMNS = (
    _Column("run", lambda one: one.name, 0, right=False),
    _Column("state", _state, 0, right=False),
    _Column("step", _steps, 0),
    _Column("speed", lambda one: speed(one.step_s) if one.step_s else "", 4),
    _Column("images/s", lambda one: f"{one.images_per_s:,.0f}" if one.step_s and one.images_per_s else "", 6),
    _Column("ETA", lambda one: duration(one.left_s) if one.left_s else "", 2),
    _Column("loss", _loss, 1),
    _Column("", lambda one: spark(one.losses), 5, right=False),
    _Column("evaluation", _evaluation, 3),
    _Column("restarts", lambda one: f"{one.restarts}" if one.restarts else "", 8),
    _Column("guard", lambda one: f"{one.guard}" if one.guard else "", 9),
    _Column("ranks", lambda one: f"{one.ranks}" if one.ranks else "", 10),
    _Column("GB/rank", lambda one: f"{one.memory_gb:.2f}" if one.memory_gb else "", 11),
)


def spark(values: Sequence[float]) -> str:
    """A line of the medians of up to 12 slices of the values, from the smallest to the largest."""
    if len(values) < 2:
        return ""
    count = min(_POINTS, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)]
    middles = [sorted(values[a:b])[(b - a) // 2] for a, b in pairwise(cuts)]
    low, high = min(middles), max(middles)
    if not high - low > 0 or high - low == float("inf"):
        return _SPARKS[0] * count
    steps = [int((value - low) / (high - low) * len(_SPARKS)) for value in middles]
    return "".join(_SPARKS[min(step, len(_SPARKS) - 1)] for step in steps)


class RunsTable:
    """The table, with a line above it; notes on runs and a line below it; as many runs as the height allows."""

    def __init__(self, title: str, runs: Sequence[Glance], footer: str = "", *, height: int | None = None):
        """`height`: of the terminal; default: no limit."""
        self._title, self._runs, self._footer, self._height = title, runs, footer, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs, more = list(self._runs), 0
        notes = [one for one in runs if one.note and one.state != "stalled"][:_NOTES]
        room = len(runs) + 4 if self._height is None else self._height - len(notes)
        if len(runs) > room - 4:
            more = len(runs) - max(room - 5, 1)
            runs = runs[: len(runs) - more]
        lines: list[RenderableType] = [Text(self._title, "bold", no_wrap=True, overflow="ellipsis")]
        if runs:
            lines.append(self._table(runs, options.max_width, ascii_only=options.ascii_only))
        if more:
            lines.append(Text(f"and {more:,} more", "dim"))
        for one in notes:
            text = Text(shortened(one.name, _LONGEST), no_wrap=True, overflow="ellipsis")
            text.append(f" {one.state}", _COLOURS.get(one.state, "")).append(f": {shortened(one.note, 500)}", "dim")
            lines.append(text)
        if self._footer:
            lines.append(Text(self._footer, "dim", no_wrap=True, overflow="ellipsis"))
        yield Group(*lines)

    @staticmethod
    def _table(runs: list[Glance], width: int, *, ascii_only: bool) -> Table:
        columns = [column for column in _COLUMNS if any(map(column.text, runs))]
        if ascii_only:
            columns = [column for column in columns if column.title]
            columns = [c._replace(text=lambda one: _loss(one, arrow=False)) if c.text is _loss else c for c in columns]
        widths = {c: max(cell_len(c.title), *(cell_len(c.text(one)) for one in runs)) for c in columns}
        widths[columns[0]] = min(widths[columns[0]], _LONGEST)
        while sum(widths.values()) + _GAP * (len(widths) - 1) > width and max(widths, key=lambda c: c.rank).rank:
            del widths[max(widths, key=lambda c: c.rank)]
        others = sum(list(widths.values())[1:]) + _GAP * (len(widths) - 1)
        widths[columns[0]] = min(widths[columns[0]], max(width - others, _SHORTEST))
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
        for column, size in widths.items():
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                max_width=size,
            )
        for one in runs:
            dim = "" if one.state in ("running", "starting", "stalled") else "dim"
            styles = {"state": _COLOURS.get(one.state, "")}
            table.add_row(*(Text(shortened(c.text(one)), styles.get(c.title, dim)) for c in widths))
        return table
