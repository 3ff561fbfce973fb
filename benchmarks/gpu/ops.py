"""Single ops: the device's ceilings, scans against mamba-ssm's CUDA scan, and the layers around them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu import times
from vimscale.kernels.cases import BENCH_SHAPES, scan_case
from vimscale.ops import add_norm, bidirectional_conv1d, bidirectional_scan, bidirectional_ssd, selective_scan, ssd_scan

Row = dict[str, Any]
Shape = tuple[int, int, int, int]
Op = tuple[Callable[..., Tensor], list[Tensor]]
SCANS: tuple[Shape, ...] = (
    (128, 197, 768, 16),
    *BENCH_SHAPES,
    (128, 197, 384, 16),
    (128, 197, 1536, 16),
    (16, 785, 768, 16),
    (1, 16384, 768, 16),
)
"""(b, l, e, n): Vim-S, Vim-B and Vim-Ti at 224 pixels, one image of each size, and few images of many tokens."""
DualShape = tuple[int, int, int, int, int]
DUAL_SCANS: tuple[DualShape, ...] = (
    (128, 197, 12, 64, 64),
    (24, 1025, 12, 64, 64),
    (4, 6085, 12, 64, 64),
    (2, 16385, 12, 64, 64),
)
"""(b, l, h, p, n) of ssd_small at 224, 512, 1,248 and 2,048 pixels."""
CONVOLUTION = (64, 197, 768)
NORM = (64, 197, 384)


def ceilings(device: str, calls: int, elements: int = 2**28, side: int = 8192) -> Iterator[Row]:
    """Bytes copied and bf16 products per second; exponentials too where Triton runs on the device."""
    source = torch.empty(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / times.wall(lambda: target.copy_(source), calls) * 1e3
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * side**3 / times.wall(lambda: a @ b, calls) * 1e3
    row: Row = {"copy_bytes_per_s": copied, "bf16_flops_per_s": flops}
    if device == "cuda":
        row["exponentials_per_s"] = _exponentials(calls)
        row["processors"] = torch.cuda.get_device_properties(0).multi_processor_count
    print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    yield row


def _exponentials(calls: int) -> float:
    from benchmarks.gpu.exponentials import exponentials

    programs, size, repeats = 4096, 1024, 512
    out = torch.empty(programs * size, device="cuda")
    taken = times.wall(lambda: exponentials[(programs,)](out, repeats, SIZE=size, num_warps=8), calls)
    return programs * size * repeats / taken * 1e3


def scans(device: str, calls: int, shapes: Sequence[Shape] = SCANS) -> Iterator[Row]:
    """One direction, both, and mamba-ssm's scan of one direction on channel-first copies of the same tensors."""
    theirs = mamba_ssm()
    for shape in shapes:
        one, both = (
            measure.inputs(scan_case(shape, torch.bfloat16, device, directions=directions)) for directions in (1, 2)
        )
        runs: dict[str, Op] = {
            "vimscale": (selective_scan, one),
            "vimscale, both directions": (bidirectional_scan, both),
        }
        if theirs is not None:
            runs["mamba-ssm CUDA"] = (partial(theirs, delta_softplus=True), _channel_first(one))
        for row in _timed(f"scan (b, l, e, n) = {shape}", runs, calls):
            b, length, e, n = shape
            directions = 2 if "both" in row["name"] else 1
            yield {"b": b, "l": length, "e": e, "n": n, "directions": directions} | row


def dual_scans(device: str, calls: int, shapes: Sequence[DualShape] = DUAL_SCANS) -> Iterator[Row]:
    """The state-space-dual scan: one direction, both with their own x, B and C, both sharing them, and mamba-ssm's
    Triton scan of one direction.
    """
    theirs = _mamba_dual()
    for shape in shapes:
        runs: dict[str, Op] = {
            "vimscale": (ssd_scan, _dual_inputs(shape, device, (), ())),
            "vimscale, both directions": (bidirectional_ssd, _dual_inputs(shape, device, (2,), (2,))),
            "vimscale, both share x, B, C": (bidirectional_ssd, _dual_inputs(shape, device, (2,), ())),
        }
        if theirs is not None:
            runs["mamba-ssm Triton"] = (theirs, _dual_inputs(shape, device, (), ()))
        for row in _timed(f"dual scan (b, l, h, p, n) = {shape}", runs, calls):
            b, length, h, p, n = shape
            directions = 2 if "both" in row["name"] else 1
            yield {"b": b, "l": length, "h": h, "p": p, "n": n, "directions": directions} | row


def _dual_inputs(shape: DualShape, device: str, k: tuple[int, ...], j: tuple[int, ...]) -> list[Tensor]:
    """x, dt, A_log, B, C and D in bf16, with steps around 0.05; `k` and `j` are leading axes of directions."""
    b, length, h, p, n = shape
    sizes = (*j, b, length, h, p), (*k, b, length, h), (*j, b, length, n), (*j, b, length, n)
    x, dt, B, C = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
    A_log, D = torch.zeros(*k, h, device=device), torch.ones(*k, h, device=device)
    return [t.requires_grad_() for t in (x, dt - 3, A_log, B, C, D)]


def _mamba_dual() -> Callable[..., Tensor] | None:
    """mamba-ssm's Triton scan with the arguments of `ssd_scan`; None, and a line that says why, without it."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        print(f"skipped mamba-ssm: {error}", flush=True)
        return None

    def scan(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return mamba_chunk_scan_combined(
            x, dt, -A_log.exp(), B.unsqueeze(2), C.unsqueeze(2), 256, D=D, dt_softplus=True
        )

    return scan


def mamba_ssm() -> Callable[..., Tensor] | None:
    """mamba-ssm's CUDA scan, which is channel first; None, and a line that says why, if it cannot be imported."""
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        print(f"skipped mamba-ssm: {error}", flush=True)
        return None
    return selective_scan_fn


def _channel_first(tensors: list[Tensor]) -> list[Tensor]:
    """Copies, so that no change of layout is timed."""
    return [t.detach().mT.contiguous().requires_grad_() if t.ndim == 3 else t for t in tensors]


def layers(
    device: str, calls: int, conv: tuple[int, int, int] = CONVOLUTION, norm: tuple[int, int, int] = NORM
) -> Iterator[Row]:
    """The convolution of both directions against causal-conv1d, and add_norm against torch's operations."""
    for op, shape, runs in (
        ("convolution", conv, _convolutions(device, conv)),
        ("add_norm", norm, _norms(device, norm)),
    ):
        b, length, width = shape
        for row in _timed(f"{op} {shape}", runs, calls):
            yield {"op": op, "b": b, "l": length, "e": width} | row


def _convolutions(device: str, shape: tuple[int, int, int]) -> dict[str, Op]:
    e = shape[-1]
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, e, 4, device=device, requires_grad=True)
    bias = torch.randn(2, e, device=device, requires_grad=True)
    runs: dict[str, Op] = {
        "vimscale, both directions": (partial(bidirectional_conv1d, activation="silu"), [x, weight, bias])
    }
    if find_spec("causal_conv1d_cuda"):
        from causal_conv1d import causal_conv1d_fn

        first = [t.detach().bfloat16().requires_grad_() for t in (x.mT.contiguous(), weight[0], bias[0])]
        runs["causal-conv1d, one direction"] = (partial(causal_conv1d_fn, activation="silu"), first)
    return runs


def _norms(device: str, shape: tuple[int, int, int]) -> dict[str, Op]:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return add_norm(x, residual, weight)[0]

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = residual + x.float()
        return F.rms_norm(total, total.shape[-1:], weight, 1e-5).to(x.dtype)

    return {"vimscale": (ours, [x, residual, weight]), "torch": (plain, [x, residual, weight])}


def _timed(title: str, runs: dict[str, Op], calls: int) -> Iterator[Row]:
    for name, (function, tensors) in runs.items():
        ahead = times.of(measure.forward(function, tensors), calls)
        both = times.of(measure.forward_and_backward(function, tensors), calls)
        print(
            f"{title:36}{name:30} forward {ahead.kernels_ms:8.3f}  and backward {both.kernels_ms:8.3f} ms of kernels,"
            f" {both.wall_ms:8.3f} of wall",
            flush=True,
        )
        yield {
            "name": name,
            "forward_ms": ahead.kernels_ms,
            "both_ms": both.kernels_ms,
            "forward_wall_ms": ahead.wall_ms,
            "both_wall_ms": both.wall_ms,
            "both_host_ms": both.host_ms,
            "both_launches": both.launches,
        }
