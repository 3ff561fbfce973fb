"""What the benchmarks share: functions timed in turn, what they ran on, and how a result is written."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimscale.kernels.cases import ScanCase


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, every round running all of them once: what else the machine does hits them alike.

    An unmeasured call precedes each measured one: what another left in the caches and took from the allocator is not
    timed. On a GPU each call is timed by events and followed by a synchronisation.
    """
    timer = _gpu_seconds if torch.cuda.is_available() else _seconds
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            taken[name].append(timer(function))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _gpu_seconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def inputs(case: ScanCase) -> list[Tensor]:
    """The eight tensors of a scan, each wanting a gradient."""
    return [t.requires_grad_() for t in (case.x, case.dt, case.A, case.B, case.C, case.D, case.z, case.dt_bias)]


def forward(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*tensors)

    return run


def forward_and_backward(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    upstream = torch.randn_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*tensors), tensors, upstream)


def machine() -> dict[str, str]:
    """The device, the versions and the commit that a result is good for."""
    found = {"cpu": _cpu_name(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for library in ("torch", "triton", "numba", "mamba_ssm", "mambapy", "causal_conv1d"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found | {"commit": commit.stdout.strip() or "not a checkout"}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(machine() | result, indent=2) + "\n")


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time against length, both logarithmic, of everything that the rows have seconds for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    names = dict.fromkeys(key.removesuffix("_s") for row in rows for key in row if key.endswith("_s"))
    for name in names:
        points = [(row["l"], row[f"{name}_s"] * 1e3) for row in rows if f"{name}_s" in row]
        axes.loglog(*zip(*points, strict=True), "k:" if name == "exponentials alone" else "o-", label=name)
    axes.set(xlabel="tokens", ylabel="ms, forward and backward", title=title)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
