"""Three times of one call, in ms: what its kernels take, what a caller waits, and what the host needs to issue it.

On a CPU there is one time, by the clock, which stands for kernels and wall; nothing is issued ahead.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]
WARM = 3


@dataclass(frozen=True)
class Times:
    """Means per call. `host_ms` near `wall_ms` means that the device waits for Python."""

    kernels_ms: float
    wall_ms: float
    host_ms: float | None
    launches: float | None
    by_kernel: tuple[tuple[str, float, float], ...]
    """(kernel, ms, launches), the longest first."""


def of(call: Call, calls: int) -> Times:
    """All three times of a call."""
    if not torch.cuda.is_available():
        taken = wall(call, calls)
        return Times(taken, taken, None, None, ())
    found = by_kernel(call, calls)
    return Times(
        kernels_ms=sum(ms for _, ms, _ in found),
        wall_ms=wall(call, calls),
        host_ms=host(call, calls),
        launches=sum(count for _, _, count in found),
        by_kernel=tuple(found),
    )


def kernels(call: Call, calls: int) -> float:
    """ms of the device's kernels; by the clock on a CPU."""
    if not torch.cuda.is_available():
        return wall(call, calls)
    return sum(ms for _, ms, _ in by_kernel(call, calls))


def by_kernel(call: Call, calls: int) -> list[tuple[str, float, float]]:
    """(kernel, ms per call, launches per call), the longest first, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    _warm(call)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            call()
        _finish()
    rows = [(e.key[:120], e.self_device_time_total / calls / 1e3, e.count / calls) for e in trace.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def wall(call: Call, calls: int) -> float:
    """ms per call, calls back to back."""
    _warm(call)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _finish()
    return (time.perf_counter() - start) / calls * 1e3


def host(call: Call, calls: int) -> float:
    """ms per call until the host has issued it. Few calls: a full queue of launches makes the host wait."""
    _warm(call)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    issued = (time.perf_counter() - start) / calls * 1e3
    _finish()
    return issued


def _warm(call: Call) -> None:
    for _ in range(WARM):
        call()
    _finish()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
