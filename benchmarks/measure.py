"""Helpers for the benchmarks: time functions in turn, describe the machine, and write results."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import profile

from vimscale.kernels.cases import ScanCase
from vimscale.launch.processes.rank import before_torch

before_torch()  # the allocator behaves as in a launched rank; scripts set OpenMP up before they import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device for complete models; torch's name for ROCm devices too."""


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function. Every round runs all of them once, so that other load on the machine affects
    them equally.

    An unmeasured call precedes each measured one, so that what other functions left in the caches and the allocator is
    not timed. On a GPU, events time each call, and a synchronization follows.
    """
    timer = _gpu_seconds if torch.cuda.is_available() else _seconds
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            taken[name].append(timer(function))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def cpu_in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of this process for each function; every round runs all of them once."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.process_time()
            function()
            taken[name].append(time.process_time() - began)
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


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors take at once during `run`, beyond what they took before it. Call `run` once before:
    otherwise this counts what a first call makes and keeps (an optimizer's state).

    On a CPU this traces every allocation and release, including those inside operations, and limits torch to one
    thread: the trace covers the calling thread only, and a kernel's helper thread could drop the last reference to a
    tensor.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it logs its start and end
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(profile_memory=True) as trace:  # torch.profiler's would import the compiler
            run()
    finally:
        torch.set_num_threads(threads)
    # the profiler's own table has a sum per operation, not the order
    events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def batch_at(image_size: int, most: int = 8, reference: int = 224) -> int:
    """Images per step with about as many pixels as `most` images of the reference size; at least one."""
    return max(round(most * (reference / image_size) ** 2), 1)


def training_step(
    model: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """A function that runs forward and backward on (images, labels) and the optimizer's step if there is one, and then
    drops the gradients. fp32 on a CPU, bf16 by autocast on a GPU.
    """
    images, labels = batch
    parameters = list(parameters)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return run


def inference(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    """A function that computes logits without a graph, at the precision of a training step."""

    def run() -> object:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            return model(images)

    return run


def random_batch(image_size: int, batch: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, image_size, image_size, device=DEVICE)
    return images, torch.randint(1000, (batch,), device=DEVICE)


def inputs(case: ScanCase) -> list[Tensor]:
    """The eight tensors of a scan, each with requires_grad."""
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
    """The device, the versions and the commit that a result applies to."""
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


def device_and_precision() -> str:
    """The device and its precision, for the title of a picture."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, bf16"
    return f"{torch.get_num_threads()} CPU cores, fp32"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(machine() | result, indent=2) + "\n")


def write_named(result: dict[str, Any], path: Path, name: str) -> None:
    """Write a result under `name`, next to those that the file has under other names: before, after."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept | {name: machine() | result}, indent=1) + "\n")


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot time against length, both logarithmic, for everything that the rows have seconds for."""
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
