"""The Mamba-1 selective scan in one or both directions: the reference, the torch ops and the public functions.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (arXiv:2312.00752, section 3.2)

Axes: k directions (one or two), b images, l tokens, e inner channels, n states per channel. Capital A B C D are the
matrices of the paper. Internally, every tensor of a scan has the axis k; the gate, which all directions have in common,
does not. The fused backends are in selective_scan_cpu.py and selective_scan_triton.py.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, choose, fused_module
from .checks import check_tensors, images_of, wide
from .recurrence import add_gradients, add_states, begins_image
from .scan_inputs import ScanInputs
from .torch_op import torch_op

# Tokens between the states that the forward pass keeps for the backward pass: n / CHUNK fp32 values per token and
# channel. The reference keeps none and walks the sequence twice.
CHUNK = {"reference": 0, "cpu": 16, "triton": 8}


# -- reference ---------------------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """One direction of a scan, in A's dtype."""

    x: Tensor
    """(b, l, e)."""
    B: Tensor
    """(b, l, n)."""
    C: Tensor
    """(b, l, n)."""
    raw: Tensor
    """(b, l, e), dt plus its bias, before the softplus."""
    step: Tensor
    """(b, l, e), after the softplus."""
    decay: Tensor
    """(l, b, e, n); zero into a token that begins an image."""
    before: Tensor
    """(l, b, e, n), the state before each token."""
    after: Tensor
    """(l, b, e, n), the state after each token. Token-major, so that each iteration of the loop is contiguous."""


def walk_of(inputs: ScanInputs, k: int, reverse: bool) -> Walk:
    """Direction `k` of a scan, token by token; `reverse`: from the last token to the first."""
    A, dt, image = inputs.A[k], inputs.dt[k], inputs.image
    x, B, C = (t[k].to(A.dtype) for t in (inputs.x, inputs.B, inputs.C))
    initial = None if inputs.initial is None else inputs.initial[k]
    raw = dt.to(A.dtype) if inputs.dt_bias is None else dt.to(A.dtype) + inputs.dt_bias[k]
    step = F.softplus(raw)

    decay = (step.transpose(0, 1).unsqueeze(-1) * A).exp()
    if image is not None:
        decay[begins_image(image, reverse).transpose(0, 1)] = 0
    after = (step * x).transpose(0, 1).unsqueeze(-1) * B.transpose(0, 1).unsqueeze(2)
    before = add_states(after, decay, initial, reverse)
    return Walk(x, B, C, raw, step, decay, before, after)


def _reference_forward(inputs: ScanInputs, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    outputs, finals = [], []
    for k, backwards in enumerate(reverse):
        walk = walk_of(inputs, k, backwards)
        outputs.append(torch.einsum("lben,bln->ble", walk.after, walk.C) + inputs.D[k] * walk.x)
        finals.append(walk.after[0 if backwards else -1])
    return torch.stack(outputs).to(inputs.x.dtype), torch.stack(finals)


def _reference_backward(
    inputs: ScanInputs, ds: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], dB: Tensor, dC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With g_t the gradient that reaches h_t:  g_t = C_t ds_t + exp(dt_{t'} A) g_{t'}, where t' follows t in scan
    order. Rebuilds the states: only the inputs were saved, and memory is linear in l.
    """
    x, _, A, _, _, D, *_ = inputs
    gradients = []
    for k, backwards in enumerate(reverse):
        walk, wide_ds = walk_of(inputs, k, backwards), ds[k].to(A.dtype)

        g = wide_ds.transpose(0, 1).unsqueeze(-1) * walk.C.transpose(0, 1).unsqueeze(2)  # (l, b, e, n)
        dinitial = add_gradients(g, walk.decay, None if dfinal is None else dfinal[k], backwards)
        dC[k] = torch.einsum("lben,ble->bln", walk.after, wide_ds)
        dB[k] = torch.einsum("lben,ble->bln", g, walk.step * walk.x)
        d_entering = torch.einsum("lben,bln->ble", g, walk.B)  # gradient of step * x
        # decay = exp(step A), so the exponent receives (g_t h_{t-1}) * decay
        d_exponent = g.mul_(walk.before).mul_(walk.decay)
        dA = torch.einsum("lben,ble->en", d_exponent, walk.step)
        dstep = torch.einsum("lben,en->ble", d_exponent, A[k]) + d_entering * walk.x
        ddt = dstep * torch.sigmoid(walk.raw)
        dx = d_entering * walk.step + D[k] * wide_ds
        dD = (wide_ds * walk.x).sum((0, 1))
        gradients.append((dx.to(x.dtype), ddt.to(x.dtype), dA, dD, ddt.sum((0, 1)), dinitial))
    dx, ddt, *parameters, dinitial = (torch.stack(each) for each in zip(*gradients, strict=True))
    return dx, ddt, torch.cat([t.flatten() for t in parameters]), A.new_empty(0) if inputs.initial is None else dinitial


# -- ops ---------------------------------------------------------------------------------------------------------------


@torch_op("selective_scan", shown=2)
def scan_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, initial: Tensor | None,
    image: Tensor | None, reverse: Sequence[bool], chunk: int, log_A: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Takes the fields of `ScanInputs`; with `log_A`, A holds log(-A). Returns s (k, b, l, e), the final states (k, b,
    e, n), and the states kept every `chunk` tokens (none if 0).
    """
    inputs = ScanInputs(x, dt, A, B, C, D, dt_bias, initial, image)
    if backend == "triton":
        return fused_module("selective_scan", backend).forward(with_rows(inputs), reverse, chunk, log_A=log_A)
    inputs = inputs._replace(A=decay_rates(A, log_A))
    if backend == "cpu":
        return fused_module("selective_scan", backend).forward(with_rows(inputs), reverse, chunk)
    with torch.autocast(x.device.type, enabled=False):
        s, final = _reference_forward(inputs, reverse)
    return s, final, A.new_empty(0)


def decay_rates(A: Tensor, log_A: bool) -> Tensor:
    """A, where the tensor holds log(-A) with `log_A`."""
    return -torch.exp(A) if log_A else A


@scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    k, b, _, e = x.shape
    *_, chunk, _, _ = others
    return x.new_empty(x.shape), A.new_empty(k, b, e, A.shape[-1]), empty_states(x.shape, A, chunk)


def empty_states(shape: Sequence[int], A: Tensor, chunk: int) -> Tensor:
    """A buffer for the states that a scan of x (k, b, l, e) keeps every `chunk` tokens; `shape` is that of x. Empty if
    `chunk` is 0.
    """
    k, b, length, e = shape
    return A.new_empty((k, b, (length + chunk - 1) // chunk, e * A.shape[-1]) if chunk else (0,))


@torch_op("selective_scan_backward", shown=4, mutates=("dB", "dC"))
def scan_backward_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, initial: Tensor | None,
    image: Tensor | None, states: Tensor, ds: Tensor, dfinal: Tensor | None, dB: Tensor, dC: Tensor,
    reverse: Sequence[bool], chunk: int, log_A: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes dB and dC, which have a contiguous last axis. Returns dx, ddt, the gradients of A (of log(-A) with
    `log_A`), D and dt_bias, one after the other (k e (n + 2)), and that of the initial state, empty if this is None.
    """
    inputs = ScanInputs(x, dt, A, B, C, D, dt_bias, initial, image)
    dfinal = None if dfinal is None else dfinal.contiguous()
    if backend == "triton":
        dx, ddt, dparameters, _, _, dinitial = fused_module("selective_scan", backend).backward(
            with_rows(inputs), states, rows(ds), dfinal, reverse, chunk, log_A=log_A, dB=dB, dC=dC
        )
        return dx, ddt, dparameters, dinitial
    inputs = inputs._replace(A=decay_rates(A, log_A))
    if backend == "cpu":
        return cpu_scan_backward(with_rows(inputs), states, rows(ds), dfinal, dB, dC, reverse, log_A)
    with torch.autocast(x.device.type, enabled=False):
        dx, ddt, dparameters, dinitial = _reference_backward(inputs, ds, dfinal, reverse, dB, dC)
        return dx, ddt, of_logarithm(dparameters, inputs.A, log_A), dinitial


def cpu_scan_backward(
    inputs: ScanInputs, states: Tensor, ds: Tensor, dfinal: Tensor | None, dB: Tensor, dC: Tensor,
    reverse: Sequence[bool], log_A: bool, dt_proj: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`scan_backward_op` on a CPU, where `inputs` hold A itself; with dt_proj, `inputs.dt` is still to be projected."""
    dx, ddt, dparameters, _, _, dinitial = fused_module("selective_scan", "cpu").backward(
        inputs, states, ds, dfinal, reverse, CHUNK["cpu"], dt_proj=dt_proj, dB=dB, dC=dC
    )
    return dx, ddt, of_logarithm(dparameters, inputs.A, log_A), dinitial


def of_logarithm(dparameters: Tensor, A: Tensor, log_A: bool) -> Tensor:
    """The gradients of the parameters, with that of A made that of log(-A)."""
    if log_A:
        dparameters[: A.numel()] *= A.flatten()
    return dparameters


@scan_backward_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    k, e, n = A.shape
    initial = others[4]
    dinitial = A.new_empty(0 if initial is None else initial.shape)
    return x.new_empty(x.shape), dt.new_empty(dt.shape), A.new_empty(k * e * (n + 2)), dinitial


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, ctx.chunk, ctx.log_A, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _scan_vjp(ctx: Any, ds: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    inputs = ScanInputs(*tensors)
    ds = torch.zeros_like(inputs.x) if ds is None else ds.to(inputs.x.dtype)
    dB, dC = inputs.B.new_empty(inputs.B.shape), inputs.C.new_empty(inputs.C.shape)
    dx, ddt, dparameters, dinitial = scan_backward_op.inside(
        *inputs, states, ds, dfinal, dB, dC, ctx.reverse, ctx.chunk, ctx.log_A, ctx.backend
    )
    dA, dD, dbias = split_parameters(dparameters, inputs.A)
    return (
        dx, ddt, dA, dB, dC, dD, None if inputs.dt_bias is None else dbias,
        None if inputs.initial is None else dinitial, None, None, None, None, None,
    )  # fmt: skip


def split_parameters(dparameters: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A (k, e, n), D (k, e) and dt_bias (k, e), which lie one after the other; contiguous views, as in
    `causal_conv1d.split_parameters`.
    """
    k, e, n = A.shape
    dA, dD, dbias = dparameters.split([k * e * n, k * e, k * e])
    return dA.view(A.shape), dD.view(k, e), dbias.view(k, e)


scan_op.register_autograd(_scan_vjp, _scan_setup)


@torch_op("combine")
def combine_op(s: Tensor, z: Tensor | None, scale: float, backend: str) -> Tensor:
    """scale silu(z) (sum of s over directions): (b, l, e) from s (k, b, l, e) and the gate z (b, l, e), which all
    directions have in common.
    """
    if backend != "reference":
        return fused_module("selective_scan", backend).combine(s.contiguous(), None if z is None else rows(z), scale)
    y = s.to(_sums(s)).sum(0) * scale
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(s.dtype)


@combine_op.register_fake
def _(s: Tensor, z: Tensor | None, scale: float, backend: str) -> Tensor:
    return s.new_empty(s.shape[1:])


@torch_op("combine_backward", mutates=("dz",))
def combine_backward_op(
    dy: Tensor, s: Tensor, z: Tensor | None, dz: Tensor | None, scale: float, backend: str
) -> Tensor:
    """Writes dz, which has a contiguous last axis. Returns the gradient of s, (b, l, e) because it is the same for each
    direction.
    """
    if backend != "reference":
        module = fused_module("selective_scan", backend)
        ds, _ = module.combine_backward(rows(dy), s.contiguous(), None if z is None else rows(z), scale, dz=dz)
        return ds
    dy = dy.contiguous()  # elementwise results take the strides of their inputs
    if z is None or dz is None:
        return dy * scale
    upstream, v = dy.to(_sums(s)) * scale, z.to(_sums(s))
    gate = torch.sigmoid(v)
    dz.copy_(upstream * s.to(v.dtype).sum(0) * gate * (1 + v * (1 - gate)))
    return (upstream * v * gate).to(s.dtype)


@combine_backward_op.register_fake
def _(dy: Tensor, s: Tensor, z: Tensor | None, dz: Tensor | None, scale: float, backend: str) -> Tensor:
    return s.new_empty(s.shape[1:])


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    s, z, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(s, z)


def _combine_vjp(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    s, z = ctx.saved_tensors
    dz = None if z is None else z.new_empty(z.shape)
    return combine_backward_op.inside(dy, s, z, dz, ctx.scale, ctx.backend).expand_as(s), dz, None, None


combine_op.register_autograd(_combine_vjp, _combine_setup)


def _sums(s: Tensor) -> torch.dtype:
    """The dtype for sums of s."""
    return torch.promote_types(s.dtype, torch.float32)


def rows(t: Tensor) -> Tensor:
    """t with a contiguous last axis, which the fused kernels require; the other axes keep any strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def with_rows(inputs: ScanInputs) -> ScanInputs:
    """`inputs` as the fused kernels require x, dt, B and C: with a contiguous last axis."""
    return inputs._replace(**{name: rows(getattr(inputs, name)) for name in ("x", "dt", "B", "C")})


# -- functions ---------------------------------------------------------------------------------------------------------


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, reverse: bool = False, initial_state: Tensor | None = None,
    reset: Tensor | None = None, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Scan x (b, l, e) with dt (b, l, e), A (e, n) < 0, B and C (b, l, n), D (e); returns y (b, l, e) in x's dtype.

    The step is softplus(dt + dt_bias), with dt_bias (e). A gate z (b, l, e) multiplies y by silu(z). `reverse` walks
    from the last token to the first; outputs stay in token order and nothing is flipped. `initial_state` (b, e, n) is
    the state before the first token of the walk.
    `reset` (b, l) bool marks the first token of each image of a packed sequence. The state restarts from zero there,
    and in reverse at the token before a mark. A mark on token 0 discards the initial state of a forward scan.

    x, dt, B, C and z share a dtype (fp32, bf16, fp16, fp64); the other tensors are read in fp32 (fp64 if x is fp64).
    States and sums are fp32. Every floating-point tensor gets a gradient. The same inputs give the same bits.

    Raises:
        ValueError: a tensor's shape, dtype or device does not match x and A, or the backend cannot run.
    """
    y, _ = selective_scan_with_state(
        x, dt, A, B, C, D, z, dt_bias, reverse=reverse, initial_state=initial_state, reset=reset, backend=backend
    )
    return y


def selective_scan_with_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, *, reverse: bool = False, initial_state: Tensor | None = None,
    reset: Tensor | None = None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan`, and the state (b, e, n) after the last token of the walk, in fp32 (fp64 if x is fp64)."""
    return _run(
        "selective_scan", (reverse,), x, dt, A, B, C, D, z, dt_bias, initial_state, reset, scale=1.0, backend=backend
    )


Pair = Tensor | tuple[Tensor, Tensor]
"""The tensors of both directions, forward first: one tensor with a leading axis of two, or two tensors."""


def bidirectional_scan(
    x: Pair, dt: Pair, A: Pair, B: Pair, C: Pair, D: Pair, z: Tensor | None = None, dt_bias: Pair | None = None, *,
    fuse: Literal["sum", "mean"] = "sum", initial_state: Pair | None = None, reset: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Both directions of one mixer: the sum or mean of a forward scan of x[0] and a reverse scan of x[1], gated once.

    Takes the arguments of `selective_scan` twice, forward first: one tensor with a leading axis of two, or a pair of
    tensors, which is copied into one. An expanded tensor (the same for both directions) is not copied. z and reset
    apply to both directions. Returns y (b, l, e). A bidirectional mixer gates each direction with the same z, and
    silu(z) a + silu(z) b = silu(z) (a + b).

    Raises:
        ValueError: as in `selective_scan`.
    """
    y, _ = bidirectional_scan_with_state(
        x, dt, A, B, C, D, z, dt_bias, fuse=fuse, initial_state=initial_state, reset=reset, backend=backend
    )
    return y


def bidirectional_scan_with_state(
    x: Pair, dt: Pair, A: Pair, B: Pair, C: Pair, D: Pair, z: Tensor | None = None, dt_bias: Pair | None = None, *,
    fuse: Literal["sum", "mean"] = "sum", initial_state: Pair | None = None, reset: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`bidirectional_scan`, and the final states (2, b, e, n)."""
    op = "bidirectional_scan"
    pairs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    each = {name: stacked(op, name, pair) for name, pair in pairs.items()}
    scale = fused_scale(op, fuse, 2)
    return _run(op, (False, True), z=z, reset=reset, scale=scale, backend=backend, **each)


def gated(x: Tensor, z: Tensor, *, backend: Backend | None = None) -> Tensor:
    """x (b, l, e) times silu(z), with z (b, l, e) of the same dtype: the gate of the scans alone. One launch each way;
    only x and z are kept for the backward pass. Computes in fp32 (fp64 if x is fp64).

    Raises:
        ValueError: the tensors' shapes, dtypes or devices differ, or the backend cannot run.
    """
    check_tensors("gated", {"x": (x, "b l e"), "z": (z, "b l e")}, alike=("x", "z"))
    return combine_op(x.unsqueeze(0), z, 1.0, choose(backend, "gated", x))


def fused_scale(op: str, fuse: str, directions: int) -> float:
    """The factor on the sum over directions."""
    if fuse not in ("sum", "mean"):
        raise ValueError(f"{op}: fuse {fuse!r} is not sum or mean")
    return 1 / directions if fuse == "mean" else 1.0


def stacked(op: str, name: str, pair: Pair | None) -> Any:
    """The pair as one tensor."""
    if pair is None or isinstance(pair, Tensor):
        return pair
    forward, backward = pair
    if forward.shape != backward.shape or forward.dtype != backward.dtype or forward.device != backward.device:
        shown = " and ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in pair)
        raise ValueError(f"{op}: the pair {name} is {shown}; both must have the same shape, dtype and device")
    return torch.stack([forward, backward])


def _run(
    op: str, reverse: tuple[bool, ...], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, *, scale: float,
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, l, e) and the final state, from tensors that have a leading axis of directions if there are two."""
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
            "initial_state": (initial_state, f"{k}b e n"),
        },
        {"reset": (reset, "b l")},
        alike=("x", "dt", "B", "C", "z"),
    )
    name = choose(backend, op, x)
    parameters = [None if t is None else wide(t, x) for t in (A, D, dt_bias, initial_state)]
    tensors = [x, dt, parameters[0], B, C, *parameters[1:]]
    if not k:
        tensors = [None if t is None else t.unsqueeze(0) for t in tensors]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    s, final = scan_op(*tensors, images_of(reset), reverse, CHUNK[name] if learns else 0, False, name)
    y = s[0] if z is None and len(reverse) == 1 else combine_op(s, z, scale, name)
    return y, final if k else final[0]
