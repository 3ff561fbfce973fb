"""A convolution and a scan over tokens that several ranks hold, a stretch each: context parallelism.

Every rank computes its own stretch. A convolution needs the tokens next to the stretch (its halo). A scan needs the
state that enters the stretch: each rank computes what its stretch adds (`scan_segments.ends`), gathers what all others
add, and passes zero through those before it. The backward pass does the same from the other end.

A function of tensors on all ranks has a gradient on all ranks: that of the sum of what they compute from its results.

Axes: N ranks, k directions, b images, l tokens of a stretch, e inner channels, n states, r rank of dt, w taps.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scan_segments, selective_scan
from .backend import Backend, choose, fused_module
from .causal_conv1d import conv_backward_op, conv_op
from .causal_conv1d import split_parameters as split_conv
from .checks import wide, without_autocast
from .scan_inputs import ScanInputs
from .scan_segments import Ends
from .selective_scan import CHUNK, decay_rates, empty_states, of_logarithm, rows, with_rows
from .ssd import ssd_op
from .torch_op import torch_op


class Context(Protocol):
    """The ranks that hold one sequence, in its order. All call the same functions in the same order."""

    rank: int
    """This rank's number among them."""
    size: int
    """How many they are."""

    def exchange(self, to_left: Tensor | None, to_right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Send a tensor to the rank before this one and to the one after it; return what they sent, from the left and
        from the right: None at the ends of the sequence. All ranks send to the same sides, tensors of one shape.
        """
        ...

    def gather(self, t: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape: (N, ...)."""
        ...

    def add(self, t: Tensor) -> Tensor:
        """The sum of the tensors of all ranks; t may be overwritten."""
        ...


class Alone:
    """One of N ranks without the others: to count what it does, or to compile it. What it computes means nothing."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def exchange(self, to_left: Tensor | None, to_right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """As `Context.exchange`."""
        from_left = None if to_right is None or self.rank == 0 else torch.zeros_like(to_right)
        from_right = None if to_left is None or self.rank + 1 == self.size else torch.zeros_like(to_left)
        return from_left, from_right

    def gather(self, t: Tensor) -> Tensor:
        """As `Context.gather`."""
        return t.new_zeros(self.size, *t.shape)

    def add(self, t: Tensor) -> Tensor:
        """As `Context.add`."""
        return t


# -- results of all ranks ----------------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Context, t: Tensor) -> Tensor:
        ctx.context = context
        return context.gather(t.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        return None, ctx.context.add(gradient.clone())[ctx.context.rank]


def gathered(context: Context, t: Tensor) -> Tensor:
    """The tensors of all ranks, which have one shape, (N, ...), with gradients."""
    return _Gathered.apply(context, t)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Context, t: Tensor) -> Tensor:
        ctx.context = context
        # not `add`: all ranks must get the same bits
        return context.gather(t.contiguous()).sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        return None, ctx.context.add(gradient.clone())


def summed(context: Context, t: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, the same bits on each, with gradients."""
    return _Summed.apply(context, t)


# -- convolution -------------------------------------------------------------------------------------------------------


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, context: Context, reverse: Sequence[bool], silu: bool,
        backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.context, ctx.reverse, ctx.silu, ctx.backend = context, reverse, silu, backend
        h = weight.shape[-1] - 1
        left, right = _halos(context, reverse, x[:, :h], x[:, x.shape[1] - h :])
        ctx.save_for_backward(x, weight, bias, left, right)
        padded = _padded(x, left, right, h)
        y = conv_op.inside(padded, weight, bias, None, reverse, silu, backend)[:, :, h : h + x.shape[1]]
        return y if len(x) == 1 else y.contiguous()  # the projection would copy it, and keep both

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        x, weight, bias, left, right = ctx.saved_tensors
        h, length = weight.shape[-1] - 1, x.shape[1]
        padded = _padded(x, left, right, h)
        dpadded = padded.new_empty(padded.shape)
        dparameters = conv_backward_op.inside(
            padded, weight, bias, None, F.pad(dy, (0, 0, h, h)), dpadded, ctx.reverse, ctx.silu, ctx.backend
        )
        # gradients go back where the halos came from
        other = [not backwards for backwards in ctx.reverse]
        from_left, from_right = _halos(ctx.context, other, dpadded[:, :h], dpadded[:, h + length :])
        dx = dpadded[:, h : h + length]
        if from_left is not None:
            dx[:, :h] += from_left
        if from_right is not None:
            dx[:, length - h :] += from_right
        return dx, *split_conv(dparameters, weight), None, None, None, None


def _halos(
    context: Context, reverse: Sequence[bool], first: Tensor, last: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What the neighbors' ends are, where a path needs them: forward paths the left one's, reverse paths the right
    one's. `first`, `last` (b, w - 1, e): the ends of this stretch.
    """
    if not first.shape[1]:
        return None, None
    to_left = first.contiguous() if any(reverse) else None
    to_right = last.contiguous() if not all(reverse) else None
    return context.exchange(to_left, to_right)


def _padded(x: Tensor, left: Tensor | None, right: Tensor | None, h: int) -> Tensor:
    zeros = x.new_zeros(x.shape[0], h, x.shape[2])
    return torch.cat([zeros if left is None else left, x, zeros if right is None else right], dim=1)


def conv_over(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor, reverse: Sequence[bool], backend: Backend | None = None
) -> Tensor:
    """The convolution and SiLU of a stretch x (b, l, e), l >= w - 1, with weight (k, e, w) and bias (k, e): (k, b, l,
    e), as `causal_conv1d` has it for each direction.
    """
    with without_autocast(x):
        name = choose(backend, "causal_conv1d", x)
        return _Conv.apply(x, wide(weight, x), wide(bias, x), context, reverse, True, name)


# -- scan --------------------------------------------------------------------------------------------------------------


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, dt_proj: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor,
        dt_bias: Tensor, context: Context, reverse: Sequence[bool], backend: str, learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.context, ctx.reverse, ctx.backend = context, reverse, backend
        ctx.set_materialize_grads(False)
        inputs, inner = _inputs(x, dt, dt_proj, A_log, B, C, D, dt_bias, backend)
        own = scan_segments.ends(inputs, reverse, True, backend, dt_proj=inner)
        A = decay_rates(A_log, True)
        end, steps = _whole(own, A)
        both = _ordered(context.gather(torch.cat([end, steps.unsqueeze(-1)], dim=-1)), reverse)  # (k, b, N, e, n + 1)
        of_all = Ends(both[..., :-1], both[..., -1])
        entering, last = scan_segments.chain(of_all, A)
        initial = _of_rank(entering, reverse, context)
        chunk = CHUNK[backend] if learns else 0
        x, dt_read, *others, _, _ = inputs
        s, states = _scan.inside(x, dt_read, *others, initial, *own, inner, reverse, chunk, backend)
        ctx.save_for_backward(x, dt, dt_proj, A_log, B, C, D, dt_bias, initial, states, of_all.steps)
        ctx.mark_non_differentiable(last)
        return s, last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x, dt, dt_proj, A_log, B, C, D, dt_bias, initial, states, all_steps = ctx.saved_tensors
        context, reverse, backend = ctx.context, ctx.reverse, ctx.backend
        ds = gradients[0]
        if ds is None:
            raise RuntimeError("a scan over several ranks needs a gradient on each of them")
        inputs, inner = _inputs(x, dt, dt_proj, A_log, B, C, D, dt_bias, backend)
        own = scan_segments.ends(inputs, reverse, True, backend, ds=ds, dt_proj=inner)
        A = decay_rates(A_log, True)
        q, _ = _whole(own, A, backward=True)
        of_all = Ends(_ordered(context.gather(q.contiguous()), reverse), all_steps)
        reaching, _ = scan_segments.chain(of_all, A, backward=True)
        dfinal = _of_rank(reaching, reverse, context)
        dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
        x, dt_read, *others, _, _ = inputs
        dx, ddt, dparameters = _scan_backward.inside(
            x, dt_read, *others, initial, states, ds, dfinal, *own, inner, dB, dC, reverse, backend
        )
        # projected by dt_proj: (k, b l, e) and (k, b l, r)
        ddt, low = ddt.flatten(1, 2), dt.flatten(1, 2)
        dlow = torch.bmm(ddt, dt_proj).view(dt.shape)
        dA_log, dD, dbias = selective_scan.split_parameters(dparameters, A_log)
        return dx, dlow, torch.bmm(ddt.mT, low), dA_log, dB, dC, dD, dbias, None, None, None, None


def _inputs(
    x: Tensor, dt: Tensor, dt_proj: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    backend: str,
) -> tuple[ScanInputs, Tensor | None]:  # fmt: skip
    """What the scan reads, and dt_proj where the scan itself multiplies dt by it."""
    if backend == "cpu":
        return ScanInputs(x, dt, A_log, B, C, D, dt_bias, None, None), dt_proj
    wide = torch.bmm(dt.flatten(1, 2), dt_proj.mT).view(x.shape)
    return ScanInputs(x, wide, A_log, B, C, D, dt_bias, None, None), None


def _whole(own: Ends, A: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """What all segments of a stretch add together: (k, b, e, n), and the sum of their steps (k, b, e)."""
    if own.end.shape[2] == 1:
        return own.end[:, :, 0], own.steps[:, :, 0]
    _, passed = scan_segments.chain(own, A, backward=backward)
    return passed, own.steps.sum(2)


def _ordered(t: Tensor, reverse: Sequence[bool]) -> Tensor:
    """From (N, k, b, ...) by rank to (k, b, N, ...) in the order of each direction's scan."""
    return torch.stack([t[:, k].flip(0) if r else t[:, k] for k, r in enumerate(reverse)]).transpose(1, 2)


def _of_rank(t: Tensor, reverse: Sequence[bool], context: Context) -> Tensor:
    """This rank's part (k, b, e, n) of (k, b, N, e, n) in scan order."""
    last = context.size - 1
    return torch.stack([t[k, :, last - context.rank if r else context.rank] for k, r in enumerate(reverse)])


# Whatever must not launch a kernel, such as fake tensors, gets these as ops.


@torch_op("selective_scan_over", shown=2)
def _scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor,
    end: Tensor, steps: Tensor, dt_proj: Tensor | None, reverse: Sequence[bool], chunk: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s (k, b, l, e) and the kept states, where `initial` enters the stretch and its segments add `end`, `steps`."""
    inputs = ScanInputs(x, dt, A_log, B, C, D, dt_bias, initial, None)
    if backend == "reference":
        s, _, states = selective_scan.scan_op.inside(*inputs, reverse, chunk, True, backend)
        return s, states
    known: dict[str, Any] = {"ends": Ends(end, steps)}
    if backend == "cpu":
        inputs, known = inputs._replace(A=decay_rates(A_log, True)), known | {"dt_proj": dt_proj}
    else:
        known["log_A"] = True
    s, _, states = fused_module("selective_scan", backend).forward(with_rows(inputs), reverse, chunk, **known)
    return s, states


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A_log: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), empty_states(x.shape, A_log, others[-2])


@torch_op("selective_scan_over_backward", shown=3, mutates=("dB", "dC"))
def _scan_backward(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor,
    states: Tensor, ds: Tensor, dfinal: Tensor, end: Tensor, steps: Tensor, dt_proj: Tensor | None, dB: Tensor,
    dC: Tensor, reverse: Sequence[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, ddt (k, b, l, e) and the parameters' gradients; what reaches the initial state is another rank's."""
    inputs = ScanInputs(x, dt, A_log, B, C, D, dt_bias, initial, None)
    if backend == "reference":
        dx, ddt, dparameters, _ = selective_scan.scan_backward_op.inside(
            *inputs, states, ds, dfinal, dB, dC, reverse, CHUNK[backend], True, backend
        )
        return dx, ddt, dparameters
    known: dict[str, Any] = {"ends": Ends(end, steps), "dB": dB, "dC": dC}
    if backend == "cpu":
        inputs, known = inputs._replace(A=decay_rates(A_log, True)), known | {"dt_proj": dt_proj}
    else:
        known["log_A"] = True
    dx, ddt, dparameters, *_ = fused_module("selective_scan", backend).backward(
        with_rows(inputs), states, rows(ds), dfinal.contiguous(), reverse, CHUNK[backend], **known
    )
    if backend == "cpu":
        dparameters = of_logarithm(dparameters, inputs.A, True)
    return dx, ddt, dparameters


@_scan_backward.register_fake
def _(x: Tensor, dt: Tensor, A_log: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    k, e, n = A_log.shape
    return x.new_empty(x.shape), x.new_empty(x.shape), A_log.new_empty(k * e * (n + 2))


def scan_over(
    context: Context, x: Tensor, dt: Tensor, dt_proj: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor,
    dt_bias: Tensor, reverse: Sequence[bool], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan of a stretch x (k, b, l, e) with dt (k, b, l, r) times dt_proj (k, e, r), A_log (k, e, n), B, C (k, b,
    l, n), D and dt_bias (k, e): s (k, b, l, e), with gradients, and the state after the whole sequence (k, b, e, n),
    without.
    """
    with without_autocast(x):
        name = choose(backend, "selective_scan", x)
        A_log, D, dt_bias = (wide(t, x) for t in (A_log, D, dt_bias))
        tensors = (x, dt, dt_proj.to(x.dtype), A_log, B, C, D, dt_bias)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return _Scan.apply(*tensors, context, reverse, name, learns)


def ssd_over(
    context: Context, x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reverse: Sequence[bool], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state-space-dual scan of a stretch x (j, b, l, h, p) with dt (k, b, l, h), B, C (j, b, l, n), A_log, D and
    dt_bias (k, h), where j is k or 1: the sum over the directions y (b, l, h, p), and the state after the whole
    sequence (k, b, h, p, n). A first scan finds what each stretch adds to the state.
    """
    with without_autocast(x):
        name = choose(backend, "ssd_over", x)
        A_log, D, dt_bias = (wide(t, x) for t in (A_log, D, dt_bias))
        _, end = ssd_op(x, dt, A_log, B, C, D, dt_bias, None, None, reverse, True, name)
        steps = F.softplus(dt.to(A_log.dtype) + dt_bias[:, None, None]).sum(2)  # (k, b, h)
        decay = (steps * -A_log.exp().unsqueeze(1)).exp()
        both = _ordered(gathered(context, torch.cat([end.flatten(3), decay.unsqueeze(-1)], dim=-1)), reverse)
        entering, state = [], torch.zeros_like(end)
        for added, passed in zip(both[..., :-1].unbind(2), both[..., -1:].unbind(2), strict=True):
            entering.append(state)
            state = added.view(end.shape) + passed.unsqueeze(-1) * state
        initial = _of_rank(torch.stack(entering, dim=2), reverse, context)
        y, _ = ssd_op(x, dt, A_log, B, C, D, dt_bias, initial, None, reverse, False, name)
        return y, state
