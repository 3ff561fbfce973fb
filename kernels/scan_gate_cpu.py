"""What follows the scans of a mixer on a CPU: the gated sum over directions, an RMSNorm of it, and their gradients.

Axes: k directions, b images, l tokens, e inner channels. A work item is one token of one image, or several where their
gradients of the norm's weight are added up.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from .cpu import kernel, numbers, run, spread, sum_lanes, zeros
from .simd import LANES, Variable, emitted, sigmoid

# Tokens per work item of the norm's backward pass. Each item has its own partial sum of the weight's gradient.
TOKENS = 32


@emitted
def _gate(code, e, directions, s, s_at, s_direction, z, z_at, scale, y, y_at):
    """One token: y = scale silu(z) (sum of s over directions)."""
    with code.loop(0, e, LANES) as c:
        total = _sum_directions(code, directions, s, s_at + c, s_direction, e - c)
        v = z.load(z_at + c, e - c)
        y.store(y_at + c, total * scale * v * sigmoid(v), e - c)


@emitted
def _add(code, e, directions, s, s_at, s_direction, scale, y, y_at):
    """One token: y = scale (sum of s over directions)."""
    with code.loop(0, e, LANES) as c:
        y.store(y_at + c, _sum_directions(code, directions, s, s_at + c, s_direction, e - c) * scale, e - c)


@emitted
def _gate_backward(code, e, directions, dy, dy_at, s, s_at, s_direction, z, z_at, scale, ds, ds_at, dz, dz_at):
    with code.loop(0, e, LANES) as c:
        total = _sum_directions(code, directions, s, s_at + c, s_direction, e - c)
        v = z.load(z_at + c, e - c)
        gate = sigmoid(v)
        upstream = dy.load(dy_at + c, e - c) * scale * gate
        ds.store(ds_at + c, upstream * v, e - c)
        dz.store(dz_at + c, upstream * total * (v * (gate * -1 + 1) + 1), e - c)


def _sum_directions(code, directions, s, at, direction, count):
    total = Variable(s.load(at, count))
    with code.loop(1, directions) as k:
        total.set(total.get() + s.load(at + k * direction, count))
    return total.get()


@kernel
def _combine(first, last, size, s, z, scale, y):
    """s (k, b, l, e), z and y (b, l, e) are pairs: the numbers, and the strides of the axes. If z has no numbers, there
    is no gate.
    """
    directions, length, e = size
    for item in range(first, last):
        b, t = item // length, item % length
        s_at = b * s[1][1] + t * s[1][2]
        y_at = b * y[1][0] + t * y[1][1]
        if len(z[0]) == 0:
            _add((e, directions, s[0], s_at, s[1][0], scale, y[0], y_at))
        else:
            _gate((e, directions, s[0], s_at, s[1][0], z[0], b * z[1][0] + t * z[1][1], scale, y[0], y_at))


@kernel
def _combine_backward(first, last, size, dy, s, z, scale, ds, dz):
    directions, length, e = size
    for item in range(first, last):
        b, t = item // length, item % length
        s_at = b * s[1][1] + t * s[1][2]
        dy_at, z_at = b * dy[1][0] + t * dy[1][1], b * z[1][0] + t * z[1][1]
        ds_at, dz_at = b * ds[1][0] + t * ds[1][1], b * dz[1][0] + t * dz[1][1]
        _gate_backward((
            e, directions, dy[0], dy_at, s[0], s_at, s[1][0], z[0], z_at, scale, ds[0], ds_at, dz[0], dz_at,
        ))  # fmt: skip


@emitted
def _gate_and_square(code, e, s, s_at, z, z_at, scale, y, y_at, lanes):
    """One token: y = scale silu(z) s, and the lanes of the sum of its squares."""
    total = Variable(code.vector(0))
    with code.loop(0, e, LANES) as c:
        v = z.load(z_at + c, e - c)
        gated = s.load(s_at + c, e - c) * scale * v * sigmoid(v)
        y.store(y_at + c, gated, e - c)
        total.set(gated.fma(gated, total.get()))
    lanes[code.index(0)] = total.get()


@emitted
def _weigh(code, e, factor, weight, y, y_at):
    with code.loop(0, e, LANES) as c:
        y.store(y_at + c, y.load(y_at + c, e - c) * factor * weight.load(c, e - c), e - c)


@emitted
def _norm_backward(code, e, dy, dy_at, s, s_at, z, z_at, scale, factor, weight, gates, dweight, dweight_at, lanes):
    """One token: adds to the gradient of the weight; writes sigmoid(z), and the lanes of the sum of the normalized
    numbers times their gradients.
    """
    total = Variable(code.vector(0))
    with code.loop(0, e, LANES) as c:
        v, upstream = z.load(z_at + c, e - c), dy.load(dy_at + c, e - c)
        gate = sigmoid(v)
        unit = s.load(s_at + c, e - c) * scale * v * gate * factor
        at = dweight_at + c
        dweight.store(at, upstream.fma(unit, dweight.load(at, e - c)), e - c)
        total.set((upstream * weight.load(c, e - c)).fma(unit, total.get()))
        gates[c] = gate
    lanes[code.index(0)] = total.get()


@emitted
def _gate_of_norm_backward(
    code, e, dy, dy_at, s, s_at, z, z_at, scale, factor, weight, along, gates, ds, ds_at, dz, dz_at
):  # fmt: skip
    """One token; `along` is the mean of the products that `_norm_backward` adds up."""
    with code.loop(0, e, LANES) as c:
        v, own, gate = z.load(z_at + c, e - c), s.load(s_at + c, e - c), gates[c]
        unit = own * scale * v * gate * factor
        upstream = (dy.load(dy_at + c, e - c) * weight.load(c, e - c) - unit * along) * factor * scale * gate
        ds.store(ds_at + c, upstream * v, e - c)
        dz.store(dz_at + c, upstream * own * (v * (gate * -1 + 1) + 1), e - c)


@kernel
def _gate_norm(first, last, size, s, z, scale, weight, eps, y, factors):
    """s, z and y (b, l, e) are pairs, as in `_combine`."""
    length, e = size
    lanes = zeros(1, LANES)
    for item in range(first, last):
        b, t = item // length, item % length
        y_at = b * y[1][0] + t * y[1][1]
        _gate_and_square((
            e, s[0], b * s[1][0] + t * s[1][1], z[0], b * z[1][0] + t * z[1][1], scale, y[0], y_at, lanes,
        ))  # fmt: skip
        factor = np.float32(1 / np.sqrt(sum_lanes(lanes) / e + eps))
        factors[b, t] = factor
        _weigh((e, factor, weight, y[0], y_at))


@kernel
def _gate_norm_backward(first, last, size, dy, s, z, scale, weight, factors, ds, dz, dweight):
    """dweight (items, e) must be zero; the kernel adds."""
    images, length, e = size
    lanes, gates = zeros(1, LANES), zeros(1, e + LANES)
    for item in range(first, last):
        for token in range(item * TOKENS, min((item + 1) * TOKENS, images * length)):
            b, t = token // length, token % length
            dy_at, s_at = b * dy[1][0] + t * dy[1][1], b * s[1][0] + t * s[1][1]
            z_at = b * z[1][0] + t * z[1][1]
            factor = factors[b, t]
            _norm_backward((
                e, dy[0], dy_at, s[0], s_at, z[0], z_at, scale, factor, weight, gates, dweight, item * e, lanes,
            ))  # fmt: skip
            _gate_of_norm_backward((
                e, dy[0], dy_at, s[0], s_at, z[0], z_at, scale, factor, weight, sum_lanes(lanes) / np.float32(e), gates,
                ds[0], b * ds[1][0] + t * ds[1][1], dz[0], b * dz[1][0] + t * dz[1][1],
            ))  # fmt: skip


def gate_norm(s: Tensor, z: Tensor, weight: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of scale silu(z) s, (b, l, e) in s's dtype, and the factors (b, l) that it multiplied by, in fp32."""
    b, length, e = s.shape
    y, factors = torch.empty(b, length, e), torch.empty(b, length)
    pairs = spread(s), spread(z), np.float32(scale), numbers(weight), np.float32(eps), spread(y)
    run(_gate_norm, b * length, (length, e), *pairs, numbers(factors))
    return y.to(s.dtype), factors


def gate_norm_backward(
    dy: Tensor, s: Tensor, z: Tensor, weight: Tensor, factors: Tensor, scale: float, *, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of s (b, l, e) and of the weight (e); writes dz, whose last axis is contiguous."""
    b, length, e = s.shape
    items = -(-b * length // TOKENS)
    ds, written = torch.empty(s.shape), dz if dz.dtype == torch.float32 else torch.empty(dz.shape)
    dweight = torch.zeros(items, e)
    tensors = spread(dy), spread(s), spread(z), np.float32(scale), numbers(weight), numbers(factors), spread(ds)
    run(_gate_norm_backward, items, (b, length, e), *tensors, spread(written), numbers(dweight))
    if written is not dz:
        dz.copy_(written)
    return ds.to(s.dtype), dweight.sum(0)


def combine(s: Tensor, z: Tensor | None, scale: float) -> Tensor:
    """scale silu(z) (sum of s over directions): (b, l, e) from s (k, b, l, e)."""
    directions, b, length, e = s.shape
    y = torch.empty(b, length, e)
    gate = (np.empty(0, np.float32), (0, 0)) if z is None else spread(z)
    run(_combine, b * length, (directions, length, e), spread(s), gate, np.float32(scale), spread(y))
    return y.to(s.dtype)


def combine_backward(
    dy: Tensor, s: Tensor, z: Tensor | None, scale: float, *, dz: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of s, (b, l, e) because it is the same for every direction, and the gradient of z, which is empty
    without z. A given `dz` is written in place; its last axis is contiguous.
    """
    if z is None:
        return dy.contiguous() * scale, dy.new_empty(0)
    directions, b, length, e = s.shape
    dz = torch.empty_like(z) if dz is None else dz
    ds, written = torch.empty(dy.shape), dz if dz.dtype == torch.float32 else torch.empty(dz.shape)
    pairs = spread(dy), spread(s), spread(z), np.float32(scale), spread(ds), spread(written)
    run(_combine_backward, b * length, (directions, length, e), *pairs)
    if written is not dz:
        dz.copy_(written)
    return ds.to(s.dtype), dz
