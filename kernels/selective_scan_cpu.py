"""The selective scan on a CPU, compiled by numba: parallel over images and channels, with the state in registers.

Axes: k directions, b images, l tokens, e inner channels, n states per channel. A work item walks one direction of one
image for a block of channels, one chunk of tokens at a time. The inner loops run over the tokens of the chunk for one
state, which stays in registers; their data stays in the first-level cache. The forward pass keeps the state before each
chunk; the backward pass rebuilds the states from there, one chunk at a time. Nothing of size l x e x n exists.

Arithmetic is fp32; 16-bit tensors are converted on the way in and out.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import counting
from .cpu import BLOCK, COLUMNS, LOG2E, array, inline, kernel, numbers, read, run, spread, tile, write, zeros
from .scan_gate_cpu import combine, combine_backward
from .scan_inputs import ScanInputs
from .simd import LANES, Variable, emitted, exp2, exp2_of_product, softplus_and_slope, sums

__all__ = ["CHUNK", "backward", "combine", "combine_backward", "forward"]

# Tokens between kept states: fp32 states then cost n / 16 values per token and channel.
CHUNK = 16


# Tiles are (tokens of the chunk, BLOCK), or (n, BLOCK) for values of states. A is already scaled by log2(e).


@emitted
def _project(code, tokens, rank, low, low_at, low_token, weight, step):
    """step = low times weight (rank, BLOCK): projects dt here, so that it is never written and read again."""
    with code.loop(0, tokens) as m:
        sums = [Variable(code.vector(0)) for _ in COLUMNS]
        with code.loop(0, rank) as r:
            low_r = low.spread(low_at + m * low_token + r)
            for j, total in zip(COLUMNS, sums, strict=True):
                total.set(low_r * weight[r * BLOCK + j] + total.get())
        for j, total in zip(COLUMNS, sums, strict=True):
            step[m * BLOCK + j] = total.get()


@emitted
def _enter(code, tokens, xs, step, dt_bias, D, entering, y):
    """`step` becomes softplus(dt + bias). `entering` times B is what enters the state at a token. y starts as D x."""
    with code.loop(0, tokens) as m:
        for j in COLUMNS:
            at = m * BLOCK + j
            after, _ = softplus_and_slope(step[at] + dt_bias[code.index(j)])
            step[at] = after
            entering[at] = after * xs[at]
            y[at] = D[code.index(j)] * xs[at]


@emitted
def _enter_again(code, tokens, xs, step, dt_bias, entering, slope):
    """`_enter` for the backward pass, which needs the slope of the softplus."""
    with code.loop(0, tokens) as m:
        for j in COLUMNS:
            at = m * BLOCK + j
            after, slope[at] = softplus_and_slope(step[at] + dt_bias[code.index(j)])
            step[at] = after
            entering[at] = after * xs[at]


def _decay(step, A):
    return exp2(step * A)


@emitted
def _advance(
    code, n, first, last, gentle, step, A, entering, B, B_at, B_token, C, C_at, C_token, h, y,
    x, x_at, x_token, dt, dt_at, dt_token, s, s_at, s_token, states, states_at,
):  # fmt: skip
    """The inner loops of the forward pass, over the tokens [first, last) of a chunk: one state at a time, with h in
    registers. In a `gentle` chunk no decay underflows.
    B_at is the index of the chunk's first token in B, B_token the distance to the next token; likewise for the others.
    """
    with code.loop(0, n) as i:
        A_i = [A[i * BLOCK + j] for j in COLUMNS]
        h_i = [Variable(h[i * BLOCK + j]) for j in COLUMNS]
        for j in COLUMNS:
            x.fetch(x_at + (i + CHUNK) * x_token + j)
            dt.fetch(dt_at + (i + CHUNK) * dt_token + j)
            s.fetch(s_at + i * s_token + j, to_write=True)
            states.fetch(states_at + i * BLOCK + j, to_write=True)
        with code.either(gentle) as branches:
            for branch, decay in zip(branches, (exp2_of_product, _decay), strict=True):
                with branch, code.loop(first, last) as m:
                    B_i, C_i = B.spread(B_at + m * B_token + i), C.spread(C_at + m * C_token + i)
                    for j, A_ij, h_ij in zip(COLUMNS, A_i, h_i, strict=True):
                        at = m * BLOCK + j
                        h_ij.set(decay(step[at], A_ij) * h_ij.get() + entering[at] * B_i)
                        y[at] = h_ij.get() * C_i + y[at]
        for j, h_ij in zip(COLUMNS, h_i, strict=True):
            h[i * BLOCK + j] = h_ij.get()


@emitted
def _retreat(
    code, n, first, last, gentle, step, A, entering, B, B_at, B_token, C, C_at, C_token, h, before, decay,
    ds, g, dA, dentering, dstep, dB_i, dC_i, dB, dC,
    far_x, x_at, x_token, far_dt, dt_at, dt_token, far_ds, ds_at, ds_token,
    dx, dx_at, dx_token, ddt, ddt_at, ddt_token, states, states_at,
):  # fmt: skip
    """The inner loops of the backward pass, over the tokens [first, last) of a chunk; h is the state before them.

    With g the gradient that reaches a state h_t:  g = C_t ds_t + (decay g) of the next token in scan order. On return,
    g is the gradient that reaches h. The loops add to dA, dentering, dstep, and to dB and dC (n, CHUNK). The buffers
    before and decay (CHUNK, BLOCK), dB_i and dC_i (CHUNK, LANES) hold one state at a time; dB_i and dC_i must be zero
    outside [first, last).
    """
    with code.loop(0, n) as i:
        A_i = [A[i * BLOCK + j] for j in COLUMNS]
        h_i = [Variable(h[i * BLOCK + j]) for j in COLUMNS]
        for j in COLUMNS:
            far_x.fetch(x_at + (i - CHUNK) * x_token + j)
            far_dt.fetch(dt_at + (i - CHUNK) * dt_token + j)
            far_ds.fetch(ds_at + (i - CHUNK) * ds_token + j)
            dx.fetch(dx_at + i * dx_token + j, to_write=True)
            ddt.fetch(ddt_at + i * ddt_token + j, to_write=True)
            states.fetch(states_at + i * BLOCK + j)
        with code.either(gentle) as branches:
            for branch, power in zip(branches, (exp2_of_product, _decay), strict=True):
                with branch, code.loop(first, last) as m:
                    B_im = B.spread(B_at + m * B_token + i)
                    for j, A_ij, h_ij in zip(COLUMNS, A_i, h_i, strict=True):
                        at = m * BLOCK + j
                        before[at] = h_ij.get()
                        decay[at] = power(step[at], A_ij)
                        h_ij.set(decay[at] * h_ij.get() + entering[at] * B_im)

        g_i = [Variable(g[i * BLOCK + j]) for j in COLUMNS]
        dA_i = [Variable(dA[i * BLOCK + j]) for j in COLUMNS]
        with code.loop(first, last) as passed:
            m = last - 1 - (passed - first)
            B_im, C_im = B.spread(B_at + m * B_token + i), C.spread(C_at + m * C_token + i)
            dB_im = dC_im = code.vector(0)
            for j, A_ij, h_ij, g_ij, dA_ij in zip(COLUMNS, A_i, h_i, g_i, dA_i, strict=True):
                at = m * BLOCK + j
                reached = ds[at] * C_im + g_ij.get()
                dC_im = ds[at] * h_ij.get() + dC_im
                dB_im = reached * entering[at] + dB_im
                dentering[at] = reached * B_im + dentering[at]
                g_ij.set(reached * decay[at])
                h_ij.set(before[at])
                dexponent = g_ij.get() * h_ij.get()
                dA_ij.set(dexponent * step[at] + dA_ij.get())
                dstep[at] = dexponent * A_ij + dstep[at]
            dB_i[m * LANES] = dB_im
            dC_i[m * LANES] = dC_im
        for j, g_ij, dA_ij in zip(COLUMNS, g_i, dA_i, strict=True):
            g[i * BLOCK + j] = g_ij.get()
            dA[i * BLOCK + j] = dA_ij.get()
        for part in range(0, CHUNK, LANES):
            for total, of_state in ((dB, dB_i), (dC, dC_i)):
                at = i * CHUNK + part
                lanes = [of_state[code.index((part + m) * LANES)] for m in range(LANES)]
                total[at] = total[at] + sums(lanes)


@emitted
def _leave(code, tokens, step, slope, xs, D, ds, dentering, dstep, dD, dbias):
    """Turn the gradients of `entering` and of the steps into those of x and dt, in place."""
    for j in COLUMNS:
        dD_j, dbias_j = Variable(dD[code.index(j)]), Variable(dbias[code.index(j)])
        with code.loop(0, tokens) as m:
            at = m * BLOCK + j
            ddt = (dstep[at] * math.log(2) + dentering[at] * xs[at]) * slope[at]
            dstep[at] = ddt
            dentering[at] = dentering[at] * step[at] + D[code.index(j)] * ds[at]
            dD_j.set(ds[at] * xs[at] + dD_j.get())
            dbias_j.set(ddt + dbias_j.get())
        dD[code.index(j)] = dD_j.get()
        dbias[code.index(j)] = dbias_j.get()


@kernel
def _is_gentle(step, lowest):
    """Whether no decay of these tokens underflows."""
    underflows = False
    for m in range(len(step)):
        for j in range(BLOCK):
            underflows |= step[m, j] * lowest[j] < np.float32(-126)
    return not underflows


@kernel
def _mark(image, b, start, length, reverse, begins):
    """For each token of the chunk, in scan order: whether it begins an image, so that the state restarts."""
    for m in range(len(begins)):
        t = length - 1 - start - m if reverse else start + m
        previous = t + 1 if reverse else t - 1
        begins[m] = False
        if image.shape[1] > 0 and previous < length:
            begins[m] = image[b, t] != (image[b, previous] if previous >= 0 else 0)


@inline
def _column(values, k, e0, width, tile):
    """A parameter (k, e) of the block's channels."""
    tile[:] = np.float32(0)
    for j in range(width):
        tile[j] = values[k, e0 + j]


@kernel
def _read_parameters(
    k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block
):  # fmt: skip
    """The parameters of the block's channels; A scaled by log2(e), and the lowest of each channel."""
    _column(D, k, e0, width, D_block)
    _column(dt_bias, k, e0, width, bias_block)
    for r in range(dt_proj.shape[2]):
        _column(dt_proj[:, :, r], k, e0, width, dt_proj_block[r])
    lowest[:] = np.float32(0)
    for i in range(len(A_block)):
        for j in range(width):
            A_block[i, j] = A[k, e0 + j, i] * LOG2E
            lowest[j] = min(lowest[j], A_block[i, j])


@inline
def _position(strides, k, b, token, channel, reverse):
    """Where a token's number is, and how far from there the next token's is in scan order."""
    at = k * strides[0] + b * strides[1] + token * strides[2] + channel
    return at, -strides[2] if reverse else strides[2]


@kernel
def _forward(first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, initial, s, final, states):
    """x, dt, B, C and s are pairs: the numbers, and the strides of directions, images and tokens. If dt_proj
    (k, e, rank) has a rank above 0, dt is still to be multiplied by it.
    """
    images, length, e, n = size
    blocks, chunks = (e + BLOCK - 1) // BLOCK, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest = tile(rank), tile(1)[0]
    h, A_block, D_block, bias_block = tile(n), tile(n), tile(1)[0], tile(1)[0]
    xs, step, entering, y = tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK)
    for item in range(first, last):
        k, b, e0 = item // (images * blocks), item // blocks % images, item % blocks * BLOCK
        width = min(BLOCK, e - e0)
        _read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        h[:] = np.float32(0)
        if len(initial):
            for i in range(n):
                for j in range(width):
                    h[i, j] = initial[k, b, e0 + j, i]
        for start in range(0, length, CHUNK):
            tokens = min(CHUNK, length - start)
            _mark(image, b, start, length, reverse[k], begins[:tokens])
            kept_at = (((k * images + b) * chunks + start // CHUNK) * e + e0) * n
            if len(states):
                write(h, states, kept_at, width, width)
            token = length - 1 - start if reverse[k] else start
            x_at, x_token = _position(x[1], k, b, token, e0, reverse[k])
            dt_at, dt_token = _position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            B_at, B_token = _position(B[1], k, b, token, 0, reverse[k])
            C_at, C_token = _position(C[1], k, b, token, 0, reverse[k])
            s_at, s_token = _position(s[1], k, b, token, e0, reverse[k])
            read(x[0], x_at, x_token, width, xs[:tokens])
            if rank > 0:
                _project((tokens, rank, dt[0], dt_at, dt_token, dt_proj_block, step))
            else:
                read(dt[0], dt_at, dt_token, width, step[:tokens])
            _enter((tokens, xs, step, bias_block, D_block, entering, y))
            gentle = _is_gentle(step[:tokens], lowest)
            m = 0
            while m < tokens:
                run_end = m + 1
                while run_end < tokens and not begins[run_end]:
                    run_end += 1
                if begins[m]:
                    h[:] = np.float32(0)
                _advance((
                    n, m, run_end, gentle, step, A_block, entering, B[0], B_at, B_token, C[0], C_at, C_token, h, y,
                    x[0], x_at, x_token, dt[0], dt_at, dt_token, s[0], s_at, s_token, states, kept_at + e * n,
                ))  # fmt: skip
                m = run_end
            write(y[:tokens], s[0], s_at, s_token, width)
        for i in range(n):
            for j in range(width):
                final[k, b, e0 + j, i] = h[i, j]


@kernel
def _backward(
    first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, states, ds, dfinal,
    dx, ddt, dA, dBC, dD, dbias, dinitial,
):  # fmt: skip
    """x, dt, B, C, ds, dx and ddt are pairs, as in `_forward`. dBC (blocks, k b chunks, 2n, CHUNK) receives, from each
    block of channels, the gradients of B and then of C; the tokens of a chunk are in scan order.
    """
    images, length, e, n = size
    blocks, chunks = (e + BLOCK - 1) // BLOCK, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest = tile(rank), tile(1)[0]
    h, g, A_block, dA_block = tile(n), tile(n), tile(n), tile(n)
    D_block, bias_block, dD_block, dbias_block = tile(1)[0], tile(1)[0], tile(1)[0], tile(1)[0]
    xs, step, slope, entering, before, decay = (
        tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK)
    )  # fmt: skip
    dss, dentering, dstep = tile(CHUNK), tile(CHUNK), tile(CHUNK)
    dB_i, dC_i = zeros(CHUNK, LANES), zeros(CHUNK, LANES)
    dB_block, dC_block = zeros(n, CHUNK), zeros(n, CHUNK)
    for item in range(first, last):
        k, b, block = item // (images * blocks), item // blocks % images, item % blocks
        e0 = block * BLOCK
        width = min(BLOCK, e - e0)
        _read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        h[:] = np.float32(0)
        g[:] = np.float32(0)
        if len(dfinal):
            for i in range(n):
                for j in range(width):
                    g[i, j] = dfinal[k, b, e0 + j, i]
        dA_block[:] = np.float32(0)
        dD_block[:] = np.float32(0)
        dbias_block[:] = np.float32(0)
        for c in range((length - 1) // CHUNK, -1, -1):
            start = c * CHUNK
            chunk = (k * images + b) * chunks + c
            kept_at = (chunk * e + e0) * n
            tokens = min(CHUNK, length - start)
            _mark(image, b, start, length, reverse[k], begins[:tokens])
            token = length - 1 - start if reverse[k] else start
            x_at, x_token = _position(x[1], k, b, token, e0, reverse[k])
            dt_at, dt_token = _position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            B_at, B_token = _position(B[1], k, b, token, 0, reverse[k])
            C_at, C_token = _position(C[1], k, b, token, 0, reverse[k])
            ds_at, ds_token = _position(ds[1], k, b, token, e0, reverse[k])
            dx_at, dx_token = _position(dx[1], k, b, token, e0, reverse[k])
            ddt_at, ddt_token = _position(ddt[1], k, b, token, e0, reverse[k])
            read(x[0], x_at, x_token, width, xs[:tokens])
            if rank > 0:
                _project((tokens, rank, dt[0], dt_at, dt_token, dt_proj_block, step))
            else:
                read(dt[0], dt_at, dt_token, width, step[:tokens])
            read(ds[0], ds_at, ds_token, width, dss[:tokens])
            _enter_again((tokens, xs, step, bias_block, entering, slope))
            dentering[:] = np.float32(0)
            dstep[:] = np.float32(0)
            dB_block[:] = np.float32(0)
            dC_block[:] = np.float32(0)
            gentle = _is_gentle(step[:tokens], lowest)
            run_end = tokens
            while run_end > 0:
                m = run_end - 1
                while m > 0 and not begins[m]:
                    m -= 1
                if begins[m]:
                    h[:] = np.float32(0)
                else:
                    read(states, kept_at, width, width, h)
                if run_end - m < CHUNK:
                    dB_i[:] = np.float32(0)
                    dC_i[:] = np.float32(0)
                _retreat((
                    n, m, run_end, gentle, step, A_block, entering, B[0], B_at, B_token, C[0], C_at, C_token, h,
                    before, decay, dss, g, dA_block, dentering, dstep, dB_i, dC_i, dB_block, dC_block,
                    x[0], x_at, x_token, dt[0], dt_at, dt_token, ds[0], ds_at, ds_token,
                    dx[0], dx_at, dx_token, ddt[0], ddt_at, ddt_token, states, kept_at - e * n,
                ))  # fmt: skip
                if begins[m]:
                    g[:] = np.float32(0)
                run_end = m
            _leave((tokens, step, slope, xs, D_block, dss, dentering, dstep, dD_block, dbias_block))
            write(dentering[:tokens], dx[0], dx_at, dx_token, width)
            write(dstep[:tokens], ddt[0], ddt_at, ddt_token, width)
            for i in range(n):
                for m in range(CHUNK):
                    dBC[block, chunk, i, m] = dB_block[i, m]
                    dBC[block, chunk, n + i, m] = dC_block[i, m]
        for j in range(width):
            dD[b, k, e0 + j] = dD_block[j]
            dbias[b, k, e0 + j] = dbias_block[j]
            for i in range(n):
                dA[b, k, e0 + j, i] = dA_block[i, j]
                if len(dinitial):
                    dinitial[k, b, e0 + j, i] = g[i, j]


@kernel
def _gather(first, last, size, dBC, reverse, dB, dC):
    """Sum dBC over its blocks into the pairs dB and dC. A work item is a chunk of one direction and image."""
    images, length, n = size
    chunks = (length + CHUNK - 1) // CHUNK
    for item in range(first, last):
        k, b, start = item // (images * chunks), item // chunks % images, item % chunks * CHUNK
        for block in range(1, len(dBC)):
            for i in range(2 * n):
                for m in range(CHUNK):
                    dBC[0, item, i, m] += dBC[block, item, i, m]
        token = length - 1 - start if reverse[k] else start
        dB_at, dB_token = _position(dB[1], k, b, token, 0, reverse[k])
        dC_at, dC_token = _position(dC[1], k, b, token, 0, reverse[k])
        for m in range(min(CHUNK, length - start)):
            for i in range(n):
                dB[0][np.uintp(dB_at + m * dB_token + i)] = dBC[0, item, i, m]
                dC[0][np.uintp(dC_at + m * dC_token + i)] = dBC[0, item, n + i, m]


def _total(parts: Tensor) -> Tensor:
    """The sum over the first axis, in a fixed order. So small that waking torch's threads would take longer."""
    return parts.sum(0) if counting() else torch.from_numpy(parts.numpy().sum(0))


def _items(k: int, b: int, e: int) -> int:
    return k * b * -(-e // BLOCK)


def _arguments(inputs: ScanInputs, reverse: Sequence[bool], dt_proj: Tensor | None) -> tuple[Any, ...]:
    """What both kernels read, but for the initial state, in the order of their arguments."""
    x, dt, A, B, C, D, dt_bias, _, image = inputs
    return (
        spread(x),
        spread(dt),
        array(dt_proj, 3),
        numbers(A),
        spread(B),
        spread(C),
        numbers(D),
        numbers(torch.zeros_like(D) if dt_bias is None else dt_bias),
        np.empty((0, 0), np.int32) if image is None else numbers(image),
        np.array(reverse),
    )


def forward(
    inputs: ScanInputs, reverse: Sequence[bool], chunk: int, dt_proj: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e) in x's dtype, the final states (k, b, e, n), and the kept states (k, b, chunks, e n) if chunk > 0.

    With dt_proj (k, e, r), dt is (k, b, l, r) and the kernel multiplies it by dt_proj as it goes.
    """
    assert chunk in (0, CHUNK)
    k, b, length, e = inputs.x.shape
    n = inputs.A.shape[-1]
    s = torch.empty(k, b, length, e)
    final = torch.empty(k, b, e, n)
    states = torch.empty(k, b, -(-length // chunk), e * n) if chunk else torch.empty(0)
    run(
        _forward, _items(k, b, e), (b, length, e, n), *_arguments(inputs, reverse, dt_proj), array(inputs.initial, 4),
        spread(s), numbers(final), numbers(states.view(-1)),
    )  # fmt: skip
    return s.to(inputs.x.dtype), final, states


def backward(
    inputs: ScanInputs, states: Tensor, ds: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], chunk: int,
    dt_proj: Tensor | None = None, *, dB: Tensor | None = None, dC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, ddt, the gradients of A, D and dt_bias one after the other (k e (n + 2)), dB, dC, and that of the initial
    state, which is empty if that is None. ddt is as wide as x, with dt_proj too. A given dB or dC is written in place;
    its last axis is contiguous.
    """
    assert chunk == CHUNK
    x, _, A, B, C, _, _, initial, _ = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    blocks, chunks = -(-e // BLOCK), -(-length // CHUNK)
    dx, ddt = torch.empty(k, b, length, e), torch.empty(k, b, length, e)
    dparameters = torch.empty(b, k * e * (n + 2))
    dA, dD, dbias = dparameters.split([k * e * n, k * e, k * e], dim=1)
    dA, dD, dbias = dA.view(b, k, e, n), dD.view(b, k, e), dbias.view(b, k, e)
    dB, dC = torch.empty_like(B) if dB is None else dB, torch.empty_like(C) if dC is None else dC
    wide = B.dtype == torch.float32
    written = (dB, dC) if wide else (torch.empty(B.shape), torch.empty(C.shape))
    dBC = torch.empty(blocks, k * b * chunks, 2 * n, CHUNK)
    dinitial = torch.empty((0, 0, 0, 0) if initial is None else (k, b, e, n))
    run(
        _backward, _items(k, b, e), (b, length, e, n), *_arguments(inputs, reverse, dt_proj), numbers(states.view(-1)),
        spread(ds), array(dfinal, 4), spread(dx), spread(ddt), *(numbers(t) for t in (dA, dBC, dD, dbias, dinitial)),
    )  # fmt: skip
    run(_gather, k * b * chunks, (b, length, n), numbers(dBC), np.array(reverse), *map(spread, written))
    if not wide:
        dB.copy_(written[0])
        dC.copy_(written[1])
    dinitial = dinitial.flatten() if initial is None else dinitial
    return dx.to(x.dtype), ddt.to(x.dtype), _total(dparameters), dB, dC, dinitial
