"""Depthwise causal convolution over tokens, channel last: one direction, or both from one read of the input.

Axes: b images, l tokens, e inner channels, k taps; weights and outputs have a leading axis of directions.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, choose, fused_module
from .checks import check_tensors, images_of, wide
from .torch_op import torch_op

Activation = Literal["silu"] | None


# -- reference ---------------------------------------------------------------------------------------------------------
# Works in any dtype. Pads the sequence by k - 1 tokens on both sides, so that every tap is a slice.


def reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (b, l, e), weight (directions, e, k), bias (directions, e), image numbers (b, l) -> y (directions, b, l, e)."""
    parameters = zip(weight, bias, reverse, strict=True)
    y = torch.stack([_pre_activation(_seen(x, image, w, r), w, c) for w, c, r in parameters])
    return (F.silu(y) if silu else y).to(x.dtype)


def reference_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    dy: Tensor,
    reverse: Sequence[bool],
    silu: bool,
    *,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx (b, l, e), summed over the directions, and the gradients of weight and bias, one after the other. A given `dx`
    is written in place.
    """
    (_, length, _), k = x.shape, weight.shape[-1]
    dpadded = _pad(torch.zeros_like(x, dtype=weight.dtype), k)
    dparameters = weight.new_empty(weight.numel() + bias.numel())
    dweight, dbias = split_parameters(dparameters, weight)
    for i, r in enumerate(reverse):
        seen = _seen(x, image, weight[i], r)
        dpre = dy[i].to(weight.dtype)
        if silu:
            pre = _pre_activation(seen, weight[i], bias[i])
            gate = pre.sigmoid()
            dpre = dpre * gate * (1 + pre * (1 - gate))
        dbias[i] = dpre.sum((0, 1))
        for j, tap in enumerate(_taps(length, k, r)):
            dweight[i, :, j] = (dpre * seen[j]).sum((0, 1))
            dpadded[:, tap] += _within_image(dpre * weight[i, :, j], image, k, tap)
    dx = torch.empty_like(x) if dx is None else dx
    return dx.copy_(dpadded[:, k - 1 : k - 1 + length]), dparameters


def _pre_activation(seen: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    y = bias.expand_as(seen[0])
    for j, x in enumerate(seen):
        y = y + weight[:, j] * x
    return y


def _seen(x: Tensor, image: Tensor | None, weight: Tensor, reverse: bool) -> list[Tensor]:
    """For each tap, what it sees from every token, (b, l, e)."""
    k = weight.shape[-1]
    padded = _pad(x.to(weight.dtype), k)
    return [_within_image(padded[:, tap], image, k, tap) for tap in _taps(x.shape[1], k, reverse)]


def _taps(length: int, k: int, reverse: bool) -> list[slice]:
    """For each tap, its positions in the padded sequence as the token that sees it goes from 0 to length - 1."""
    starts = range(2 * (k - 1), k - 2, -1) if reverse else range(k)
    return [slice(start, start + length) for start in starts]


def _within_image(values: Tensor, image: Tensor | None, k: int, tap: slice) -> Tensor:
    """values (b, l, e), zero where the token and its `tap` belong to different images."""
    if image is None:
        return values
    same = _pad(image.unsqueeze(-1), k)[:, tap] == image.unsqueeze(-1)  # (b, l, 1); the padding is zero for any image
    return torch.where(same, values, 0)


def _pad(values: Tensor, k: int) -> Tensor:
    return F.pad(values, (0, 0, k - 1, k - 1))


# -- ops ---------------------------------------------------------------------------------------------------------------
# Each of the three implementations is a pair (forward, backward) with the signatures of the reference.


def _implementation(backend: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    if backend == "reference":
        return reference_forward, reference_backward
    module = fused_module("causal_conv1d", backend)
    return module.forward, module.backward


@torch_op("causal_conv1d")
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool, backend: str
) -> Tensor:
    """Returns y (directions, b, l, e)."""
    forward, _ = _implementation(backend)
    return forward(_dense(x), weight.contiguous(), bias.contiguous(), image, reverse, silu)


@torch_op("causal_conv1d_backward", mutates=("dx",))
def conv_backward_op(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, dy: Tensor, dx: Tensor, reverse: Sequence[bool],
    silu: bool, backend: str,
) -> Tensor:  # fmt: skip
    """Writes dx (b, l, e), whose channels are contiguous. Returns the gradients of weight and bias, one after the other
    (directions e (k + 1)).
    """
    _, backward = _implementation(backend)
    weight, bias = weight.contiguous(), bias.contiguous()
    _, dparameters = backward(_dense(x), weight, bias, image, dy.contiguous(), reverse, silu, dx=dx)
    return dparameters


def _dense(x: Tensor) -> Tensor:
    """x with contiguous channels. Half of a (b, l, 2e) projection, the usual x, is not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


@conv_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(weight), *x.shape)


@conv_backward_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    directions, e, k = weight.shape
    return weight.new_empty(directions * e * (k + 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, image, ctx.reverse, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, image)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, image = ctx.saved_tensors
    dx = x.new_empty(x.shape)
    dparameters = conv_backward_op.inside(x, weight, bias, image, dy, dx, ctx.reverse, ctx.silu, ctx.backend)
    return dx, *split_parameters(dparameters, weight), None, None, None, None


def split_parameters(dparameters: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the weight (directions, e, k) and the bias (directions, e), which lie one after the other: views
    that are contiguous, so that nothing that collects gradients copies them once more.
    """
    dweight, dbias = dparameters.split([weight.numel(), dparameters.numel() - weight.numel()])
    return dweight.view(weight.shape), dbias.view(weight.shape[:2])


conv_op.register_autograd(_gradients, _setup_context)


# -- functions ---------------------------------------------------------------------------------------------------------


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reverse: bool = False,
    activation: Activation = None,
    reset: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """y_t = bias + sum_j weight[:, j] x_{t - (k-1) + j}: token t sees itself and the k - 1 tokens before it.

    x (b, l, e), weight (e, k), bias (e); returns (b, l, e) in x's dtype. With `reverse`, a token sees the k - 1 tokens
    *after* it, and the tap weight[:, k-1] stays on the token itself: this equals flip, convolve, flip back.

    `reset` (b, l) bool marks the first token, in token order, of each image of a packed sequence: a token then does not
    see tokens of other images, in either direction. Sums are fp32 (fp64 if x is fp64), under autocast too. If `backend`
    is None, x's device decides (kernels/backend.py). Every floating-point argument gets a gradient; there are no second
    derivatives.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a tensor is empty, or the activation is unknown.
    """
    tensors = {"x": (x, "b l e"), "weight": (weight, "e k"), "bias": (bias, "e")}
    check_tensors("causal_conv1d", tensors, {"reset": (reset, "b l")})
    y = _convolve("causal_conv1d", x, weight[None], bias[None], [reverse], activation, reset, backend)
    return y.squeeze(0)


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: Activation = None,
    reset: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`causal_conv1d` forwards with weight[0], bias[0] and in reverse with weight[1], bias[1], from one read of x.

    x (b, l, e), weight (2, e, k), bias (2, e); returns (2, b, l, e), both in token order. All else is as in
    `causal_conv1d`.
    """
    tensors = {"x": (x, "b l e"), "weight": (weight, "2 e k"), "bias": (bias, "2 e")}
    check_tensors("bidirectional_conv1d", tensors, {"reset": (reset, "b l")})
    return _convolve("bidirectional_conv1d", x, weight, bias, [False, True], activation, reset, backend)


def _convolve(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    reverse: list[bool],
    activation: Activation,
    reset: Tensor | None,
    backend: Backend | None,
) -> Tensor:
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation {activation!r} is neither None nor 'silu'")
    return conv_op(
        x, wide(weight, x), wide(bias, x), images_of(reset), reverse, activation == "silu", choose(backend, op, x)
    )  # (directions, b, l, e)
