"""Which charts a page has, and the numbers in them: one table of columns for each kind of row of each run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vimscale.model.schedule import MOST_LAYERS
from vimscale.report import decimate
from vimscale.report.record import Event, Record, number

Columns = dict[str, np.ndarray | list[str]]
"""Equally long columns of figures and texts. Charts draw over `x`, a copy of `step` or `hours`."""

POINTS = 12_000
"""Most points of the curves of single steps, over all runs; progress lines have half as many."""
_CELLS = 6_000
"""Most cells of a heat map, over all runs."""
_EVENTS = 500
"""Most events of a run that are drawn."""
_SMOOTH = 0.95
"""Factor of the exponential average of losses."""
_LOG_FROM = 30
"""Values whose largest is this many times the smallest get a logarithmic axis."""
_FIGURES = 12
"""Most figures of an objective that are drawn."""
_KNOWN = (
    "grad_norm",
    "images_per_s",
    "data_wait",
    "read_mb_per_s",
    "fetched_mb_per_s",
    "cache_hits",
    "memory_gb",
    "gpu_busy",
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    source: str
    column: str
    run: int
    label: str
    style: str = "line"
    """line, faint or points (a line with a marker at each value)."""


@dataclass(frozen=True)
class Chart:
    """Curves over steps or time."""

    key: str
    group: str
    """The section of the page: learning, evaluation, speed."""
    title: str
    lines: tuple[Line, ...]
    form: str = "0.0000"
    """How values are written, in Bokeh's notation."""
    log: bool = False


@dataclass(frozen=True)
class Heat:
    """A quantity of all layers over steps, of one run."""

    key: str
    title: str
    source: str
    column: str
    run: int
    layers: int
    log: bool
    low: float
    high: float


@dataclass(frozen=True)
class Pictures:
    """Everything that is drawn."""

    charts: list[Chart]
    heats: list[Heat]
    sources: dict[str, Columns]
    events: list[str]
    """Names of the sources of events, by run."""
    has_hours: bool
    """Whether every run's rows have times."""

    @property
    def form(self) -> str:
        """Changes when another page is needed to show the data, not only other numbers."""
        heats = [(heat.key, heat.layers) for heat in self.heats]
        return repr((self.charts, heats, sorted(self.sources), self.has_hours))


def pictures(records: Sequence[Record]) -> Pictures:
    """Collect what there is to draw of some runs."""
    sources: dict[str, Columns] = {}
    for i, record in enumerate(records):
        _add(sources, record, i, len(records))
    charts = [
        _chart(sources, "loss", "learning", "training loss", "0.0000", ("steps", "loss", "faint"),
               ("steps", "smooth", "line")),
        _chart(sources, "grad_norm", "learning", "gradient norm, before clipping", "0.000",
               ("lines", "grad_norm", "line")),
        _chart(sources, "lr", "learning", "learning rate", "0.00e+0", ("steps", "lr", "line"), never_log=True),
        *_figures(sources),
        *_evaluations(sources),
        _chart(sources, "images_per_s", "speed", "images per second", "0,0.0", ("lines", "images_per_s", "line")),
        _chart(sources, "data_wait", "speed", "time spent waiting for data", "0.0 %", ("lines", "data_wait", "line")),
        _chart(sources, "memory_gb", "speed", "memory of rank 0 at its peak, GB", "0.00",
               ("lines", "memory_gb", "line")),
        _chart(sources, "gpu_busy", "speed", "time that the GPU of rank 0 computes", "0 %",
               ("lines", "gpu_busy", "line")),
        _chart(sources, "read_mb_per_s", "speed", "data read, MB/s", "0,0.0", ("lines", "read_mb_per_s", "line")),
        _chart(sources, "fetched_mb_per_s", "speed", "data fetched from remote stores, MB/s", "0,0.0",
               ("lines", "fetched_mb_per_s", "line")),
        _chart(sources, "cache_hits", "speed", "reads that the cache answers", "0.0 %",
               ("lines", "cache_hits", "line")),
    ]  # fmt: skip
    events = [f"events{i}" for i in range(len(records))]
    times = [record.times[1] for record in records if record.rows.get("train")]
    has_hours = bool(times) and all(times)
    drawn = [chart for chart in charts if chart is not None]
    return Pictures(drawn, _heats(sources, len(records)), sources, events, has_hours)


def smoothed(values: np.ndarray, factor: float = _SMOOTH) -> np.ndarray:
    """The exponential average (n), corrected for its start. It passes over values that are not finite."""
    average, weight, found = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values.tolist()):
        if math.isfinite(value):
            average = factor * average + (1 - factor) * value
            weight = factor * weight + 1 - factor
        found[i] = average / weight if weight else math.nan
    return found


# ---- columns


def _add(sources: dict[str, Columns], record: Record, run: int, runs: int) -> None:
    """Add the columns of a run."""
    steps, times = record.times
    begin = min([at for at, _ in record.starts[:1]] + times[:1], default=0.0)

    def hours(at: np.ndarray) -> np.ndarray:
        if not times:
            return np.zeros(len(at))
        return (np.interp(at, [0, *steps], [begin, *times]) - begin) / 3600

    def placed(step: np.ndarray, columns: Columns) -> Columns:
        over = {"step": step.astype(np.int32), "hours": hours(step).astype(np.float32)}
        figures = {key: c if isinstance(c, list) else _drawable(c) for key, c in columns.items()}
        return {"x": step.astype(np.float32), **over, **figures}

    train, lines = record.rows.get("train", []), record.lines
    if train:
        step = np.array([row["step"] for row in train])
        loss, rate = (np.array([_or_nan(row[key]) for row in train]) for key in ("loss", "lr"))
        keep = decimate.kept([loss, rate], POINTS // runs)
        columns: Columns = {"loss": loss[keep], "smooth": smoothed(loss)[keep], "lr": rate[keep]}
        sources[f"steps{run}"] = placed(step[keep], columns)
    if lines:
        names = [name for name in _KNOWN if any(name in row for row in lines)]
        unknown = dict.fromkeys(
            key for row in lines for key in row if key not in (*_KNOWN, "kind", "step", "loss", "lr", "time")
        )
        names += [name for name in unknown if any(number(row.get(name)) is not None for row in lines)][:_FIGURES]
        found = {name: np.array([_or_nan(row.get(name)) for row in lines]) for name in names}
        keep = decimate.kept(list(found.values()), POINTS // 2 // runs)
        step = np.array([row["step"] for row in lines])
        sources[f"lines{run}"] = placed(step[keep], {name: values[keep] for name, values in found.items()})
    if evals := record.rows.get("eval", []):
        evals = sorted(evals, key=lambda row: row["step"])[-POINTS // 4 :]
        names = list(
            dict.fromkeys(key for row in evals for key in row if key not in ("kind", "step", "images", "asynchronous"))
        )
        step = np.array([row["step"] for row in evals])
        sources[f"evals{run}"] = placed(step, {n: np.array([_or_nan(row.get(n)) for row in evals]) for n in names[:32]})
    happened = [event for event in record.events if event.step is not None][-_EVENTS:]
    sources[f"events{run}"] = placed(np.array([event.step for event in happened], dtype=float), _told(happened))
    layers = [row for row in record.rows.get("layers", []) if _numbers_layers(row.get("layer"))]
    if layers:
        _add_heat(sources, layers, run, _CELLS // runs, hours)


def _told(events: list[Event]) -> Columns:
    rows = {"launch": "launches", "failure": "failures", "skip": "guard", "rollback": "guard", "warning": "warnings",
            "evaluation": "warnings", "damage": "warnings", "end": "launches"}  # fmt: skip
    return {
        "kind": [rows[event.kind] for event in events],
        "text": [event.text[:300] for event in events],
    }


def _add_heat(sources: dict[str, Columns], rows: list[dict], run: int, cells: int, hours) -> None:  # type: ignore[no-untyped-def]
    """Add the telemetry of the layers, one row of columns per cell."""
    count = len(rows[-1]["layer"])
    rows = [row for row in rows if len(row["layer"]) == count]
    names = [
        key for key, value in rows[-1].items() if isinstance(value, list) and key != "layer" and len(value) == count
    ]
    step = np.array([row["step"] for row in rows], dtype=float)
    most = max(cells // count, 2)
    columns: Columns = {}
    first = np.arange(0)
    for name in names:
        values = np.array(
            [
                [_or_nan(one) for one in row[name]] if _is_row(row.get(name), count) else [math.nan] * count
                for row in rows
            ]
        ).T
        first, binned = decimate.outliers(values, most)
        if np.isfinite(binned).any():
            columns[name] = _drawable(binned.T.ravel())
    if not columns:
        return
    ends = np.append(step[first[1:]], step[-1] + (step[-1] - step[-2] if len(step) > 1 else 1))
    for key, start, end in (("step", step[first], ends), ("hours", hours(step[first]), hours(ends))):
        columns[key] = np.repeat((start + end) / 2, count).astype(np.float32)
        columns[f"width_{key}"] = np.repeat(end - start, count).astype(np.float32)
    columns["from_step"] = np.repeat(step[first], count).astype(np.int32)
    columns |= {"x": columns["step"], "width": columns["width_step"]}
    columns["layer"] = np.tile(np.array(rows[-1]["layer"], dtype=np.int32), len(first))
    sources[f"heat{run}"] = columns


def _numbers_layers(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(type(number) is int and 0 <= number < MOST_LAYERS for number in value)


def _is_row(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _or_nan(value: object) -> float:
    found = number(value)
    return math.nan if found is None else found


def _drawable(values: np.ndarray) -> np.ndarray:
    """Values as 32-bit floats; nan for those that are not finite, which leave a gap."""
    with np.errstate(over="ignore"):
        small = np.asarray(values, dtype=float).astype(np.float32)
    return np.where(np.isfinite(small), small, np.float32(np.nan))


# ---- charts


def _chart(
    sources: dict[str, Columns],
    key: str,
    group: str,
    title: str,
    form: str,
    *of: tuple[str, str, str],
    never_log: bool = False,
) -> Chart | None:
    """A chart of (kind of source, column, style), for each run that has it; None if no run does."""
    found, values = [], []
    runs = sum(name.startswith("events") for name in sources)
    for run in range(runs):
        for kind, column, style in of:
            columns = sources.get(f"{kind}{run}", {})
            if column not in columns or not np.isfinite(columns[column]).any():
                continue
            label = {"loss": "each step", "smooth": "average"}.get(column, column)
            found.append(Line(f"{kind}{run}", column, run, label, style))
            values.append(np.asarray(columns[column])[np.isfinite(columns[column])])
    if not found:
        return None
    all_values = np.concatenate(values)
    log = not never_log and all_values.min() > 0 and all_values.max() >= _LOG_FROM * all_values.min()
    return Chart(key, group, title, tuple(found), form, bool(log))


def _figures(sources: dict[str, Columns]) -> list[Chart | None]:
    """A chart for each figure of the runs' objectives."""
    taken = (*_KNOWN, "x", "step", "hours")
    names = dict.fromkeys(
        c for key, columns in sources.items() if key.startswith("lines") for c in columns if c not in taken
    )
    return [
        _chart(sources, f"figure_{i}", "learning", name, "0.0000", ("lines", name, "line"))
        for i, name in enumerate(names)
    ]


def _evaluations(sources: dict[str, Columns]) -> list[Chart | None]:
    """The loss, the figures that are fractions, and each of the others."""
    evals = [columns for key, columns in sources.items() if key.startswith("evals")]
    names = dict.fromkeys(c for columns in evals for c in columns if c not in ("x", "step", "hours", "loss"))

    def is_fraction(name: str) -> bool:
        values = np.concatenate([np.asarray(columns[name]) for columns in evals if name in columns])
        values = values[np.isfinite(values)]
        return bool(len(values)) and values.min() >= 0 and values.max() <= 1

    def chart(key: str, title: str, form: str, *columns: str) -> Chart | None:
        lines = (("evals", column, "points") for column in columns)
        return _chart(sources, key, "evaluation", f"evaluations: {title}", form, *lines, never_log=form.endswith("%"))

    fractions = [name for name in names if is_fraction(name)]
    others = [name for name in names if name not in fractions]
    return [
        chart("eval_fractions", "fractions", "0.00 %", *fractions),
        chart("eval_loss", "loss", "0.0000", "loss"),
        *(chart(f"eval_{i}", name, "0.0000", name) for i, name in enumerate(others)),
    ]


_TITLES = {
    "rms": "residual stream, root mean square",
    "dt_min": "smallest step size (dt) of the first path",
    "dt_max": "largest step size (dt) of the first path",
    "state": "largest final state of the first path",
    "gate": "gate of the backward path",
}


def _heats(sources: dict[str, Columns], runs: int) -> list[Heat]:
    found: list[Heat] = []
    for run in range(runs):
        columns = sources.get(f"heat{run}", {})
        for name, values in columns.items():
            if name in ("x", "width", "step", "hours", "width_step", "width_hours", "from_step", "layer"):
                continue
            finite = np.asarray(values)[np.isfinite(values)]
            log = name != "gate" and finite.min() > 0 and finite.max() >= _LOG_FROM * finite.min()
            low = 0.0 if name == "gate" else float(finite.min())
            high = float(finite.max())
            high = high if high > low else low + (abs(low) or 1.0) * 0.01
            layers = int(np.asarray(columns["layer"]).max()) + 1
            found.append(
                Heat(
                    f"heat_{run}_{len(found)}",
                    _TITLES.get(name, name),
                    f"heat{run}",
                    name,
                    run,
                    layers,
                    bool(log),
                    low,
                    high,
                )
            )
    return found
