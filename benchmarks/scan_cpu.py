"""The selective scan on a CPU against mambapy's pscan and mamba-ssm's reference: `python -m benchmarks.scan_cpu`.

`make bench` installs the peers first: the extra `bench`, and mamba-ssm, which is built without CUDA. Prints tables, and
writes a JSON file and a picture (time against length, with the cost of the exponentials alone).
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# OpenMP's idle threads spin for milliseconds after each torch operation, on the cores that the scan's threads need. The
# variable is read once, when torch is loaded. The launcher sets it for its ranks. The peers ran no faster without it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from vimscale.kernels.cases import scan_case
from vimscale.ops import bidirectional_scan, selective_scan

SHAPE = (8, 197, 384, 16)
LENGTHS = (196, 784, 3136, 12544)  # squares: 14 x 14 patches, then twice the side each time
Scan = Callable[..., Tensor]


def mambapy_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """What mambapy's block computes around its parallel scan."""
    from mambapy.pscan import pscan

    step = F.softplus(dt + bias)
    h = pscan(torch.exp(step.unsqueeze(-1) * A), (step * x).unsqueeze(-1) * B.unsqueeze(2))
    return ((h @ C.unsqueeze(-1)).squeeze(3) + D * x) * F.silu(z)


def mamba_ssm_reference() -> Scan:
    """mamba-ssm's torch reference, channel first. Its module imports the CUDA one, which the reference never calls."""
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return selective_scan_ref


def mamba_ssm_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    x, dt, B, C, z = (t.transpose(1, 2) for t in (x, dt, B, C, z))
    return mamba_ssm_reference()(x, dt, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)


PEERS: dict[str, Scan] = {"mambapy pscan": mambapy_scan, "mamba-ssm selective_scan_ref": mamba_ssm_scan}


def peak_extra_mb(run: Callable[[], object]) -> float:
    """The rise of the resident set during `run`, from the kernel's high-water mark."""

    def status(key: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    run()
    ctypes.CDLL(None).malloc_trim(0)  # so that the second call cannot reuse memory that the first one freed
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    run()
    return (status("VmHWM") - before) / 1024


def exponentials(length: int, e: int, n: int) -> Callable[[], object]:
    """Only the exponentials of the b = 1 scan, in pieces that stay in the cache."""
    piece = -torch.rand(64, e * n)
    out = torch.empty_like(piece)

    def run() -> None:
        for _ in range(length // 64 + 1):
            torch.exp(piece, out=out)

    return run


def one_shape(rounds: int) -> dict[str, dict[str, float]]:
    tensors, both = measure.inputs(scan_case(SHAPE)), measure.inputs(scan_case(SHAPE, directions=2))
    ours = {"vimscale": (selective_scan, tensors), "vimscale, both directions": (bidirectional_scan, both)}
    everyone = ours | {name: (scan, tensors) for name, scan in PEERS.items()}
    ahead = measure.in_turn({name: measure.forward(*of) for name, of in everyone.items()}, rounds)
    both_passes = measure.in_turn({name: measure.forward_and_backward(*of) for name, of in everyone.items()}, rounds)
    print(f"b, l, e, n = {SHAPE}, fp32, median of {rounds} rounds", "", sep="\n")
    print(f"{'ms':32}{'forward':>10}{'and backward':>14}{'to ours':>12}")
    for name in everyone:
        ratio = both_passes[name] / both_passes["vimscale"]
        print(f"{name:32}{ahead[name] * 1e3:10.1f}{both_passes[name] * 1e3:14.1f}{ratio:12.1f}")
    return {name: {"forward_s": ahead[name], "forward_and_backward_s": both_passes[name]} for name in everyone}


def lengths(rounds: int) -> list[dict[str, float]]:
    """Forward and backward at b = 1 as l grows; peers at lengths that fit in a minute and in memory."""
    e, n = SHAPE[2:]
    limits = {"mambapy pscan": 3136, "mamba-ssm selective_scan_ref": 784}
    print("", f"{'l':>8}{'ours, ms':>12}{'us per token':>14}{'peak extra':>12}{'inputs':>10}", sep="\n")
    rows = []
    for length in LENGTHS:
        tensors = measure.inputs(scan_case((1, length, e, n)))
        runs = {"vimscale": measure.forward_and_backward(selective_scan, tensors)}
        runs |= {
            name: measure.forward_and_backward(scan, tensors) for name, scan in PEERS.items() if length <= limits[name]
        }
        seconds = measure.in_turn(runs | {"exponentials alone": exponentials(length, e, n)}, rounds)
        extra, given = peak_extra_mb(runs["vimscale"]), sum(t.nbytes for t in tensors) / 2**20
        ours = seconds["vimscale"]
        print(f"{length:8}{ours * 1e3:12.1f}{ours / length * 1e6:14.1f}{extra:9.1f} MB{given:7.1f} MB")
        rows.append(
            {"l": length, "peak_extra_mb": extra, "inputs_mb": given, **{f"{k}_s": v for k, v in seconds.items()}}
        )
    return rows


def first_calls() -> dict[str, float]:
    """Seconds of a forward and backward scan of both directions in a new process, with an empty numba cache, then a
    full one.
    """
    code = """
import time, torch, torch._dynamo  # a custom op imports dynamo on its first call, which is not numba's time
from vimscale.kernels.cases import scan_case
from vimscale.ops import bidirectional_scan
tensors = [t.requires_grad_() for t in scan_case((1, 8, 32, 16), directions=2).tensors()[:8]]
start = time.perf_counter()
torch.autograd.grad(bidirectional_scan(*tensors), tensors, torch.ones(1, 8, 32))
print(time.perf_counter() - start)
"""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        empty, full = (
            float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        )
    print("", f"first call: {empty:.1f} s with an empty cache, {full:.2f} s with a full one", sep="\n")
    return {"empty_cache_s": empty, "full_cache_s": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/scan_cpu"),
        help="path of the .json and .png files, without the suffix",
    )
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    result: dict[str, Any] = {"shape": SHAPE, "scans": one_shape(options.rounds), "lengths": lengths(options.rounds)}
    result["first_call"] = first_calls()
    measure.write(result, options.out.with_suffix(".json"))
    title = "Selective scan on a CPU: 1 image, 384 channels, 16 states, fp32"
    measure.draw(result["lengths"], title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
