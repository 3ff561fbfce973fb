"""The selective scan on a GPU: both directions of a mixer in one launch, with the states in registers.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.

A program owns CHANNELS channels of one image and one direction and walks its tokens in scan order, CHUNK at a time. Its
state is a tile (channels, n) spread over the lanes: each channel has four lanes that hold n/4 states each, so that B
and C cost a lane one vector load, and sums over n and over channels are both short. Work per (token, channel) that does
not involve a state (softplus, conversions, loads, stores) is done on (CHUNK, channels) tiles with one value per lane.
triton_tiles.py moves values between the two layouts and sums across lanes, once per chunk.

The backward pass needs every state. The forward pass keeps one every CHUNK tokens (64 / CHUNK bytes per token and
channel at n = 16); the backward pass walks the chunks from the last to the first and rebuilds the states of a chunk,
and their decays, in registers. For CHUNK = 8, 255 registers hold sixteen channels per warp if every second state is
computed twice.
"""
# The tools take Triton's language for Python; Triton's tuples grow by + only:
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import TRITON_TYPE, CompileCase, target_of
from .large import is_large, scan_grid, scan_program, token_number
from .scan_gate_triton import combine, combine_backward
from .scan_inputs import ScanInputs
from .triton_tiles import LOG2_E, row_pairs, rows, softplus, sum_channels, sum_states

__all__ = ["CHUNK", "backward", "combine", "combine_backward", "compile_cases", "forward"]

CHUNK = 8
"""Tokens between kept states, and tokens per iteration of the main loops: `rows` and `stack` are written for eight."""

# Sixteen channels per warp: see above. Four warps write a quarter of the partial sums of dB and dC that one would.
CHANNELS, WARPS = 64, 4
# For the backward kernel if sixteen channels per warp do not fit into 255 registers. It then issues 12 % more.
FEWER_CHANNELS = 32
# tokens per program of selective_scan_pack_kernel
ROWS = 32

_COMMON = {"enable_fp_fusion": True}

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _restart(starts, slot, h):
    """h, or zero if a new image begins at the slot (never, without `starts`). It stops a NaN too."""
    if starts is not None:
        h = tl.where(tl.load(starts + slot) != 0, 0.0, h)
    return h


@triton.jit
def _decay_rate(A, cell, here, LOG_A: tl.constexpr):
    """A, which is -exp(A) if A holds logarithms; 0 where there is no channel or state."""
    if LOG_A:
        return -tl.exp(tl.load(A + cell, mask=here, other=float("-inf")))
    else:
        return tl.load(A + cell, mask=here, other=0.0)


@triton.jit(do_not_specialize=["length", "slots", "backwards"])
def selective_scan_pack_kernel(
    B, C, image, packed, starts, length, slots, backwards,
    B_k, B_b, B_l, C_k, C_b, C_l,
    n: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Write B and C of one direction as fp32 rows (slots, 2, N) in scan order, zero where there is no token or state,
    so that the scans read both at constant offsets; with `image`, also write whether the state restarts at each slot.
    """
    tile, b, k, _, images = scan_program(tl.cdiv(slots, ROWS), LARGE)
    slot = token_number(tile * ROWS + tl.arange(0, ROWS), LARGE)
    backward = (backwards >> k) & 1
    token = tl.where(backward == 1, length - 1 - slot, slot)
    valid = slot < length
    state = tl.arange(0, N)
    cell = valid[:, None] & (state < n)[None, :]
    row = (k * images + b).to(tl.int64) * slots

    B += k.to(tl.int64) * B_k + b.to(tl.int64) * B_b
    C += k.to(tl.int64) * C_k + b.to(tl.int64) * C_b
    B_rows = tl.load(B + token[:, None] * B_l + state[None, :], mask=cell, other=0.0).to(tl.float32)
    C_rows = tl.load(C + token[:, None] * C_l + state[None, :], mask=cell, other=0.0).to(tl.float32)
    packed += (row + slot)[:, None] * (2 * N) + state[None, :]
    tl.store(packed, B_rows, mask=(slot < slots)[:, None])
    tl.store(packed + N, C_rows, mask=(slot < slots)[:, None])

    if image is not None:
        image += b.to(tl.int64) * length
        number = tl.load(image + token, mask=valid, other=0)
        # the predecessor of the first token in scan order is image 0 forwards, and the token's own image in reverse
        first = slot == 0
        before = tl.load(image + token - 1 + 2 * backward, mask=valid & (slot > 0), other=0)
        before = tl.where(first & (backward == 1), number, before)
        tl.store(starts + row + slot, (number != before).to(tl.int32), mask=slot < slots)


@triton.jit(do_not_specialize=["length", "blocks", "backwards"])
def selective_scan_unpack_kernel(
    partial, dB, dC, length, blocks, backwards,
    dB_k, dB_b, dB_l, dC_k, dC_b, dC_l,
    n: tl.constexpr, N: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Sum the partial sums of the channel blocks, in the order of the blocks; write dB and dC in token order."""
    T: tl.constexpr = 8
    chunk, b, k, chunks, images = scan_program(tl.cdiv(length, T), LARGE)
    chunks = chunks.to(tl.int64)
    state = tl.arange(0, N)
    cell = tl.arange(0, T)[:, None] * (2 * N) + state[None, :]

    partial += ((k * blocks * images + b) * chunks + chunk) * T * (2 * N)
    dB_rows = tl.zeros((T, N), tl.float32)
    dC_rows = tl.zeros((T, N), tl.float32)
    for _ in range(blocks):
        dB_rows += tl.load(partial + cell)
        dC_rows += tl.load(partial + N + cell)
        partial += images * chunks * T * (2 * N)

    slot = chunk * T + tl.arange(0, T)
    token = tl.where((backwards >> k) & 1 == 1, length - 1 - slot, slot)
    dB += k.to(tl.int64) * dB_k + b.to(tl.int64) * dB_b
    dC += k.to(tl.int64) * dC_k + b.to(tl.int64) * dC_b
    inside = (slot < length)[:, None] & (state < n)[None, :]
    tl.store(dB + token[:, None] * dB_l + state[None, :], dB_rows.to(dB.dtype.element_ty), mask=inside)
    tl.store(dC + token[:, None] * dC_l + state[None, :], dC_rows.to(dC.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "backwards"])
def selective_scan_fwd_kernel(
    x, dt, A, packed, starts, D, dt_bias, initial, s, final, states, length, e, backwards,
    x_k, x_b, x_l, dt_k, dt_b, dt_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, KEEP: tl.constexpr,
    LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute s and the last state; with KEEP, also the state before each chunk. UNPADDED: no channel or state of a
    block is padding.
    """
    T: tl.constexpr = 8
    block, b, k, _blocks, images = scan_program(tl.cdiv(e, CHANNELS), LARGE)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    row = (k * images + b).to(tl.int64)
    chunks = tl.cdiv(length, T)
    state = tl.arange(0, N)
    if UNPADDED:
        here = tl.full((CHANNELS,), True, tl.int1)
        cell_here = tl.full((CHANNELS, N), True, tl.int1)
    else:
        here = channel < e
        cell_here = here[:, None] & (state < n)[None, :]
    cell = channel[:, None] * n + state[None, :]

    rate = _decay_rate(A + k * e * n, cell, cell_here, LOG_A) * LOG2_E
    skip = tl.load(D + k * e + channel, mask=here, other=0.0)
    if dt_bias is not None:
        bias = tl.load(dt_bias + k * e + channel, mask=here, other=0.0)
    if initial is not None:
        h = tl.load(initial + row * e * n + cell, mask=cell_here, other=0.0)
    else:
        h = tl.zeros((CHANNELS, N), tl.float32)

    x += k.to(tl.int64) * x_k + b.to(tl.int64) * x_b
    dt += k.to(tl.int64) * dt_k + b.to(tl.int64) * dt_b
    s += row * length * e
    packed += row * chunks * T * (2 * N)
    if starts is not None:
        starts += row * chunks * T
    for ahead in range(chunks):
        chunk = token_number(ahead, LARGE)
        slot = chunk * T + tl.arange(0, T)
        token = tl.where((backwards >> k) & 1 == 1, length - 1 - slot, slot)[:, None]
        valid = (slot < length)[:, None] & here[None, :]
        x_tile = tl.load(x + token * x_l + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        # a slot after the last token gets step 0 and slope 0, and does not change the state
        v = tl.load(dt + token * dt_l + channel[None, :], mask=valid, other=float("-inf")).to(tl.float32)
        if dt_bias is not None:
            v += bias[None, :]
        step_tile, _ = softplus(v)
        step, inflow = row_pairs(step_tile, step_tile * x_tile)
        if KEEP:
            tl.store(states + (row * chunks + chunk) * e * n + cell, h, mask=cell_here)
        parts = ()
        for i in tl.static_range(T):
            B = tl.load(packed + (chunk * T + i) * (2 * N) + state)
            C = tl.load(packed + (chunk * T + i) * (2 * N) + N + state)
            h = _restart(starts, chunk * T + i, h)
            h = tl.exp2(step[i][:, None] * rate) * h + inflow[i][:, None] * B[None, :]
            parts = parts + (tl.sum(tl.reshape(h * C[None, :], (CHANNELS, 4, N // 4)), 2),)
        s_tile = sum_states(parts) + skip[None, :] * x_tile
        tl.store(s + token * e + channel[None, :], s_tile.to(s.dtype.element_ty), mask=valid)
    tl.store(final + row * e * n + cell, h, mask=cell_here)


@triton.jit(do_not_specialize=["length", "backwards"])
def selective_scan_bwd_kernel(
    x, dt, A, packed, starts, D, dt_bias, states, ds, dfinal,
    dx, ddt, partial, dparameters, dinitial, length, e, backwards, parameters,
    x_k, x_b, x_l, dt_k, dt_b, dt_l, ds_k, ds_b, ds_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, LANES: tl.constexpr,
    LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute every gradient; those of parameters for one image, those of B and C for one block of channels. A row of
    dparameters has dA, dD and ddt_bias of a channel.

    With g_t the gradient that reaches h_t, and q_t = exp(step_t A) g_t what h_t passes on:  g_t = q_{t+1} + C_t ds_t,
    d(step_t x_t) = B_t . g_t,  dB_t = g_t (step_t x_t),  dC_t = h_t ds_t,  d(step_t A) = q_t h_{t-1}.
    2 ** LANES lanes hold different channels; each lane sums its own channels before lanes exchange anything.
    """
    T: tl.constexpr = 8
    GROUPS: tl.constexpr = 2**LANES
    block, b, k, blocks, images = scan_program(tl.cdiv(e, CHANNELS), LARGE)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    row = (k * images + b).to(tl.int64)
    chunks = tl.cdiv(length, T)
    state = tl.arange(0, N)
    if UNPADDED:
        here = tl.full((CHANNELS,), True, tl.int1)
        cell_here = tl.full((CHANNELS, N), True, tl.int1)
    else:
        here = channel < e
        cell_here = here[:, None] & (state < n)[None, :]
    cell = channel[:, None] * n + state[None, :]

    rate = _decay_rate(A + k * e * n, cell, cell_here, LOG_A) * LOG2_E
    if dfinal is not None:
        q = tl.load(dfinal + row * e * n + cell, mask=cell_here, other=0.0)
    else:
        q = tl.zeros((CHANNELS, N), tl.float32)
    dA_cell = tl.zeros((CHANNELS, N), tl.float32)
    dD_tile = tl.zeros((T, CHANNELS), tl.float32)
    dbias_tile = tl.zeros((T, CHANNELS), tl.float32)

    x += k.to(tl.int64) * x_k + b.to(tl.int64) * x_b
    dt += k.to(tl.int64) * dt_k + b.to(tl.int64) * dt_b
    ds += k.to(tl.int64) * ds_k + b.to(tl.int64) * ds_b
    dx += row * length * e
    ddt += row * length * e
    packed += row * chunks * T * (2 * N)
    if starts is not None:
        starts += row * chunks * T
    partial += ((k.to(tl.int64) * blocks + block) * images + b) * chunks * T * (2 * N)
    for back in range(chunks):
        chunk = token_number(chunks - 1 - back, LARGE)
        slot = chunk * T + tl.arange(0, T)
        token = tl.where((backwards >> k) & 1 == 1, length - 1 - slot, slot)[:, None]
        valid = (slot < length)[:, None] & here[None, :]
        x_tile = tl.load(x + token * x_l + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        v = tl.load(dt + token * dt_l + channel[None, :], mask=valid, other=float("-inf")).to(tl.float32)
        ds_tile = tl.load(ds + token * ds_l + channel[None, :], mask=valid, other=0.0).to(tl.float32)
        if dt_bias is not None:
            v += tl.load(dt_bias + k * e + channel, mask=here, other=0.0)[None, :]
        step_tile, slope = softplus(v)
        step, inflow = row_pairs(step_tile, step_tile * x_tile)

        h = tl.load(states + (row * chunks + chunk) * e * n + cell, mask=cell_here, other=0.0)
        before = ()
        decay = ()
        for i in tl.static_range(T):
            B = tl.load(packed + (chunk * T + i) * (2 * N) + state)
            if i % 2 == 0:
                before = before + (h,)
            h = _restart(starts, chunk * T + i, h)
            decay = decay + (tl.exp2(step[i][:, None] * rate),)
            h = decay[i] * h + inflow[i][:, None] * B[None, :]

        ds_row = rows(tl.reshape(ds_tile, (T, CHANNELS, 1)))
        dB = ()
        dC = ()
        dinflow = ()
        drate = ()
        for i in tl.static_range(T - 1, -1, -1):
            # .ca is the default; spelling it out keeps the compiler from holding rows of the first walk in registers
            B = tl.load(packed + (chunk * T + i) * (2 * N) + state, cache_modifier=".ca")
            C = tl.load(packed + (chunk * T + i) * (2 * N) + N + state)
            dC = (tl.sum(tl.reshape(h * ds_row[i], (CHANNELS // GROUPS, GROUPS, N)), 0),) + dC
            if i % 2 == 0:
                h = before[i // 2]
            else:
                B_before = tl.load(packed + (chunk * T + i - 1) * (2 * N) + state, cache_modifier=".ca")
                # fma instead of * and +, for the same reason
                h = _restart(starts, chunk * T + i - 1, before[i // 2])
                h = tl.fma(decay[i - 1], h, inflow[i - 1][:, None] * B_before[None, :])
            g = q + ds_row[i] * C[None, :]
            dB = (tl.sum(tl.reshape(g * inflow[i][:, None], (CHANNELS // GROUPS, GROUPS, N)), 0),) + dB
            dinflow = (tl.sum(tl.reshape(g * B[None, :], (CHANNELS, 4, N // 4)), 2),) + dinflow
            q = _restart(starts, chunk * T + i, g * decay[i])
            w = _restart(starts, chunk * T + i, q * h)
            drate = (tl.sum(tl.reshape(w * rate, (CHANNELS, 4, N // 4)), 2),) + drate
            dA_cell += w * step[i][:, None]

        out = partial + slot[:, None] * (2 * N) + state[None, :]
        tl.store(out + N, sum_channels(dC, LANES))
        tl.store(out, sum_channels(dB, LANES))
        dinflow_tile = sum_states(dinflow)
        drate_tile = sum_states(drate) * _LN_2
        # read again, to save registers
        x_tile = tl.load(x + token * x_l + channel[None, :], mask=valid, other=0.0, cache_modifier=".ca").to(tl.float32)
        skip = tl.load(D + k * e + channel, mask=here, other=0.0)
        dx_tile = dinflow_tile * step_tile + skip[None, :] * ds_tile
        ddt_tile = (dinflow_tile * x_tile + drate_tile) * slope
        tl.store(dx + token * e + channel[None, :], dx_tile.to(dx.dtype.element_ty), mask=valid)
        tl.store(ddt + token * e + channel[None, :], ddt_tile.to(ddt.dtype.element_ty), mask=valid)
        dD_tile += ds_tile * x_tile
        if dt_bias is not None:
            dbias_tile += ddt_tile

    if LOG_A:
        dA_cell *= _decay_rate(A + k * e * n, cell, cell_here, LOG_A)
    dparameters += b.to(tl.int64) * parameters
    tl.store(dparameters + k * e * n + cell, dA_cell, mask=cell_here)
    each = parameters // (n + 2)
    dparameters += each * n + k * e + channel
    tl.store(dparameters, tl.sum(dD_tile, 0), mask=here)
    tl.store(dparameters + each, tl.sum(dbias_tile, 0), mask=here)
    if dinitial is not None:
        tl.store(dinitial + row * e * n + cell, q, mask=cell_here)


def forward(
    inputs: ScanInputs, reverse: Sequence[bool], chunk: int, *, log_A: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e), the last state (k, b, e, n), and the states (k, b, chunks, e n) before each chunk of tokens in
    scan order; `chunk` is CHUNK, or 0 to keep none. With `log_A`, `inputs.A` is A_log: A = -exp(A_log).
    """
    x, dt, A, B, C, D, dt_bias, initial, image = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    width = _width(n)
    channels = _channels(width, CHANNELS)
    keep = _keeps(chunk)
    packed, starts = _packed(B, C, image, reverse, width)
    s = x.new_empty(k, b, length, e)
    final = A.new_empty(k, b, e, n)
    states = A.new_empty((k, b, triton.cdiv(length, CHUNK), e * n) if keep else (0,))
    grid = triton.cdiv(e, channels), b, k
    large = is_large(grid, packed.shape[2], e, 2 * width, x.stride(2), dt.stride(2))
    with torch.cuda.device_of(x):
        selective_scan_fwd_kernel[scan_grid(grid, large)](
            x, dt, A, packed, starts, D, dt_bias, initial, s, final, states, length, e, _mask(reverse),
            *x.stride()[:3], *dt.stride()[:3],
            n=n, N=width, CHANNELS=channels, UNPADDED=e % channels == 0 and n == width, KEEP=keep,
            LOG_A=log_A, LARGE=large, num_warps=WARPS, **_COMMON,
        )  # fmt: skip
    return s, final, states


def backward(
    inputs: ScanInputs, states: Tensor, ds: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], chunk: int, *,
    log_A: bool = False, dB: Tensor | None = None, dC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients dx, ddt, dparameters, dB, dC, dinitial of `forward`, given those of s and of the last state.

    dparameters (k, e, n + 2) is fp32: the gradient of A (of A_log, with `log_A`), then of D and of dt_bias (zero without
    dt_bias). dB and dC are written into the tensors (k, b, l, n) that are passed, if any; their last axis has stride 1.
    dinitial is empty if `inputs.initial` is None. `states` are those that `forward` kept with the same chunk.
    """
    if not _keeps(chunk):
        raise ValueError(f"the backward pass of a scan needs the kept states: chunk is 0, it must be {CHUNK}")
    x, dt, A, B, C, D, dt_bias, initial, image = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    width = _width(n)
    lean = x.dtype != torch.float32 and e % CHANNELS == 0 and image is None and initial is None and dfinal is None
    channels = _channels(width, _backward_channels(target_of(x.device), lean))
    blocks = triton.cdiv(e, channels)
    slots = triton.cdiv(length, CHUNK) * CHUNK
    packed, starts = _packed(B, C, image, reverse, width)
    dx, ddt = x.new_empty(k, b, length, e), dt.new_empty(k, b, length, e)
    dB = B.new_empty(k, b, length, n) if dB is None else dB
    dC = C.new_empty(k, b, length, n) if dC is None else dC
    partial = A.new_empty(k, blocks, b, slots, 2 * width)
    dparameters = A.new_empty(b, k * e * (n + 2))
    dinitial = None if initial is None else torch.empty_like(initial)
    grid = blocks, b, k
    large = is_large(grid, slots, e, 2 * width, x.stride(2), dt.stride(2), ds.stride(2), dB.stride(2), dC.stride(2))
    chunk_grid = slots // CHUNK, b, k
    with torch.cuda.device_of(x):
        selective_scan_bwd_kernel[scan_grid(grid, large)](
            x, dt, A, packed, starts, D, dt_bias, states, ds, dfinal,
            dx, ddt, partial, dparameters, dinitial, length, e, _mask(reverse), dparameters.shape[1],
            *x.stride()[:3], *dt.stride()[:3], *ds.stride()[:3],
            n=n, N=width, CHANNELS=channels, UNPADDED=e % channels == 0 and n == width, LANES=_lanes(channels),
            LOG_A=log_A, LARGE=large, num_warps=WARPS, **_COMMON,
        )  # fmt: skip
        selective_scan_unpack_kernel[scan_grid(chunk_grid, large)](
            partial, dB, dC, length, blocks, _mask(reverse), *dB.stride()[:3], *dC.stride()[:3],
            n=n, N=width, LARGE=large, num_warps=1, **_COMMON,
        )  # fmt: skip
    return dx, ddt, dparameters.sum(0), dB, dC, A.new_empty(0) if dinitial is None else dinitial


def _packed(
    B: Tensor, C: Tensor, image: Tensor | None, reverse: Sequence[bool], width: int
) -> tuple[Tensor, Tensor | None]:
    k, b, length, n = B.shape
    slots = triton.cdiv(length, CHUNK) * CHUNK
    packed = B.new_empty(k, b, slots, 2, width, dtype=torch.float32)
    starts = None if image is None else B.new_empty(k, b, slots, dtype=torch.int32)
    grid = triton.cdiv(slots, ROWS), b, k
    large = is_large(grid, length, B.stride(2), C.stride(2))
    with torch.cuda.device_of(B):
        selective_scan_pack_kernel[scan_grid(grid, large)](
            B, C, image, packed, starts, length, slots, _mask(reverse),
            *B.stride()[:3], *C.stride()[:3], n=n, N=width, ROWS=ROWS, LARGE=large, **_COMMON,
        )  # fmt: skip
    return packed, starts


def _keeps(chunk: int) -> bool:
    if chunk not in (0, CHUNK):
        raise ValueError(f"chunk is {chunk}; it must be {CHUNK}, the tokens between kept states, or 0 to keep none")
    return chunk > 0


def _mask(reverse: Sequence[bool]) -> int:
    """The directions as one integer: bit i is set where direction i runs in reverse."""
    return sum(backward << i for i, backward in enumerate(reverse))


def _width(n: int) -> int:
    """States per channel in a tile: a power of two that four lanes can divide."""
    if n > 512:
        raise ValueError(f"a channel has {n} states; a tile of these kernels holds at most 512 (use backend reference)")
    return max(4, triton.next_power_of_2(n))


def _channels(width: int, channels: int) -> int:
    """Channels per program: fewer if a channel has more than 16 states, so that registers stay the same."""
    return max(1, channels * 16 // max(width, 16))


def _backward_channels(target: str, lean: bool) -> int:
    """`lean`: 16-bit, full blocks of channels, one image per sequence, no states passed in or out. Anything else, and
    sm_80 always, would spill 8 to 88 bytes per lane. (sm_100 spills 80 even so, and still issues an eighth less.)
    """
    return CHANNELS if target.startswith("gfx") or (lean and target != "sm_80") else FEWER_CHANNELS


def _lanes(channels: int) -> int:
    """log2 of the lanes across channels in a backward program: eight per warp, if there are enough channels."""
    return (min(channels, 8 * WARPS)).bit_length() - 1


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """The kernels as a model of inner width e launches them in `dtype`, at n = 16, for `kernels.aot`. "_packed" has
    image numbers, states passed in and out, and A instead of A_log.
    """
    n = 16
    size = dtype.itemsize
    types = dict.fromkeys(["x", "dt", "B", "C", "s", "ds", "dx", "ddt", "dB", "dC"], TRITON_TYPE[dtype])
    types |= dict.fromkeys(["length", "e", "slots", "blocks", "backwards"], "i32")
    # B and C are slices of the rows of a projection
    slices = [f"{name}{axis}" for name in ("B", "C", "dB", "dC") for axis in ("", "_k", "_b", "_l")]
    loose = frozenset(["length", "slots", "blocks", "backwards", *slices])
    types |= dict.fromkeys(["image", "starts"], "*i32")
    absent = {"image": None, "starts": None, "initial": None, "dfinal": None, "dinitial": None}

    def case(kernel: Any, constants: dict[str, Any], variant: str = "", warps: int = 4, **facts: Any) -> CompileCase:
        given = constants if variant == "_packed" else {**absent, **constants}
        signature = {
            argument: "constexpr" if argument in given
            else types.get(argument, "i32" if argument.endswith(("_k", "_b", "_l")) else "*fp32")
            for argument in kernel.arg_names
        }  # fmt: skip
        return CompileCase(
            kernel=kernel, variant=variant, signature=signature,
            constexprs={argument: given[argument] for argument in kernel.arg_names if argument in given},
            options={"num_warps": warps, **_COMMON}, loose=loose, **facts,
        )  # fmt: skip

    scan = {"n": n, "N": n, "LARGE": False}
    unpadded = {"UNPADDED": e % CHANNELS == 0}
    kept = 4 * n / CHUNK
    rows = 2 * n / e

    def scan_cases(packed: str) -> list[CompileCase]:
        lean = dtype != torch.float32 and e % CHANNELS == 0 and not packed
        channels = _backward_channels(target, lean)
        return [
            case(
                selective_scan_fwd_kernel, {**scan, **unpadded, "CHANNELS": CHANNELS, "KEEP": True, "LOG_A": not packed}, packed, WARPS,
                tokens=CHUNK, channels=CHANNELS, bytes=3 * size + kept + 4 * rows, exponentials=n,
            ),
            case(
                selective_scan_bwd_kernel,
                {**scan, **unpadded, "CHANNELS": channels, "LANES": _lanes(channels), "LOG_A": not packed}, packed, WARPS,
                tokens=CHUNK, channels=channels,
                bytes=5 * size + kept + 4 * rows + 4 * 2 * n / channels, exponentials=n,
            ),
        ]  # fmt: skip

    return [
        *scan_cases(""),
        *scan_cases("_packed"),
        case(
            selective_scan_pack_kernel, {**scan, "ROWS": ROWS}, tokens=ROWS, channels=e, bytes=(size + 4) * rows,
        ),
        case(
            # four blocks per iteration: the compiler unrolls
            selective_scan_unpack_kernel, scan, warps=1, tokens=4 * CHUNK, channels=CHANNELS,
            bytes=4 * 2 * n / CHANNELS + size * rows,
        ),
    ]  # fmt: skip
