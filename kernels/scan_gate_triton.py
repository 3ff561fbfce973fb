"""What follows the scans of a mixer on a GPU: the gated sum over directions, an RMSNorm of it, and their gradients.

Axes: k directions, b images, l tokens, e inner channels.
"""
# The tools take Triton's language for Python:
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_norm_triton import PROGRAMS, launch_of_rows
from .compile_case import TRITON_TYPE, CompileCase
from .large import Grid, cdiv, is_large, tile_grid, tile_program, token_number
from .triton_tiles import rounded, sigmoid

# (tokens, channels) per program: rows of full 128-byte lines in the 16-bit types, sixteen elements per lane
TILE = (32, 64)


@triton.jit
def _tile(length, e, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LARGE: tl.constexpr):
    """The image, token (tokens, 1) and channel (1, channels) of the program's tile, and which are inside."""
    block, tile, b, _, _ = tile_program(tl.cdiv(e, CHANNELS), tl.cdiv(length, TOKENS), LARGE)
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    token = token_number(tile * TOKENS + tl.arange(0, TOKENS), LARGE)[:, None]
    return b.to(tl.int64), token, channel, (token < length) & (channel < e)


@triton.jit
def _sum_directions(s, cell, inside, s_k, K: tl.constexpr):
    total = tl.load(s + cell, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, K):
        s += s_k
        total += tl.load(s + cell, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["length"])
def scan_gate_fwd_kernel(
    s, z, y, length, e, scale, s_k, z_b, z_l,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    b, token, channel, inside = _tile(length, e, TOKENS, CHANNELS, LARGE)
    cell = token * e + channel

    total = _sum_directions(s + b * length * e, cell, inside, s_k, K)
    total *= scale
    if z is not None:
        gate = tl.load(z + b * z_b + token * z_l + channel, mask=inside, other=0.0).to(tl.float32)
        total *= gate * sigmoid(gate)
    tl.store(y + b * length * e + cell, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def scan_gate_bwd_kernel(
    dy, s, z, ds, dz, length, e, scale, dy_b, dy_l, s_k, z_b, z_l, dz_b, dz_l,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    b, token, channel, inside = _tile(length, e, TOKENS, CHANNELS, LARGE)
    cell = token * e + channel

    grad = tl.load(dy + b * dy_b + token * dy_l + channel, mask=inside, other=0.0).to(tl.float32) * scale
    if z is not None:
        gate = tl.load(z + b * z_b + token * z_l + channel, mask=inside, other=0.0).to(tl.float32)
        total = _sum_directions(s + b * length * e, cell, inside, s_k, K)
        slope = sigmoid(gate)
        dgate = grad * total * slope * (1.0 + gate * (1.0 - slope))
        tl.store(dz + b * dz_b + token * dz_l + channel, dgate.to(dz.dtype.element_ty), mask=inside)
        grad *= gate * slope
    tl.store(ds + b * length * e + cell, grad.to(ds.dtype.element_ty), mask=inside)


def combine(s: Tensor, z: Tensor | None, scale: float) -> Tensor:
    """y (b, l, e) = scale * silu(z) * sum of s (k, b, l, e) over its directions; without z there is no gate."""
    k, b, length, e = s.shape
    y = s.new_empty(b, length, e)
    z_strides = (0, 0) if z is None else z.stride()[:2]
    grid = _grid(b, length, e)
    large = is_large(grid, length, e, z_strides[1])
    with torch.cuda.device_of(s):
        scan_gate_fwd_kernel[tile_grid(grid, large)](
            s, z, y, length, e, scale, s.stride(0), *z_strides,
            K=k, TOKENS=TILE[0], CHANNELS=TILE[1], LARGE=large, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def combine_backward(
    dy: Tensor, s: Tensor, z: Tensor | None, scale: float, *, dz: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ds (b, l, e), which is the same for every direction, and dz (b, l, e), which is empty without z.

    A given `dz` is written in place; its channels are contiguous, and its other strides are free.
    """
    k, b, length, e = s.shape
    ds = s.new_empty(b, length, e)
    if z is None:
        dz = s.new_empty(0)
    elif dz is None:
        dz = z.new_empty(b, length, e)
    strides = (0, 0, 0, 0) if z is None else (*z.stride()[:2], *dz.stride()[:2])
    grid = _grid(b, length, e)
    large = is_large(grid, length, e, dy.stride(1), *strides[1::2])
    with torch.cuda.device_of(s):
        scan_gate_bwd_kernel[tile_grid(grid, large)](
            dy, s, z, ds, dz, length, e, scale, *dy.stride()[:2], s.stride(0), *strides,
            K=k, TOKENS=TILE[0], CHANNELS=TILE[1], LARGE=large, enable_fp_fusion=True,
        )  # fmt: skip
    return ds, dz


@triton.jit(do_not_specialize=["length"])
def gate_norm_fwd_kernel(s, z, weight, y, factors, length, e, scale, eps, z_b, z_l, WIDTH: tl.constexpr):
    """One program per token."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < e
    z += (row // length) * z_b + (row % length) * z_l
    gate = tl.load(z + channel, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(s + row * e + channel, mask=inside, other=0.0).to(tl.float32) * scale * gate * sigmoid(gate)
    factor = tl.rsqrt(tl.sum(gated * gated) / e + eps)
    out = gated * factor * tl.load(weight + channel, mask=inside, other=0.0)
    tl.store(y + row * e + channel, rounded(out, y.dtype.element_ty), mask=inside)
    tl.store(factors + row, factor)


@triton.jit(do_not_specialize=["m", "length", "rows"])
def gate_norm_bwd_kernel(
    dy, s, z, weight, factors, ds, dz, parts, m, length, e, rows, scale, z_b, z_l, dz_b, dz_l, WIDTH: tl.constexpr
):  # fmt: skip
    """Each program handles `rows` tokens, so that the weight and the partial sum of its gradient stay in registers."""
    first = tl.program_id(0) * rows
    channel = tl.arange(0, WIDTH)
    inside = channel < e
    weighed = tl.load(weight + channel, mask=inside, other=0.0) * scale
    dweight = tl.zeros((WIDTH,), tl.float32)
    for i in range(tl.minimum(rows, m - first)):
        row = (first + i).to(tl.int64)
        b, t = row // length, row % length
        gate = tl.load(z + b * z_b + t * z_l + channel, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(s + row * e + channel, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(dy + row * e + channel, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(factors + row)
        slope = sigmoid(gate)
        unit = own * gate * slope * (scale * factor)
        dweight += upstream * unit
        upstream *= weighed
        # the gradient of what the gate multiplies
        dgated = (upstream - unit * (tl.sum(upstream * unit) / e)) * factor * slope
        tl.store(ds + row * e + channel, rounded(dgated * gate, ds.dtype.element_ty), mask=inside)
        dgate = dgated * own * (1.0 + gate * (1.0 - slope))
        tl.store(dz + b * dz_b + t * dz_l + channel, rounded(dgate, dz.dtype.element_ty), mask=inside)
    tl.store(parts + tl.program_id(0).to(tl.int64) * e + channel, dweight, mask=inside)


def gate_norm(s: Tensor, z: Tensor, weight: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of scale silu(z) s, (b, l, e) in s's dtype, and the factors (b, l) that it multiplied by, in fp32. s is
    contiguous, as are the channels of z.
    """
    b, length, e = s.shape
    y, factors = s.new_empty(s.shape), weight.new_empty(b, length)
    with torch.cuda.device_of(s):
        gate_norm_fwd_kernel[(b * length,)](
            s, z, weight, y, factors, length, e, scale, eps, *z.stride()[:2], **launch_of_rows(e)
        )
    return y, factors


def gate_norm_backward(
    dy: Tensor, s: Tensor, z: Tensor, weight: Tensor, factors: Tensor, scale: float, *, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of s (b, l, e) and of the weight (e); writes dz, whose last axis is contiguous, as that of z. dy
    and s are contiguous.
    """
    b, length, e = s.shape
    m = b * length
    rows = cdiv(m, PROGRAMS)
    programs = cdiv(m, rows)
    ds, parts = s.new_empty(s.shape), weight.new_empty(programs, e)
    with torch.cuda.device_of(s):
        gate_norm_bwd_kernel[(programs,)](
            dy, s, z, weight, factors, ds, dz, parts, m, length, e, rows, scale, *z.stride()[:2], *dz.stride()[:2],
            **launch_of_rows(e),
        )  # fmt: skip
    return ds, parts.sum(0)


def _grid(b: int, length: int, e: int) -> Grid:
    return cdiv(e, TILE[1]), cdiv(length, TILE[0]), b


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Two directions and a gate, and a gate and a norm, for `kernels.aot`."""
    constants = {"K": 2, "TOKENS": TILE[0], "CHANNELS": TILE[1], "LARGE": False}
    types = dict.fromkeys(["s", "z", "y", "dy", "ds", "dz"], TRITON_TYPE[dtype]) | {"scale": "fp32"}
    of_norm = dict.fromkeys(["weight", "factors", "parts"], "*fp32") | {"eps": "fp32", "WIDTH": "constexpr"}
    launch = launch_of_rows(e)
    width = launch.pop("WIDTH")
    norms = [
        CompileCase(
            kernel=kernel,
            signature={argument: (types | of_norm).get(argument, "i32") for argument in kernel.arg_names},
            constexprs={"WIDTH": width},
            options=launch,
            tokens=1,
            channels=e,
            bytes=tensors * dtype.itemsize,
            loose=frozenset({"m", "length", "rows"} | ({"e"} if e % 16 else set())),
        )
        for kernel, tensors in ((gate_norm_fwd_kernel, 3), (gate_norm_bwd_kernel, 5))
    ]
    types |= dict.fromkeys(constants, "constexpr")
    return norms + [
        CompileCase(
            kernel=kernel,
            signature={argument: types.get(argument, "i32") for argument in kernel.arg_names},
            constexprs=constants,
            options={"num_warps": 4, "enable_fp_fusion": True},
            tokens=TILE[0],
            channels=TILE[1],
            # tensors of the activation's size that are read or written; s counts twice
            bytes=tensors * dtype.itemsize,
            loose=frozenset({"length"}),
        )
        for kernel, tensors in ((scan_gate_fwd_kernel, 4), (scan_gate_bwd_kernel, 6))
    ]
