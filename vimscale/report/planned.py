"""A run's plan next to what it measured."""

import statistics
from dataclasses import dataclass

from vimscale.report.record import Record, number
from vimscale.report.words import note, table


@dataclass(frozen=True)
class Planned:
    """What a plan says of one rank of a run."""

    where: str
    world: int
    micro: int
    accumulation: int
    parts: dict[str, int]
    """Bytes of its memory at the peak, by kind."""
    process: int
    """Bytes of a process on a CPU before it has a model; 0 on a GPU, where only tensors are measured."""
    step_s: float | None
    """Seconds per step; None for CPUs, whose speed no plan knows."""
    basis: str
    """What the time comes from."""


def compared(record: Record, plan: "Planned | str") -> str:
    """HTML: memory and time, planned and measured. `plan`: or why there is none."""
    if isinstance(plan, str):
        return note(f"No plan: {plan}")
    memory = max((found for row in record.lines if (found := number(row.get("memory_gb"))) is not None), default=None)
    step = step_seconds(record)
    tensors = sum(plan.parts.values())
    parts = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in plan.parts.items() if size)
    rows = [
        (
            "memory of a rank, GB",
            f"{(tensors + plan.process) / 1e9:.2f}",
            "unknown" if memory is None else f"{memory:.2f}",
            f"{parts}" + (f"; {plan.process / 1e9:.2f} for the process itself" if plan.process else ""),
        ),
        (
            "time per step, s",
            "no plan" if plan.step_s is None else f"{plan.step_s:.3f}",
            "unknown" if step is None else f"{step:.3f}",
            plan.basis,
        ),
    ]
    head = f"{plan.world} ranks, {plan.micro} images x {plan.accumulation} micro-steps; planned for {plan.where}"
    return f"{note(head)}{table(('', 'planned', 'measured', 'planned from'), rows, numbers=(1, 2))}"


def step_seconds(record: Record) -> float | None:
    """Median seconds per step of the progress lines after the first; None without them."""
    if record.recipe is None:
        return None
    found = [
        record.recipe.batch_at(row["step"] - 1) / speed
        for row in record.lines[1:]
        if (speed := number(row.get("images_per_s"))) is not None and speed > 0
    ]
    return statistics.median(found) if found else None
