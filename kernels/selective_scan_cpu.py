"""The selective scan on a CPU, compiled by numba: parallel over images and channels, with the state in registers.

Axes: k directions, b images, l tokens, S segments, e inner channels, n states per channel. A work item walks one
segment (usually the whole sequence) of one direction of one image for a block of channels, one chunk of tokens at a
time. The inner loops (scan_loops_cpu.py) run over the tokens of the chunk for a few states, which stay in registers;
their data stays in the first-level cache. The forward pass keeps the state before each chunk; the backward pass
rebuilds the states from there, one chunk at a time. Nothing of size l x e x n exists.

Arithmetic is fp32; 16-bit tensors are converted on the way in and out.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import scan_segments_cpu
from .backend import counting
from .cpu import BLOCK, array, kernel, leaves_threads_idle, numbers, read_rows, run, spread, tile, write_rows, zeros
from .scan_gate_cpu import combine, combine_backward
from .scan_inputs import ScanInputs
from .scan_loops_cpu import (
    CHUNK,
    GROUP,
    advance,
    arguments,
    chunks_of,
    enter,
    enter_again,
    is_gentle,
    leave,
    mark,
    place,
    position,
    read_parameters,
    read_steps,
    retreat,
)
from .scan_segments import Ends, chain
from .simd import LANES

# If a pass over the sequences has fewer work items, it cuts them into segments, which costs more than half of a forward
# pass. The number of threads must not matter: it would change the last bits.
FEW = 4

__all__ = ["CHUNK", "backward", "combine", "combine_backward", "forward"]


@kernel
def _forward(first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, initial, s, final, states):
    """x, dt, B, C and s are pairs: the numbers, and the strides of directions, images and tokens. If dt_proj
    (k, e, rank) has a rank above 0, dt is still to be multiplied by it. `initial` (k, b, S, e, n) enters the segments.
    """
    images, length, e, n, segments, block = size
    blocks, chunks = (e + block - 1) // block, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest, least = tile(rank, block), tile(1, block)[0], tile(1, block)[0]
    h, A_block, D_block, bias_block = tile(n, block), tile(n, block), tile(1, block)[0], tile(1, block)[0]
    xs, step, entering, y = tile(CHUNK, block), tile(CHUNK, block), tile(CHUNK, block), tile(CHUNK, block)
    for item in range(first, last):
        k, b, segment, part = place(item, images, segments, blocks)
        e0 = part * block
        width = min(block, e - e0)
        vectors = (width + LANES - 1) // LANES
        kept0 = e0 // BLOCK * BLOCK
        kept_row = min(BLOCK, e - kept0)
        read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        h[:] = np.float32(0)
        if len(initial):
            for i in range(n):
                for j in range(width):
                    h[i, j] = initial[k, b, segment, e0 + j, i]
        first_chunk, last_chunk = chunks_of(segment, segments, chunks)
        for c in range(first_chunk, last_chunk):
            start = c * CHUNK
            tokens = min(CHUNK, length - start)
            mark(image, b, start, length, reverse[k], begins[:tokens])
            kept_at = (((k * images + b) * chunks + c) * e + kept0) * n + e0 - kept0
            if len(states):
                write_rows((n, width, block, h, states, kept_at, kept_row))
            token = length - 1 - start if reverse[k] else start
            x_at, x_token = position(x[1], k, b, token, e0, reverse[k])
            dt_at, dt_token = position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            B_at, B_token = position(B[1], k, b, token, 0, reverse[k])
            C_at, C_token = position(C[1], k, b, token, 0, reverse[k])
            s_at, s_token = position(s[1], k, b, token, e0, reverse[k])
            read_rows((tokens, width, block, x[0], x_at, x_token, xs))
            read_steps(dt[0], dt_at, dt_token, width, block, tokens, dt_proj_block, step)
            enter((tokens, vectors, block, xs, step, bias_block, entering, D_block, y))
            gentle = is_gentle(tokens, step, lowest, least)
            m = 0
            while m < tokens:
                run_end = m + 1
                while run_end < tokens and not begins[run_end]:
                    run_end += 1
                if begins[m]:
                    h[:] = np.float32(0)
                advance((
                    n, m, run_end, vectors, block, gentle, step, A_block, entering, B[0], B_at, B_token,
                    C[0], C_at, C_token, h, y, x[0], x_at, x_token, dt[0], dt_at, dt_token, s[0], s_at, s_token,
                    states, kept_at + e * n, block // GROUP,
                ))  # fmt: skip
                m = run_end
            write_rows((tokens, width, block, y, s[0], s_at, s_token))
        if segment == segments - 1:
            for i in range(n):
                for j in range(width):
                    final[k, b, e0 + j, i] = h[i, j]


@kernel
def _backward(
    first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, states, ds, dfinal,
    dx, ddt, dA, dBC, dD, dbias, dinitial,
):  # fmt: skip
    """x, dt, B, C, ds, dx and ddt are pairs, as in `_forward`, and dfinal is (k, b, S, e, n). dA, dD and
    dbias have a row for each segment of each image. dBC (blocks, k b chunks, 2n, CHUNK) receives, from each block of
    channels, the gradients of B and then of C; the tokens of a chunk are in scan order.
    """
    images, length, e, n, segments = size
    blocks, chunks = (e + BLOCK - 1) // BLOCK, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest, least = tile(rank), tile(1)[0], tile(1)[0]
    h, g, A_block, dA_block = tile(n), tile(n), tile(n), tile(n)
    D_block, bias_block, dD_block, dbias_block = tile(1)[0], tile(1)[0], tile(1)[0], tile(1)[0]
    xs, step, slope, entering, before, decay = (
        tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK), tile(CHUNK)
    )  # fmt: skip
    dss, dentering, dstep = tile(CHUNK), tile(CHUNK), tile(CHUNK)
    dB_i, dC_i = zeros(CHUNK, LANES), zeros(CHUNK, LANES)
    dB_block, dC_block = zeros(n, CHUNK), zeros(n, CHUNK)
    for item in range(first, last):
        k, b, segment, block = place(item, images, segments, blocks)
        e0 = block * BLOCK
        width = min(BLOCK, e - e0)
        read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        h[:] = np.float32(0)
        g[:] = np.float32(0)
        if len(dfinal):
            for i in range(n):
                for j in range(width):
                    g[i, j] = dfinal[k, b, segment, e0 + j, i]
        dA_block[:] = np.float32(0)
        dD_block[:] = np.float32(0)
        dbias_block[:] = np.float32(0)
        first_chunk, last_chunk = chunks_of(segment, segments, chunks)
        for c in range(last_chunk - 1, first_chunk - 1, -1):
            start = c * CHUNK
            chunk = (k * images + b) * chunks + c
            kept_at = (chunk * e + e0) * n
            tokens = min(CHUNK, length - start)
            mark(image, b, start, length, reverse[k], begins[:tokens])
            token = length - 1 - start if reverse[k] else start
            x_at, x_token = position(x[1], k, b, token, e0, reverse[k])
            dt_at, dt_token = position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            B_at, B_token = position(B[1], k, b, token, 0, reverse[k])
            C_at, C_token = position(C[1], k, b, token, 0, reverse[k])
            ds_at, ds_token = position(ds[1], k, b, token, e0, reverse[k])
            dx_at, dx_token = position(dx[1], k, b, token, e0, reverse[k])
            ddt_at, ddt_token = position(ddt[1], k, b, token, e0, reverse[k])
            read_rows((tokens, width, BLOCK, x[0], x_at, x_token, xs))
            read_steps(dt[0], dt_at, dt_token, width, BLOCK, tokens, dt_proj_block, step)
            read_rows((tokens, width, BLOCK, ds[0], ds_at, ds_token, dss))
            enter_again((tokens, xs, step, bias_block, entering, slope))
            dentering[:] = np.float32(0)
            dstep[:] = np.float32(0)
            dB_block[:] = np.float32(0)
            dC_block[:] = np.float32(0)
            gentle = is_gentle(tokens, step, lowest, least)
            run_end = tokens
            while run_end > 0:
                m = run_end - 1
                while m > 0 and not begins[m]:
                    m -= 1
                if begins[m]:
                    h[:] = np.float32(0)
                else:
                    read_rows((n, width, BLOCK, states, kept_at, width, h))
                if run_end - m < CHUNK:
                    dB_i[:] = np.float32(0)
                    dC_i[:] = np.float32(0)
                retreat((
                    n, m, run_end, gentle, step, A_block, entering, B[0], B_at, B_token, C[0], C_at, C_token, h,
                    before, decay, dss, g, dA_block, dentering, dstep, dB_i, dC_i, dB_block, dC_block,
                    x[0], x_at, x_token, dt[0], dt_at, dt_token, ds[0], ds_at, ds_token,
                    dx[0], dx_at, dx_token, ddt[0], ddt_at, ddt_token, states, kept_at - e * n,
                ))  # fmt: skip
                if begins[m]:
                    g[:] = np.float32(0)
                run_end = m
            leave((tokens, step, slope, xs, D_block, dss, dentering, dstep, dD_block, dbias_block))
            write_rows((tokens, width, BLOCK, dentering, dx[0], dx_at, dx_token))
            write_rows((tokens, width, BLOCK, dstep, ddt[0], ddt_at, ddt_token))
            for i in range(n):
                for m in range(CHUNK):
                    dBC[block, chunk, i, m] = dB_block[i, m]
                    dBC[block, chunk, n + i, m] = dC_block[i, m]
        row = b * segments + segment
        for j in range(width):
            dD[row, k, e0 + j] = dD_block[j]
            dbias[row, k, e0 + j] = dbias_block[j]
            for i in range(n):
                dA[row, k, e0 + j, i] = dA_block[i, j]
                if segment == 0 and len(dinitial):
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
        dB_at, dB_token = position(dB[1], k, b, token, 0, reverse[k])
        dC_at, dC_token = position(dC[1], k, b, token, 0, reverse[k])
        for m in range(min(CHUNK, length - start)):
            for i in range(n):
                dB[0][np.uintp(dB_at + m * dB_token + i)] = dBC[0, item, i, m]
                dC[0][np.uintp(dC_at + m * dC_token + i)] = dBC[0, item, n + i, m]


def _total(parts: Tensor) -> Tensor:
    """The sum over the first axis, in a fixed order. So small that waking torch's threads would take longer."""
    return parts.sum(0) if counting() else torch.from_numpy(parts.numpy().sum(0))


def _units(inputs: ScanInputs, segments: int, block: int) -> int:
    """Work items for segments of images, in blocks of that many channels."""
    k, b, _, e = inputs.x.shape
    return k * b * segments * -(-e // block)


def _must_be_cut(inputs: ScanInputs, block: int) -> bool:
    return _units(inputs, 1, block) < FEW and scan_segments_cpu.segments(*inputs.x.shape) > 1


def _segments(ends: Ends | None) -> int:
    return 1 if ends is None else ends.end.shape[2]


def _entering(ends: Ends | None, A: Tensor, first: Tensor | None, *, backward: bool) -> Tensor | None:
    """What enters each segment: (k, b, S, e, n)."""
    if ends is None or _segments(ends) == 1:
        return None if first is None else first.unsqueeze(2)
    return chain(ends, A, first, backward=backward)[0]


def forward(
    inputs: ScanInputs, reverse: Sequence[bool], chunk: int, dt_proj: Tensor | None = None, ends: Ends | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e) in x's dtype, the final states (k, b, e, n), and the kept states (k, b, chunks, e n) if chunk > 0.

    With dt_proj (k, e, r), dt is (k, b, l, r) and the kernel multiplies it by dt_proj as it goes. `ends` are what
    `scan_segments_cpu.ends` returns, if the caller has them already; their number of segments is taken.
    """
    assert chunk in (0, CHUNK)
    k, b, length, e = inputs.x.shape
    n = inputs.A.shape[-1]
    if ends is None and _must_be_cut(inputs, LANES):
        ends = scan_segments_cpu.ends(inputs, reverse, dt_proj)
    segments = _segments(ends)
    block = LANES if leaves_threads_idle(_units(inputs, segments, BLOCK)) else BLOCK
    entering = _entering(ends, inputs.A, inputs.initial, backward=False)
    s = torch.empty(k, b, length, e)
    final = torch.empty(k, b, e, n)
    states = torch.empty(k, b, -(-length // chunk), e * n) if chunk else torch.empty(0)
    run(
        _forward, _units(inputs, segments, block), (b, length, e, n, segments, block),
        *arguments(inputs, reverse, dt_proj), array(entering, 5),
        spread(s), numbers(final), numbers(states.view(-1)),
    )  # fmt: skip
    return s.to(inputs.x.dtype), final, states


def backward(
    inputs: ScanInputs, states: Tensor, ds: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], chunk: int,
    dt_proj: Tensor | None = None, *, dB: Tensor | None = None, dC: Tensor | None = None, ends: Ends | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, ddt, the gradients of A, D and dt_bias one after the other (k e (n + 2)), dB, dC, and that of the initial
    state, which is empty if that is None. ddt is as wide as x, with dt_proj too. A given dB or dC is written in place;
    its last axis is contiguous. `ends` are what `scan_segments_cpu.ends_backward` returns, as in `forward`.
    """
    assert chunk == CHUNK
    x, _, A, B, C, _, _, initial, _ = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    if ends is None and _must_be_cut(inputs, BLOCK):
        ends = scan_segments_cpu.ends_backward(inputs, ds, reverse, dt_proj)
    segments = _segments(ends)
    reaching = _entering(ends, A, dfinal, backward=True)
    blocks, chunks, rows = -(-e // BLOCK), -(-length // CHUNK), b * segments
    dx, ddt = torch.empty(k, b, length, e), torch.empty(k, b, length, e)
    dparameters = torch.empty(rows, k * e * (n + 2))
    dA, dD, dbias = dparameters.split([k * e * n, k * e, k * e], dim=1)
    dA, dD, dbias = dA.view(rows, k, e, n), dD.view(rows, k, e), dbias.view(rows, k, e)
    dB, dC = torch.empty_like(B) if dB is None else dB, torch.empty_like(C) if dC is None else dC
    wide = B.dtype == torch.float32
    written = (dB, dC) if wide else (torch.empty(B.shape), torch.empty(C.shape))
    dBC = torch.empty(blocks, k * b * chunks, 2 * n, CHUNK)
    dinitial = torch.empty((0, 0, 0, 0) if initial is None else (k, b, e, n))
    run(
        _backward, _units(inputs, segments, BLOCK), (b, length, e, n, segments),
        *arguments(inputs, reverse, dt_proj), numbers(states.view(-1)),
        spread(ds), array(reaching, 5), spread(dx), spread(ddt),
        *(numbers(t) for t in (dA, dBC, dD, dbias, dinitial)),
    )  # fmt: skip
    run(_gather, k * b * chunks, (b, length, n), numbers(dBC), np.array(reverse), *map(spread, written))
    if not wide:
        dB.copy_(written[0])
        dC.copy_(written[1])
    dinitial = dinitial.flatten() if initial is None else dinitial
    return dx.to(x.dtype), ddt.to(x.dtype), _total(dparameters), dB, dC, dinitial
