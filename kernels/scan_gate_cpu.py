"""What follows the scans of a mixer on a CPU: the gated sum over directions, and its gradient.

Axes: k directions, b images, l tokens, e inner channels. A work item is one token of one image.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from .cpu import kernel, run, spread
from .simd import LANES, Variable, emitted, sigmoid


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
