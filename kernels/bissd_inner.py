"""The inside of an `ssd` mixer as one op: from the input projection to the norm of the gated sum of its directions.

Axes: k directions, c convolutions, b images, l tokens, h heads, e inner channels, n states per channel, w taps.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import causal_conv1d
from .backend import Backend, choose, fused_module
from .causal_conv1d import conv_backward_op, conv_op
from .checks import check_tensors, images_of, wide, without_autocast
from .selective_scan import fused_scale, rows
from .ssd import SsdInputs, ssd_backward_op, ssd_op
from .torch_op import torch_op


def bissd_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    reverse: Sequence[bool] = (False, True),
    conv_reverse: Sequence[bool] | None = None,
    fuse: Literal["sum", "mean"] = "mean",
    eps: float = 1e-5,
    reset: Tensor | None = None,
    recompute: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """Both directions of one mixer with Mamba-2's scan (arXiv:2405.21060): returns y (b, l, e) in zxbcdt's dtype.

    zxbcdt (b, l, 2e + 2n + h) holds the gate z, the tokens x with B and C, and dt, which all directions have in common.
    Each direction, or one for all of them, convolves (x, B, C) and applies SiLU; each scans h heads of e / h channels.
    The sum or mean of the directions is multiplied by silu(z), and RMSNorm follows. `reverse` says for each direction,
    and `conv_reverse` (the same by default) for each convolution, whether it walks from the last token to the first.
    conv_weight (c, e + 2n, w), conv_bias (c, e + 2n), dt_bias, A_log and D (k, h), where A = -exp(A_log), norm_weight
    (e). `reset` (b, l) marks the first token of each image, as in `ssd_scan`.

    With `recompute`, only zxbcdt and a number per token are kept for the backward pass, which repeats convolution and
    scan; without it, also the outputs of both. Gradients of slices are written into the slices of one tensor.

    Raises:
        ValueError: a tensor's shape, dtype or device does not match the others, or the backend cannot run.
    """
    op = "bissd_inner"
    conv_reverse = reverse if conv_reverse is None else conv_reverse
    k, c = len(reverse), len(conv_reverse)
    tensors = {
        "zxbcdt": (zxbcdt, "b l width"),
        "conv_weight": (conv_weight, f"{c} channels w"),
        "conv_bias": (conv_bias, f"{c} channels"),
        "dt_bias": (dt_bias, f"{k} h"),
        "A_log": (A_log, f"{k} h"),
        "D": (D, f"{k} h"),
        "norm_weight": (norm_weight, "e"),
    }
    check_tensors(op, tensors, {"reset": (reset, "b l")})
    e, h, channels = len(norm_weight), D.shape[1], conv_weight.shape[1]
    width = e + channels + h
    if zxbcdt.shape[-1] != width or c not in (1, k) or e % h or channels <= e or (channels - e) % 2:
        raise ValueError(
            f"{op}: zxbcdt {tuple(zxbcdt.shape)} and {c} convolutions of {channels} channels, with {k} directions of"
            f" {h} heads and a norm of {e} channels: e must be a multiple of the heads, convolutions have e + 2n"
            f" channels, one or {k} of them, and zxbcdt has 2e + 2n + h"
        )
    name = choose(backend, op, zxbcdt)
    parameters = [wide(t, zxbcdt) for t in (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)]
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in (zxbcdt, *parameters))
    with without_autocast(zxbcdt):
        return _inner(
            zxbcdt, *parameters, images_of(reset), conv_reverse, reverse, fused_scale(op, fuse, k), eps, keep, name
        )


@torch_op("bissd_inner")
def _inner(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, image: Tensor | None, conv_reverse: Sequence[bool], reverse: Sequence[bool], scale: float,
    eps: float, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e) and the factors of its norm (b, l); then the outputs of the convolutions (c, b, l, e + 2n) and the
    scans (b, l, e), which are empty unless `keep`.
    """
    z, before, dt = _parts(zxbcdt, norm_weight, D)
    convolved = conv_op.inside(before, conv_weight, conv_bias, image, conv_reverse, True, backend)
    s = _scan(_inputs(convolved, dt, dt_bias, A_log, D, image, len(norm_weight)), reverse, backend)
    y, factors = _gate_norm.inside(s, z, norm_weight, scale, eps, backend)
    if keep:
        return y, factors, convolved, s
    return y, factors, s.new_empty(0), s.new_empty(0)


def _parts(zxbcdt: Tensor, norm_weight: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, what is convolved, and dt, or their gradients."""
    e, h = len(norm_weight), D.shape[1]
    z, before, dt = zxbcdt.split([e, zxbcdt.shape[-1] - e - h, h], dim=-1)
    return z, before, dt


def _of_heads(convolved: Tensor, e: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (c, b, l, h, e / h), B and C (c, b, l, n), or their gradients."""
    n = (convolved.shape[-1] - e) // 2
    x, B, C = convolved.split([e, n, n], dim=-1)
    return x.unflatten(-1, (h, -1)), B, C


def _inputs(
    convolved: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, image: Tensor | None, e: int
) -> SsdInputs:
    k, h = A_log.shape
    x, B, C = _of_heads(convolved, e, h)
    return SsdInputs(x, dt.expand(k, *dt.shape), A_log, B, C, D, dt_bias, None, image)


def _scan(inputs: SsdInputs, reverse: Sequence[bool], backend: str) -> Tensor:
    """The sum over directions, (b, l, e)."""
    s, _ = ssd_op.inside(*inputs, reverse, False, backend)
    return s.flatten(2)


@_inner.register_fake
def _(zxbcdt: Tensor, conv_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    b, length, _ = zxbcdt.shape
    _, _, _, D, norm_weight, *_, keep, _ = others
    e = len(norm_weight)
    y, factors = zxbcdt.new_empty(b, length, e), norm_weight.new_empty(b, length)
    if not keep:
        return y, factors, zxbcdt.new_empty(0), zxbcdt.new_empty(0)
    channels = zxbcdt.shape[-1] - e - D.shape[1]
    return y, factors, zxbcdt.new_empty(len(conv_weight), b, length, channels), zxbcdt.new_empty(b, length, e)


@torch_op("bissd_inner_backward", shown=4)
def _inner_backward(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, image: Tensor | None, factors: Tensor, convolved: Tensor, s: Tensor, dy: Tensor,
    conv_reverse: Sequence[bool], reverse: Sequence[bool], scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of zxbcdt, of the convolutions' parameters (c (e + 2n) (w + 1)), of A_log, D and dt_bias (3, k, h),
    and of the norm's weight (e), from what `_inner` kept; what it did not keep is rebuilt. Gradients of slices are
    written into the slices of one tensor.
    """
    z, before, dt = _parts(zxbcdt, norm_weight, D)
    dzxbcdt = zxbcdt.new_empty(zxbcdt.shape)
    dz, dbefore, ddt = _parts(dzxbcdt, norm_weight, D)
    e, h = len(norm_weight), D.shape[1]
    rebuild = not convolved.numel()
    if rebuild:
        convolved = conv_op.inside(before, conv_weight, conv_bias, image, conv_reverse, True, backend)
    inputs = _inputs(convolved, dt, dt_bias, A_log, D, image, e)
    if rebuild:
        s = _scan(inputs, reverse, backend)
    ds, dnorm_weight = _gate_norm_backward.inside(dy, s, z, norm_weight, factors, dz, scale, backend)
    del s
    dconvolved = convolved.new_empty(convolved.shape)
    ddt_of_each, dparameters, _ = ssd_backward_op.inside(
        *inputs, ds.unflatten(-1, (h, -1)), None, *_of_heads(dconvolved, e, h), reverse, backend
    )
    torch.sum(ddt_of_each, 0, out=ddt)
    dconv = conv_backward_op.inside(
        before, conv_weight, conv_bias, image, dconvolved, dbefore, conv_reverse, True, backend
    )
    return dzxbcdt, dconv, dparameters, dnorm_weight


@_inner_backward.register_fake
def _(zxbcdt: Tensor, conv_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, A_log, _, norm_weight, *_ = others
    (c, channels, w), (k, h) = conv_weight.shape, A_log.shape
    dconv = conv_weight.new_empty(c * channels * (w + 1))
    return zxbcdt.new_empty(zxbcdt.shape), dconv, A_log.new_empty(3, k, h), norm_weight.new_empty(norm_weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.conv_reverse, ctx.reverse, ctx.scale, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # of the outputs that are not shown: they would be zeros


def _vjp(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 14
    tensors = ctx.saved_tensors
    dzxbcdt, dconv, dparameters, dnorm_weight = _inner_backward.inside(
        *tensors, dy, ctx.conv_reverse, ctx.reverse, ctx.scale, ctx.backend
    )
    dconv_weight, dconv_bias = causal_conv1d.split_parameters(dconv, tensors[1])
    dA_log, dD, dt_bias = dparameters.unbind()
    return dzxbcdt, dconv_weight, dconv_bias, dt_bias, dA_log, dD, dnorm_weight, *(None,) * 7


_inner.register_autograd(_vjp, _setup)


# -- gate and norm -----------------------------------------------------------------------------------------------------


@torch_op("gate_norm", shown=2)
def _gate_norm(s: Tensor, z: Tensor, weight: Tensor, scale: float, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """RMSNorm of scale silu(z) s, (b, l, e), and the factors (b, l) that it multiplied by."""
    if backend != "reference":
        return fused_module("scan_gate", backend).gate_norm(s.contiguous(), rows(z), weight, scale, eps)
    gated = s.to(weight.dtype) * scale * F.silu(z.to(weight.dtype))
    factors = (gated.square().mean(-1) + eps).rsqrt()
    return (gated * factors.unsqueeze(-1) * weight).to(s.dtype), factors


@_gate_norm.register_fake
def _(s: Tensor, z: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(s.shape[:2])


@torch_op("gate_norm_backward", shown=2, mutates=("dz",))
def _gate_norm_backward(
    dy: Tensor, s: Tensor, z: Tensor, weight: Tensor, factors: Tensor, dz: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Writes dz, whose last axis is contiguous. Returns the gradients of s (b, l, e) and of the weight (e)."""
    dy, s = dy.contiguous(), s.contiguous()
    if backend != "reference":
        return fused_module("scan_gate", backend).gate_norm_backward(dy, s, rows(z), weight, factors, scale, dz=dz)
    upstream, own, v = (t.to(weight.dtype) for t in (dy, s, z.contiguous()))
    gate, factors = torch.sigmoid(v), factors.unsqueeze(-1)
    unit = own * scale * v * gate * factors
    dunit = upstream * weight
    dgated = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * factors * scale
    dz.copy_(dgated * own * gate * (1 + v * (1 - gate)))
    return (dgated * v * gate).to(s.dtype), (upstream * unit).sum((0, 1))


@_gate_norm_backward.register_fake
def _(dy: Tensor, s: Tensor, z: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape)
