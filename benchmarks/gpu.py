"""Kernels and complete models on a GPU, against their peers and the device's ceilings: `python -m benchmarks.gpu`.

Skips peers that are not installed: mamba-ssm and causal-conv1d, built with CUDA. The recurrence under torch.compile and
a ViT with scaled_dot_product_attention need nothing else. Prints tables; writes a JSON file and a picture (time against
length, with the cost of the exponentials alone). This script has not run on a GPU yet.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import measure
from benchmarks.vit import ViT
from vimscale.kernels.cases import BENCH_SHAPES, scan_case
from vimscale.model import PRESETS, VisionMamba
from vimscale.ops import add_norm, bidirectional_conv1d, bidirectional_scan, selective_scan

Row = dict[str, Any]
DEVICE = "cuda"  # torch's name for CUDA and ROCm devices


@triton.jit
def _exponentials(out, times, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = at.to(tl.float32) * 1e-9
    for _ in range(times):
        value = tl.exp2(-value)
    tl.store(out + at, value)


def ceilings(rounds: int) -> Row:
    """The device's limits for the two things that a scan consists of: bytes copied and exponentials per second."""
    source = torch.empty(2**28, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    programs, size, times = 4096, 1024, 512
    out = torch.empty(programs * size, device=DEVICE)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "exp": lambda: _exponentials[(programs,)](out, times, SIZE=size, num_warps=8),
    }
    seconds = measure.in_turn(runs, rounds)
    return {
        "bytes_per_s": 2 * source.nbytes / seconds["copy"],
        "exponentials_per_s": programs * size * times / seconds["exp"],
    }


def mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """mamba-ssm's CUDA scan, which is channel first. It gets transposed tensors, so the layout change is not timed."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True)


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The two lines of the paper, token by token, as input for torch.compile."""
    step = F.softplus(dt.float() + bias)
    h, y = torch.zeros(len(x), *A.shape, device=x.device), []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return ((torch.stack(y, 1) + D * x) * F.silu(z)).to(x.dtype)


def scans(shape: tuple[int, int, int, int], rounds: int, ceiling: Row) -> Row:
    b, length, e, n = shape
    tensors = measure.inputs(scan_case(shape, torch.bfloat16, DEVICE))
    both = measure.inputs(scan_case(shape, torch.bfloat16, DEVICE, directions=2))
    runs: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "vimscale": (selective_scan, tensors),
        "vimscale, both directions": (bidirectional_scan, both),
    }
    if find_spec("selective_scan_cuda"):
        first = [t.detach().mT.contiguous().requires_grad_() if t.ndim == 3 else t for t in tensors]
        runs["mamba-ssm CUDA"] = (mamba_ssm, first)
    if length <= 200:  # torch.compile unrolls the loop
        runs["torch.compile of the recurrence"] = (torch.compile(recurrence), tensors)
    ahead = measure.in_turn({name: measure.forward(*of) for name, of in runs.items()}, rounds)
    both_passes = measure.in_turn({name: measure.forward_and_backward(*of) for name, of in runs.items()}, rounds)
    floor = b * length * e * n / ceiling["exponentials_per_s"]
    print(f"\nscan, (b, l, e, n) = {shape}, bf16; the exponentials alone take {floor * 1e3:.3f} ms")
    table({name: (ahead[name], both_passes[name]) for name in runs})
    return {
        "b": b,
        "l": length,
        "e": e,
        "n": n,
        "forward": ahead,
        "exponentials alone_s": floor,
        **{f"{name}_s": value for name, value in both_passes.items()},
    }


def table(rows: dict[str, tuple[float, float]]) -> None:
    ours = next(iter(rows.values()))
    print(f"{'ms':36}{'forward':>10}{'and backward':>14}{'to ours':>12}")
    for name, (ahead, both_passes) in rows.items():
        print(f"{name:36}{ahead * 1e3:10.3f}{both_passes * 1e3:14.3f}{both_passes / ours[1]:12.2f}")


def convolutions(shape: tuple[int, int, int], rounds: int) -> Row:
    b, length, e = shape
    x = torch.randn(b, length, e, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, e, 4, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, e, device=DEVICE, requires_grad=True)
    runs = {"vimscale, both directions": (partial(bidirectional_conv1d, activation="silu"), [x, weight, bias])}
    if find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            one = causal_conv1d_fn(x, weight[0], bias[0], activation="silu")
            other = causal_conv1d_fn(x.flip(-1), weight[1], bias[1], activation="silu").flip(-1)
            return torch.stack([one, other])

        first = [x.detach().mT.contiguous().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
        runs["causal-conv1d, twice, with flips"] = (twice, [*first, bias.detach().bfloat16().requires_grad_()])
    return _both_passes(f"convolution, (b, l, e) = {shape}, 4 taps, SiLU, bf16", runs, rounds)


def norms(shape: tuple[int, int, int], rounds: int) -> Row:
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight = torch.randn(shape[-1], device=DEVICE, requires_grad=True)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return add_norm(x, residual, weight)[0]

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = residual + x.float()
        return F.rms_norm(total, total.shape[-1:], weight, 1e-5).to(x.dtype)

    tensors = [x, residual, weight]
    runs = {"vimscale": (ours, tensors), "torch": (plain, tensors), "torch.compile": (torch.compile(plain), tensors)}
    return _both_passes(f"add and RMSNorm, {shape}, bf16", runs, rounds)


def _both_passes(title: str, runs: dict[str, tuple[Callable[..., Tensor], list[Tensor]]], rounds: int) -> Row:
    ahead = measure.in_turn({name: measure.forward(*of) for name, of in runs.items()}, rounds)
    both_passes = measure.in_turn({name: measure.forward_and_backward(*of) for name, of in runs.items()}, rounds)
    print(f"\n{title}")
    table({name: (ahead[name], both_passes[name]) for name in runs})
    return {name: {"forward_s": ahead[name], "forward_and_backward_s": both_passes[name]} for name in runs}


def models(image_size: int, batch: int, rounds: int) -> Row:
    """Seconds per training step (forward, backward, fused AdamW; bf16 autocast) and peak memory, at one batch size."""
    vim = dataclasses.replace(PRESETS["vim_small"], image_size=image_size)
    samples = measure.random_batch(image_size, batch)
    row: Row = {"image_size": image_size, "batch": batch}
    print(f"\ntraining step, {image_size} pixels, batch {batch}, bf16")
    for name, make in {"Vim-S": lambda: VisionMamba(vim), "ViT-S": lambda: ViT(image_size, d=384, heads=6)}.items():
        torch.manual_seed(0)
        model = make().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = measure.training_step(model, model.parameters(), samples, optimizer)
        torch.cuda.reset_peak_memory_stats()
        seconds = measure.in_turn({name: step}, rounds)[name]
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name:10}{seconds * 1e3:10.1f} ms{batch / seconds:10.0f} images/s{peak:8.2f} GiB")
        row[name] = {"step_s": seconds, "images_per_s": batch / seconds, "peak_gib": peak}
        del model, optimizer, step
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="path of the .json and .png files, without the suffix; default: named after the device",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu needs a CUDA or ROCm device and torch finds none; benchmarks.scan_cpu runs without one"
        )
    device = torch.cuda.get_device_name().lower().replace(" ", "_")
    out = options.out or Path("benchmarks/results") / f"gpu_{device}"
    rounds = options.rounds
    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    ceiling = ceilings(rounds)
    print(
        f"copies {ceiling['bytes_per_s'] / 1e12:.2f} TB/s, {ceiling['exponentials_per_s'] / 1e12:.2f}e12 exponentials/s"
    )
    result: Row = {"ceilings": ceiling, "scans": [scans(shape, rounds, ceiling) for shape in BENCH_SHAPES]}
    result["lengths"] = [scans((4, length, 384, 16), rounds, ceiling) for length in (196, 784, 3136, 12544)]
    result["convolution"] = convolutions((64, 197, 768), rounds)
    result["add_norm"] = norms((64, 197, 384), rounds)
    result["models"] = [models(224, 64, rounds), models(448, 16, rounds), models(1248, 2, rounds)]
    measure.write(result, out.with_suffix(".json"))
    if find_spec("matplotlib"):
        title = f"Selective scan on {torch.cuda.get_device_name()}: 4 images, 384 channels, 16 states, bf16"
        measure.draw(result["lengths"], title, out.with_suffix(".png"))
    print(f"wrote {out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
