"""The loops of the CPU scans over the tokens of one chunk, for the channels of one block; states stay in registers.

Tiles are (tokens of the chunk, block), or (n, block) for values of states; a block has at most BLOCK channels. A is
already scaled by log2(e). B_at is the index of the chunk's first token in B, B_token the distance to the next token;
likewise for the others.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu import BLOCK, COLUMNS, LOG2E, array, inline, kernel, numbers, read_rows, spread
from .scan_inputs import ScanInputs
from .simd import (
    LANES,
    Variable,
    emitted,
    exp2_of_product,
    exp2_of_product_or_least,
    softplus_and_slope,
    sums,
)

# Tokens between kept states: fp32 states then cost n / 16 values per token and channel.
CHUNK = 16

# States, or vectors of channels, that one loop over tokens advances: enough work between two steps of a recurrence.
GROUP = 4


@emitted
def project(code, tokens, vectors, block, rank, low, low_at, low_token, weight, step):
    """step = low times weight (rank, block): projects dt here, so that it is never written and read again."""
    with code.loop(0, tokens) as m:

        def columns(vectors_of_group):
            columns = [v * LANES for v in vectors_of_group]
            sums = [Variable(code.vector(0)) for _ in columns]
            with code.loop(0, rank) as r:
                low_r = low.spread(low_at + m * low_token + r)
                for j, total in zip(columns, sums, strict=True):
                    total.set(low_r * weight[r * block + j] + total.get())
            for j, total in zip(columns, sums, strict=True):
                step[m * block + j] = total.get()

        code.in_groups(vectors, GROUP, columns)


@emitted
def enter(code, tokens, vectors, block, xs, step, dt_bias, entering, D=None, y=None):
    """`step` becomes softplus(dt + bias). `entering` times B is what enters the state at a token. y starts as D x."""
    with code.loop(0, tokens) as m:

        def columns(vectors_of_group):
            for v in vectors_of_group:
                j = v * LANES
                at = m * block + j
                after, _ = softplus_and_slope(step[at] + dt_bias[j])
                step[at] = after
                entering[at] = after * xs[at]
                if y is not None:
                    y[at] = D[j] * xs[at]

        code.in_groups(vectors, GROUP, columns)


@emitted
def softplus(code, tokens, width, block, step, dt_bias):
    """`enter` where nothing needs what enters the states."""
    with code.loop(0, tokens) as m, code.loop(0, width, LANES) as j:
        step[m * block + j], _ = softplus_and_slope(step[m * block + j] + dt_bias[j])


@emitted
def enter_again(code, tokens, xs, step, dt_bias, entering, slope):
    """`_enter` for the backward pass, which needs the slope of the softplus."""
    with code.loop(0, tokens) as m:
        for j in COLUMNS:
            at = m * BLOCK + j
            after, slope[at] = softplus_and_slope(step[at] + dt_bias[code.index(j)])
            step[at] = after
            entering[at] = after * xs[at]


DECAYS = exp2_of_product, exp2_of_product_or_least


@emitted
def advance(
    code, n, first, last, vectors, block, gentle, step, A, entering, B, B_at, B_token, C, C_at, C_token, h, y,
    x, x_at, x_token, dt, dt_at, dt_token, s, s_at, s_token, states, states_at, line,
):  # fmt: skip
    """The inner loops of the forward pass, over the tokens [first, last) of a chunk: a few states of a vector of
    channels at a time, with h in registers. In a `gentle` chunk no decay underflows.
    """

    def walk(states_of_group):
        with code.loop(0, vectors) as v:
            j = v * LANES
            for q in range(GROUP):
                m, c = states_of_group[0] + v + q, line * q
                x.fetch(x_at + (m + CHUNK) * x_token + c)
                dt.fetch(dt_at + (m + CHUNK) * dt_token + c)
                s.fetch(s_at + m * s_token + c, to_write=True)
                states.fetch(states_at + m * BLOCK + c, to_write=True)
            A_i = [A[i * block + j] for i in states_of_group]
            h_i = [Variable(h[i * block + j]) for i in states_of_group]
            with code.either(gentle) as branches:
                for branch, decay in zip(branches, DECAYS, strict=True):
                    with branch, code.loop(first, last) as m:
                        at = m * block + j
                        step_m, entering_m, total = step[at], entering[at], y[at]
                        for i, A_ij, h_ij in zip(states_of_group, A_i, h_i, strict=True):
                            B_im, C_im = B.spread(B_at + m * B_token + i), C.spread(C_at + m * C_token + i)
                            h_ij.set(decay(step_m, A_ij) * h_ij.get() + entering_m * B_im)
                            total = h_ij.get() * C_im + total
                        y[at] = total
            for i, h_ij in zip(states_of_group, h_i, strict=True):
                h[i * block + j] = h_ij.get()

    code.in_groups(n, GROUP, walk)


@emitted
def retreat(
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
            for branch, power in zip(branches, DECAYS, strict=True):
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
def leave(code, tokens, step, slope, xs, D, ds, dentering, dstep, dD, dbias):
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


@emitted
def _least_exponents(code, tokens, block, step, lowest, least):
    """least (block) = the least step times A of each channel."""
    with code.loop(0, block, LANES) as j:
        least_j = Variable(code.vector(0))
        with code.loop(0, tokens) as m:
            exponent = step[m * block + j] * lowest[j]
            least_j.set(exponent.below(least_j.get(), exponent, least_j.get()))
        least[j] = least_j.get()


@inline
def is_gentle(tokens, step, lowest, least):
    """Whether no decay of these tokens underflows; `least` (block) is a buffer."""
    _least_exponents((tokens, len(least), step, lowest, least))
    underflows = False
    for j in range(len(least)):
        underflows |= least[j] < np.float32(-126)
    return not underflows


@kernel
def mark(image, b, start, length, reverse, begins):
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
def read_parameters(
    k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block
):  # fmt: skip
    """The parameters of the block's channels; A scaled by log2(e), and the lowest of each channel."""
    _column(D, k, e0, width, D_block)
    _column(dt_bias, k, e0, width, bias_block)
    for r in range(dt_proj.shape[2]):
        _column(dt_proj[:, :, r], k, e0, width, dt_proj_block[r])
    A_block[:] = np.float32(0)
    lowest[:] = np.float32(0)
    for i in range(len(A_block)):
        for j in range(width):
            A_block[i, j] = A[k, e0 + j, i] * LOG2E
            lowest[j] = min(lowest[j], A_block[i, j])


@inline
def position(strides, k, b, token, channel, reverse):
    """Where a token's number is, and how far from there the next token's is in scan order."""
    at = k * strides[0] + b * strides[1] + token * strides[2] + channel
    return at, -strides[2] if reverse else strides[2]


@inline
def read_steps(dt, at, token, width, block, tokens, dt_proj_block, step):
    """dt of the chunk's tokens, multiplied by its projection if that has a rank above 0."""
    rank = len(dt_proj_block)
    if rank > 0:
        project((tokens, block // LANES, block, rank, dt, at, token, dt_proj_block, step))
    else:
        read_rows((tokens, width, block, dt, at, token, step))


@inline
def place(item, images, segments, blocks):
    """The direction, image, segment and block of channels of a work item."""
    return (
        item // (images * segments * blocks),
        item // (segments * blocks) % images,
        item // blocks % segments,
        (item % blocks),
    )


@inline
def chunks_of(segment, segments, chunks):
    """The first chunk of a segment, and the first one after it: segments differ by one chunk at most."""
    return chunks * segment // segments, chunks * (segment + 1) // segments


def arguments(inputs: ScanInputs, reverse: Sequence[bool], dt_proj: Tensor | None) -> tuple[Any, ...]:
    """What the kernels read, but for states and gradients, in the order of their arguments."""
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
