"""What segments of a scan add, on a CPU: the work of a scan that only the states need, parallel over segments too.

Axes: k directions, b images, S segments, l tokens, e inner channels, n states per channel. A work item walks one
segment of one direction of one image for a block of channels. A segment consists of complete chunks, in scan order.
"""
# numba and simd.py infer the types of what they compile:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .cpu import BLOCK, kernel, numbers, read_rows, run, spread, tile
from .scan_inputs import ScanInputs
from .scan_loops_cpu import (
    CHUNK,
    DECAYS,
    GROUP,
    arguments,
    chunks_of,
    enter,
    is_gentle,
    mark,
    place,
    position,
    read_parameters,
    read_steps,
    softplus,
)
from .scan_segments import Ends
from .simd import LANES, Variable, emitted

# A segment has at least this many tokens, and no more segments are cut than this many work items need.
SHORTEST = 512
ITEMS = 64


@emitted
def _collect(
    code, n, first, last, width, gentle, step, A, entering, B, B_at, B_token, h, x, x_at, x_token, dt, dt_at, dt_token
):  # fmt: skip
    """`advance` without what is read from the states: h moves over the tokens [first, last)."""
    with code.loop(0, width, LANES) as j:

        def walk(states):
            A_i = [A[i * BLOCK + j] for i in states]
            h_i = [Variable(h[i * BLOCK + j]) for i in states]
            for i in states:
                x.fetch(x_at + (i + CHUNK) * x_token + j)
                dt.fetch(dt_at + (i + CHUNK) * dt_token + j)
            with code.either(gentle) as branches:
                for branch, decay in zip(branches, DECAYS, strict=True):
                    with branch, code.loop(first, last) as m:
                        step_m, entering_m = step[m * BLOCK + j], entering[m * BLOCK + j]
                        for i, A_ij, h_ij in zip(states, A_i, h_i, strict=True):
                            B_im = B.spread(B_at + m * B_token + i)
                            h_ij.set(decay(step_m, A_ij) * h_ij.get() + entering_m * B_im)
            for i, h_ij in zip(states, h_i, strict=True):
                h[i * BLOCK + j] = h_ij.get()

        code.in_groups(n, GROUP, walk)


@emitted
def _pass_back(
    code, n, first, last, width, gentle, step, A, ds, C, C_at, C_token, g, far_dt, dt_at, dt_token, far_ds, ds_at,
    ds_token,
):  # fmt: skip
    """`retreat` without gradients of the inputs: g, the gradient that reaches the state after the tokens [first, last),
    becomes the one that reaches the state before them.
    """
    with code.loop(0, width, LANES) as j:

        def walk(states):
            A_i = [A[i * BLOCK + j] for i in states]
            g_i = [Variable(g[i * BLOCK + j]) for i in states]
            for i in states:
                far_dt.fetch(dt_at + (i - CHUNK) * dt_token + j)
                far_ds.fetch(ds_at + (i - CHUNK) * ds_token + j)
            with code.either(gentle) as branches:
                for branch, decay in zip(branches, DECAYS, strict=True):
                    with branch, code.loop(first, last) as passed:
                        m = last - 1 - (passed - first)
                        step_m, ds_m = step[m * BLOCK + j], ds[m * BLOCK + j]
                        for i, A_ij, g_ij in zip(states, A_i, g_i, strict=True):
                            reached = ds_m * C.spread(C_at + m * C_token + i) + g_ij.get()
                            g_ij.set(reached * decay(step_m, A_ij))
            for i, g_ij in zip(states, g_i, strict=True):
                g[i * BLOCK + j] = g_ij.get()

        code.in_groups(n, GROUP, walk)


@kernel
def _add_steps(step, steps):
    for m in range(len(step)):
        for j in range(BLOCK):
            steps[j] += step[m, j]


@kernel
def _ends(first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, end, steps):
    """The arguments before `end` are those of `selective_scan_cpu._forward`."""
    images, length, e, n, segments = size
    blocks, chunks = (e + BLOCK - 1) // BLOCK, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest, D_block, bias_block, total = tile(rank), tile(1)[0], tile(1)[0], tile(1)[0], tile(1)[0]
    h, A_block, least = tile(n), tile(n), tile(1)[0]
    xs, step, entering = tile(CHUNK), tile(CHUNK), tile(CHUNK)
    for item in range(first, last):
        k, b, segment, block = place(item, images, segments, blocks)
        e0 = block * BLOCK
        width = min(BLOCK, e - e0)
        read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        h[:] = np.float32(0)
        total[:] = np.float32(0)
        any_begins = False
        first_chunk, last_chunk = chunks_of(segment, segments, chunks)
        for c in range(first_chunk, last_chunk):
            start = c * CHUNK
            tokens = min(CHUNK, length - start)
            mark(image, b, start, length, reverse[k], begins[:tokens])
            token = length - 1 - start if reverse[k] else start
            x_at, x_token = position(x[1], k, b, token, e0, reverse[k])
            dt_at, dt_token = position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            B_at, B_token = position(B[1], k, b, token, 0, reverse[k])
            read_rows((tokens, width, BLOCK, x[0], x_at, x_token, xs))
            read_steps(dt[0], dt_at, dt_token, width, BLOCK, tokens, dt_proj_block, step)
            enter((tokens, (width + LANES - 1) // LANES, BLOCK, xs, step, bias_block, entering))
            _add_steps(step[:tokens], total)
            gentle = is_gentle(tokens, step, lowest, least)
            m = 0
            while m < tokens:
                run_end = m + 1
                while run_end < tokens and not begins[run_end]:
                    run_end += 1
                if begins[m]:
                    h[:] = np.float32(0)
                    any_begins = True
                _collect((
                    n, m, run_end, width, gentle, step, A_block, entering, B[0], B_at, B_token, h,
                    x[0], x_at, x_token, dt[0], dt_at, dt_token,
                ))  # fmt: skip
                m = run_end
        for j in range(width):
            steps[k, b, segment, e0 + j] = np.float32(-1) if any_begins else total[j]
            for i in range(n):
                end[k, b, segment, e0 + j, i] = h[i, j]


@kernel
def _ends_backward(first, last, size, x, dt, dt_proj, A, B, C, D, dt_bias, image, reverse, ds, end, steps):
    images, length, e, n, segments = size
    blocks, chunks = (e + BLOCK - 1) // BLOCK, (length + CHUNK - 1) // CHUNK
    begins = np.empty(CHUNK, np.bool_)
    rank = dt_proj.shape[2]
    dt_proj_block, lowest, D_block, bias_block, total = tile(rank), tile(1)[0], tile(1)[0], tile(1)[0], tile(1)[0]
    g, A_block, least = tile(n), tile(n), tile(1)[0]
    step, dss = tile(CHUNK), tile(CHUNK)
    for item in range(first, last):
        k, b, segment, block = place(item, images, segments, blocks)
        e0 = block * BLOCK
        width = min(BLOCK, e - e0)
        read_parameters(k, e0, width, dt_proj, A, D, dt_bias, dt_proj_block, A_block, lowest, D_block, bias_block)
        g[:] = np.float32(0)
        total[:] = np.float32(0)
        any_begins = False
        first_chunk, last_chunk = chunks_of(segment, segments, chunks)
        for c in range(last_chunk - 1, first_chunk - 1, -1):
            start = c * CHUNK
            tokens = min(CHUNK, length - start)
            mark(image, b, start, length, reverse[k], begins[:tokens])
            token = length - 1 - start if reverse[k] else start
            dt_at, dt_token = position(dt[1], k, b, token, 0 if rank > 0 else e0, reverse[k])
            C_at, C_token = position(C[1], k, b, token, 0, reverse[k])
            ds_at, ds_token = position(ds[1], k, b, token, e0, reverse[k])
            read_steps(dt[0], dt_at, dt_token, width, BLOCK, tokens, dt_proj_block, step)
            read_rows((tokens, width, BLOCK, ds[0], ds_at, ds_token, dss))
            softplus((tokens, width, BLOCK, step, bias_block))
            _add_steps(step[:tokens], total)
            gentle = is_gentle(tokens, step, lowest, least)
            run_end = tokens
            while run_end > 0:
                m = run_end - 1
                while m > 0 and not begins[m]:
                    m -= 1
                _pass_back((
                    n, m, run_end, width, gentle, step, A_block, dss, C[0], C_at, C_token, g,
                    dt[0], dt_at, dt_token, ds[0], ds_at, ds_token,
                ))  # fmt: skip
                if begins[m]:
                    g[:] = np.float32(0)
                    any_begins = True
                run_end = m
        for j in range(width):
            steps[k, b, segment, e0 + j] = np.float32(-1) if any_begins else total[j]
            for i in range(n):
                end[k, b, segment, e0 + j, i] = g[i, j]


def ends(inputs: ScanInputs, reverse: Sequence[bool], dt_proj: Tensor | None = None) -> Ends:
    """What each segment adds to the state; reads neither C nor D. With dt_proj (k, e, r), dt is (k, b, l, r)."""
    size, found = _prepared(inputs)
    run(_ends, _units(found), size, *arguments(inputs, reverse, dt_proj), *map(numbers, found))
    return found


def ends_backward(inputs: ScanInputs, ds: Tensor, reverse: Sequence[bool], dt_proj: Tensor | None = None) -> Ends:
    """What each segment adds to the gradient that it passes on; ds (k, b, l, e). Reads neither x nor B."""
    size, found = _prepared(inputs)
    run(_ends_backward, _units(found), size, *arguments(inputs, reverse, dt_proj), spread(ds), *map(numbers, found))
    return found


def _prepared(inputs: ScanInputs) -> tuple[tuple[int, ...], Ends]:
    """Sizes for the kernels, and what they fill."""
    k, b, length, e = inputs.x.shape
    n, count = inputs.A.shape[-1], segments(*inputs.x.shape)
    return (b, length, e, n, count), Ends(torch.empty(k, b, count, e, n), torch.empty(k, b, count, e))


def segments(k: int, b: int, length: int, e: int) -> int:
    """The number of segments. The number of threads must not matter: it would change the last bits."""
    return max(1, min(-(-ITEMS // (k * b * -(-e // BLOCK))), length // SHORTEST))


def _units(found: Ends) -> int:
    k, b, segments, e = found.steps.shape
    return k * b * segments * -(-e // BLOCK)
