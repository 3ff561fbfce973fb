"""Segments of a scan on a GPU: what each adds, and what enters each. scan_segments.py has the equations.

Axes: k directions, b images, l tokens, S segments in scan order, e inner channels, n states per channel.

A program owns some channels of one segment, image and direction, in the layout of the scans
(selective_scan_triton.py), and does no more than the state needs: forward nothing with C, D or outputs; backward
nothing with x, B or states. `entering` is what the scans start from, in one launch for the ends and one for the chain.
"""
# The tools take Triton's language for Python; Triton's tuples grow by + only:
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import segment_choice
from .compile_case import CompileCase
from .large import cdiv, is_large, scan_grid, scan_program, token_number
from .scan_inputs import ScanInputs
from .scan_rows_triton import CHUNK, OPTIONS, channels_of, mask_of, pack, scan_case, width_of
from .scan_segments import Ends
from .triton_tiles import LOG2_E, decay_rate, keep, restart, row_pairs, softplus, touch

CHANNELS, WARPS = 32, 2
# numbers of a state per program of the chain
CELLS = 256


@triton.jit
def _walk(
    values, dt, A, packed, starts, dt_bias, end, steps, length, e, backwards, span, count,
    values_k, values_b, values_l, dt_k, dt_b, dt_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, BACKWARD: tl.constexpr,
    LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute the end and the summed steps of the first `count` segments in walking order, of `values`, which are x or
    ds. Backward, the walk starts at the last chunk, and h is the gradient that a token passes on to the state before.
    """
    T: tl.constexpr = 8
    chunks = tl.cdiv(length, T)
    segments = tl.cdiv(chunks, span)
    blocks = tl.cdiv(e, CHANNELS)
    program, b, k, _blocks, images = scan_program(blocks * count, LARGE)
    block = program % blocks
    segment = program // blocks
    if BACKWARD:
        segment += segments - count
    first = segment * span
    stop = tl.minimum(first + span, chunks)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    row = (k * images + b).to(tl.int64)
    state = tl.arange(0, N)
    if UNPADDED:
        here = tl.full((CHANNELS,), True, tl.int1)
        cell_here = tl.full((CHANNELS, N), True, tl.int1)
    else:
        here = channel < e
        cell_here = here[:, None] & (state < n)[None, :]
    cell = channel[:, None] * n + state[None, :]

    rate = decay_rate(A + k * e * n, cell, cell_here, LOG_A) * LOG2_E
    if dt_bias is not None:
        bias = tl.load(dt_bias + k * e + channel, mask=here, other=0.0)
    h = tl.zeros((CHANNELS, N), tl.float32)
    total = tl.zeros((T, CHANNELS), tl.float32)
    began = tl.zeros((T,), tl.int32)

    at = stop - 1 if BACKWARD else first
    ahead = -T if BACKWARD else T
    reverse = (backwards >> k) & 1 == 1
    slot = token_number(at * T, LARGE) + tl.arange(0, T)
    token = tl.where(reverse, length - 1 - slot, slot)[:, None]
    value_cell = token * values_l + channel[None, :]
    dt_cell = token * dt_l + channel[None, :]
    values += k.to(tl.int64) * values_k + b.to(tl.int64) * values_b
    dt += k.to(tl.int64) * dt_k + b.to(tl.int64) * dt_b
    packed += (row * chunks + at) * T * (2 * N)
    if starts is not None:
        starts += (row * chunks + at) * T
    valid = (slot < length)[:, None] & here[None, :]
    value_next = tl.load(values + value_cell, mask=valid, other=0.0)
    # a slot after the last token gets step 0 and does not change the state
    dt_next = tl.load(dt + dt_cell, mask=valid, other=float("-inf"))
    touched = touch(packed, T * 2 * N)
    unused = touched
    for remaining in range(stop - first - 1, -1, -1):
        tile = value_next.to(tl.float32)
        v = dt_next.to(tl.float32)
        unused ^= touched

        # the next chunk is loaded while this one is computed; the last one loads itself once more
        forth = tl.where(remaining > 0, ahead, 0)
        slot += forth
        tokens = token_number(tl.where(reverse, -forth, forth), LARGE)
        value_cell += tokens * values_l
        dt_cell += tokens * dt_l
        valid = (slot < length)[:, None] & here[None, :]
        value_next = tl.load(values + value_cell, mask=valid, other=0.0)
        dt_next = tl.load(dt + dt_cell, mask=valid, other=float("-inf"))
        touched = touch(packed + forth * (2 * N), T * 2 * N)

        if dt_bias is not None:
            v += bias[None, :]
        step_tile, _ = softplus(v)
        total += step_tile
        if not BACKWARD:
            tile *= step_tile
        step, inflow = row_pairs(step_tile, tile)
        for i in tl.static_range(T - 1 if BACKWARD else 0, -1 if BACKWARD else T, -1 if BACKWARD else 1):
            if BACKWARD:
                C = tl.load(packed + i * (2 * N) + N + state)
                h += inflow[i][:, None] * C[None, :]
                h = restart(starts, i, tl.exp2(step[i][:, None] * rate) * h)
            else:
                B = tl.load(packed + i * (2 * N) + state)
                h = restart(starts, i, h)
                h = tl.exp2(step[i][:, None] * rate) * h + inflow[i][:, None] * B[None, :]
        packed += forth * (2 * N)
        if starts is not None:
            began |= tl.load(starts + tl.arange(0, T))
            starts += forth

    row = row * segments + segment
    tl.store(end + row * e * n + cell, h, mask=cell_here)
    sums = tl.sum(total, 0)
    if starts is not None:
        sums = tl.where(tl.max(began, 0) != 0, -1.0, sums)
    tl.store(steps + row * e + channel, sums, mask=here)
    keep(end, unused, length)


@triton.jit(do_not_specialize=["length", "backwards", "span", "count"])
def scan_segments_fwd_kernel(
    x, dt, A, packed, starts, dt_bias, end, steps, length, e, backwards, span, count,
    x_k, x_b, x_l, dt_k, dt_b, dt_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, LOG_A: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Compute the states after the first `count` segments."""
    _walk(
        x, dt, A, packed, starts, dt_bias, end, steps, length, e, backwards, span, count,
        x_k, x_b, x_l, dt_k, dt_b, dt_l, n, N, CHANNELS, UNPADDED, False, LOG_A, LARGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "backwards", "span", "count"])
def scan_segments_bwd_kernel(
    ds, dt, A, packed, starts, dt_bias, end, steps, length, e, backwards, span, count,
    ds_k, ds_b, ds_l, dt_k, dt_b, dt_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, LOG_A: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients before the last `count` segments."""
    _walk(
        ds, dt, A, packed, starts, dt_bias, end, steps, length, e, backwards, span, count,
        ds_k, ds_b, ds_l, dt_k, dt_b, dt_l, n, N, CHANNELS, UNPADDED, True, LOG_A, LARGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["segments"])
def scan_segments_chain_kernel(
    end, steps, A, first, entering, e, segments,
    n: tl.constexpr, CELLS: tl.constexpr, BACKWARD: tl.constexpr, LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Pass `first`, or zero, through the segments, but for the last in walking order, whose end nobody needs."""
    block, b, k, _, images = scan_program(tl.cdiv(e * n, CELLS), LARGE)
    cell = block * CELLS + tl.arange(0, CELLS)
    here = cell < e * n
    row = (k * images + b).to(tl.int64)
    rate = decay_rate(A + k * e * n, cell, here, LOG_A) * LOG2_E
    if first is not None:
        passed = tl.load(first + row * e * n + cell, mask=here, other=0.0)
    else:
        passed = tl.zeros((CELLS,), tl.float32)
    at = row * segments
    if BACKWARD:
        at += segments - 1
    end += at * e * n + cell
    entering += at * e * n + cell
    steps += at * e + cell // n
    ahead = -1 if BACKWARD else 1
    for done in range(0, segments, 4):
        # four loads under way at a time
        added = ()
        summed = ()
        for i in tl.static_range(4):
            there = here & (done + i < segments - 1)
            added = added + (tl.load(end + i * ahead * e * n, mask=there, other=0.0),)
            summed = summed + (tl.load(steps + i * ahead * e, mask=there, other=0.0),)
        for i in tl.static_range(4):
            tl.store(entering + i * ahead * e * n, passed, mask=here & (done + i < segments))
            # Where an image begins, nothing of what entered is left, not even a NaN. Beyond the last segment, nothing
            # changes.
            passed = tl.where(summed[i] < 0, added[i], tl.exp2(summed[i] * rate) * passed + added[i])
        end += 4 * ahead * e * n
        entering += 4 * ahead * e * n
        steps += 4 * ahead * e


def ends(inputs: ScanInputs, reverse: Sequence[bool], *, log_A: bool) -> Ends:
    """What each segment adds to the state. With `log_A`, `inputs.A` is A_log."""
    return _all_ends(inputs, None, reverse, log_A)


def ends_backward(inputs: ScanInputs, ds: Tensor, reverse: Sequence[bool], *, log_A: bool) -> Ends:
    """What each segment adds to the gradient that it passes on to the state before it; ds (k, b, l, e) has stride 1
    along e.
    """
    return _all_ends(inputs, ds, reverse, log_A)


def entering(
    inputs: ScanInputs, ds: Tensor | None, packed: Tensor, starts: Tensor | None, reverse: Sequence[bool],
    first: Tensor | None, given: Ends | None, log_A: bool,
) -> tuple[int | None, int, Tensor | None]:  # fmt: skip
    """The chunks of a segment (None: the sequence is one), the number of segments, and what enters each (k, b, S, e,
    n): the state, or with ds the gradient. `first` (k, b, e, n) enters the sequence; `given` are the ends, if known.
    """
    length = inputs.x.shape[2]
    count = _count(inputs) if given is None else given.end.shape[2]
    if count == 1:
        return None, 1, first
    span = segment_choice.span(length, count)
    found = given or _ends(inputs, ds, packed, starts, reverse, span, count, count - 1, log_A)
    return span, count, _chain(found, inputs.A, first, ds is not None, log_A)


def _all_ends(inputs: ScanInputs, ds: Tensor | None, reverse: Sequence[bool], log_A: bool) -> Ends:
    packed, starts = pack(inputs.B, inputs.C, inputs.image, reverse, width_of(inputs.A.shape[-1]))
    count = _count(inputs)
    span = segment_choice.span(inputs.x.shape[2], count)
    return _ends(inputs, ds, packed, starts, reverse, span, count, count, log_A)


def _count(inputs: ScanInputs) -> int:
    k, b, length, e = inputs.x.shape
    return segment_choice.segments(k, b, length, e, inputs.A.shape[-1])


def _ends(
    inputs: ScanInputs, ds: Tensor | None, packed: Tensor, starts: Tensor | None, reverse: Sequence[bool], span: int,
    segments: int, count: int, log_A: bool,
) -> Ends:  # fmt: skip
    """The ends of the first `count` segments, in walking order; the others are not written."""
    values = inputs.x if ds is None else ds
    dt, A = inputs.dt, inputs.A
    k, b, length, e = values.shape
    n = A.shape[-1]
    width = width_of(n)
    channels = channels_of(width, CHANNELS)
    end, steps = A.new_empty(k, b, segments, e, n), A.new_empty(k, b, segments, e)
    grid = cdiv(e, channels) * count, b, k
    large = is_large(grid, packed.shape[2], e, 2 * width, values.stride(2), dt.stride(2))
    kernel = scan_segments_fwd_kernel if ds is None else scan_segments_bwd_kernel
    with torch.cuda.device_of(values):
        kernel[scan_grid(grid, large)](
            values, dt, A, packed, starts, inputs.dt_bias, end, steps, length, e, mask_of(reverse), span, count,
            *values.stride()[:3], *dt.stride()[:3],
            n=n, N=width, CHANNELS=channels, UNPADDED=e % channels == 0 and n == width, LOG_A=log_A, LARGE=large,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return Ends(end, steps)


def _chain(ends: Ends, A: Tensor, first: Tensor | None, backward: bool, log_A: bool) -> Tensor:
    """What enters each segment (k, b, S, e, n), as `scan_segments.chain` says."""
    k, b, segments, e, n = ends.end.shape
    entering = torch.empty_like(ends.end)
    grid = cdiv(e * n, CELLS), b, k
    large = is_large(grid, 0, 0)
    with torch.cuda.device_of(A):
        scan_segments_chain_kernel[scan_grid(grid, large)](
            *ends, A, first, entering, e, segments,
            n=n, CELLS=CELLS, BACKWARD=backward, LOG_A=log_A, LARGE=large, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return entering


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """All three kernels as a model of inner width e launches them, at n = 16, for `kernels.aot`: "_packed" has image
    numbers and A instead of A_log.
    """
    n = 16
    constants = {"n": n, "N": n, "CHANNELS": CHANNELS, "UNPADDED": e % CHANNELS == 0, "LARGE": False}
    walks = [
        scan_case(
            dtype, kernel, {**constants, "LOG_A": not packed}, packed, WARPS, segments=True,
            tokens=CHUNK, channels=CHANNELS, bytes=2 * dtype.itemsize + 4 * 2 * n / e, exponentials=n,
        )
        for kernel in (scan_segments_fwd_kernel, scan_segments_bwd_kernel)
        for packed in ("", "_packed")
    ]  # fmt: skip
    chain = {"n": n, "CELLS": CELLS, "LOG_A": True, "LARGE": False}
    return walks + [
        scan_case(
            dtype, scan_segments_chain_kernel, {**chain, "BACKWARD": backward, "first": None}, variant, WARPS,
            segments=True, tokens=4, channels=CELLS // n, bytes=4 * (2 * n + 1),
        )
        for backward, variant in ((False, ""), (True, "_backward"))
    ]  # fmt: skip
