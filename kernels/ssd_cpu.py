"""The state-space-dual scan on a CPU: the scores of tokens by BLAS, everything else in loops (ssd_loops_cpu.py).

Axes: k directions, b images, c chunks of q tokens, h heads, p channels of a head, n states; j is k, or 1 where all
directions read the same x, B and C.

Inside a chunk, the scan is one product for each head: y = W x with W_ts = (C_t . B_s) decay(s to t) dt_s, lower
triangular forward and upper triangular in reverse, and D on the diagonal (arXiv:2405.21060, section 6). A few rows of W
are made at a time, and multiplied while they are in the cache. States pass between chunks; a sequence of up to DENSE
tokens is one chunk and has none, unless a state enters or leaves it. Between tokens of a chunk, a decay is a product
of the decays of the tokens, each at most 1; to or from an end of the chunk, the exponential of a sum that starts there:
never of a difference of sums.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import ssd_loops_cpu
from .cpu import LOG2E, array, numbers, run, spread
from .recurrence import begins_image
from .simd import LANES
from .ssd import SsdInputs

CHUNK, DENSE = 48, 256
FEW = 8
"""Items of the backward pass, below which heads are divided into groups."""


class _Chunks(NamedTuple):
    """What a scan reads, in fp32 and in chunks. Padding after the last token has steps of zero."""

    B: Tensor
    """(j, b c, q, n)."""
    C: Tensor
    """(j, b c, q, n)."""
    raw: Tensor
    """(k, b, l, h), dt plus its bias, before the softplus; not in chunks."""
    step: Tensor
    """(k, b, h, c, q), after the softplus."""
    decay: Tensor
    """(k, b, h, c, q); zero into a token that begins an image."""
    scores: Tensor
    """(j b c, q, pitch); zero from q on. The pitch is a multiple of LANES."""


def _sizes(length: int) -> tuple[int, int]:
    """The number of chunks and their tokens."""
    return (1, length) if length <= DENSE else (-(-length // CHUNK), CHUNK)


def _chunked(inputs: SsdInputs, reverse: Sequence[bool]) -> _Chunks:
    length = inputs.x.shape[2]
    c, q = _sizes(length)
    B, C = (_in_chunks(t) for t in (inputs.B, inputs.C))
    raw = inputs.dt.float()
    if inputs.dt_bias is not None:
        raw = raw + inputs.dt_bias[:, None, None]
    step = F.pad(F.softplus(raw).transpose(2, 3), (0, c * q - length)).contiguous()
    decay = (step * -inputs.A_log.exp()[:, None, :, None]).exp_()
    if inputs.image is not None:
        begins = torch.stack([begins_image(inputs.image, r) for r in reverse])
        decay.masked_fill_(F.pad(begins, (0, c * q - length)).unsqueeze(2), 0)
    step, decay = (t.unflatten(-1, (c, q)) for t in (step, decay))
    scores = B.new_empty(len(B) * B.shape[1], q, -(-q // LANES) * LANES)
    scores[..., q:] = 0
    torch.bmm(C.flatten(0, 1), B.flatten(0, 1).mT, out=scores[..., :q])
    return _Chunks(B, C, raw, step, decay, scores)


def _in_chunks(t: Tensor) -> Tensor:
    """(j, b, l, n) in fp32 as (j, b c, q, n); a copy only if tokens are padded or the strides do not allow it."""
    j, b, length = t.shape[:3]
    c, q = _sizes(length)
    t = t.detach().float()
    if t.stride(-1) != 1:
        t = t.contiguous()
    if c * q > length:
        t = F.pad(t, (0, 0, 0, c * q - length))
    return t.reshape(j, b * c, q, -1)


def _after(t: Tensor, reverse: bool) -> Tensor:
    """Sums (..., q) over the tokens that follow each one in scan order."""
    if reverse:
        return F.pad(t[..., :-1].cumsum(-1), (1, 0))
    return F.pad(t[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def _arguments(inputs: SsdInputs, chunks: _Chunks) -> list[Any]:
    """x, B and C with their strides, as the loops take them."""
    return [each for t in (inputs.x, chunks.B, chunks.C) for each in spread(t)]


def _more_arguments(inputs: SsdInputs, chunks: _Chunks, reverse: Sequence[bool], with_states: bool) -> list[Any]:
    j, _, length, _, p = inputs.x.shape
    rates = inputs.A_log.exp() * -float(LOG2E)  # of the base-2 logarithms of decays
    tensors = chunks.scores, chunks.decay, chunks.step, rates, inputs.D
    shape = j, length, p, inputs.B.shape[-1]
    return [*(array(t, t.ndim) for t in tensors), array(inputs.initial, 5), np.array(reverse), shape, with_states]


def forward(inputs: SsdInputs, reverse: Sequence[bool], with_state: bool) -> tuple[Tensor, Tensor]:
    """As the op: y (b, l, h, p) and the final states, empty unless `with_state`."""
    _, b, length, h, p = inputs.x.shape
    chunks = _chunked(inputs, reverse)
    y = chunks.scores.new_empty(b, length, h, p)
    final = chunks.scores.new_empty(len(reverse) if with_state else 0, b, h, p, inputs.B.shape[-1])
    with_states = with_state or inputs.initial is not None or chunks.step.shape[3] > 1
    arguments = *_arguments(inputs, chunks), *_more_arguments(inputs, chunks, reverse, with_states)
    run(ssd_loops_cpu.forward, b * h, *arguments, numbers(y), numbers(final))
    return y.to(inputs.x.dtype), final if with_state else y.new_empty(0)


def backward(
    inputs: SsdInputs, dy: Tensor, dfinal: Tensor | None, dx: Tensor, dB: Tensor, dC: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op: writes dx, dB and dC, and returns ddt, dparameters and dinitial."""
    j, b, length, h, _ = inputs.x.shape
    chunks = _chunked(inputs, reverse)
    with_states = dfinal is not None or inputs.initial is not None or chunks.step.shape[3] > 1
    groups = min(h, -(-FEW // (j * b)))

    def new(*shape: int) -> Tensor:
        return chunks.scores.new_empty(shape)

    written = dx if dx.dtype == torch.float32 else new(*dx.shape)
    dscores = new(groups, *chunks.scores.shape)
    of_B, of_C = (new(groups if with_states else 0, *t.flatten(0, 1).shape) for t in (chunks.B, chunks.C))
    dstep, dlog = (torch.zeros_like(chunks.step) for _ in range(2))
    dD, dacross = (chunks.step.new_zeros(chunks.step.shape[:-1]) for _ in range(2))
    of_used, of_left = (torch.zeros_like(chunks.step[: len(reverse) * with_states]) for _ in range(2))
    dinitial = new(*((0,) * 5 if inputs.initial is None else inputs.initial.shape))
    sums = dscores, of_B, of_C, dstep, dlog, dD, of_used, of_left, dacross, dinitial
    arguments = *_arguments(inputs, chunks), array(dy.flatten(), 1)
    arguments += *_more_arguments(inputs, chunks, reverse, with_states), array(dfinal, 5)
    run(ssd_loops_cpu.backward, j * b * groups, *arguments, *spread(written), *(numbers(t) for t in sums))
    if written is not dx:
        dx.copy_(written)

    own = (dscores[0] if groups == 1 else dscores.sum(0))[..., : chunks.step.shape[-1]]
    products = torch.bmm(own.mT, chunks.C.flatten(0, 1)), torch.bmm(own, chunks.B.flatten(0, 1))
    for t, product, through_states in zip((dB, dC), products, (of_B, of_C), strict=True):
        if with_states:
            product += through_states.sum(0)
        t.copy_(product.view(j, b, -1, t.shape[-1])[:, :, :length])
    if with_states:
        dstep += of_left
        # a token's decay is a factor of `entering` of the tokens from it on, and of `leaving` of those before it
        for k, backwards in enumerate(reverse):
            dlog[k] += _after(of_used[k], backwards) + of_used[k] + dacross[k].unsqueeze(-1)
            dlog[k] += _after(of_left[k] * chunks.step[k], not backwards)

    A = -inputs.A_log.exp()
    dstep, dlog, step = (t.flatten(3)[..., :length].transpose(2, 3) for t in (dstep, dlog, chunks.step))
    ddt = (dstep + dlog * A[:, None, None]) * torch.sigmoid(chunks.raw)
    dparameters = torch.stack([(dlog * step).sum((1, 2)) * A, dD.sum((1, 3)), ddt.sum((1, 2))])
    return ddt.to(inputs.dt.dtype).contiguous(), dparameters, dinitial
