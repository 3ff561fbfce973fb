"""The inside of a bidirectional mixer as one op: from the input projection to the gated sum of its directions.

Axes: k directions, b images, l tokens, e inner channels, n states per channel, r rank of dt, w convolution taps. Each
direction has its own parameters; they are stored in one tensor with a leading axis k, so that a projection is one
product.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .backend import Backend, choose, fused_module
from .causal_conv1d import _conv, _conv_backward
from .checks import check_tensors, images_of, wide
from .scan_inputs import ScanInputs
from .selective_scan import (
    CHUNK,
    _combine,
    _combine_backward,
    _scan,
    _scan_backward,
    empty_states,
    fused_scale,
)


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

    xz (b, l, 2e) holds the tokens x and the gate z. Each direction convolves x and applies SiLU, projects the result
    to (dt, B, C), and scans. The sum or mean of the directions is multiplied by silu(z), unless `gated` is false.
    `reverse` says for each direction whether it walks from the last token to the first; a single direction works too.
    conv_weight (k, e, w), conv_bias (k, e), x_proj (k, r + 2n, e), dt_proj (k, e, r), dt_bias (k, e), A (k, e, n) < 0,
    D (k, e). `reset` (b, l) marks the first token of each image, as in `selective_scan`.

    With `recompute`, only xz and the projections (k, b, l, r + 2n) are kept for the backward pass, which rebuilds the
    convolution, dt and the scan. This keeps 2 + k (r + 2n) / e values per token and channel instead of about 2 + 3k,
    and costs one more convolution and scan. Without it, the outputs of the convolution and the scan and the scan's
    states are kept too.

    Raises:
        ValueError: a tensor's shape, dtype or device does not match the others, or the backend cannot run.
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
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, image: Tensor | None, reverse: Sequence[bool], scale: float, gated: bool, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e) and the projections (k, b, l, r + 2n); then the outputs of the convolution and the scan (k, b, l, e)
    and the scan's states, which are empty unless `keep`.
    """
    before, z = xz.chunk(2, dim=-1)
    x = _conv(before, conv_weight, conv_bias, image, reverse, True, backend)
    projected = _project(x, x_proj)
    s, states = _scan_projected(_inputs(x, projected, dt_proj, A, D, dt_bias, image), dt_proj, reverse, keep, backend)
    y = _combine(s, z if gated else None, scale, backend)
    if keep:
        return y, projected, x, s, states
    return y, projected, *(t.new_empty(0) for t in (x, s, states))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (k, b, l, i) by one weight per direction, (k, o, i) -> (k, b, l, o)."""
    k, b, length, _ = x.shape
    return torch.bmm(x.flatten(1, 2), weight.mT).view(k, b, length, -1)


def _inputs(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, image: Tensor | None
) -> ScanInputs:
    """What the scan reads, but for dt, which is (k, b, l, r), before its projection."""
    low_dt, B, C = projected.split([dt_proj.shape[-1], A.shape[-1], A.shape[-1]], dim=-1)
    return ScanInputs(x, low_dt, A, B, C, D, dt_bias, None, image)


def _scan_projected(
    inputs: ScanInputs, dt_proj: Tensor, reverse: Sequence[bool], keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """s and the kept states. On a CPU dt is never written: the scan multiplies by dt_proj as it goes."""
    chunk = CHUNK[backend] if keep else 0
    if backend == "cpu":
        s, _, states = fused_module("selective_scan", backend).forward(inputs, reverse, chunk, dt_proj=dt_proj)
    else:
        s, _, states = _scan(*inputs._replace(dt=_project(inputs.dt, dt_proj)), reverse, chunk, backend)
    return s, states


@_inner.register_fake
def _(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, A, *_, keep, backend = others
    b, length, _ = xz.shape
    k, width, e = x_proj.shape
    y, projected = xz.new_empty(b, length, e), xz.new_empty(k, b, length, width)
    inside = (k, b, length, e)
    kept = inside if keep else (0,)
    states = empty_states(inside, A, CHUNK[backend] if keep else 0)
    return y, projected, xz.new_empty(kept), xz.new_empty(kept), states


@torch.library.custom_op("vimscale::bimamba_inner_backward", mutates_args=())
def _inner_backward(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, image: Tensor | None, projected: Tensor, x: Tensor, s: Tensor, states: Tensor, dy: Tensor,
    reverse: Sequence[bool], scale: float, gated: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of xz and the seven parameters, from what `_inner` kept; what it did not keep is rebuilt."""
    before, z = xz.chunk(2, dim=-1)
    rebuild = not x.numel()
    if rebuild:
        x = _conv(before, conv_weight, conv_bias, image, reverse, True, backend)
    inputs = _inputs(x, projected, dt_proj, A, D, dt_bias, image)
    if rebuild:
        s, states = _scan_projected(inputs, dt_proj, reverse, True, backend)

    ds, dz = _combine_backward(dy, s, z if gated else None, scale, backend)
    ds, chunk, low_dt = ds.expand_as(s), CHUNK[backend], inputs.dt
    if backend == "cpu":
        dx, ddt, dA, dB, dC, dD, dbias, _ = fused_module("selective_scan", backend).backward(
            inputs, states, ds, None, reverse, chunk, dt_proj=dt_proj
        )
    else:
        inputs = inputs._replace(dt=_project(low_dt, dt_proj))
        dx, ddt, dA, dB, dC, dD, dbias, _ = _scan_backward(*inputs, states, ds, None, reverse, chunk, backend)
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
    """The outputs after y exist only to be kept: nothing else reads them, so no gradient reaches them."""
    if dy is None:
        return (None,) * 14
    grads = _inner_backward(*ctx.saved_tensors, dy, ctx.reverse, ctx.scale, ctx.gated, ctx.backend)
    return *grads, None, None, None, None, None, None


_inner.register_autograd(_vjp, setup_context=_setup)
