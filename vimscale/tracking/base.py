"""What a tracker gets, and the interface that each one has."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Ending = Literal["done", "stopped", "failed"]
"""How the run's process ends. A run that was stopped or that failed may resume."""


@dataclass(frozen=True)
class About:
    """A run, as trackers name and describe it."""

    name: str
    project: str
    folder: Path
    """The run's folder."""
    id: str | None
    """What the tracker called the run when it first met it; None for a new run."""
    start: int = 0
    """The step that this process resumes from."""
    config: dict[str, Any] = field(default_factory=dict)
    """The recipe, in nested sections."""
    tags: dict[str, str] = field(default_factory=dict)
    """device, commit and the like."""


@dataclass(frozen=True)
class Figures:
    """Numbers of one step, by tags such as train/loss."""

    step: int
    time: float
    """Seconds since 1970."""
    values: dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A picture of one step, as a PNG file's bytes."""

    step: int
    time: float
    tag: str
    png: bytes


Item = Figures | Picture


class Tracker(Protocol):
    """One tracker's run. `Sender` calls these from its own thread; whatever they raise is reported there, and the same
    items are sent again later.
    """

    id: str
    """What a later process needs to continue this run."""

    def send(self, items: list[Item]) -> None: ...

    def close(self, ending: Ending) -> None: ...


def values(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics.jsonl by tag: KIND/NAME, and layers/NAME/LAYER for lists over layers."""
    found: dict[str, float] = {}
    layers = row.get("layer", ())
    for key, value in row.items():
        if key in ("step", "kind", "time", "layer"):
            continue
        listed = value if isinstance(value, list) and len(value) == len(layers) else None
        named = {f"/{layer:02d}": each for layer, each in zip(layers, listed, strict=True)} if listed else {"": value}
        for suffix, each in named.items():
            if isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each):
                found[f"{row['kind']}/{key}{suffix}"] = float(each)
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
