"""What Python costs: host time per op, per block and per step of the engine: `python -m benchmarks.host`.

Needs no GPU: without one, Triton compiles for sm_90 and launches through a driver that does everything but call the
device, on CPU tensors so small that nothing else counts. Every op is measured in turn with torch.cat of as many
tensors, so that the machine's speed divides out. On a GPU the shapes are those of Vim-S, and the time of the kernels
and of the calls stand next to the host's.
"""

import argparse
import cProfile
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.device_ops import counted
from vimscale.kernels.cases import scan_case
from vimscale.model import VimConfig, VisionMamba
from vimscale.ops import (
    add_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    bimamba_inner,
    causal_conv1d,
    selective_scan,
)
from vimscale.ops import (
    counted as counted_as,
)
from vimscale.recipe.recipe import Recipe

Row = dict[str, Any]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHAPE = (128, 197, 768, 16) if ON_GPU else (2, 8, 64, 16)
"""(b, l, e, n)"""
clock = time.perf_counter if ON_GPU else time.process_time
"""Without a GPU, the processor's time: what else the machine does at the moment does not count."""
ENGINE_DEPTHS = (12, 24)


class DryDriver:
    """Stands in for Triton's driver: compiles for sm_90, and launches nothing."""

    class launcher_cls:
        def __init__(self, source: Any, metadata: Any):
            pass

        def __call__(self, *arguments: Any) -> None:
            metadata, enter = arguments[6:8]
            enter(metadata)

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
        load_binary=lambda *arguments: (0, 0, 255, 0, 1024),
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """The public ops and a block, each with the tensors that it gets."""
    b, length, e, n = SHAPE
    d, r = e // 2, e // 32
    torch.manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=DEVICE).to(dtype).requires_grad_()

    x = draw(b, length, e, dtype=torch.bfloat16)
    one = measure.inputs(scan_case(SHAPE, torch.bfloat16, DEVICE))
    both = measure.inputs(scan_case(SHAPE, torch.bfloat16, DEVICE, directions=2))
    inner = [draw(b, length, 2 * e, dtype=torch.bfloat16), draw(2, e, 4), draw(2, e), draw(2, r + 2 * n, e)]
    inner += [draw(2, e, r), draw(2, e), (-torch.rand(2, e, n, device=DEVICE)).requires_grad_(), draw(2, e)]
    block = VisionMamba(VimConfig(image_size=32, d_model=d, d_state=n, directions="bi", depth=1)).to(DEVICE).blocks[0]
    seen: list[Any] = []
    model = VisionMamba(VimConfig(image_size=32, d_model=d, d_state=n, directions="bi", depth=1)).to(DEVICE)
    with model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[2])), torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device=DEVICE))

    def run_block(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return block(x, residual, seen[0])[0]

    narrow = draw(b, length, d, dtype=torch.bfloat16)
    return {
        "add_norm": (lambda *t: add_norm(*t)[0], [narrow, draw(b, length, d), draw(d)]),
        "causal_conv1d": (causal_conv1d, [x, draw(e, 4), draw(e)]),
        "bidirectional_conv1d": (bidirectional_conv1d, [x, draw(2, e, 4), draw(2, e)]),
        "selective_scan": (selective_scan, one),
        "bidirectional_scan": (bidirectional_scan, both),
        "bimamba_inner": (lambda *t: bimamba_inner(*t, recompute=False), inner),
        "bimamba_inner, recompute": (bimamba_inner, inner),
        "block, bi": (run_block, [narrow, draw(b, length, d), *block.parameters()]),
    }


def ops(rounds: int) -> dict[str, Row]:
    """Microseconds of host time of every op, forward (with a graph) and forward and backward, and of torch.cat of as
    many tensors.
    """
    rows = {}
    for name, (function, tensors) in cases().items():
        peer = [torch.zeros(1, device=DEVICE, requires_grad=True) for _ in tensors]
        runs = {
            "forward": lambda function=function, tensors=tensors: function(*tensors),
            "both": measure.forward_and_backward(function, tensors),
            "peer_forward": lambda peer=peer: torch.cat(peer),
            "peer_both": measure.forward_and_backward(lambda *t: torch.cat(t), peer),
        }
        seconds = host_seconds(runs, rounds)
        row = {f"{key}_us": value * 1e6 for key, value in seconds.items()} | {"inputs": len(tensors)}
        with counted() as counter:
            runs["both"]()
        row["operations"] = counter.ops.total()
        if ON_GPU:
            row |= {"kernels_us": kernel_seconds(runs["both"]) * 1e6, "wall_us": wall_seconds(runs["both"]) * 1e6}
        rows[name] = row
    return rows


def host_seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds that the host needs for each call, all in turn; the device, if there is one, is idle before."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for run in runs.values():
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            if ON_GPU:
                torch.cuda.synchronize()
            start = clock()
            run()
            taken[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def kernel_seconds(run: Callable[[], object], calls: int = 10) -> float:
    """Seconds of all kernels of a call, by the profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / calls / 1e6


def wall_seconds(run: Callable[[], object], calls: int = 20) -> float:
    """Seconds per call, calls back to back."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def show_ops(rows: dict[str, Row], other: dict[str, Row] | None, against: str) -> None:
    print("\nhost time, us: forward, forward and backward; torch.cat of as many tensors; per device operation")
    last = f"{against[:12]:>14}{'ratio':>8}" if other else ""
    print(f"{'':26}{'forward':>9}{'both':>9}{'cat':>7}{'both':>7}{'operations':>12}{'each':>7}{last}")
    for name, row in rows.items():
        line = f"{name:26}{row['forward_us']:9.0f}{row['both_us']:9.0f}{row['peer_forward_us']:7.1f}"
        line += f"{row['peer_both_us']:7.1f}{row['operations']:12}{row['both_us'] / row['operations']:7.1f}"
        if other and name in other:
            line += f"{other[name]['both_us']:14.0f}{row['both_us'] / other[name]['both_us']:8.2f}"
        if "kernels_us" in row:
            line += f"   kernels {row['kernels_us']:.0f}, wall {row['wall_us']:.0f}"
        print(line)


def profile_block(calls: int = 50, top: int = 15) -> None:
    """Print where the time of a block's forward and backward pass goes, by the functions' own time."""
    function, tensors = cases()["block, bi"]
    run = measure.forward_and_backward(function, tensors)
    run()
    profiler = cProfile.Profile(clock)
    with profiler:
        for _ in range(calls):
            run()
    print("\na bi block, forward and backward: own time of functions, us per call (under cProfile, which adds its own)")
    rows = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])  # type: ignore[attr-defined]
    for (path, line, name), (_, count, own, _, _) in rows[:top]:
        where = f"{'/'.join(Path(path).parts[-2:])}:{line} {name}" if line else name
        print(f"{own / calls * 1e6:8.1f}  {count / calls:6.1f} calls  {where[:90]}")


# ---- the engine


def engines(zero: int, rounds: int) -> list[Row]:
    """Milliseconds of forward, backward and update under DeepSpeed and without it (torch's clipping and fused AdamW),
    in turn, for each of `ENGINE_DEPTHS`; digits model, two images, bf16, one rank.
    """
    from vimscale.recipe import recipe
    from vimscale.runtime import distributed
    from vimscale.runtime.distributed import RankSpec

    changes = [f"parallel.zero={zero}", "parallel.precision=bf16", "parallel.persist=2000", "batch=2"]
    changes += ["model.patch_size=16", "model.d_model=32", "model.d_state=4"]
    device = "cuda:0" if ON_GPU else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = recipe.load("vim_digits_cpu", changes)
        spec = RankSpec(chosen, Path(folder), 0, 1, device, 1, f"file://{folder}/meeting", "lo")
        distributed.prepare(spec)
        distributed.join(spec)
        for depth in ENGINE_DEPTHS:
            chosen = recipe.load("vim_digits_cpu", [*changes, f"model.directions=bi*{depth}"])
            rows.append({"zero": zero, "depth": depth, **_engine(chosen, torch.device(device), rounds)})
        distributed.leave()
    return rows


def _engine(chosen: Recipe, device: torch.device, rounds: int) -> Row:
    from vimscale.engine.deepspeed_engine import Engine  # imports DeepSpeed, after `prepare`
    from vimscale.objectives.base import Inputs, Learner
    from vimscale.objectives.build import build

    config = chosen.model.shape(10)
    inputs = Inputs(torch.randn(2, 3, 32, 32, device=device), torch.arange(2, device=device))
    plain = Learner(build(chosen.objective, config), VisionMamba(config)).to(device)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    sharded = Engine(config, chosen, device)

    def plain_loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return plain.ask("loss", inputs)[0]

    def plain_update() -> None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    ways: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None], Callable[[], None]]] = {
        "plain": (plain_loss, Tensor.backward, plain_update),
        "engine": (lambda: sharded.loss(inputs)[0], sharded.backward, lambda: sharded.step(1e-3)),
    }
    taken: dict[str, list[float]] = {}
    for number in range(rounds + 3):
        for way, (loss, backward, update) in ways.items():
            times = [clock()]
            value = loss()
            times.append(clock())
            backward(value)
            times.append(clock())
            update()
            times.append(clock())
            if number >= 3:
                for phase, start, end in zip(("forward", "backward", "update"), times, times[1:], strict=False):
                    taken.setdefault(f"{way}_{phase}_ms", []).append((end - start) * 1e3)
    found = {key: statistics.median(values) for key, values in taken.items()}
    return {"parameters": len(list(plain.parameters())), **found}


ENGINE_HEADER = """
DeepSpeed's host time, ms: with it - without it (torch's clipping and fused AdamW), in turn
                           forward        backward          update   added  us per parameter"""


def show_engine(rows: list[Row]) -> None:
    for row in rows:
        added, cells = 0.0, ""
        for phase in ("forward", "backward", "update"):
            ours, plain = row[f"engine_{phase}_ms"], row[f"plain_{phase}_ms"]
            added += ours - plain
            cells += f"{f'{ours:.1f} - {plain:.1f}':>16}"
        label = f"ZeRO-{row['zero']}, {row['depth']} blocks"
        print(f"{label:18}{cells}{added:8.1f}{added * 1e3 / row['parameters']:18.0f}", flush=True)


# ---- processes


def child(*options: str, tree: Path | None = None) -> Any:
    """What this script prints in another process: the ops, or one row of the engine; `tree`: with that package."""
    command = [sys.executable, "-m", "benchmarks.host", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tree, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def unpack(revision: str, folder: Path) -> Path:
    """Lay out another commit's package as in a wheel, with today's benchmarks."""
    root = Path(__file__).resolve().parents[1]
    packages = ["kernels", "launch", "recipes", "cluster"]
    archive = subprocess.run(
        ["git", "archive", revision, "vimscale", *packages], cwd=root, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    for package in packages:
        shutil.move(folder / package, folder / "vimscale" / package)
    (folder / "benchmarks").symlink_to(root / "benchmarks")
    return folder


def medians(tables: list[dict[str, Row]]) -> dict[str, Row]:
    return {
        name: {key: statistics.median(table[name][key] for table in tables) for key in tables[0][name]}
        for name in tables[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="of the ops in one process")
    parser.add_argument(
        "--processes", type=int, default=3, help="that measure the ops, in turn with those of --against"
    )
    parser.add_argument("--against", metavar="REV", help="measure the ops of another commit too")
    parser.add_argument("--zero", type=int, nargs="*", default=[0, 1, 2, 3], choices=range(4), metavar="STAGE")
    parser.add_argument("--name", default="after", help="key of these times in the file; default: after")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host.json"))
    parser.add_argument("--only", choices=("ops", "engine"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only == "engine":
        print(json.dumps(engines(options.zero[0], rounds=8)))
        return
    if not ON_GPU:
        from triton.runtime import driver

        os.environ["TRITON_INTERPRET"] = "0"
        driver.set_active(DryDriver())  # type: ignore[arg-type]
    with counted_as("triton"):
        if options.only == "ops":
            print(json.dumps(ops(options.rounds)))
            return
        print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
        with tempfile.TemporaryDirectory() as folder:
            tree = unpack(options.against, Path(folder)) if options.against else None
            here, there = [], []
            for _ in range(options.processes):
                here.append(child("--only", "ops", "--rounds", str(options.rounds)))
                if tree is not None:
                    there.append(child("--only", "ops", "--rounds", str(options.rounds), tree=tree))
        result: Row = {"shape": SHAPE, "ops": medians(here)}
        if there:
            result |= {"against": options.against, "ops_against": medians(there)}
        show_ops(result["ops"], result.get("ops_against"), options.against or "")
        profile_block()
    measure.write_named(result, options.out, options.name)
    if options.zero:
        print(ENGINE_HEADER)
    for zero in options.zero:
        rows = child("--only", "engine", "--zero", str(zero))
        show_engine(rows)
        result.setdefault("engine", []).extend(rows)
        measure.write_named(result, options.out, options.name)


if __name__ == "__main__":
    main()
