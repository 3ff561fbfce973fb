"""Residual add and norm in Triton: each row is read once. The forward kernel has one program per row.

Axes: m rows, d model width.
"""
# mypy takes Triton's language for Python:
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import TRITON_TYPE, CompileCase
from .large import cdiv

# Programs of the backward kernel: enough for 15 warps on each of 132 multiprocessors at once, with as few partial sums
# of the weight's gradient as that allows.
PROGRAMS = 2048
# Elements of a row per warp, 16 per lane: a narrower row is summed by shuffles, without barriers. With 32 per lane the
# backward kernel needs 249 registers at d = 768, and half as many warps fit.
WARP_ELEMENTS = 512


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (m, d), residual (m, d), weight and bias (d), all contiguous, in fp32 but for x -> normed (m, d) in x's dtype,
    total (m, d) and stats (m, 2) in fp32: the mean to subtract (0 for RMS) and the scale to multiply by.
    """
    m, d = x.shape
    normed = x.new_empty(m, d)
    total = weight.new_empty(m, d)
    stats = weight.new_empty(m, 2)
    with torch.cuda.device_of(x):
        add_norm_fwd_kernel[(m,)](
            x, residual, weight, bias, normed, total, stats, d, eps, kind == "layer", **launch_of_rows(d)
        )
    return normed, total, stats


def backward(
    total: Tensor, weight: Tensor, stats: Tensor, dnormed: Tensor, dtotal: Tensor | None, kind: str, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in dnormed's dtype (empty if that is fp32: dresidual is dx), and in fp32 dresidual (m, d), dweight (d), and
    dbias (d) or empty. dweight and dbias are rows of one tensor.
    """
    m, d = total.shape
    rows = cdiv(m, PROGRAMS)
    programs = cdiv(m, rows)
    dx = None if dnormed.dtype == torch.float32 else dnormed.new_empty(m, d)
    dresidual = total.new_empty(m, d)
    parts = weight.new_empty(programs, 1 + has_bias, d)
    with torch.cuda.device_of(total):
        add_norm_bwd_kernel[(programs,)](
            total, weight, stats, dnormed, dtotal, dx, dresidual, parts, m, d, rows, kind == "layer", has_bias,
            **launch_of_rows(d),
        )  # fmt: skip
    dweight, *dbias = parts.sum(0)
    return (
        dnormed.new_empty(0) if dx is None else dx,
        dresidual,
        dweight,
        dbias[0] if has_bias else weight.new_empty(0),
    )


def launch_of_rows(d: int) -> dict[str, int | bool]:
    width = triton.next_power_of_2(d)
    return {"WIDTH": width, "num_warps": min(max(width // WARP_ELEMENTS, 1), 16), "enable_fp_fusion": True}


@triton.jit
def add_norm_fwd_kernel(
    x, residual, weight, bias, normed, total, stats, d, eps, LAYER: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < d
    sum_ = tl.load(x + row * d + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        sum_ += tl.load(residual + row * d + column, mask=inside, other=0.0)
    tl.store(total + row * d + column, sum_, mask=inside)

    mean = 0.0
    if LAYER:
        mean = tl.sum(sum_) / d
    centred = tl.where(inside, sum_ - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / d + eps)
    out = centred * scale * tl.load(weight + column, mask=inside, other=0.0)
    if bias is not None:
        out += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(normed + row * d + column, out.to(normed.dtype.element_ty), mask=inside)
    tl.store(stats + row * 2, mean)
    tl.store(stats + row * 2 + 1, scale)


@triton.jit(do_not_specialize=["m", "rows"])
def add_norm_bwd_kernel(
    total, weight, stats, dnormed, dtotal, dx, dresidual, parts, m, d, rows,
    LAYER: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program handles `rows` rows, so that the weight and the partial sum of its gradient stay in registers."""
    first = tl.program_id(0) * rows
    column = tl.arange(0, WIDTH)
    inside = column < d
    scale_by = tl.load(weight + column, mask=inside, other=0.0)
    dweight_sum = tl.zeros((WIDTH,), tl.float32)
    dbias_sum = tl.zeros((WIDTH,), tl.float32)
    stats += first.to(tl.int64) * 2
    start = first.to(tl.int64) * d
    for row in range(tl.minimum(rows, m - first)):
        at = start + row * d + column
        mean = tl.load(stats + row * 2)
        scale = tl.load(stats + row * 2 + 1)
        unit = (tl.load(total + at, mask=inside, other=0.0) - mean) * scale
        dout = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        dunit = dout * scale_by
        dcentred = dunit - unit * (tl.sum(dunit * unit) / d)
        if LAYER:
            dcentred -= tl.sum(dunit) / d
        dtotal_all = dcentred * scale
        if dtotal is not None:
            dtotal_all += tl.load(dtotal + at, mask=inside, other=0.0)
        tl.store(dresidual + at, dtotal_all, mask=inside)
        if dx is not None:
            tl.store(dx + at, dtotal_all.to(dx.dtype.element_ty), mask=inside)
        dweight_sum += dout * unit
        if BIAS:
            dbias_sum += dout
    parts += tl.program_id(0).to(tl.int64) * (1 + BIAS) * d + column
    tl.store(parts, dweight_sum, mask=inside)
    if BIAS:
        tl.store(parts + d, dbias_sum, mask=inside)


def compile_cases(dtype: torch.dtype, d: int, target: str) -> list[CompileCase]:
    """RMSNorm without a bias, as the models launch it, and LayerNorm with one; both add to a residual stream."""
    activation = dict.fromkeys(("x", "normed", "dnormed", "dx"), TRITON_TYPE[dtype])
    integers = dict.fromkeys(("m", "d", "rows"), "i32")
    options = launch_of_rows(d)
    width = options.pop("WIDTH")
    with_dx = dtype != torch.float32
    cases = []
    # bytes: x, normed, and residual, total in fp32; then dnormed, dx (unless fp32), and total, dtotal, dresidual in
    # fp32
    for kernel, size in (
        (add_norm_fwd_kernel, 2 * dtype.itemsize + 8),
        (add_norm_bwd_kernel, (1 + with_dx) * dtype.itemsize + 12),
    ):
        for kind in ("rms", "layer"):
            layer = kind == "layer"
            absent = (set() if layer else {"bias"}) | (set() if with_dx else {"dx"})
            constants: dict[str, Any] = {"LAYER": layer, "BIAS": layer, "WIDTH": width} | dict.fromkeys(absent)
            constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
            types = activation | integers | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
            cases.append(
                CompileCase(
                    kernel=kernel,
                    variant=f"_{kind}",
                    signature={argument: types.get(argument, "*fp32") for argument in kernel.arg_names},
                    constexprs=constants,
                    options=options,
                    tokens=1,
                    channels=d,
                    bytes=size,
                    loose=frozenset({"m", "rows"} | ({"d"} if d % 16 else set())),
                )
            )
    return cases
