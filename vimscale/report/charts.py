"""The charts as Bokeh models, which become JSON for BokehJS in the page."""

import re
from collections.abc import Sequence
from typing import Any

import bokeh.models as bk
import bokeh.palettes
from bokeh.core.enums import Place
from bokeh.document import Document
from bokeh.embed.util import standalone_docs_json_and_render_items
from bokeh.plotting import figure
from bokeh.resources import Resources

from vimscale.report.series import Chart, Heat, Pictures

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#ec4899", "#84cc16")
"""Of the runs, or of the lines of a single run; visible on white and on black."""
_EVENTS = {"launches": "#10b981", "failures": "#ef4444", "guard": "#f59e0b", "warnings": "#a855f7"}
_HEIGHT = 250
_DASHES = ("solid", "dashed", "dotted", "dotdash")


def library() -> str:
    """BokehJS without its extensions: widgets, tables, WebGL, formulas."""
    return Resources(mode="inline", components=["bokeh"]).js_raw[0]


def document(pictures: Pictures, names: Sequence[str]) -> dict[str, Any]:
    """{docs, items, targets} for BokehJS: `targets` names the element of each chart by its key."""
    sources = {name: bk.ColumnDataSource(columns, name=name) for name, columns in pictures.sources.items()}
    over = bk.DataRange1d(name="over", range_padding=0.01)
    roots = {chart.key: _curves(chart, sources, names, over, pictures) for chart in pictures.charts}
    roots["events"] = _events(pictures, sources, names, over)
    roots |= {heat.key: _heat(heat, sources, over) for heat in pictures.heats}
    together = Document()
    for root in roots.values():
        together.add_root(root)
    docs, (item,) = standalone_docs_json_and_render_items(list(roots.values()))
    made = item.to_json()
    made["roots"] = {root.id: f"chart-{key}" for key, root in roots.items()}
    return {"docs": docs, "items": [made]}


def _plain(text: str) -> str:
    """Text for a canvas: Bokeh would take $$ and backslashes for formulas."""
    return re.sub(r"[^\w .,:/+()%@-]", "·", text)[:60]


def _figure(over: bk.Range, title: str, height: int, **more: Any) -> figure:
    tools = [
        bk.BoxZoomTool(dimensions="auto"),
        bk.WheelZoomTool(dimensions="width", modifiers={"ctrl": True}),
        bk.PanTool(),
        bk.ResetTool(),
        bk.SaveTool(),
    ]
    found = figure(
        title=_plain(title), x_range=over, height=height, sizing_mode="stretch_width", tools=tools,
        toolbar_location="above", min_border_right=12, background_fill_color=None, border_fill_color=None, **more,
    )  # fmt: skip
    found.axis.minor_tick_line_color = None
    found.toolbar.logo = None
    found.toolbar.autohide = True
    found.toolbar.active_drag = tools[0]
    found.title.text_font_size = "13px"
    found.xaxis.formatter = bk.NumeralTickFormatter(format="0,0.[00]")
    found.xaxis.ticker = bk.BasicTicker(desired_num_ticks=6)
    return found


def _axis(form: str) -> bk.TickFormatter:
    if "%" not in form and not form.startswith("0,0"):
        return bk.BasicTickFormatter()
    return bk.NumeralTickFormatter(format=re.sub(r"\.0+", lambda zeros: f".[{zeros[0][1:]}]", form))


def _curves(
    chart: Chart, sources: dict[str, bk.ColumnDataSource], names: Sequence[str], over: bk.Range, pictures: Pictures
) -> figure:
    fig = _figure(over, chart.title, _HEIGHT, y_axis_type="log" if chart.log else "linear")
    fig.yaxis.formatter = bk.BasicTickFormatter() if chart.log else _axis(chart.form)
    labels = list(dict.fromkeys(line.label for line in chart.lines))
    several = len(names) > 1
    entries: list[tuple[str, list[bk.GlyphRenderer]]] = []
    for line in chart.lines:
        number = labels.index(line.label)
        own = chart.group == "evaluation" and not several
        color = COLORS[(number if own else line.run) % len(COLORS)]
        faint = line.style == "faint"
        drawn = [
            fig.line(
                "x", line.column, source=sources[line.source], color=color, line_width=1 if faint else 2,
                line_alpha=0.35 if faint else 1.0,
                line_dash=_DASHES[number % 4] if several and chart.group == "evaluation" else "solid",
            )
        ]  # fmt: skip
        if line.style == "points":
            drawn.append(fig.scatter("x", line.column, source=sources[line.source], color=color, size=6))
        for one in drawn:
            one.tags = [line.run]
        tips = [("", _plain(names[line.run]))] if several else []
        tips += [
            (_plain(line.label), f"@{{{line.column}}}{{{chart.form.replace('e+0', '0')}}}"),
            ("step", "@step{0,0}"),
        ]
        if chart.form.count("e+"):
            tips[-2] = (_plain(line.label), f"@{{{line.column}}}{{%.3e}}")
        formats = {f"@{{{line.column}}}": "printf"} if "e+" in chart.form else {}
        fig.add_tools(
            bk.HoverTool(renderers=drawn[:1], tooltips=tips, formatters=formats, mode="mouse", visible=False,
                         line_policy="nearest")
        )  # fmt: skip
        label = " ".join(filter(None, [_plain(names[line.run]) if several else "", _plain(line.label)]))
        entries.append((label if len(labels) > 1 or not several else _plain(names[line.run]), drawn))
    if len(entries) > 1:
        legend = bk.Legend(
            items=[bk.LegendItem(label=label, renderers=drawn) for label, drawn in entries],
            click_policy="hide", orientation="horizontal", ncols=min(len(entries), 3), label_text_font_size="11px",
            padding=0, spacing=8, margin=2, border_line_color=None, background_fill_alpha=0,
        )  # fmt: skip
        fig.add_layout(legend, "above")
    if chart.key == "loss":
        for run, key in enumerate(pictures.events):
            for kind in ("failures", "guard"):
                view = bk.CDSView(filter=bk.GroupFilter(column_name="kind", group=kind))
                color = _EVENTS[kind]
                line = fig.vspan("x", source=sources[key], view=view, color=color, line_alpha=0.6, line_width=1.5)
                line.tags = [run]
    return fig


def _events(
    pictures: Pictures, sources: dict[str, bk.ColumnDataSource], names: Sequence[str], over: bk.Range
) -> figure:
    rows = list(_EVENTS)[::-1]
    fig = _figure(over, "what happened, and at which step", 150, y_range=rows)
    colors = bk.CategoricalColorMapper(factors=rows, palette=[_EVENTS[row] for row in rows])
    for run, key in enumerate(pictures.events):
        drawn = fig.scatter(
            "x", "kind", source=sources[key], size=11, marker="diamond", fill_alpha=0.8,
            color={"field": "kind", "transform": colors},
        )  # fmt: skip
        drawn.tags = [run]
        tips = [("", _plain(names[run])), ("step", "@step{0,0}"), ("", "@text")]
        fig.add_tools(bk.HoverTool(renderers=[drawn], tooltips=tips, visible=False))
    fig.ygrid.visible = False
    return fig


def _heat(heat: Heat, sources: dict[str, bk.ColumnDataSource], over: bk.Range) -> figure:
    height = 110 + min(max(heat.layers * 12, 80), 420)
    fig = _figure(over, heat.title, height, y_range=bk.Range1d(heat.layers - 0.5, -0.5))
    mapper = bk.LogColorMapper if heat.log else bk.LinearColorMapper
    colors = mapper(
        palette=bokeh.palettes.viridis(64), low=heat.low, high=heat.high, nan_color="#00000000", name=heat.key
    )
    shade = {"field": heat.column, "transform": colors}
    cells = fig.rect(
        *("x", "layer", "width", 1), source=sources[heat.source], fill_color=shade, line_color=shade, line_width=0.6
    )
    cells.tags = [heat.run]
    bar = bk.ColorBar(color_mapper=colors, width=10, padding=4, label_standoff=6, background_fill_alpha=0)
    bar.ticker = (
        bk.LogTicker(desired_num_ticks=4)
        if heat.log and heat.high > 300 * heat.low
        else bk.BasicTicker(desired_num_ticks=5)
    )
    bar.formatter = bk.BasicTickFormatter(precision=2)
    place: Any = Place.right
    fig.add_layout(bar, place)
    tips = [("layer", "@layer"), (_plain(heat.column), f"@{{{heat.column}}}{{%.4g}}"), ("from step", "@from_step{0,0}")]
    fig.add_tools(
        bk.HoverTool(renderers=[cells], tooltips=tips, formatters={f"@{{{heat.column}}}": "printf"}, visible=False)
    )
    fig.yaxis.ticker = bk.BasicTicker(min_interval=1, desired_num_ticks=min(heat.layers, 12), num_minor_ticks=0)
    fig.yaxis.formatter = bk.NumeralTickFormatter(format="0")
    fig.yaxis.axis_label = "layer"
    fig.grid.visible = False
    return fig
