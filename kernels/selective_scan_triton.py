"""The selective scan on a GPU: both directions of a mixer in one launch, with the states in registers.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.

A program owns some channels of one image and one direction and walks its tokens in scan order, CHUNK at a time. Its
state is a tile (channels, n) spread over the lanes: each channel has four lanes that hold n/4 states each, so that B
and C cost a lane one vector load, and sums over n and over channels are both short. Work per (token, channel) that does
not involve a state (softplus, conversions, loads, stores) is done on (CHUNK, channels) tiles with one value per lane.
triton_tiles.py moves values between the two layouts and sums across lanes, once per chunk.

Nothing should wait for memory: a chunk computes with what the chunk before it loaded into registers (x and dt; in the
backward pass also ds and the kept state). Rows of B and C would need 64 registers; their eight lines are only brought
into the first-level cache a chunk ahead, by a load whose result nothing needs (`touch`, `keep`).

The backward pass needs every state. The forward pass keeps one every CHUNK tokens (64 / CHUNK bytes per token and
channel at n = 16); the backward pass walks the chunks from the last to the first and rebuilds the states of a chunk,
and their decays, in registers. For CHUNK = 8, 255 registers hold sixteen channels per warp if every second state is
computed twice.

If a sequence is long and programs are few, each walks a segment of it; scan_segments_triton.py computes what enters.
"""
# The tools take Triton's language for Python; Triton's tuples grow by + only:
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .large import cdiv, is_large, scan_grid, token_number
from .scan_gate_triton import combine, combine_backward
from .scan_inputs import ScanInputs
from .scan_rows_triton import CHUNK, OPTIONS, channels_of, mask_of, pack, scan_case, walk_program, width_of
from .scan_segments import Ends
from .scan_segments_triton import entering
from .selective_scan_bwd_triton import backward
from .triton_tiles import LOG2_E, decay_rate, keep, restart, row_pairs, softplus, sum_states, touch

__all__ = ["CHUNK", "backward", "combine", "combine_backward", "compile_cases", "forward"]

# Sixteen channels per warp. Two warps wait for each other less than four; a single one would read rows of B and C for
# sixteen channels only.
CHANNELS, WARPS = 32, 2


@triton.jit(do_not_specialize=["length", "backwards", "span"])
def selective_scan_fwd_kernel(
    x, dt, A, packed, starts, D, dt_bias, initial, s, final, states, length, e, backwards, span,
    x_k, x_b, x_l, dt_k, dt_b, dt_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, KEEP: tl.constexpr,
    LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute s and the last state; with KEEP, also the state before each chunk. UNPADDED: no channel or state of a
    block is padding. With `span`, a program walks a segment of that many chunks; `initial` has a state for each.
    """
    T: tl.constexpr = 8
    chunks = tl.cdiv(length, T)
    block, b, k, segment, first, stop, _blocks, images, segments = walk_program(chunks, span, e, CHANNELS, LARGE)
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
    skip = tl.load(D + k * e + channel, mask=here, other=0.0)
    if dt_bias is not None:
        bias = tl.load(dt_bias + k * e + channel, mask=here, other=0.0)
    if initial is not None:
        h = tl.load(initial + (row * segments + segment) * e * n + cell, mask=cell_here, other=0.0)
    else:
        h = tl.zeros((CHANNELS, N), tl.float32)

    reverse = (backwards >> k) & 1 == 1
    slot = token_number(first * T, LARGE) + tl.arange(0, T)
    token = tl.where(reverse, length - 1 - slot, slot)[:, None]
    ahead = token_number(tl.where(reverse, -T, T), LARGE)
    x_cell = token * x_l + channel[None, :]
    dt_cell = token * dt_l + channel[None, :]
    s_cell = token * e + channel[None, :]
    x += k.to(tl.int64) * x_k + b.to(tl.int64) * x_b
    dt += k.to(tl.int64) * dt_k + b.to(tl.int64) * dt_b
    s += row * length * e
    packed += (row * chunks + first) * T * (2 * N)
    if KEEP:
        states += (row * chunks + first) * e * n
    if starts is not None:
        starts += (row * chunks + first) * T
    valid = (slot < length)[:, None] & here[None, :]
    x_next = tl.load(x + x_cell, mask=valid, other=0.0)
    # a slot after the last token gets step 0 and slope 0, and does not change the state
    dt_next = tl.load(dt + dt_cell, mask=valid, other=float("-inf"))
    touched = touch(packed, T * 2 * N)
    unused = touched
    count = stop - first
    for chunk in range(count):
        x_tile = x_next.to(tl.float32)
        v = dt_next.to(tl.float32)
        inside = valid
        unused ^= touched

        # the next chunk is loaded while this one is computed
        slot += T
        x_cell += ahead * x_l
        dt_cell += ahead * dt_l
        next_rows = tl.where(chunk + 1 < count, T * 2 * N, 0)
        valid = (slot < length)[:, None] & here[None, :]
        x_next = tl.load(x + x_cell, mask=valid, other=0.0)
        dt_next = tl.load(dt + dt_cell, mask=valid, other=float("-inf"))
        touched = touch(packed + next_rows, T * 2 * N)

        if dt_bias is not None:
            v += bias[None, :]
        step_tile, _ = softplus(v)
        step, inflow = row_pairs(step_tile, step_tile * x_tile)
        if KEEP:
            tl.store(states + cell, h, mask=cell_here)
            states += e * n
        parts = ()
        for i in tl.static_range(T):
            B = tl.load(packed + i * (2 * N) + state)
            C = tl.load(packed + i * (2 * N) + N + state)
            h = restart(starts, i, h)
            h = tl.exp2(step[i][:, None] * rate) * h + inflow[i][:, None] * B[None, :]
            parts = parts + (tl.sum(tl.reshape(h * C[None, :], (CHANNELS, 4, N // 4)), 2),)
        s_tile = sum_states(parts) + skip[None, :] * x_tile
        tl.store(s + s_cell, s_tile.to(s.dtype.element_ty), mask=inside)
        s_cell += ahead * e
        packed += next_rows
        if starts is not None:
            starts += T
    tl.store(final + row * e * n + cell, h, mask=cell_here & (stop == chunks))
    keep(final, unused, length)


def forward(
    inputs: ScanInputs, reverse: Sequence[bool], chunk: int, *, log_A: bool = False, ends: Ends | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e), the last state (k, b, e, n), and the states (k, b, chunks, e n) before each chunk of tokens in
    scan order; `chunk` is CHUNK, or 0 to keep none. With `log_A`, `inputs.A` is A_log: A = -exp(A_log). `ends` are
    those of `scan_segments_triton.ends`, if they are known already.
    """
    x, dt, A, B, C, D, dt_bias, initial, image = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    width = width_of(n)
    channels = channels_of(width, CHANNELS)
    if chunk not in (0, CHUNK):
        raise ValueError(f"chunk is {chunk}; it must be {CHUNK}, the tokens between kept states, or 0 to keep none")
    keeps = chunk > 0
    packed, starts = pack(B, C, image, reverse, width)
    s = x.new_empty(k, b, length, e)
    final = A.new_empty(k, b, e, n)
    states = A.new_empty((k, b, cdiv(length, CHUNK), e * n) if keeps else (0,))
    span, segments, initial = entering(inputs, None, packed, starts, reverse, initial, ends, log_A)
    grid = cdiv(e, channels) * segments, b, k
    large = is_large(grid, packed.shape[2], e, 2 * width, x.stride(2), dt.stride(2))
    with torch.cuda.device_of(x):
        selective_scan_fwd_kernel[scan_grid(grid, large)](
            x, dt, A, packed, starts, D, dt_bias, initial, s, final, states, length, e, mask_of(reverse), span,
            *x.stride()[:3], *dt.stride()[:3],
            n=n, N=width, CHANNELS=channels, UNPADDED=e % channels == 0 and n == width, KEEP=keeps,
            LOG_A=log_A, LARGE=large, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return s, final, states


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """The forward kernel as a model of inner width e launches it, at n = 16, for `kernels.aot`. "_packed" has image
    numbers, states passed in and out, and A instead of A_log; "_segments" walks segments.
    """
    n = 16
    constants = {"n": n, "N": n, "CHANNELS": CHANNELS, "UNPADDED": e % CHANNELS == 0, "KEEP": True, "LARGE": False}
    return [
        scan_case(
            dtype, selective_scan_fwd_kernel, {**constants, "LOG_A": "_packed" not in variant}, variant, WARPS,
            segments="_segments" in variant, tokens=CHUNK, channels=CHANNELS,
            bytes=3 * dtype.itemsize + 4 * n / CHUNK + 4 * 2 * n / e, exponentials=n,
        )
        for variant in ("", "_packed", "_segments", "_packed_segments")
    ]  # fmt: skip
