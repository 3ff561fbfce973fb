"""The state-space-dual scan on a CPU: matrix products in chunks of tokens, with numba between them.

Axes: k directions, b images, c chunks of q tokens, h heads, p channels of a head, n states; j is k, or 1 where all
directions read the same x, B and C.

Inside a chunk, the scan is one product for each head: y = W x with W_ts = (C_t . B_s) decay(s to t) dt_s, lower
triangular forward and upper triangular in reverse, and D on the diagonal (arXiv:2405.21060, section 6). Directions that
read the same x, B and C have one W. States pass between chunks; a sequence of up to DENSE tokens is one chunk and has
none, unless a state enters or leaves it. A decay is a product of the decays of its tokens, each at most 1, or the
exponential of a sum that starts at an end of a chunk: never of a difference of sums.
"""
# numba infers the types of what it compiles:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import kernel, numbers, run, zeros
from .selective_scan import _begins
from .simd import LANES, Variable, emitted
from .ssd import SsdInputs

CHUNK, DENSE = 64, 256


# -- inside a chunk ----------------------------------------------------------------------------------------------------


# Rows of (q, q) matrices are `pitch` numbers apart, a multiple of LANES. A row of decays is zero where the scan has not
# been yet, so that loops run over complete vectors: the triangle is never masked.


@emitted
def _weigh_row(code, W, at, G, scores_at, row, factor, first, last):
    """One more token: decay the row, and write its products with the scores."""
    with code.loop(first, last, LANES) as s:
        row[s] = row[s] * factor
        W[at + s] = G[scores_at + s] * row[s]


@emitted
def _weigh_row_more(code, W, at, G, scores_at, row, factor, first, last):
    """`_weigh_row`, added to what the other direction has written."""
    with code.loop(first, last, LANES) as s:
        row[s] = row[s] * factor
        W[at + s] = W[at + s] + G[scores_at + s] * row[s]


@emitted
def _clear(code, W, at, first, last):
    with code.loop(first, last, LANES) as s:
        W[at + s] = code.vector(0)


@emitted
def _unweigh_row(code, dW, at, G, dG, scores_at, row, dt, factor, products, row_at, first, last):
    """One token of the backward pass: its products, and its part of dG."""
    with code.loop(first, last, LANES) as s:
        decay = row[s] * factor
        row[s] = decay
        upstream = dW[at + s]
        products[row_at + s] = upstream * G[scores_at + s] * decay
        dG[scores_at + s] = dG[scores_at + s] + upstream * (decay * dt[s])


@emitted
def _cross_row(code, products, row_at, column, dt, sums, first, last):
    """Add a row of products to the sums of columns, and add up those that cross the token."""
    total = Variable(code.vector(0))
    with code.loop(first, last, LANES) as s:
        column[s] = column[s] + products[row_at + s]
        total.set(column[s].fma(dt[s], total.get()))
    sums[code.index(0)] = total.get()


@kernel
def _weigh(first, last, G, decay, step, D, backwards, W):
    """W (h, j b c, q, pitch) from the scores G (j b c, q, pitch): an item is a head of one of the j b c chunks."""
    directions, images, heads, chunks, _ = decay.shape
    together = len(G) < directions * images * chunks
    row = zeros(1, G.shape[2])
    for item in range(first, last):
        m, h = item // heads, item % heads
        image, c = m // chunks % images, m % chunks
        for k in range(directions):
            if not together and k != m // (images * chunks):
                continue
            _fill(W, G, decay[k, image, h, c], step[k, image, h, c], D[k, h], backwards[k], together, row, h, m)


@kernel
def _fill(W, G, d, dt, skip, backwards, together, row, h, m):
    """What one direction of one head adds to W."""
    _, rows, q, pitch = W.shape
    row[:] = np.float32(0)
    for i in range(q):
        t = q - 1 - i if backwards else i
        edge = t // LANES * LANES
        low, high = (edge, pitch) if backwards else (0, edge + LANES)
        at, scores_at = ((h * rows + m) * q + t) * pitch, (m * q + t) * pitch
        if together and backwards:
            _weigh_row_more((W, at, G, scores_at, row, d[t], low, high))
        else:
            _weigh_row((W, at, G, scores_at, row, d[t], low, high))
            _clear((W, at, 0, low))
            _clear((W, at, high, pitch))
        row[0, t] = dt[t]
        W[h, m, t, t] += G[m, t, t] * dt[t] + skip


@kernel
def _weigh_backward(first, last, G, decay, step, D, backwards, W, dW, dG, ddt, dlog, dD):
    """From dW: W again, the gradients of G, dt and the logarithms of decays, and of D for each chunk. An item is one of
    the j b c chunks, so that dG is summed over heads in one order.
    """
    directions, images, heads, chunks, q = decay.shape
    pitch = G.shape[2]
    together = len(G) < directions * images * chunks
    row, column, dt, lanes = zeros(1, pitch), zeros(1, pitch), zeros(1, pitch), zeros(1, LANES)
    products = zeros(q, pitch)
    for m in range(first, last):
        image, c = m // chunks % images, m % chunks
        dG[m] = np.float32(0)
        for h in range(heads):
            for k in range(directions):
                if not together and k != m // (images * chunks):
                    continue
                d, steps, back = decay[k, image, h, c], step[k, image, h, c], backwards[k]
                _fill(W, G, d, steps, D[k, h], back, together, row, h, m)
                row[:] = np.float32(0)
                column[:] = np.float32(0)
                dt[0, :q] = steps
                trace = np.float32(0)
                for i in range(q):
                    t = q - 1 - i if back else i
                    edge = t // LANES * LANES
                    low, high = (edge, pitch) if back else (0, edge + LANES)
                    at, scores_at = ((h * len(G) + m) * q + t) * pitch, (m * q + t) * pitch
                    _unweigh_row((dW, at, G, dG, scores_at, row, dt, d[t], products, t * pitch, low, high))
                    row[0, t] = np.float32(1)
                    dG[m, t, t] += dW[h, m, t, t] * steps[t]
                    trace += dW[h, m, t, t]
                dD[k, image, h, c] = trace
                # the decay of token t is a factor of all products from its side of it to the other
                for i in range(q):
                    t = i if back else q - 1 - i
                    edge = t // LANES * LANES
                    low, high = (edge, pitch) if back else (0, edge + LANES)
                    dt[0, t] = np.float32(0)
                    _cross_row((products, t * pitch, column, dt, lanes, low, high))
                    crossing = np.float32(0)
                    for lane in range(LANES):
                        crossing += lanes[0, lane]
                    dlog[k, image, h, c, t] = crossing
                    ddt[k, image, h, c, t] = column[0, t] + dW[h, m, t, t] * G[m, t, t]


# -- the scan ----------------------------------------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """What a scan reads, in fp32 and in chunks. Padding after the last token has steps of zero."""

    x: Tensor
    """(j, b c, q, h, p)."""
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
    entering: Tensor
    """(k, b, h, c, q), the decay of what enters the chunk up to each token."""
    leaving: Tensor
    """(k, b, h, c, q), the decay from each token to the end of the chunk."""
    across: Tensor
    """(k, b, h, c), the decay over the chunk."""
    scores: Tensor
    """(j b c, q, pitch); zero from q on."""


def _sizes(length: int) -> tuple[int, int]:
    """The number of chunks and their tokens."""
    return (1, length) if length <= DENSE else (-(-length // CHUNK), CHUNK)


def _chunked(inputs: SsdInputs, reverse: Sequence[bool]) -> _Chunks:
    length = inputs.x.shape[2]
    c, q = _sizes(length)
    x, B, C = (_in_chunks(t) for t in (inputs.x, inputs.B, inputs.C))
    raw = inputs.dt.float()
    if inputs.dt_bias is not None:
        raw = raw + inputs.dt_bias[:, None, None]
    step = F.softplus(raw)
    log = step * -inputs.A_log.exp()[:, None, None]
    step, log = (F.pad(t.transpose(2, 3), (0, c * q - length)).unflatten(-1, (c, q)).contiguous() for t in (step, log))
    decay = log.exp()
    # sums from the start of the chunk to a token, and from the token after one to the end of the chunk
    upto, after = _sums(log, reverse)
    entering, leaving = upto.exp(), after.exp()
    if inputs.image is not None:
        marks = torch.stack([_begins(inputs.image, r) for r in reverse]).unsqueeze(2).float()
        marks = F.pad(marks, (0, c * q - length)).unflatten(-1, (c, q))  # (k, b, 1, c, q)
        decay = decay.masked_fill(marks > 0, 0)
        upto, after = _sums(marks, reverse)
        entering, leaving = entering.masked_fill(upto > 0, 0), leaving.masked_fill(after > 0, 0)
    across = torch.stack([t[..., 0] if r else t[..., -1] for t, r in zip(entering, reverse, strict=True)])
    scores = _matrices(len(B) * B.shape[1], q, like=x)
    torch.bmm(C.flatten(0, 1), B.flatten(0, 1).mT, out=scores[..., :q])
    return _Chunks(x, B, C, raw, step, decay, entering, leaving, across, scores)


def _matrices(*shape: int, like: Tensor) -> Tensor:
    """An empty buffer for matrices (..., q, q) with rows of `pitch` numbers, which are zero from q on."""
    q = shape[-1]
    pitch = -(-q // LANES) * LANES
    matrices = like.new_empty(*shape, pitch)
    matrices[..., q:] = 0
    return matrices


def _in_chunks(t: Tensor) -> Tensor:
    """(j, b, l, ...) in fp32 as (j, b c, q, ...); a copy only if tokens are padded or the strides do not allow it."""
    j, b, length = t.shape[:3]
    c, q = _sizes(length)
    t = t.detach().float()
    if t.stride(-1) != 1:
        t = t.contiguous()
    if c * q > length:
        t = F.pad(t, (0, 0) * (t.ndim - 3) + (0, c * q - length))
    return t.reshape(j, b * c, q, *t.shape[3:])


def _sums(t: Tensor, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Of (k, ..., q), in scan order: sums over the tokens up to each one, and over those that follow it."""
    upto = [own.flip(-1).cumsum(-1).flip(-1) if r else own.cumsum(-1) for own, r in zip(t, reverse, strict=True)]
    return torch.stack(upto), torch.stack([_after(own, r) for own, r in zip(t, reverse, strict=True)])


def _after(t: Tensor, reverse: bool) -> Tensor:
    """Sums (..., q) over the tokens that follow each one in scan order."""
    if reverse:
        return F.pad(t[..., :-1].cumsum(-1), (1, 0))
    return F.pad(t[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))


def forward(inputs: SsdInputs, reverse: Sequence[bool], with_state: bool) -> tuple[Tensor, Tensor]:
    """As the op: y (b, l, h, p) and the final states, empty unless `with_state`."""
    _, b, length, h, p = inputs.x.shape
    chunks = _chunked(inputs, reverse)
    _, rows, q, _, _ = chunks.x.shape
    W = chunks.scores.new_empty(h, *chunks.scores.shape)
    run(_weigh, h * len(chunks.scores), *_arrays(chunks, inputs.D, reverse), numbers(W))
    W = W[..., :q]
    y = chunks.x.new_empty(rows, q, h, p)
    states = _states(inputs, chunks, reverse, with_state)
    for i in range(h):
        for j, x in enumerate(chunks.x):
            own = W[i, j * rows : (j + 1) * rows]
            if j == 0:
                torch.bmm(own, x[:, :, i], out=y[:, :, i])
            else:
                y[:, :, i].baddbmm_(own, x[:, :, i])
        if states is not None:
            for k in range(len(reverse)):
                y[:, :, i].baddbmm_(_times(chunks.C, chunks.entering, k, i), states.before[k, i].mT)
    y = y.view(b, -1, h, p)[:, :length].to(inputs.x.dtype).contiguous()
    return y, states.final if with_state and states is not None else y.new_empty(0, dtype=torch.float32)


class _States(NamedTuple):
    before: Tensor
    """(k, h, b c, p, n), the state that enters each chunk."""
    final: Tensor
    """(k, b, h, p, n)."""


def _states(inputs: SsdInputs, chunks: _Chunks, reverse: Sequence[bool], needed: bool) -> _States | None:
    """The states between chunks; None if there are none."""
    k, b, h, c, _ = chunks.step.shape
    if c == 1 and inputs.initial is None and not needed:
        return None
    p, n = chunks.x.shape[-1], chunks.B.shape[-1]
    before, finals = chunks.x.new_empty(k, h, b * c, p, n), []
    for d, backwards in enumerate(reverse):
        added = chunks.x.new_empty(h, b * c, p, n)
        for i in range(h):
            torch.bmm(_of(chunks.x, d)[:, :, i].mT, _times(chunks.B, chunks.leaving * chunks.step, d, i), out=added[i])
        state = chunks.x.new_zeros(h, b, p, n) if inputs.initial is None else inputs.initial[d].transpose(0, 1)
        own, added, across = before[d].view(h, b, c, p, n), added.view(h, b, c, p, n), chunks.across[d].transpose(0, 1)
        for at in _order(c, backwards):
            own[:, :, at] = state
            state = torch.addcmul(added[:, :, at], across[:, :, at, None, None], state)
        finals.append(state.transpose(0, 1))
    return _States(before, torch.stack(finals))


def _order(c: int, backwards: bool) -> Iterator[int]:
    return iter(range(c - 1, -1, -1) if backwards else range(c))


def _of(t: Tensor, k: int) -> Tensor:
    """What direction k reads of (j, ...)."""
    return t[k if len(t) > 1 else 0]


def _times(t: Tensor, factors: Tensor, k: int, i: int) -> Tensor:
    """What direction k reads of t (j, b c, q, n), times the factors (k, b, h, c, q) of head i."""
    return _of(t, k) * factors[k, :, i].flatten(0, 1).unsqueeze(-1)


def _arrays(chunks: _Chunks, D: Tensor, reverse: Sequence[bool]) -> tuple[Any, ...]:
    tensors = (chunks.scores, chunks.decay, chunks.step, D)
    return *(numbers(t.contiguous()) for t in tensors), np.array(reverse)


def backward(
    inputs: SsdInputs, dy: Tensor, dfinal: Tensor | None, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op: dx, ddt, dB, dC, dparameters and dinitial."""
    length = inputs.x.shape[2]
    chunks = _chunked(inputs, reverse)
    _, rows, q, h, _ = chunks.x.shape
    dy = _in_chunks(dy.unsqueeze(0))[0]
    dW, W = _matrices(h, len(chunks.scores), q, like=dy), chunks.scores.new_empty(h, *chunks.scores.shape)
    for i in range(h):
        for j, x in enumerate(chunks.x):
            torch.bmm(dy[:, :, i], x[:, :, i].mT, out=dW[i, j * rows : (j + 1) * rows, :, :q])
    dscores = chunks.scores.new_empty(chunks.scores.shape)
    dstep, dlog, dD = (chunks.step.new_empty(chunks.step.shape[:axes]) for axes in (5, 5, 4))
    arrays = _arrays(chunks, inputs.D, reverse)
    run(_weigh_backward, len(dscores), *arrays, *(numbers(t) for t in (W, dW, dscores, dstep, dlog, dD)))
    del dW
    W, dscores = W[..., :q], dscores[..., :q]

    dx = chunks.x.new_empty(chunks.x.shape)
    for i in range(h):
        for j in range(len(dx)):
            torch.bmm(W[i, j * rows : (j + 1) * rows].mT, dy[:, :, i], out=dx[j, :, :, i])
    dC = torch.bmm(dscores, chunks.B.flatten(0, 1)).view(chunks.B.shape)
    dB = torch.bmm(dscores.mT, chunks.C.flatten(0, 1)).view(chunks.C.shape)
    del W, dscores
    states = _states(inputs, chunks, reverse, dfinal is not None)
    dinitial = chunks.x.new_empty(0)
    if states is not None:
        dinitial = _states_backward(chunks, states, dy, dfinal, reverse, dx, dB, dC, dstep, dlog)

    A = -inputs.A_log.exp()
    dstep, dlog = (t.flatten(3)[..., :length].transpose(2, 3) for t in (dstep, dlog))
    step = chunks.step.flatten(3)[..., :length].transpose(2, 3)
    ddt = (dstep + dlog * A[:, None, None]) * torch.sigmoid(chunks.raw)
    dparameters = torch.stack([(dlog * step).sum((1, 2)) * A, dD.sum((1, 3)), ddt.sum((1, 2))], dim=1)
    dx, dB, dC = (_from_chunks(t, like) for t, like in ((dx, inputs.x), (dB, inputs.B), (dC, inputs.C)))
    return dx, ddt.to(inputs.dt.dtype).contiguous(), dB, dC, dparameters, dinitial


def _from_chunks(t: Tensor, like: Tensor) -> Tensor:
    """(j, b c, q, ...) as (j, b, l, ...) like the given tensor."""
    j, b, length = like.shape[:3]
    return t.view(j, b, -1, *t.shape[3:])[:, :, :length].to(like.dtype).contiguous()


def _states_backward(
    chunks: _Chunks, states: _States, dy: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], dx: Tensor,
    dB: Tensor, dC: Tensor, dstep: Tensor, dlog: Tensor,
) -> Tensor:  # fmt: skip
    """Add what passes through the states to the gradients; return that of the initial state (k, b, h, p, n)."""
    _, b, h, c, q = chunks.step.shape
    p, n = chunks.x.shape[-1], chunks.B.shape[-1]
    dinitials = []
    for k, backwards in enumerate(reverse):
        j = k if len(chunks.x) > 1 else 0
        used = chunks.x.new_empty(h, b * c, p, n)
        for i in range(h):
            torch.bmm(dy[:, :, i].mT, _times(chunks.C, chunks.entering, k, i), out=used[i])
        state = chunks.x.new_zeros(h, b, p, n) if dfinal is None else dfinal[k].transpose(0, 1)
        after, across = used.new_empty(h, b, c, p, n), chunks.across[k].transpose(0, 1)
        used = used.view(h, b, c, p, n)
        for at in reversed([*_order(c, backwards)]):
            after[:, :, at] = state
            state = torch.addcmul(used[:, :, at], across[:, :, at, None, None], state)
        dinitials.append(state.transpose(0, 1))
        dacross = across * (after.flatten(3) * states.before[k].view(h, b, c, -1)).sum(-1)
        after = after.flatten(1, 2)
        weights = chunks.leaving * chunks.step
        for i in range(h):
            dx[j, :, :, i].baddbmm_(_times(chunks.B, weights, k, i), after[i].mT)
            dleft, dused = torch.bmm(chunks.x[j, :, :, i], after[i]), torch.bmm(dy[:, :, i], states.before[k, i])
            entering, leaving, step = (t[k, :, i] for t in (chunks.entering, chunks.leaving, chunks.step))  # (b, c, q)
            dB[j].addcmul_(dleft, (leaving * step).flatten(0, 1).unsqueeze(-1))
            dC[j].addcmul_(dused, entering.flatten(0, 1).unsqueeze(-1))
            of_left = leaving * (dleft * chunks.B[j]).sum(-1).view(b, c, q)
            of_used = entering * (dused * chunks.C[j]).sum(-1).view(b, c, q)
            dstep[k, :, i] += of_left
            # a token's decay is a factor of `entering` of the tokens from it on, and of `leaving` of those before it
            dlog[k, :, i] += _after(of_used, backwards) + of_used
            dlog[k, :, i] += _after(of_left * step, not backwards) + dacross[i].unsqueeze(-1)
    return torch.stack(dinitials)
