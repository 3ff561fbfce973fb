"""The state-space-dual scan of Mamba-2, in one or both directions: reference, torch ops and public functions.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t        (arXiv:2405.21060, sections 3 and 6)

Axes: k directions (one or two), b images, l tokens, h heads, p channels of a head, n states per channel; j is k, or 1
where all directions read the same x, B and C. A head has one dt, one A and one D. Capital A B C D are the matrices of
the paper. The kernels for a CPU are in ssd_cpu.py, those for a GPU in ssd_triton.py.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, choose, fused_module
from .checks import check_tensors, images_of, wide
from .recurrence import add_gradients, add_states, begins_image
from .selective_scan import Pair, combine_op, fused_scale, stacked
from .torch_op import torch_op


class SsdInputs(NamedTuple):
    """In the order of the op's arguments. x, dt, B and C share the activation dtype; the parameters A_log, D, dt_bias
    and the initial state are fp32 (fp64 if x is fp64).
    """

    x: Tensor
    """(j, b, l, h, p)."""
    dt: Tensor
    """(k, b, l, h), before the bias and the softplus."""
    A_log: Tensor
    """(k, h), log(-A)."""
    B: Tensor
    """(j, b, l, n)."""
    C: Tensor
    """(j, b, l, n)."""
    D: Tensor
    """(k, h)."""
    dt_bias: Tensor | None
    """(k, h)."""
    initial: Tensor | None
    """(k, b, h, p, n), the state before the first token of the walk; None: zero."""
    image: Tensor | None
    """(b, l) int32: tokens of the same image have the same number; None: each sequence is one image."""


# -- reference ---------------------------------------------------------------------------------------------------------


class _Walk(NamedTuple):
    """One direction of a scan, in A_log's dtype. States are token-major: iterations of the loop are contiguous."""

    x: Tensor
    """(b, l, h, p)."""
    B: Tensor
    """(b, l, n)."""
    C: Tensor
    """(b, l, n)."""
    raw: Tensor
    """(b, l, h), dt plus its bias, before the softplus."""
    step: Tensor
    """(b, l, h), after the softplus."""
    decay: Tensor
    """(l, b, h, 1, 1); zero into a token that begins an image."""
    before: Tensor
    """(l, b, h, p, n), the state before each token."""
    after: Tensor
    """(l, b, h, p, n), the state after each token."""


def _walk(inputs: SsdInputs, k: int, reverse: bool) -> _Walk:
    A_log = inputs.A_log[k]
    x, B, C = (t[k if len(t) > 1 else 0].to(A_log.dtype) for t in (inputs.x, inputs.B, inputs.C))
    initial = None if inputs.initial is None else inputs.initial[k]
    raw = inputs.dt[k].to(A_log.dtype)
    if inputs.dt_bias is not None:
        raw = raw + inputs.dt_bias[k]
    step = F.softplus(raw)
    decay = (step * -A_log.exp()).exp()
    if inputs.image is not None:
        decay = decay.masked_fill(begins_image(inputs.image, reverse).unsqueeze(-1), 0)
    decay = decay.transpose(0, 1)[..., None, None]
    after = torch.einsum("blh,blhp,bln->lbhpn", step, x, B).contiguous()
    before = add_states(after, decay, initial, reverse)
    return _Walk(x, B, C, raw, step, decay, before, after)


def _reference_forward(inputs: SsdInputs, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    outputs, finals = [], []
    for k, backwards in enumerate(reverse):
        walk = _walk(inputs, k, backwards)
        outputs.append(torch.einsum("lbhpn,bln->blhp", walk.after, walk.C) + inputs.D[k].unsqueeze(-1) * walk.x)
        finals.append(walk.after[0 if backwards else -1])
    return torch.stack(outputs).sum(0).to(inputs.x.dtype), torch.stack(finals)


def _reference_backward(
    inputs: SsdInputs, dy: Tensor, dfinal: Tensor | None, dx: Tensor, dB: Tensor, dC: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, ...]:
    """With g_t the gradient that reaches h_t:  g_t = dy_t C_t^T + exp(dt_{t'} A) g_{t'}, where t' follows t in scan
    order. Rebuilds the states: only the inputs were saved, and memory is linear in l.
    """
    wide_dy = dy.to(inputs.A_log.dtype)
    gradients = []
    for k, backwards in enumerate(reverse):
        walk, A, D = _walk(inputs, k, backwards), -inputs.A_log[k].exp(), inputs.D[k]
        g = torch.einsum("blhp,bln->lbhpn", wide_dy, walk.C).contiguous()
        dinitial = add_gradients(g, walk.decay, None if dfinal is None else dfinal[k], backwards)
        own_dC = torch.einsum("lbhpn,blhp->bln", walk.after, wide_dy)
        d_entering = torch.einsum("lbhpn,bln->blhp", g, walk.B)  # gradient of step * x
        own_dB = torch.einsum("lbhpn,blh,blhp->bln", g, walk.step, walk.x)
        # decay = exp(step A), so the exponent receives (g_t . h_{t-1}) * decay
        d_exponent = (g.mul_(walk.before).sum((-2, -1)) * walk.decay[..., 0, 0]).transpose(0, 1)  # (b, l, h)
        ddt = (d_exponent * A + (d_entering * walk.x).sum(-1)) * torch.sigmoid(walk.raw)
        own_dx = d_entering * walk.step.unsqueeze(-1) + D.unsqueeze(-1) * wide_dy
        dA_log, dD = (d_exponent * walk.step).sum((0, 1)) * A, (wide_dy * walk.x).sum((0, 1, 3))
        gradients.append((own_dx, own_dB, own_dC, ddt, torch.stack([dA_log, dD, ddt.sum((0, 1))]), dinitial))
    *inputs_of_all, ddt, dparameters, dinitial = (torch.stack(each) for each in zip(*gradients, strict=True))
    for written, each in zip((dx, dB, dC), inputs_of_all, strict=True):
        written.copy_(each if len(inputs.x) == len(reverse) else each.sum(0, keepdim=True))
    return ddt.to(inputs.dt.dtype), dparameters.transpose(0, 1).contiguous(), dinitial


# -- ops ---------------------------------------------------------------------------------------------------------------


@torch_op("ssd", shown=2)
def ssd_op(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None,
    initial: Tensor | None, image: Tensor | None, reverse: Sequence[bool], with_state: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Takes the fields of `SsdInputs`. Returns y (b, l, h, p), the sum over the directions, and the final states (k, b,
    h, p, n), empty unless `with_state`.
    """
    inputs = SsdInputs(x, dt, A_log, B, C, D, dt_bias, initial, image)
    with torch.autocast(x.device.type, enabled=False):
        if backend != "reference":
            return fused_module("ssd", backend).forward(inputs, reverse, with_state)
        y, final = _reference_forward(inputs, reverse)
    return y, final if with_state else A_log.new_empty(0)


@ssd_op.register_fake
def _(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, b, _, h, p = x.shape
    *_, with_state, _ = others
    state = (len(dt), b, h, p, B.shape[-1])
    return x.new_empty(x.shape[1:]), A_log.new_empty(state if with_state else (0,))


@torch_op("ssd_backward", shown=3, mutates=("dx", "dB", "dC"))
def ssd_backward_op(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None,
    initial: Tensor | None, image: Tensor | None, dy: Tensor, dfinal: Tensor | None, dx: Tensor, dB: Tensor, dC: Tensor,
    reverse: Sequence[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes dx, dB and dC, whose last axis is contiguous. Returns ddt, the gradients of A_log, D and dt_bias (3, k,
    h), and that of the initial state, empty if this is None.
    """
    inputs = SsdInputs(x, dt, A_log, B, C, D, dt_bias, initial, image)
    with torch.autocast(x.device.type, enabled=False):
        backward = _reference_backward if backend == "reference" else fused_module("ssd", backend).backward
        ddt, dparameters, dinitial = backward(inputs, dy, dfinal, dx, dB, dC, reverse)
    return ddt, dparameters, A_log.new_empty(0) if initial is None else dinitial


@ssd_backward_op.register_fake
def _(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, initial, *_ = others
    k, h = A_log.shape
    dinitial = A_log.new_empty(0 if initial is None else initial.shape)
    return dt.new_empty(dt.shape), A_log.new_empty(3, k, h), dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    inputs = SsdInputs(*ctx.saved_tensors)
    dy = torch.zeros_like(inputs.x[0]) if dy is None else dy.to(inputs.x.dtype)
    dx, dB, dC = (t.new_empty(t.shape) for t in (inputs.x, inputs.B, inputs.C))
    ddt, dparameters, dinitial = ssd_backward_op.inside(*inputs, dy, dfinal, dx, dB, dC, ctx.reverse, ctx.backend)
    dA_log, dD, dbias = dparameters.unbind()
    return (
        dx, ddt, dA_log, dB, dC, dD, None if inputs.dt_bias is None else dbias,
        None if inputs.initial is None else dinitial, None, None, None, None,
    )  # fmt: skip


ssd_op.register_autograd(_vjp, _setup)


# -- functions ---------------------------------------------------------------------------------------------------------


def ssd_scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, reverse: bool = False, initial_state: Tensor | None = None,
    reset: Tensor | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Scan x (b, l, h, p) with dt (b, l, h), A = -exp(A_log) (h), B and C (b, l, n), which all heads have in common,
    and D (h); returns y (b, l, h, p) in x's dtype.

    The step is softplus(dt + dt_bias), with dt_bias (h). A gate z (b, l, h, p) multiplies y by silu(z). `reverse` walks
    from the last token to the first; outputs stay in token order and nothing is flipped. `initial_state` (b, h, p, n)
    is the state before the first token of the walk.
    `reset` (b, l) bool marks the first token of each image of a packed sequence. The state restarts from zero there,
    and in reverse at the token before a mark. A mark on token 0 discards the initial state of a forward scan.

    x, dt, B, C and z share a dtype (fp32, bf16, fp16, fp64); the other tensors are read in fp32 (fp64 if x is fp64).
    States and sums are fp32. Every floating-point tensor gets a gradient. The same inputs give the same bits.
    A number that is not finite reaches other tokens of its row, also those of other images.

    Raises:
        ValueError: a tensor's shape, dtype or device does not match x and B, or the backend cannot run.
    """
    y, _ = _run(
        "ssd_scan", (reverse,), x, dt, A_log, B, C, D, z, dt_bias, initial_state, reset, with_state=False,
        backend=backend,
    )  # fmt: skip
    return y


def ssd_scan_with_state(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, reverse: bool = False, initial_state: Tensor | None = None,
    reset: Tensor | None = None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd_scan`, and the state (b, h, p, n) after the last token of the walk, in fp32 (fp64 if x is fp64)."""
    y, final = _run(
        "ssd_scan", (reverse,), x, dt, A_log, B, C, D, z, dt_bias, initial_state, reset, with_state=True,
        backend=backend,
    )  # fmt: skip
    return y, final[0]


def bidirectional_ssd(
    x: Pair, dt: Pair, A_log: Pair, B: Pair, C: Pair, D: Pair, z: Tensor | None = None, dt_bias: Pair | None = None, *,
    fuse: Literal["sum", "mean"] = "sum", initial_state: Pair | None = None, reset: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Both directions of one mixer: the sum or mean of a forward scan of x[0] and a reverse scan of x[1], gated once.

    Takes the arguments of `ssd_scan` twice, forward first: one tensor with a leading axis of two, or a pair of tensors,
    which is copied into one. x (b, l, h, p), B and C (b, l, n) without that axis are the same for both directions, and
    their scores are computed once. z and reset apply to both directions. Returns y (b, l, h, p).

    Raises:
        ValueError: as in `ssd_scan`.
    """
    y, _ = _run_both(x, dt, A_log, B, C, D, z, dt_bias, initial_state, fuse, reset, with_state=False, backend=backend)
    return y


def bidirectional_ssd_with_state(
    x: Pair, dt: Pair, A_log: Pair, B: Pair, C: Pair, D: Pair, z: Tensor | None = None, dt_bias: Pair | None = None, *,
    fuse: Literal["sum", "mean"] = "sum", initial_state: Pair | None = None, reset: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`bidirectional_ssd`, and the final states (2, b, h, p, n)."""
    return _run_both(x, dt, A_log, B, C, D, z, dt_bias, initial_state, fuse, reset, with_state=True, backend=backend)


def _run_both(
    x: Pair, dt: Pair, A_log: Pair, B: Pair, C: Pair, D: Pair, z: Tensor | None, dt_bias: Pair | None,
    initial_state: Pair | None, fuse: str, reset: Tensor | None, *, with_state: bool, backend: Backend | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "bidirectional_ssd"
    scale = fused_scale(op, fuse, 2)
    pairs = {
        "x": x, "dt": dt, "A_log": A_log, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state,
    }  # fmt: skip
    each = {name: stacked(op, name, pair) for name, pair in pairs.items()}
    return _run(op, (False, True), z=z, reset=reset, scale=scale, with_state=with_state, backend=backend, **each)


def _run(
    op: str, reverse: tuple[bool, ...], x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, *,
    with_state: bool, backend: Backend | None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, h, p) and the final states (k, b, h, p, n), from tensors that have a leading axis of directions if there
    are two; x, B and C may do without it.
    """
    k = "" if len(reverse) == 1 else f"{len(reverse)} "
    j = "" if x.ndim == 4 else k
    check_tensors(
        op,
        {
            "x": (x, f"{j}b l h p"),
            "dt": (dt, f"{k}b l h"),
            "A_log": (A_log, f"{k}h"),
            "B": (B, f"{j}b l n"),
            "C": (C, f"{j}b l n"),
            "D": (D, f"{k}h"),
            "z": (z, "b l h p"),
            "dt_bias": (dt_bias, f"{k}h"),
            "initial_state": (initial_state, f"{k}b h p n"),
        },
        {"reset": (reset, "b l")},
        alike=("x", "dt", "B", "C", "z"),
    )
    name = choose(backend, op, x)
    A_log, D = wide(A_log, x), wide(D, x)
    optional = [None if t is None else wide(t, x) for t in (dt_bias, initial_state)]
    if not j:
        x, B, C = (t.unsqueeze(0) for t in (x, B, C))
    if not k:
        dt, A_log, D = (t.unsqueeze(0) for t in (dt, A_log, D))
        optional = [None if t is None else t.unsqueeze(0) for t in optional]
    y, final = ssd_op(x, dt, A_log, B, C, D, *optional, images_of(reset), reverse, with_state, name)
    if z is not None:
        return combine_op(y.flatten(2).unsqueeze(0), z.flatten(2), scale, name).view(y.shape), final
    return y if scale == 1 else y * scale, final
