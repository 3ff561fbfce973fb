"""The page: charts and tables in one HTML file that needs nothing else and asks for nothing else."""

import base64
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from vimscale.report import charts, series, tables
from vimscale.report.planned import Planned, compared
from vimscale.report.record import Record, json_text
from vimscale.report.series import Pictures
from vimscale.report.words import note

_MISSING = {
    "learning": "No step has finished yet: there are no curves.",
    "evaluation": "No evaluations: set data.val, and evaluate.every to the steps between them; the last step is always"
    " evaluated.",
    "speed": "No progress line yet: log.every says when one is due.",
}


@dataclass(frozen=True)
class Content:
    """What a page shows of some runs."""

    parts: dict[str, str]
    """HTML of the text sections by the id of their element."""
    pictures: Pictures
    names: list[str]

    @property
    def form(self) -> str:
        """Changes when a page with this content needs other elements."""
        return hashlib.sha256((self.pictures.form + repr(self.names)).encode()).hexdigest()[:16]

    def data(self, stamp: str) -> str:
        """JSON that refreshes a page of the same form."""
        sources = {name: {key: _encoded(c) for key, c in columns.items() if key not in ("x", "width")}
                   for name, columns in self.pictures.sources.items()}  # fmt: skip
        return json_text({"stamp": stamp, "form": self.form, "parts": self.parts, "sources": sources})


def collect(records: Sequence[Record], plans: Sequence["Planned | str"]) -> Content:
    """Collect what a page shows. `plans`: of each run, or why there is none."""
    names = tables.labels(records)
    plan = "".join(
        (f"<h3>{escape(name)}</h3>" if len(records) > 1 else "") + compared(record, one)
        for name, record, one in zip(names, records, plans, strict=True)
    )
    parts = {
        "summary": tables.summary(records),
        "plan": plan,
        "timeline": tables.timeline(records),
        "findings": tables.findings(records),
        "model": tables.model(records),
        "recipes": tables.recipes(records),
        "environment": tables.environment(records),
        "checkpoints": tables.checkpoints(records),
        "written": escape(tables.written(records)),
    }
    if len(records) > 1:
        parts["differences"] = tables.differences(records)
    return Content(parts, series.pictures(records), names)


def html(content: Content, *, stamp: str = "", every_s: float = 0.0) -> str:
    """The page. `every_s`: seconds between its requests for new data; 0: it makes none."""
    pictures, names, parts = content.pictures, content.names, content.parts
    settings = {"stamp": stamp, "form": content.form, "every_s": every_s}
    groups = {group: [c.key for c in pictures.charts if c.group == group] for group in _MISSING}
    drawn = {group: _charts(keys) or note(_MISSING[group]) for group, keys in groups.items()}
    heats = "".join(
        f'<div data-of="{run}">'
        + (f"<h3>{escape(name)}</h3>" if len(names) > 1 else "")
        + (_charts([h.key for h in pictures.heats if h.run == run]) or note(_NO_LAYERS))
        + "</div>"
        for run, name in enumerate(names)
    )
    script, library = _asset("page.js"), charts.library()
    rule = _policy([script, library], connects=every_s > 0)
    title = ", ".join(names)
    differences = f"<h2>What differs</h2>{_part(parts, 'differences')}" if "differences" in parts else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(rule)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)} - vimscale</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{_runs(names)}{_axis(pictures.has_hours)}<button id="theme">light / dark</button>
<span class="note" id="written">{parts["written"]}</span><span id="trouble"></span></header>
<main>
<noscript><p>Charts need JavaScript; the tables below do not.</p></noscript>
{_part(parts, "summary")}
{differences}
<h2>How good is it?</h2>
{drawn["learning"]}
<h3>Evaluations</h3>
{drawn["evaluation"]}
<h2>How fast is it?</h2>
{drawn["speed"]}
<h3>Plan against reality</h3>
{_part(parts, "plan")}
<h2>What went wrong?</h2>
{_charts(["events"])}
{_part(parts, "timeline")}
<h3>What the guard found</h3>
{_part(parts, "findings")}
<h2>Inside the layers</h2>
{heats}
<h2>What is it?</h2>
<h3>Model</h3>
{_part(parts, "model")}
<h3>Recipe</h3>
{_part(parts, "recipes")}
<h3>Environment</h3>
{_part(parts, "environment")}
<h3>Checkpoints</h3>
{_part(parts, "checkpoints")}
</main>
<script type="application/json" id="settings">{json_text(settings)}</script>
<script type="application/json" id="charts">{json_text(charts.document(pictures, names))}</script>
<script type="text/plain" id="library">{_packed(library)}</script>
<script>{script}</script>
</body>
</html>
"""


_NO_LAYERS = "No telemetry of the layers yet: training writes it with every progress line, at multiples of log.every."


def _policy(scripts: Sequence[str], *, connects: bool) -> str:
    sums = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in sums)
    own = "; connect-src 'self'" if connects else ""
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:{own};"
        " base-uri 'none'; form-action 'none'"
    )


def _part(parts: dict[str, str], name: str) -> str:
    return f'<div id="{name}">{parts[name]}</div>'


def _charts(keys: Sequence[str]) -> str:
    boxes = "".join(f'<div class="chart" id="chart-{key}"></div>' for key in keys)
    return f'<div class="charts">{boxes}</div>' if boxes else ""


def _runs(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    chips = "".join(
        f'<label class="chip"><input type="checkbox" checked data-run="{i}">'
        f'<i style="background:{charts.COLORS[i % len(charts.COLORS)]}"></i>{escape(name)}</label>'
        for i, name in enumerate(names)
    )
    return f'<span id="runs">{chips}</span>'


def _axis(has_hours: bool) -> str:
    if not has_hours:
        return ""
    buttons = "".join(
        f'<button data-axis="{key}" aria-pressed="{str(key == "step").lower()}">{word}</button>'
        for key, word in (("step", "steps"), ("hours", "hours"))
    )
    return f'<span id="axis">{buttons}</span>'


@cache
def _asset(name: str) -> str:
    return (resources.files("vimscale.report") / name).read_text()


@cache
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def _encoded(column: "np.ndarray | list[str]") -> Any:
    if isinstance(column, list):
        return column
    kind = "i" if column.dtype.kind == "i" else "f"
    small = column.astype("<i4" if kind == "i" else "<f4")
    return {"kind": kind, "data": base64.b64encode(small.tobytes()).decode()}
