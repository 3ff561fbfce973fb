"""What a run prints: one live line in a terminal, plain lines anywhere else."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from vimscale.report.pace import Pace, Trend, trend

from ..processes.output import lossy

_STYLES = {"warning": "yellow", "error": "bold red"}
_LOSSES = 400
"""Losses of single steps that the trend is judged by."""
WAIT_MATTERS = 0.1
"""From this fraction of the time spent waiting for data on, the loader is the limit."""
_WAITS = 3
"""Progress lines whose median decides that: the first line after a start always waits."""
_BAR = (8, 30)
"""Fewest and most cells of the bar."""
ARROWS: dict[Trend, str] = {"falling": "↘", "flat": "→", "rising": "↗"}


def duration(seconds: float) -> str:
    """Return a time like 12 s, 3:05, 2:11:09 or 4 d 03:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"


def speed(step_s: float) -> str:
    """Return a rate like 12.3 steps/s or 2.41 s/step."""
    if step_s >= 1:
        return f"{step_s:.{2 if step_s < 100 else 0}f} s/step"
    return f"{1 / max(step_s, 1e-9):.1f} steps/s"


def console() -> Console:
    """Return a console on standard output that never fails: a run continues if its output cannot be written."""
    return Console(file=lossy(sys.stdout))


class Progress:
    """Prints the events of rank 0 and, at the first step, where the time until then went."""

    def __init__(self, console: Console):
        self._console = console
        self._phases: dict[str, float] = {}
        self._until = "first step"
        self._lap = time.perf_counter()
        self._live: Live | None = None
        self._started: dict[str, Any] = {}
        self._best: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        """Begin to measure: ranks have started."""
        self._pace = Pace()
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._waits: deque[float] = deque(maxlen=_WAITS)
        self._waiting = False

    def phase(self, name: str, seconds: float | None = None) -> None:
        """Name the phase that ends now. It began when the phase before ended, or `seconds` ago."""
        now = time.perf_counter()
        self._phases[name] = now - self._lap if seconds is None else seconds
        self._lap = now

    def lap(self) -> None:
        """Begin the next phase now."""
        self._lap = time.perf_counter()

    def restart(self, name: str) -> None:
        """End the phase `name`, in which the run has not trained. Print the phases until it trains again, as at the
        first step.
        """
        self._phases, self._until = {}, "resumed"
        self.phase(name)

    def note(self, level: str, message: str) -> None:
        # not print's style=, which would colour the live line below, too
        self._console.print(Text(message, _STYLES.get(level, "")), soft_wrap=True)

    def show(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "joined":
                self.phase("ranks and their imports")
            case "started":
                self.phase("data and engine")
                self._started, self._best = event, event.get("best")
                self._begin()
            case "step":
                self._step(event)
            case "eval":
                self.note("info", f"evaluation at step {event['step']:,}: {figures(event)}{self._compared(event)}")
            case "checkpoint":
                self.note("info", f"checkpoint {event['path']}")
            case "guard":
                self.note("warning", event["message"])
            case "log":
                self.note(event["level"], event["message"])

    def heard(self, heartbeat: dict[str, Any]) -> None:
        """Show how far rank 0 has come since its last progress line, in a terminal."""
        if self._live is not None and heartbeat["step"] is not None:
            line = self._live.get_renderable()
            assert isinstance(line, Line)
            doing = {"evaluate": "evaluating", "save": "saving"}.get(heartbeat["doing"], "")
            self._live.update(line._replace(step=max(line.step, heartbeat["step"]), doing=doing))

    def _compared(self, row: dict[str, Any]) -> str:
        """How an evaluation compares with those before it, by the figure that runs are compared by."""
        headline, best = self._started.get("headline"), self._best
        if headline not in row:
            return ""
        sign = 1 if headline == "loss" else -1
        if best is None or sign * row[headline] < sign * best[headline]:
            self._best = row
            return "" if best is None else ", the best so far"
        return f", best so far: {figures({headline: best[headline]})} at step {best['step']:,}"

    def _step(self, event: dict[str, Any]) -> None:
        if self._phases:
            self.phase("first step")
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
            self.note("info", f"{self._until} after {sum(self._phases.values()):.1f} s: {parts}")
            self._phases = {}
        self._pace.add(event["step"], time.perf_counter())
        self._losses += event.get("losses", (event["loss"],))
        self._waits.append(event["data_wait"])
        line = Line(
            event["step"],
            event["steps"],
            event,
            trend(self._losses),
            self._pace.step_s,
            self._pace.left_s(event["steps"]),
            self._memory,
            self._judge_loader(),
        )
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            self.note("info", line.plain())
        elif self._live is None:
            self._live = Live(line, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._live.update(line)

    @property
    def _memory(self) -> int | None:
        """Bytes of rank 0's GPU; None on CPUs."""
        device = self._started.get("device", {})
        return device["memory"] if device.get("kind") == "gpu" else None

    def _judge_loader(self) -> bool:
        """Whether the ranks wait for their data too long. Say so when it begins, and how to change it."""
        found = statistics.median(self._waits)
        before, self._waiting = self._waiting, len(self._waits) == _WAITS and found >= WAIT_MATTERS
        if self._memory is None and self._started.get("workers", 0) + 1 >= self._started.get("threads", 1):
            self._waiting = False  # CPUs that compute have none to spare: nothing would help
        if self._waiting and not before:
            workers, threads = self._started.get("workers", 0), self._started.get("threads", 1)
            advice = f"raise data.workers ({workers} now)"
            if workers + 1 >= threads:
                advice = (
                    f"data.workers={workers} and {threads} CPU{'s' * (threads != 1)} per rank leave no room for more:"
                    " use more CPUs or smaller images (vimscale data prepare --resize)"
                )
            self.note("warning", f"the loader is the limit: {found:.0%} of the time waits for data; {advice}")
        return self._waiting

    def close(self) -> None:
        """End the live line. What it says last stays."""
        if self._live is not None:
            line = self._live.get_renderable()
            assert isinstance(line, Line)
            self._live.update(line._replace(doing=""))
            self._live.stop()
            self._live = None


class Line(NamedTuple):
    """One progress line."""

    step: int
    steps: int
    event: dict[str, Any]
    """Rank 0's last report."""
    trend: Trend | None
    step_s: float | None
    left_s: float | None
    memory: int | None
    """Bytes of the GPU of a rank; None on CPUs."""
    waiting: bool
    """Whether the loader is the limit."""
    doing: str = ""
    """What the ranks do, other than steps."""

    def plain(self) -> str:
        """Everything, for a file."""
        parts = dict(self._parts())
        words = parts["loss"] + (f" {self.trend}" if self.trend else "")
        step = f"step {self.step:,}/{self.steps:,} ({self._percent.strip()})"
        return "  ".join([step, words, *(text for name, text in parts.items() if name != "loss")])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.fitted(options.max_width, ascii_only=options.ascii_only)

    def fitted(self, width: int, *, ascii_only: bool = False) -> Text:
        """As much as fits into a line of `width` cells, the important parts first."""
        order = ["loss", "ETA", "rate", "images", "GPU", "bar", "figures", "wait", "norm", "lr"]
        parts = dict(self._parts())
        if self.trend is not None:
            parts["loss"] += f" {self.trend if ascii_only else ARROWS[self.trend]}"
        if self.doing:
            parts["rate"] = self.doing
        if self.waiting:
            order.insert(2, order.pop(order.index("wait")))
        head = f"{self._percent}  {self.step:,}/{self.steps:,}"
        left = width - cell_len(head)
        chosen = set()
        for name in (name for name in order if name in parts or name == "bar"):
            size = _BAR[0] + 1 if name == "bar" else 2 + cell_len(parts[name])
            if size <= left:
                left -= size
                chosen.add(name)
        found = Text(no_wrap=True, overflow="crop", end="")
        if "bar" in chosen:
            cells = min(_BAR[0] + left, _BAR[1])
            done = cells * self.step // self.steps
            full, empty = ("#", ".") if ascii_only else ("━", "─")
            found.append(full * done, "green").append(f"{empty * (cells - done)} ", "dim")
        found.append(head, "bold")
        for name, text in parts.items():
            if name in chosen:
                found.append("  ").append(text, self._style(name))
        found.truncate(width)
        return found

    @property
    def _percent(self) -> str:
        return f"{100 * self.step // self.steps:3d}%"

    def _style(self, name: str) -> str:
        if name == "loss":
            return {"falling": "green", "rising": "red"}.get(self.trend or "", "")
        return "yellow" if name == "wait" and self.waiting else ""

    def _parts(self) -> Iterator[tuple[str, str]]:
        """(name, text) of everything but the step, in the order in which they are shown."""
        row = self.event
        yield "loss", f"loss {row['loss']:.4f}"
        if named := row.get("figures"):
            yield "figures", "  ".join(f"{name} {value:.4g}" for name, value in named.items())
        if self.step_s is not None:
            yield "rate", speed(self.step_s)
        yield "images", f"{row['images_per_s']:,.0f} images/s"
        if self.left_s is not None and self.event["step"] < self.steps:
            yield "ETA", f"ETA {duration(self.left_s)}"
        yield "wait", f"data wait {row['data_wait']:.0%}"
        if self.memory is not None:
            busy = f" {row['gpu_busy']:.0%} busy" if "gpu_busy" in row else ""
            yield "GPU", f"GPU {row['memory_gb']:.1f}/{self.memory / 1e9:.0f} GB{busy}"
        yield "norm", f"|g| {row['grad_norm']:.2f}"
        yield "lr", f"lr {row['lr']:.2e}"


def figures(row: dict[str, Any]) -> str:
    """An evaluation's figures in words, in the order of its objective; of probes of frozen features the first ones."""
    rates = {"top1": "top-1", "top5": "top-5", "knn_top1": "kNN top-1", "linear_top1": "linear top-1"}
    others = ("kind", "status", "step", "steps", "images", "asynchronous")
    parts = [
        f"{rates[name]} {value:.2%}" if name in rates else f"{name} {value:{'.0e' if 0 < value < 1e-4 else '.4f'}}"
        for name, value in row.items()
        if name not in others and (name in rates or not name.startswith(("knn", "linear", "mean_")))
    ]
    return "  ".join([*parts, *([f"({row['images']:,} images)"] if "images" in row else [])])
