"""What a run prints: one live line in a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from ..processes.output import lossy

_STYLES = {"warning": "yellow", "error": "bold red"}


def duration(seconds: float) -> str:
    """Return a time like 12 s, 3:05, 2:11:09 or 4 d 03:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"


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
        self._bar: Bar | None = None
        self._first: tuple[int, float] | None = None

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
        self._console.print(message, style=_STYLES.get(level), highlight=False, markup=False, soft_wrap=True)

    def show(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "joined":
                self.phase("ranks and their imports")
            case "started":
                self.phase("data and engine")
                self._first = None
            case "step":
                self._step(event)
            case "eval":
                self.note("info", f"evaluation at step {event['step']:,}: {figures(event)}")
            case "checkpoint":
                self.note("info", f"checkpoint {event['path']}")
            case "guard":
                self.note("warning", event["message"])
            case "log":
                self.note(event["level"], event["message"])

    def _step(self, event: dict[str, Any]) -> None:
        now = time.perf_counter()
        step, steps = event["step"], event["steps"]
        if self._first is None:
            self._first = (step, now)
            if self._phases:
                self.phase("first step")
                parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
                self.note("info", f"{self._until} after {sum(self._phases.values()):.1f} s: {parts}")
                self._phases = {}
        done, since = step - self._first[0], now - self._first[1]
        eta = duration(since / done * (steps - step)) if done else "…"
        figures = "".join(f"  {name} {value:.4g}" for name, value in event.get("figures", {}).items())
        line = (
            f"loss {event['loss']:.4f}{figures}  lr {event['lr']:.2e}  |g| {event['grad_norm']:.2f}"
            f"  {event['images_per_s']:,.0f} images/s  data wait {event['data_wait']:.0%}"
        )
        if not self._console.is_terminal:
            self.note("info", f"step {step:,}/{steps:,}  {line}  ETA {eta}")
            return
        if self._bar is None:
            layout = (
                TextColumn("step {task.completed:,}/{task.total:,}"),
                BarColumn(None),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*layout, console=self._console, transient=True, refresh_per_second=4, expand=True)
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()
        self._bar.update(self._task, completed=step, total=steps, description=f"{line}  ETA {eta}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
