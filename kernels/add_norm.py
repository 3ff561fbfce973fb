"""Residual add and normalization; the residual stream stays in fp32.

Axes: d model width, m rows (all the axes before it, flattened).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .backend import Backend, choose, fused_module
from .checks import check_tensors, wide

Kind = Literal["rms", "layer"]


# -- reference ---------------------------------------------------------------------------------------------------------
# Works in any dtype.


def reference_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (m, d), residual (m, d), weight and bias (d) -> normed (m, d) in x's dtype, total (m, d), stats (m, 2): the
    mean to subtract (0 for RMS) and the scale to multiply by.
    """
    total = x.to(weight.dtype, copy=True) if residual is None else residual + x.to(weight.dtype)
    mean = total.mean(1, keepdim=True) if kind == "layer" else torch.zeros_like(total[:, :1])
    centred = total - mean
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normed = centred * scale * weight
    normed = normed if bias is None else normed + bias
    return normed.to(x.dtype), total, torch.cat([mean, scale], 1)


def reference_backward(
    total: Tensor, weight: Tensor, stats: Tensor, dnormed: Tensor, dtotal: Tensor | None, kind: str, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in dnormed's dtype (empty if dresidual has the same dtype: it is dx), dresidual (m, d), dweight (d), and
    dbias (d) or empty.
    """
    mean, scale = stats.split(1, 1)
    unit = (total - mean) * scale
    dnormed_wide = dnormed.to(total.dtype)
    dunit = dnormed_wide * weight
    dcentred = dunit - unit * (dunit * unit).mean(1, keepdim=True)
    if kind == "layer":
        dcentred = dcentred - dunit.mean(1, keepdim=True)
    dresidual = dcentred * scale
    dresidual = dresidual if dtotal is None else dresidual + dtotal
    dx = dnormed.new_empty(0) if dnormed.dtype == dresidual.dtype else dresidual.to(dnormed.dtype)
    dbias = dnormed_wide.sum(0) if has_bias else weight.new_empty(0)
    return dx, dresidual, (dnormed_wide * unit).sum(0), dbias


# -- ops ---------------------------------------------------------------------------------------------------------------
# Each of the three implementations is a pair (forward, backward) with the signatures of the reference.


def _implementation(backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    if backend == "reference":
        return reference_forward, reference_backward
    module = fused_module("add_norm", backend)
    return module.forward, module.backward


@torch.library.custom_op("vimscale::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    forward, _ = _implementation(backend)
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    normed, total, stats = forward(x.contiguous(), residual, weight.contiguous(), bias, kind, eps)
    return normed, total, stats


@torch.library.custom_op("vimscale::add_norm_backward", mutates_args=())
def _add_norm_backward(
    total: Tensor, weight: Tensor, stats: Tensor, dnormed: Tensor, dtotal: Tensor | None, kind: str, has_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _, backward = _implementation(backend)
    dtotal = None if dtotal is None else dtotal.contiguous()
    dx, dresidual, dweight, dbias = backward(
        total, weight.contiguous(), stats, dnormed.contiguous(), dtotal, kind, has_bias
    )
    return dx, dresidual, dweight, dbias.clone() if backend == "triton" else dbias


@_add_norm.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(x.shape), weight.new_empty(x.shape[0], 2)


@_add_norm_backward.register_fake
def _(
    total: Tensor, weight: Tensor, stats: Tensor, dnormed: Tensor, dtotal: Any, kind: str, has_bias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dnormed.new_empty(0 if dnormed.dtype == total.dtype else total.shape)
    dbias = weight.new_empty(weight.shape if has_bias else 0)
    return dx, total.new_empty(total.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.kind, _, ctx.backend = inputs
    _, total, stats = output
    ctx.save_for_backward(total, weight, stats)
    ctx.has_residual, ctx.has_bias, ctx.dtype = residual is not None, bias is not None, x.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, stats = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total, dtype=ctx.dtype)
    dx, dresidual, dweight, dbias = _add_norm_backward(
        total, weight, stats, dnormed, dtotal, ctx.kind, ctx.has_bias, ctx.backend
    )
    dx = dresidual if ctx.dtype == total.dtype else dx
    return dx, dresidual if ctx.has_residual else None, dweight, dbias if ctx.has_bias else None, None, None, None


_add_norm.register_autograd(_gradients, setup_context=_setup_context)


# -- functions ---------------------------------------------------------------------------------------------------------


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind = "rms",
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMSNorm or LayerNorm: returns (normed (..., d) in x's dtype, total (..., d) in fp32).

    x and residual (..., d), weight and bias (d); without a residual, the stream starts with x. Sums are fp32 (fp64 if x
    is fp64), under autocast too. If `backend` is None, x's device decides (kernels/backend.py). Every tensor gets a
    gradient; there are no second derivatives.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a tensor is empty, or the kind is unknown.
    """
    tensors = {"x": (x, "... d"), "residual": (residual, "... d"), "weight": (weight, "d"), "bias": (bias, "d")}
    check_tensors("add_norm", tensors)
    if kind not in ("rms", "layer"):
        raise ValueError(f"add_norm: kind {kind!r} is neither 'rms' nor 'layer'")
    normed, total, _ = _add_norm(
        x.flatten(0, -2) if x.ndim > 1 else x[None],
        None if residual is None else wide(residual, x).view(-1, x.shape[-1]),
        wide(weight, x),
        None if bias is None else wide(bias, x),
        kind,
        eps,
        choose(backend, "add_norm", x),
    )
    return normed.view(x.shape), total.view(x.shape)
