"""The sections of a page that are text: how a run is doing, what happened to it, and what it is."""

import base64
import io
import math
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from vimscale.errors import CheckpointError
from vimscale.model.cost import flops, parameters
from vimscale.model.presets import VimConfig
from vimscale.report import stack
from vimscale.report.planned import step_seconds
from vimscale.report.record import Event, Record, moment, number
from vimscale.report.stack import short
from vimscale.report.words import clock, duration, note, pairs, table

_EVENTS = 200
"""Most events in a table; the newest."""
_FINDS, _IMAGES, _SIDE = 6, 8, 128
"""Most findings of the guard that are shown, images of each, and their largest side in pixels."""
_DEVICES = 16
"""Most kinds of devices that are listed."""
_LETTERS = 600
"""Most characters of a message."""


def summary(records: Sequence[Record]) -> str:
    """How far, how good and how fast."""
    if len(records) == 1:
        cards = "".join(
            f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span>'
            + (f"<i>{escape(more)}</i>" if more else "")
            + "</div>"
            for name, value, more in _cards(records[0])
        )
        return f'{_bar(records[0])}<div class="cards">{cards}</div>'
    found = [{name: f"{value} ({more})" if more else value for name, value, more in _cards(one)} for one in records]
    names = list(dict.fromkeys(name for cards in found for name in cards))
    rows = [
        [label, *(cards.get(name, "") for name in names)] for label, cards in zip(labels(records), found, strict=True)
    ]
    return "".join(map(_bar, records)) + table(["run", *names], rows)


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each run: its folder's, or its path if two have the same."""
    names = [record.name for record in records]
    return [str(r.folder.path) if names.count(r.name) > 1 else r.name for r in records]


def _bar(record: Record) -> str:
    status, steps, last = record.status, record.steps, record.last
    part = 0.0 if not steps else min(last / steps, 1.0)
    left = f"{last:,} of {steps:,} steps, {part:.0%}" if steps else f"{last:,} steps; the length is not known yet"
    why = f'<div class="dim">failed: {escape(record.failed)}</div>' if record.failed else ""
    words = {"empty": "no step yet"}.get(status, status)
    return (
        f'<div class="run"><span class="badge {status}">{words}</span> <strong>{escape(record.name)}</strong>'
        f' <span class="dim">{left}</span><div class="bar"><div style="width:{100 * part:.1f}%"></div></div>{why}</div>'
    )


def _cards(record: Record) -> Iterator[tuple[str, str, str]]:
    """(name, value, remark) of the figures that matter most."""
    train, lines, evals = (record.rows.get("train", []), record.lines, record.rows.get("eval", []))
    evals = sorted(evals, key=lambda row: row["step"])
    if train:
        tail = [row["loss"] for row in train[-50:] if math.isfinite(row["loss"])]
        if tail:
            yield "training loss", f"{sum(tail) / len(tail):.4f}", f"mean of the last {len(tail)} steps"
    headline = "loss" if record.recipe is None else record.recipe.objective.headline
    known = [row for row in evals if number(row.get(headline)) is not None]
    if known:
        best = (min if headline == "loss" else max)(known, key=lambda row: row[headline])
        form = "{:.4f}" if headline == "loss" else "{:.2%}"
        remark = "" if best is known[-1] else f"best {form.format(best[headline])} at step {best['step']:,}"
        name = {"top1": "top-1", "loss": "evaluation loss"}.get(headline, headline)
        yield name, form.format(known[-1][headline]), remark or f"at step {known[-1]['step']:,}"
    speeds = sorted(s for row in lines[1:] or lines if (s := number(row.get("images_per_s"))) is not None)
    if speeds:
        median = speeds[len(speeds) // 2]
        waits = sorted(w for row in lines if (w := number(row.get("data_wait"))) is not None)
        wait = f"{waits[len(waits) // 2]:.0%} of the time waiting for data" if waits else ""
        yield "images/s", f"{median:,.0f}" if median >= 10 else f"{median:.2f}", f"median; {wait}"
    memory = [m for row in lines if (m := number(row.get("memory_gb"))) is not None]
    if memory:
        yield "memory of rank 0", f"{max(memory):.2f} GB", "at its peak"
    times = record.times[1]
    if times:
        begin = min([at for at, _ in record.starts[:1]] + times[:1])
        yield "since the start", duration(times[-1] - begin), f"last line {clock(times[-1])}"
    each = step_seconds(record)
    if each is not None and record.steps and record.status == "running":
        yield "left", duration(each * max(record.steps - record.last, 0)), "at the median speed"
    troubles = [
        (sum(event.kind == kind for event in record.events), name)
        for kind, name in (
            ("failure", "failure"),
            ("skip", "skipped step"),
            ("rollback", "rollback"),
            ("warning", "warning"),
        )
    ]
    found = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in troubles if count)
    yield "trouble", found or "none", ""


# ---- what went wrong


def timeline(records: Sequence[Record]) -> str:
    parts = []
    for label, record in zip(labels(records), records, strict=True):
        events = record.events
        more = f" (the last {_EVENTS} of {len(events):,})" if len(events) > _EVENTS else ""
        rows = [(clock(e.at), _step(e), e.kind, e.text[:_LETTERS]) for e in events[-_EVENTS:]]
        title = f"<h3>{escape(label)}{more}</h3>" if len(records) > 1 or more else ""
        body = (
            table(("time", "after step", "", "what"), rows, numbers=(1,), unbroken=(0, 2))
            if rows
            else note("Nothing is on record.")
        )
        parts.append(title + body)
    if not any(record.times[1] for record in records):
        parts.append(note("Progress lines of this version's runs hold the time; those of these runs do not."))
    return "".join(parts)


def _step(event: Event) -> str:
    return "" if event.step is None else f"{event.step:,}"


def findings(records: Sequence[Record]) -> str:
    """What the guard saw in bad steps, with the images of the largest loss."""
    parts = []
    for label, record in zip(labels(records), records, strict=True):
        steps = sorted(
            {step for path in record.folder.guard.glob("step_*/report.json") if (step := _number(path)) >= 0}
        )
        for step in steps[-_FINDS:]:
            parts.append(_finding(record, step, label if len(records) > 1 else ""))
        if len(steps) > _FINDS:
            parts.append(note(f"{label}: {len(steps) - _FINDS} earlier findings are in {record.folder.guard}."))
    rule = "A step is bad if its loss or gradient norm jumps (guard.spike) or is not finite."
    return "".join(parts) or note(f"The guard has reported no bad step. {rule}")


def _number(path: Any) -> int:
    digits = path.parent.name.split("_")[1]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1


def _finding(record: Record, step: int, label: str) -> str:
    from vimscale.guard import report as guard_report

    title = f"<h3>{escape(label)} step {step:,}</h3>"
    try:
        _, report, images = guard_report.read(record.folder, step)
        samples = report["samples"]
        order = sorted(range(len(images)), key=lambda i: _badness(samples[i].get("loss")), reverse=True)[:_IMAGES]
        figures = "".join(
            f'<figure><img alt="" src="{_picture(images[i])}"><figcaption>{escape(str(samples[i].get("key"))[:40])}<br>'
            f"label {escape(str(samples[i].get('class', samples[i].get('label')))[:30])}"
            f"<br>loss {_badness(samples[i].get('loss')):.4g}</figcaption></figure>"
            for i in order
        )
        words = f"<p>{escape(str(report['reason'])[:_LETTERS])}</p><p>{escape(str(report['cause'])[:_LETTERS])}</p>"
        many = f" {len(order)} of {len(images)} images, those of the largest loss" if len(images) > len(order) else ""
        return f'{title}{words}<div class="images">{figures}</div><p class="note">{many}</p>'
    except (CheckpointError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        return title + note(str(error)[:_LETTERS])


def _badness(value: object) -> float:
    found = number(value)
    return math.inf if found is None or not math.isfinite(found) else found


def _picture(image: Any) -> str:
    """A data URI of an image (3, h, w) uint8: small ones as they are, larger ones shrunk."""
    from PIL import Image

    drawn = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    drawn.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    kind, options = ("PNG", {"optimize": True}) if max(drawn.size) <= 48 else ("JPEG", {"quality": 80})
    drawn.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- what it was


def differences(records: Sequence[Record]) -> str:
    """Keys of the recipes that differ, and versions."""
    flat = [dict(_flat(record.tree)) for record in records]
    others = [
        {"environment: host": str(r.environment.get("host")), "ranks": str(r.world)}
        | {f"environment: {name}": str(version) for name, version in _packages(r)}
        for r in records
    ]
    rows = []
    for found in (flat, others):
        for key in dict.fromkeys(key for one in found for key in one):
            values = [one.get(key, "not set") for one in found]
            if len({*values}) > 1 and key != "name":
                rows.append([key, *(value[:_LETTERS] for value in values)])
    return table(["", *labels(records)], rows) if rows else note("The recipes and environments are the same.")


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "null" if tree is None else str(tree)


def _packages(record: Record) -> list[tuple[str, Any]]:
    found = record.environment.get("packages")
    return list(found.items()) if isinstance(found, dict) else []


def model(records: Sequence[Record]) -> str:
    """The stack of layers, once per different model."""
    parts: dict[str, list[str]] = {}
    for label, record in zip(labels(records), records, strict=True):
        config = record.config
        if config is None:
            why = record.refused or "the recipe does not fit this version"
            drawn = note(f"The model is not drawn: {why}")
        else:
            drawn = _stack(config)
        parts.setdefault(drawn, []).append(label)
    return "".join(_titled(", ".join(of), records) + drawn for drawn, of in parts.items())


def _stack(config: VimConfig) -> str:
    def row(label: str, sign: str, kind: str, *cells: str, share: float = 0.0) -> str:
        numbers = "".join(f"<td class=num>{cell}</td>" for cell in cells)
        bar = f'<div class="share" style="width:{120 * share:.0f}px"></div>' if share else ""
        name = f"<td class=num>{escape(label)}</td><td class=sign>{sign}</td><td>{escape(kind)}</td>"
        return f"<tr>{name}{numbers}<td>{bar}</td></tr>"

    rows = [
        row(
            *(one.label, one.sign, one.kind, f"{one.tokens:,}", f"{one.d_model:,}"),
            *(short(one.parameters), f"{one.flops / 1e9:.3f}"),
            share=one.share,
        )
        for one in stack.rows(config)
    ]
    rows.append(row("sum", "", "", "", "", short(parameters(config)), f"{flops(config) / 1e9:.3f}"))
    titles = "".join(f"<th class=num>{name}</th>" for name in ("tokens", "width", "parameters", "GFLOPs"))
    head = f"<tr><th class=num>layers</th><th></th><th>kind</th>{titles}<th>share of FLOPs</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def recipes(records: Sequence[Record]) -> str:
    parts = []
    for label, record in zip(labels(records), records, strict=True):
        parts.append(note(record.refused) if record.refused else "")
        if (origin := record.origin) is not None:
            parts.append(note(f"A fork of {origin.get('run')} at step {origin.get('step')}."))
        title = f"<summary>{escape(label)}: recipe.yaml</summary>"
        parts.append(f"<details>{title}<pre>{escape(record.text)}</pre></details>")
    return "".join(parts)


def _titled(label: str, records: Sequence[Record]) -> str:
    """A heading for one of several runs."""
    return f"<h3>{escape(label)}</h3>" if len(records) > 1 else ""


def environment(records: Sequence[Record]) -> str:
    parts = []
    for label, record in zip(labels(records), records, strict=True):
        env = record.environment
        if not env:
            parts.append(note(f"{label}: environment.json is missing."))
            continue
        rows: list[tuple[str, object]] = [(key, env.get(key)) for key in ("host", "platform", "cpus", "python")]
        rows += [
            ("last launch", clock(moment(env.get("started"))) or "unknown"),
            ("command", _command(env.get("command"))),
            ("packages", ", ".join(f"{name} {version}" for name, version in _packages(record))),
            ("ranks", record.world or "unknown"),
            *(("computes on", _device(device)) for device in _devices(env)),
        ]
        parts.append(_titled(label, records) + pairs(rows))
    return "".join(parts)


def _devices(env: dict[str, Any]) -> list[dict[str, Any]]:
    found = env.get("devices")
    return [device for device in found[:_DEVICES] if isinstance(device, dict)] if isinstance(found, list) else []


def _device(device: dict[str, Any]) -> str:
    """What some ranks compute on: `2 x NVIDIA H100, 85 GB, driver 580.1, CUDA 13.0; CPU ...; on host`."""
    size = number(device.get("memory"))
    parts = [f"{device.get('ranks')} x {device.get('name')}"] + ([f"{size / 1e9:.0f} GB"] if size is not None else [])
    versions = {"driver": "driver", "cuda": "CUDA", "rocm": "ROCm"}
    parts += [f"{word} {device[key]}" for key, word in versions.items() if device.get(key)]
    hosts = device.get("hosts")
    parts += [f"CPU {device['cpu']}"] if device.get("cpu") else []
    parts += [f"on {', '.join(map(str, hosts))}"] if isinstance(hosts, list) else []
    if device.get("kind") == "cpu":
        parts[0] = f"{device.get('ranks')} ranks on {device.get('name')}"
    return ", ".join(parts)[:_LETTERS]


def _command(words: object) -> str:
    if not isinstance(words, list) or not words:
        return "unknown"
    program, *others = map(str, words)
    return " ".join([PurePath(program).name, *others])[:_LETTERS]


def checkpoints(records: Sequence[Record]) -> str:
    parts = []
    for label, record in zip(labels(records), records, strict=True):
        rows = [
            (
                one.name,
                "" if one.step is None else f"{one.step:,}",
                f"{short(one.bytes)}B" if one.bytes else "",
                clock(one.at),
                one.ranks or "",
                "" if one.zero is None else one.zero,
                one.fault or "sizes are right",
            )
            for one in record.saved
        ]
        head = ("checkpoint", "step", "size", "saved", "ranks", "ZeRO", "")
        body = table(head, rows, numbers=(1, 2, 4, 5), unbroken=(0, 3, 6))
        parts.append(_titled(label, records) + (body if rows else note("No checkpoint yet: see checkpoint.every.")))
    return "".join(parts)


def written(records: Sequence[Record]) -> str:
    return f"written {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(max(r.read_at for r in records)))}"
