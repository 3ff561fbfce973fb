"""The inside of a bidirectional mixer as one op: from the input projection to the gated sum of its directions.

Axes: k directions, b images, l tokens, e inner channels, n states a channel, r rank of dt, w convolution taps. Every
direction has its own parameters; they lie in one tensor with a leading axis k, so that a projection is one product.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .backend import Backend, choose
from .causal_conv1d import _conv, _conv_backward
from .checks import check_tensors, images_of, wide
from .selective_scan import CHUNK, _combine, _combine_backward, _fused, _scan, _scan_backward, fused_scale


def bimamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    reverse: Sequence[bool] = (False, True),
    fuse: Literal["sum", "mean"] = "mean",
    gated: bool = True,
    reset: Tensor | None = None,
    recompute: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """Both directions of one mixer (arXiv:2401.09417, algorithm 1): returns y (b, l, e) in xz's dtype.

    xz (b, l, 2e) holds the tokens x and the gate z. A direction convolves x and applies SiLU, projects the result to
    (dt, B, C), and scans. Their sum or mean is multiplied by silu(z), or not, with `gated` false. `reverse` says for
    each direction whether it walks from the last token to the first; one direction alone is fine.
    conv_weight (k, e, w), conv_bias (k, e), x_proj (k, r + 2n, e), dt_proj (k, e, r), dt_bias (k, e), A (k, e, n) < 0,
    D (k, e). `reset` (b, l) marks first tokens of images, as in `selective_scan`.

    With `recompute` only xz and the projections (k, b, l, r + 2n) are kept for the backward pass, which rebuilds the
    convolution, dt and the scan: 2 + k (r + 2n) / e values a token and channel instead of about 2 + 3k, for one more
    convolution and scan. Without, what the convolution and the scan gave and the scan's states are kept too.

    Raises:
        ValueError: a tensor of another shape, dtype or device than the others ask for, or a backend that cannot run.
    """
    op = "bimamba_inner"
    if xz.ndim and xz.shape[-1] % 2:
        raise ValueError(f"{op}: xz {tuple(xz.shape)} has an odd last axis; it must be (b, l, 2e)")
    x, _ = xz.chunk(2, dim=-1)
    k = len(reverse)
    check_tensors(
        op,
        {
            "xz[..., :e]": (x, "b l e"),
            "conv_weight": (conv_weight, f"{k} e w"),
            "conv_bias": (conv_bias, f"{k} e"),
            "dt_proj": (dt_proj, f"{k} e r"),
            "dt_bias": (dt_bias, f"{k} e"),
            "A": (A, f"{k} e n"),
            "D": (D, f"{k} e"),
            "x_proj": (x_proj, f"{k} {dt_proj.shape[-1] + 2 * A.shape[-1]} e"),
        },
        {"reset": (reset, "b l")},
    )
    name = choose(backend, op, xz)
    conv_weight, conv_bias, dt_bias, A, D = (wide(t, xz) for t in (conv_weight, conv_bias, dt_bias, A, D))
    x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)  # as autocast does
    parameters = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    scale = fused_scale(op, fuse, k)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (xz, *parameters))
    with torch.autocast(xz.device.type, enabled=False):
        return _inner(xz, *parameters, images_of(reset), reverse, scale, gated, learns and not recompute, name)[0]


@torch.library.custom_op("vimscale::bimamba_inner", mutates_args=())
def _inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    image: Tensor | None,
    reverse: Sequence[bool],
    scale: float,
    gated: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (b, l, e) and the projections (k, b, l, r + 2n); then, empty unless they are to be kept, what comes out of the
    convolution and the scan (k, b, l, e), and the scan's states.
    """
    before, z = xz.chunk(2, dim=-1)
    x = _conv(before, conv_weight, conv_bias, image, reverse, True, backend)
    projected = _project(x, x_proj)
    s, states = _scan_projected(x, projected, dt_proj, dt_bias, A, D, image, reverse, keep, backend)
    y = _combine(s, z if gated else None, scale, backend)
    if keep:
        return y, projected, x, s, states
    return y, projected, *(t.new_empty(0) for t in (x, s, states))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """(k, b, l, i) by a weight (k, o, i) a direction -> (k, b, l, o)."""
    k, b, length, _ = x.shape
    return torch.bmm(x.flatten(1, 2), weight.mT).view(k, b, length, -1)


def _scan_projected(
    x: Tensor,
    projected: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    image: Tensor | None,
    reverse: Sequence[bool],
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """s and the states kept. On a CPU dt is never written: the scan multiplies by dt_proj on the way."""
    low_dt, B, C = _split(projected, dt_proj, A)
    chunk = CHUNK[backend] if keep else 0
    if backend == "cpu":
        s, _, states = _fused(backend).forward(
            x, low_dt, A, B, C, D, dt_bias, None, image, reverse, chunk, dt_proj=dt_proj
        )
    else:
        dt = _project(low_dt, dt_proj)
        s, _, states = _scan(x, dt, A, B, C, D, dt_bias, None, image, reverse, chunk, backend)
    return s, states


def _split(projected: Tensor, dt_proj: Tensor, A: Tensor) -> list[Tensor]:
    return list(projected.split([dt_proj.shape[-1], A.shape[-1], A.shape[-1]], dim=-1))


@_inner.register_fake
def _(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, A, *_, keep, backend = others
    b, length, _ = xz.shape
    k, width, e = x_proj.shape
    inside = (k, b, length, e) if keep else (0,)
    chunk = CHUNK[backend] if keep else 0
    states = A.new_empty((k, b, (length + chunk - 1) // chunk, e * A.shape[-1]) if chunk else (0,))
    y, projected = xz.new_empty(b, length, e), xz.new_empty(k, b, length, width)
    return y, projected, xz.new_empty(inside), xz.new_empty(inside), states


@torch.library.custom_op("vimscale::bimamba_inner_backward", mutates_args=())
def _inner_backward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    image: Tensor | None,
    projected: Tensor,
    x: Tensor,
    s: Tensor,
    states: Tensor,
    dy: Tensor,
    reverse: Sequence[bool],
    scale: float,
    gated: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of xz and the seven parameters, from what `_inner` kept, or rebuilt line by line."""
    before, z = xz.chunk(2, dim=-1)
    low_dt, B, C = _split(projected, dt_proj, A)
    if not x.numel():
        x = _conv(before, conv_weight, conv_bias, image, reverse, True, backend)
        s, states = _scan_projected(x, projected, dt_proj, dt_bias, A, D, image, reverse, True, backend)

    ds, dz = _combine_backward(dy, s, z if gated else None, scale, backend)
    ds = ds.expand_as(s)
    if backend == "cpu":
        dx, ddt, dA, dB, dC, dD, dbias, _ = _fused(backend).backward(
            x, low_dt, A, B, C, D, dt_bias, None, image, states, ds, None, reverse, CHUNK[backend], dt_proj=dt_proj
        )
    else:
        dt = _project(low_dt, dt_proj)
        dx, ddt, dA, dB, dC, dD, dbias, _ = _scan_backward(
            x, dt, A, B, C, D, dt_bias, None, image, states, ds, None, reverse, CHUNK[backend], backend
        )
    del s, states
    d_low_dt = torch.bmm(ddt.flatten(1, 2), dt_proj).view_as(low_dt)
    ddt_proj = torch.bmm(ddt.flatten(1, 2).mT, low_dt.flatten(1, 2))
    dprojected = torch.cat([d_low_dt, dB, dC], dim=-1).flatten(1, 2)
    dx_proj = torch.bmm(dprojected.mT, x.flatten(1, 2))
    dx = dx.flatten(1, 2).baddbmm_(dprojected, x_proj).view_as(x)
    dbefore, dconv_weight, dconv_bias = _conv_backward(
        before, conv_weight, conv_bias, image, dx, reverse, True, backend
    )
    dxz = torch.cat([dbefore, dz if gated else torch.zeros_like(z)], dim=-1)
    return dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dbias, dA, dD


@_inner_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in arguments[:8])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.scale, ctx.gated, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    """What follows y is an output only to be kept: nobody else sees it, so that no gradient arrives there."""
    if dy is None:
        return (None,) * 14
    grads = _inner_backward(*ctx.saved_tensors, dy, ctx.reverse, ctx.scale, ctx.gated, ctx.backend)
    return *grads, None, None, None, None, None, None


_inner.register_autograd(_vjp, setup_context=_setup)
