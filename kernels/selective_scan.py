"""The Mamba-1 selective scan, forwards, backwards or both, in three backends; this file: the reference, ops, functions.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (arXiv:2312.00752, section 3.2)

Axes: k directions (one or two), b images, l tokens, e inner channels, n states a channel. Capital A B C D are the
matrices of the paper. Inside, a scan always has the axis k, and what the directions share (the gate) has not.
"""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, choose
from .checks import check_tensors, images_of, wide

# Tokens between the states that the forward keeps for the backward: n / CHUNK fp32 values a token and channel.
# The reference keeps none and walks twice.
CHUNK = {"reference": 0, "cpu": 16, "triton": 8}


# -- reference ---------------------------------------------------------------------------------------------------------


def _states(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, initial: Tensor | None, image: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction's decay, the state before each token and the state after it, all (l, b, e, n): token-major, so that
    a step of the loop is contiguous. The decay into a token that begins an image is zero.
    """
    decay = (step.transpose(0, 1).unsqueeze(-1) * A).exp()
    if image is not None:
        decay[_begins(image, reverse).transpose(0, 1)] = 0
    after = (step * x).transpose(0, 1).unsqueeze(-1) * B.transpose(0, 1).unsqueeze(2)
    order = _order(len(after), reverse)
    if initial is not None:
        after[order[0]].addcmul_(decay[order[0]], initial)
    for previous, t in pairwise(order):
        after[t].addcmul_(decay[t], after[previous])

    start = (torch.zeros_like(after[0]) if initial is None else initial).unsqueeze(0)
    before = torch.cat([after[1:], start] if reverse else [start, after[:-1]])
    return decay, before, after


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def _begins(image: Tensor, reverse: bool) -> Tensor:
    """(b, l) bool: the token before it in scan order is of another image. What precedes the sequence is image 0."""
    if reverse:
        return image != torch.cat([image[:, 1:], image[:, -1:]], dim=1)
    return image != torch.cat([torch.zeros_like(image[:, :1]), image[:, :-1]], dim=1)


def _step(dt: Tensor, dt_bias: Tensor | None, A: Tensor) -> tuple[Tensor, Tensor]:
    """Before and after the softplus, (b, l, e), in A's dtype."""
    raw = dt.to(A.dtype) if dt_bias is None else dt.to(A.dtype) + dt_bias
    return raw, F.softplus(raw)


def _reference_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    outputs, finals = [], []
    for k, backwards in enumerate(reverse):
        wide_x, wide_B, wide_C = (t[k].to(A.dtype) for t in (x, B, C))
        _, step = _step(dt[k], None if dt_bias is None else dt_bias[k], A)
        start = None if initial is None else initial[k]
        _, _, h = _states(wide_x, step, A[k], wide_B, start, image, backwards)
        outputs.append(torch.einsum("lben,bln->ble", h, wide_C) + D[k] * wide_x)
        finals.append(h[0 if backwards else -1])
    return torch.stack(outputs).to(x.dtype), torch.stack(finals)


def _reference_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    ds: Tensor,
    dfinal: Tensor | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, ...]:
    """With g_t the gradient that reaches h_t:  g_t = C_t ds_t + exp(dt_{t'} A) g_{t'}, t' following t in scan order.
    The states are rebuilt: memory is linear in l, and only the inputs were saved.
    """
    gradients = []
    for k, backwards in enumerate(reverse):
        wide_x, wide_B, wide_C, wide_ds = (t[k].to(A.dtype) for t in (x, B, C, ds))
        raw, step = _step(dt[k], None if dt_bias is None else dt_bias[k], A)
        start = None if initial is None else initial[k]
        decay, before, after = _states(wide_x, step, A[k], wide_B, start, image, backwards)

        g = wide_ds.transpose(0, 1).unsqueeze(-1) * wide_C.transpose(0, 1).unsqueeze(2)  # (l, b, e, n)
        order = _order(len(g), backwards)
        if dfinal is not None:
            g[order[-1]] += dfinal[k]
        for following, t in pairwise(reversed(order)):
            g[t].addcmul_(decay[following], g[following])

        dinitial = decay[order[0]] * g[order[0]]
        dC = torch.einsum("lben,ble->bln", after, wide_ds)
        dB = torch.einsum("lben,ble->bln", g, step * wide_x)
        d_entering = torch.einsum("lben,bln->ble", g, wide_B)  # gradient of step * x
        # decay = exp(step A), so the exponent receives (g_t h_{t-1}) * decay
        d_exponent = g.mul_(before).mul_(decay)
        dA = torch.einsum("lben,ble->en", d_exponent, step)
        dstep = torch.einsum("lben,en->ble", d_exponent, A[k]) + d_entering * wide_x
        ddt = dstep * torch.sigmoid(raw)
        dx = d_entering * step + D[k] * wide_ds
        dD = (wide_ds * wide_x).sum((0, 1))
        gradients.append((dx, ddt, dA, dB, dC, dD, ddt.sum((0, 1)), dinitial))
    dx, ddt, dA, dB, dC, dD, dbias, dinitial = (torch.stack(each) for each in zip(*gradients, strict=True))
    dx, ddt, dB, dC = (t.to(x.dtype) for t in (dx, ddt, dB, dC))
    dbias, dinitial = (A.new_empty(0) if t is None else d for t, d in ((dt_bias, dbias), (initial, dinitial)))
    return dx, ddt, dA, dB, dC, dD, dbias, dinitial


# -- ops ---------------------------------------------------------------------------------------------------------------


def _fused(backend: str) -> Any:
    """The module of a fused backend, imported when it is first needed."""
    return import_module(f"{__name__}_{backend}")


@torch.library.custom_op("vimscale::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    reverse: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e), final states (k, b, e, n), and the states kept every `chunk` tokens (none if 0).

    x, dt (k, b, l, e), B, C (k, b, l, n) in the activations' dtype; A (k, e, n), D, dt_bias (k, e),
    initial (k, b, e, n) in fp32; image (b, l) int32: tokens of one image have one number.
    """
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            s, final = _reference_forward(x, dt, A, B, C, D, dt_bias, initial, image, reverse)
        return s, final, A.new_empty(0)
    x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
    return _fused(backend).forward(x, dt, A, B, C, D, dt_bias, initial, image, reverse, chunk)


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    (k, b, length, e), n = x.shape, A.shape[-1]
    *_, chunk, _ = others
    states = A.new_empty((k, b, (length + chunk - 1) // chunk, e * n) if chunk else (0,))
    return x.new_empty(x.shape), A.new_empty(k, b, e, n), states


@torch.library.custom_op("vimscale::selective_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    states: Tensor,
    ds: Tensor,
    dfinal: Tensor | None,
    reverse: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return _reference_backward(x, dt, A, B, C, D, dt_bias, initial, image, ds, dfinal, reverse)  # type: ignore[return-value]
    x, dt, B, C, ds = (_rows(t) for t in (x, dt, B, C, ds))
    dfinal = None if dfinal is None else dfinal.contiguous()
    return _fused(backend).backward(x, dt, A, B, C, D, dt_bias, initial, image, states, ds, dfinal, reverse, chunk)


@_scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *always, dt_bias, initial = arguments[:8]
    A = always[2]
    return *(t.new_empty(t.shape) for t in always), *(
        A.new_empty(0 if t is None else t.shape) for t in (dt_bias, initial)
    )


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, reverse, chunk, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.reverse, ctx.chunk, ctx.backend = reverse, chunk, backend
    ctx.set_materialize_grads(False)


def _scan_vjp(ctx: Any, ds: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *inputs, states = ctx.saved_tensors
    x, _, _, _, _, _, dt_bias, initial, _ = inputs
    ds = torch.zeros_like(x) if ds is None else ds.to(x.dtype)
    grads: list[Tensor | None] = list(_scan_backward(*inputs, states, ds, dfinal, ctx.reverse, ctx.chunk, ctx.backend))
    if dt_bias is None:
        grads[6] = None
    if initial is None:
        grads[7] = None
    return *grads, None, None, None, None


_scan.register_autograd(_scan_vjp, setup_context=_scan_setup)


@torch.library.custom_op("vimscale::combine", mutates_args=())
def _combine(s: Tensor, z: Tensor | None, scale: float, backend: str) -> Tensor:
    """scale silu(z) (sum of s over directions): (b, l, e) from s (k, b, l, e) and a gate (b, l, e) that they share."""
    if backend != "reference":
        return _fused(backend).combine(s.contiguous(), None if z is None else _rows(z), scale)
    y = s.to(_sums(s)).sum(0) * scale
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(s.dtype)


@_combine.register_fake
def _(s: Tensor, z: Tensor | None, scale: float, backend: str) -> Tensor:
    return s.new_empty(s.shape[1:])


@torch.library.custom_op("vimscale::combine_backward", mutates_args=())
def _combine_backward(dy: Tensor, s: Tensor, z: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of s, the same for each direction (b, l, e), and of z."""
    if backend != "reference":
        return _fused(backend).combine_backward(_rows(dy), s.contiguous(), None if z is None else _rows(z), scale)
    dy = dy.contiguous()  # results have the strides of what they are computed from
    if z is None:
        return dy * scale, dy.new_empty(0)
    upstream, v = dy.to(_sums(s)) * scale, z.to(_sums(s))
    gate = torch.sigmoid(v)
    dz = upstream * s.to(v.dtype).sum(0) * gate * (1 + v * (1 - gate))
    return (upstream * v * gate).to(s.dtype), dz.to(z.dtype)


@_combine_backward.register_fake
def _(dy: Tensor, s: Tensor, z: Tensor | None, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape[1:]), s.new_empty(0 if z is None else z.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    s, z, ctx.scale, ctx.backend = inputs
    ctx.directions = len(s)
    ctx.save_for_backward(s, z)


def _combine_vjp(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    s, z = ctx.saved_tensors
    ds, dz = _combine_backward(dy, s, z, ctx.scale, ctx.backend)
    return ds.expand_as(s), None if z is None else dz, None, None


_combine.register_autograd(_combine_vjp, setup_context=_combine_setup)


def _sums(s: Tensor) -> torch.dtype:
    return torch.promote_types(s.dtype, torch.float32)


def _rows(t: Tensor) -> Tensor:
    """With its last axis contiguous, as the fused kernels read it; the other axes keep any strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


# -- functions ---------------------------------------------------------------------------------------------------------


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    *,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    reset: Tensor | None = ...,
    return_final_state: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    *,
    reverse: bool = ...,
    initial_state: Tensor | None = ...,
    reset: Tensor | None = ...,
    return_final_state: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
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
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan x (b, l, e) with dt (b, l, e), A (e, n) < 0, B and C (b, l, n), D (e); returns y (b, l, e) in x's dtype.

    The step is softplus(dt + dt_bias), dt_bias (e); a gate z (b, l, e) multiplies y by silu(z). `reverse` walks from
    the last token to the first; outputs stay in token order and nothing is flipped. `initial_state` (b, e, n) precedes
    the first token walked; with `return_final_state` the state after the last one walked comes second, in fp32.
    `reset` (b, l), bool, marks the first token of each image of a packed sequence: the state starts from zero there,
    and in reverse at the token before a mark. A mark on token 0 discards the initial state of a forward scan.

    x, dt, B, C and z share a dtype (fp32, bf16, fp16, fp64); the others are read in fp32 (fp64 with fp64). States and
    sums are fp32. Every floating tensor gets a gradient. The same inputs give the same bits.

    Raises:
        ValueError: a tensor of another shape, dtype or device than x and A ask for, or a backend that cannot run.
    """
    y, final = _run(
        "selective_scan", (reverse,), x, dt, A, B, C, D, z, dt_bias, initial_state, reset, scale=1.0, backend=backend
    )
    return (y, final) if return_final_state else y


Pair = Tensor | tuple[Tensor, Tensor]


def bidirectional_scan(
    x: Pair,
    dt: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair,
    z: Tensor | None = None,
    dt_bias: Pair | None = None,
    *,
    fuse: Literal["sum", "mean"] = "sum",
    initial_state: Pair | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both directions of one mixer: the sum or mean of a forward scan of x[0] and a reverse scan of x[1], gated once.

    Arguments are those of `selective_scan` twice, forward first: a tensor with a leading axis of two, or a pair of
    tensors, which are copied into one; an expanded tensor (both directions alike) is not copied. z and reset are
    common. Returns y (b, l, e), and the final states (2, b, e, n) with `return_final_state`. A bidirectional mixer
    gates each direction with the same z, and silu(z) a + silu(z) b = silu(z) (a + b).

    Raises:
        ValueError: as selective_scan.
    """
    pairs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    stacked = {name: _stacked(name, pair) for name, pair in pairs.items() if pair is not None}
    y, final = _run(
        "bidirectional_scan",
        (False, True),
        stacked["x"],
        stacked["dt"],
        stacked["A"],
        stacked["B"],
        stacked["C"],
        stacked["D"],
        z,
        stacked.get("dt_bias"),
        stacked.get("initial_state"),
        reset,
        scale=fused_scale("bidirectional_scan", fuse, 2),
        backend=backend,
    )
    return (y, final) if return_final_state else y


def fused_scale(op: str, fuse: str, directions: int) -> float:
    """What the sum over directions is multiplied by."""
    if fuse not in ("sum", "mean"):
        raise ValueError(f"{op}: fuse {fuse!r} is not sum or mean")
    return 1 / directions if fuse == "mean" else 1.0


def _stacked(name: str, pair: Pair) -> Tensor:
    if isinstance(pair, Tensor):
        return pair
    forward, backward = pair
    if forward.shape != backward.shape or forward.dtype != backward.dtype or forward.device != backward.device:
        shown = " and ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in pair)
        raise ValueError(f"bidirectional_scan: the pair {name} is {shown}; both must be alike")
    return torch.stack([forward, backward])


def _run(
    op: str,
    reverse: tuple[bool, ...],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
    *,
    scale: float,
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:
    """y (b, l, e) and the final state, from tensors with a leading axis of directions if there are two."""
    k = "" if len(reverse) == 1 else f"{len(reverse)} "
    check_tensors(
        op,
        {
            "x": (x, f"{k}b l e"),
            "dt": (dt, f"{k}b l e"),
            "A": (A, f"{k}e n"),
            "B": (B, f"{k}b l n"),
            "C": (C, f"{k}b l n"),
            "D": (D, f"{k}e"),
            "z": (z, "b l e"),
            "dt_bias": (dt_bias, f"{k}e"),
            "initial_state": (initial, f"{k}b e n"),
        },
        {"reset": (reset, "b l")},
        alike=("x", "dt", "B", "C", "z"),
    )
    name = choose(backend, op, x)
    parameters = [None if t is None else wide(t, x) for t in (A, D, dt_bias, initial)]
    tensors = [x, dt, parameters[0], B, C, *parameters[1:]]
    if not k:
        tensors = [None if t is None else t.unsqueeze(0) for t in tensors]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    s, final, _ = _scan(*tensors, images_of(reset), reverse, CHUNK[name] if learns else 0, name)
    y = s[0] if z is None and len(reverse) == 1 else _combine(s, z, scale, name)
    return y, final if k else final[0]
