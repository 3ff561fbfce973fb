"""The inside of a bidirectional mixer as one op: from the input projection to the gated sum of its directions.

Axes: k directions, b images, l tokens, e inner channels, n states per channel, r rank of dt, w convolution taps. Each
direction has its own parameters; they are stored in one tensor with a leading axis k, so that a projection is one
product.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import causal_conv1d, selective_scan
from .backend import Backend, choose, fused_module
from .causal_conv1d import conv_backward_op, conv_op
from .checks import check_tensors, images_of, wide, without_autocast
from .context import Context, conv_over, scan_over
from .scan_inputs import ScanInputs
from .selective_scan import CHUNK, combine_backward_op, combine_op, empty_states, fused_scale, scan_backward_op, scan_op
from .torch_op import torch_op


def bimamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    reverse: Sequence[bool] = (False, True),
    fuse: Literal["sum", "mean"] = "mean",
    gated: bool = True,
    reset: Tensor | None = None,
    recompute: bool = True,
    context: Context | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Both directions of one mixer (arXiv:2401.09417, algorithm 1): returns y (b, l, e) in xz's dtype.

    xz (b, l, 2e) holds the tokens x and the gate z. Each direction convolves x and applies SiLU, projects the result
    to (dt, B, C), and scans. The sum or mean of the directions is multiplied by silu(z), unless `gated` is false.
    `reverse` says for each direction whether it walks from the last token to the first; a single direction works too.
    conv_weight (k, e, w), conv_bias (k, e), x_proj (k, r + 2n, e), dt_proj (k, e, r), dt_bias (k, e), A_log (k, e, n),
    where A = -exp(A_log), D (k, e). `reset` (b, l) marks the first token of each image, as in `selective_scan`.

    With `recompute`, only xz and the projections (k, b, l, r + 2n) are kept for the backward pass, which rebuilds the
    convolution, dt and the scan. This keeps 2 + k (r + 2n) / e values per token and channel instead of about 2 + 3k,
    and costs one more convolution and scan. Without it, the outputs of the convolution and the scan and the scan's
    states are kept too.

    `context`: the ranks that hold a stretch each of the same sequences; xz is this rank's stretch, of w - 1 tokens or
    more, and all ranks call this. Gradients are then those of the sum of what all ranks compute from their y.

    Raises:
        ValueError: a tensor's shape, dtype or device does not match the others, or the backend cannot run; a stretch is
            too short, or comes with `reset`.
    """
    op = "bimamba_inner"
    if xz.ndim and xz.shape[-1] % 2:
        raise ValueError(f"{op}: xz {tuple(xz.shape)} has an odd last axis; it must be (b, l, 2e)")
    k = len(reverse)
    check_tensors(
        op,
        {
            "xz": (xz, "b l 2e"),
            "conv_weight": (conv_weight, f"{k} e w"),
            "conv_bias": (conv_bias, f"{k} e"),
            "dt_proj": (dt_proj, f"{k} e r"),
            "dt_bias": (dt_bias, f"{k} e"),
            "A_log": (A_log, f"{k} e n"),
            "D": (D, f"{k} e"),
            "x_proj": (x_proj, f"{k} {dt_proj.shape[-1] + 2 * A_log.shape[-1]} e"),
        },
        {"reset": (reset, "b l")},
    )
    name = choose(backend, op, xz)
    conv_weight, conv_bias, dt_bias, A_log, D = (wide(t, xz) for t in (conv_weight, conv_bias, dt_bias, A_log, D))
    x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)  # as autocast does
    parameters = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
    scale = fused_scale(op, fuse, k)
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in (xz, *parameters))
    with without_autocast(xz):
        if context is not None:
            _check_stretch(op, xz, conv_weight, reset)
            inner = partial(_inner_over, context, reverse=reverse, scale=scale, gated=gated, backend=name)
            if recompute:
                return checkpoint(inner, xz, *parameters, use_reentrant=False, preserve_rng_state=False)
            return inner(xz, *parameters)
        return _inner(xz, *parameters, images_of(reset), reverse, scale, gated, keep, name)


def _check_stretch(op: str, xz: Tensor, conv_weight: Tensor, reset: Tensor | None) -> None:
    halo = conv_weight.shape[-1] - 1
    if xz.shape[1] < halo:
        raise ValueError(
            f"{op}: a stretch of {xz.shape[1]} tokens is too short: a convolution of {halo + 1} taps needs {halo};"
            " share a sequence between fewer ranks"
        )
    if reset is not None:
        raise ValueError(f"{op}: reset marks and context exclude each other: ranks share sequences of one image")


def _inner_over(
    context: Context, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, *, reverse: Sequence[bool], scale: float, gated: bool, backend: Backend,
) -> Tensor:  # fmt: skip
    """`_inner` on one rank's stretch, as a composition: its parts communicate, so it cannot be one op."""
    before, z = xz.chunk(2, dim=-1)
    x = conv_over(context, before, conv_weight, conv_bias, reverse, backend)
    low_dt, B, C = _parts(_project(x, x_proj), dt_proj, A_log)
    s, _ = scan_over(context, x, low_dt, dt_proj, A_log, B, C, D, dt_bias, reverse, backend)
    return combine_op(s, z if gated else None, scale, backend)


@torch_op("bimamba_inner")
def _inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, image: Tensor | None, reverse: Sequence[bool], scale: float, gated: bool, keep: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, e) and the projections (k, b, l, r + 2n); then the outputs of the convolution and the scan (k, b, l, e)
    and the scan's states, which are empty unless `keep`.
    """
    before, z = xz.chunk(2, dim=-1)
    x = conv_op.inside(before, conv_weight, conv_bias, image, reverse, True, backend)
    projected = _project(x, x_proj)
    inputs = _inputs(x, projected, dt_proj, A_log, D, dt_bias, image)
    s, states = _scan_projected(inputs, dt_proj, reverse, keep, backend)
    y = combine_op.inside(s, z if gated else None, scale, backend)
    if keep:
        return y, projected, x, s, states
    return y, projected, *(t.new_empty(0) for t in (x, s, states))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (k, b, l, i) by one weight per direction, (k, o, i) -> (k, b, l, o)."""
    k, b, length, _ = x.shape
    return torch.bmm(x.flatten(1, 2), weight.mT).view(k, b, length, -1)


def _inputs(
    x: Tensor, projected: Tensor, dt_proj: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor, image: Tensor | None
) -> ScanInputs:
    """What the scan reads, but for dt, which is (k, b, l, r), before its projection, and with A_log as A."""
    low_dt, B, C = _parts(projected, dt_proj, A_log)
    return ScanInputs(x, low_dt, A_log, B, C, D, dt_bias, None, image)


def _parts(projected: Tensor, dt_proj: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dt before its projection, B and C, from the projections, or their gradients."""
    low_dt, B, C = projected.split([dt_proj.shape[-1], A_log.shape[-1], A_log.shape[-1]], dim=-1)
    return low_dt, B, C


def _scan_projected(
    inputs: ScanInputs, dt_proj: Tensor, reverse: Sequence[bool], keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """s and the kept states. On a CPU dt is never written: the scan multiplies by dt_proj as it goes."""
    chunk = CHUNK[backend] if keep else 0
    if backend == "cpu":
        inputs = inputs._replace(A=selective_scan.decay_rates(inputs.A, True))
        s, _, states = fused_module("selective_scan", backend).forward(inputs, reverse, chunk, dt_proj=dt_proj)
    else:
        inputs = inputs._replace(dt=_project(inputs.dt, dt_proj))
        s, _, states = scan_op.inside(*inputs, reverse, chunk, True, backend)
    return s, states


@_inner.register_fake
def _(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, A_log, *_, keep, backend = others
    b, length, _ = xz.shape
    k, width, e = x_proj.shape
    y, projected = xz.new_empty(b, length, e), xz.new_empty(k, b, length, width)
    inside = (k, b, length, e)
    kept = inside if keep else (0,)
    states = empty_states(inside, A_log, CHUNK[backend] if keep else 0)
    return y, projected, xz.new_empty(kept), xz.new_empty(kept), states


@torch_op("bimamba_inner_backward", shown=5)
def _inner_backward(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, image: Tensor | None, projected: Tensor, x: Tensor, s: Tensor, states: Tensor, dy: Tensor,
    reverse: Sequence[bool], scale: float, gated: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of xz, of the convolution's parameters (k e (w + 1)), of x_proj and dt_proj, and of the scan's
    parameters (k e (n + 2)), from what `_inner` kept; what it did not keep is rebuilt. Gradients of slices are written
    into the slices of one tensor.
    """
    before, z = xz.chunk(2, dim=-1)
    dxz, dprojected = xz.new_empty(xz.shape), projected.new_empty(projected.shape)
    dbefore, dz = dxz.chunk(2, dim=-1)
    d_low_dt, dB, dC = _parts(dprojected, dt_proj, A_log)

    rebuild = not x.numel()
    if rebuild:
        x = conv_op.inside(before, conv_weight, conv_bias, image, reverse, True, backend)
    inputs = _inputs(x, projected, dt_proj, A_log, D, dt_bias, image)
    if rebuild:
        s, states = _scan_projected(inputs, dt_proj, reverse, True, backend)

    if gated:
        ds = combine_backward_op.inside(dy, s, z, dz, scale, backend)
    else:
        ds = combine_backward_op.inside(dy, s, None, None, scale, backend)
        dz.zero_()
    ds, low_dt = ds.expand_as(s), inputs.dt.flatten(1, 2)
    del s
    if backend == "cpu":
        inputs = inputs._replace(A=selective_scan.decay_rates(A_log, True))
        dx, ddt, dscan, _ = selective_scan.cpu_scan_backward(inputs, states, ds, None, dB, dC, reverse, True, dt_proj)
    else:
        inputs = inputs._replace(dt=_project(inputs.dt, dt_proj))
        dx, ddt, dscan, _ = scan_backward_op.inside(
            *inputs, states, ds, None, dB, dC, reverse, CHUNK[backend], True, backend
        )
    del states
    dx, ddt, dprojected, x = (t.flatten(1, 2) for t in (dx, ddt, dprojected, x))
    torch.bmm(ddt, dt_proj, out=d_low_dt.flatten(1, 2))
    ddt_proj = torch.bmm(ddt.mT, low_dt)
    dx_proj = torch.bmm(dprojected.mT, x)
    dx = dx.baddbmm_(dprojected, x_proj).view(inputs.x.shape)
    dconv = conv_backward_op.inside(before, conv_weight, conv_bias, image, dx, dbefore, reverse, True, backend)
    return dxz, dconv, dx_proj, ddt_proj, dscan


@_inner_backward.register_fake
def _(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dt_proj, _, A_log, *_ = others
    (k, e, w), n = conv_weight.shape, A_log.shape[-1]
    dconv, dscan = conv_weight.new_empty(k * e * (w + 1)), A_log.new_empty(k * e * (n + 2))
    return xz.new_empty(xz.shape), dconv, x_proj.new_empty(x_proj.shape), dt_proj.new_empty(dt_proj.shape), dscan


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.scale, ctx.gated, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # of the outputs that are not shown: they would be zeros


def _vjp(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 14
    tensors = ctx.saved_tensors
    dxz, dconv, dx_proj, ddt_proj, dscan = _inner_backward.inside(
        *tensors, dy, ctx.reverse, ctx.scale, ctx.gated, ctx.backend
    )
    _, conv_weight, _, _, _, _, A_log, *_ = tensors
    dconv_weight, dconv_bias = causal_conv1d.split_parameters(dconv, conv_weight)
    dA_log, dD, dt_bias = selective_scan.split_parameters(dscan, A_log)
    gradients = dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, dt_bias, dA_log, dD
    return *gradients, None, None, None, None, None, None


_inner.register_autograd(_vjp, _setup)
