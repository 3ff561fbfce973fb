"""The Mamba-1 selective scan, forwards or backwards through the sequence, in plain torch: the reference.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (arXiv:2312.00752, section 3.2)

Axes: b images, l tokens, e inner channels, n states a channel. Capital A B C D are the matrices of the paper.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scan(torch.autograd.Function):
    """The recurrence alone, from a positive `dt`. One loop over tokens each way, memory linear in l.

    With g_t the gradient that reaches h_t:  g_t = C_t dy_t + exp(dt_{t'} A) g_{t'}, where t' follows t in scan order.
    The states are rebuilt in the backward instead of being kept: only the inputs are saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
        ctx.save_for_backward(x, dt, A, B, C)
        ctx.reverse = reverse
        _, h = _states(x, dt, A, B, reverse)
        return torch.einsum("lben,bln->ble", h, C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, dt, A, B, C = ctx.saved_tensors
        decay, h = _states(x, dt, A, B, ctx.reverse)

        g = dy.transpose(0, 1).unsqueeze(-1) * C.transpose(0, 1).unsqueeze(2)  # (l, b, e, n)
        order = _order(len(g), ctx.reverse)
        for after, t in pairwise(reversed(order)):
            g[t].addcmul_(decay[after], g[after])

        dC = torch.einsum("lben,ble->bln", h, dy)
        dB = torch.einsum("lben,ble->bln", g, dt * x)
        d_input = torch.einsum("lben,bln->ble", g, B)  # gradient of dt * x

        # d_decay = g_t h_{t-1}, and decay = exp(dt A): what both dt and A receive is d_decay * decay.
        d_exponent = torch.zeros_like(g)
        now, before = slice(1, None), slice(None, -1)
        if ctx.reverse:
            now, before = before, now
        torch.mul(g[now], h[before], out=d_exponent[now])
        d_exponent.mul_(decay)
        dA = torch.einsum("lben,ble->en", d_exponent, dt)
        ddt = torch.einsum("lben,en->ble", d_exponent, A).addcmul_(d_input, x)
        return d_input.mul_(dt), ddt, dA, dB, dC, None


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """exp(dt A) and h for every token, both (l, b, e, n): token-major, so that a step of the loop is contiguous."""
    decay = (dt.transpose(0, 1).unsqueeze(-1) * A).exp_()
    h = (dt * x).transpose(0, 1).unsqueeze(-1) * B.transpose(0, 1).unsqueeze(2)
    order = _order(len(h), reverse)
    for before, t in pairwise(order):
        h[t].addcmul_(decay[t], h[before])
    return decay, h


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Scan x (b, l, e) with step dt (b, l, e), A (e, n) < 0, B and C (b, l, n), D (e); returns y (b, l, e) like x.

    `dt_bias` (e) is added to dt before the softplus; a gate `z` (b, l, e) multiplies y by silu(z). `reverse` runs the
    recurrence from the last token to the first; the output stays in token order and nothing is flipped. States and
    sums are fp32 (fp64 where x is); every tensor argument gets a gradient.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, dt, A, B, C, D, z, dt_bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
        step = F.softplus(step)
        y = _Scan.apply(x.to(wide), step, A.to(wide), B.to(wide), C.to(wide), reverse)
        y = y + D.to(wide) * x.to(wide)
        if z is not None:
            y = y * F.silu(z.to(wide))
    return y.to(x.dtype)


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, dt_bias: Tensor | None
) -> None:
    if x.ndim != 3:
        raise ValueError(f"selective_scan: x has shape {tuple(x.shape)}; it must be (b, l, e)")
    b, length, e = x.shape
    n = A.shape[-1]
    wanted = {"dt": (dt, (b, length, e)), "A": (A, (e, n)), "B": (B, (b, length, n)), "C": (C, (b, length, n))}
    wanted |= {"D": (D, (e,))}
    if z is not None:
        wanted["z"] = (z, (b, length, e))
    if dt_bias is not None:
        wanted["dt_bias"] = (dt_bias, (e,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}; x and A ask for {shape}")
