"""The backward pass of the selective scan on a GPU; selective_scan_triton.py describes both passes.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.
"""
# The tools take Triton's language for Python; Triton's tuples grow by + only:
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase, target_of
from .large import cdiv, is_large, scan_grid, token_number
from .scan_inputs import ScanInputs
from .scan_rows_triton import CHUNK, OPTIONS, channels_of, mask_of, pack, scan_case, unpack, walk_program, width_of
from .scan_segments import Ends
from .scan_segments_triton import entering
from .segment_choice import MANY
from .triton_tiles import LOG2_E, decay_rate, keep, restart, row_pairs, rows, softplus, sum_channels, sum_states, touch

# Sixteen channels per warp. Four warps write a quarter of the partial sums of dB and dC that one would.
CHANNELS, WARPS = 64, 4
# If sixteen channels per warp do not fit into 255 registers, or if there are few programs. It issues 14 % more.
FEWER_CHANNELS = 32

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["length", "backwards", "span", "parameters"])
def selective_scan_bwd_kernel(
    x, dt, A, packed, starts, D, dt_bias, states, ds, dfinal,
    dx, ddt, partial, dparameters, dinitial, length, e, backwards, span, parameters,
    x_k, x_b, x_l, dt_k, dt_b, dt_l, ds_k, ds_b, ds_l,
    n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, UNPADDED: tl.constexpr, LANES: tl.constexpr,
    LOG_A: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute every gradient; those of parameters for one image, those of B and C for one block of channels.
    dparameters has all dA of an image, all dD and all ddt_bias: `parameters` numbers. With `span`, a program walks a
    segment of that many chunks; `dfinal` has a gradient for each, and dparameters has a row for each.

    With g_t the gradient that reaches h_t, and q_t = exp(step_t A) g_t what h_t passes on:  g_t = q_{t+1} + C_t ds_t,
    d(step_t x_t) = B_t . g_t,  dB_t = g_t (step_t x_t),  dC_t = h_t ds_t,  d(step_t A) = q_t h_{t-1}.
    2 ** LANES lanes hold different channels; each lane sums its own channels before lanes exchange anything.
    """
    T: tl.constexpr = 8
    GROUPS: tl.constexpr = 2**LANES
    chunks = tl.cdiv(length, T)
    block, b, k, segment, first, stop, blocks, images, segments = walk_program(chunks, span, e, CHANNELS, LARGE)
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
    if dfinal is not None:
        q = tl.load(dfinal + (row * segments + segment) * e * n + cell, mask=cell_here, other=0.0)
    else:
        q = tl.zeros((CHANNELS, N), tl.float32)
    dA_cell = tl.zeros((CHANNELS, N), tl.float32)
    dD_tile = tl.zeros((T, CHANNELS), tl.float32)
    dbias_tile = tl.zeros((T, CHANNELS), tl.float32)

    x += k.to(tl.int64) * x_k + b.to(tl.int64) * x_b
    dt += k.to(tl.int64) * dt_k + b.to(tl.int64) * dt_b
    ds += k.to(tl.int64) * ds_k + b.to(tl.int64) * ds_b
    last = (row * chunks + stop - 1) * T
    packed += last * (2 * N)
    states += (row * chunks + stop - 1) * e * n
    partial += (((k.to(tl.int64) * blocks + block) * images + b) * chunks + stop - 1) * T * (2 * N)
    if starts is not None:
        starts += last
    reverse = (backwards >> k) & 1 == 1
    slot = token_number((stop - 1) * T, LARGE) + tl.arange(0, T)
    token = tl.where(reverse, length - 1 - slot, slot)[:, None]
    ahead = token_number(tl.where(reverse, T, -T), LARGE)
    x_cell = token * x_l + channel[None, :]
    dt_cell = token * dt_l + channel[None, :]
    ds_cell = token * ds_l + channel[None, :]
    out_cell = row * length * e + (token * e + channel[None, :])
    inside = (slot < length)[:, None] & here[None, :]
    x_next = tl.load(x + x_cell, mask=inside, other=0.0)
    dt_next = tl.load(dt + dt_cell, mask=inside, other=float("-inf"))
    ds_next = tl.load(ds + ds_cell, mask=inside, other=0.0)
    h_next = tl.load(states + cell, mask=cell_here, other=0.0)
    touched = touch(packed, T * 2 * N)
    unused = touched
    for remaining in range(stop - first - 1, -1, -1):
        x_tile = x_next.to(tl.float32)
        v = dt_next.to(tl.float32)
        ds_tile = ds_next.to(tl.float32)
        unused ^= touched
        if dt_bias is not None:
            v += tl.load(dt_bias + k * e + channel, mask=here, other=0.0)[None, :]
        step_tile, slope = softplus(v)
        step, inflow = row_pairs(step_tile, step_tile * x_tile)

        h = h_next
        before = ()
        decay = ()
        for i in tl.static_range(T):
            B = tl.load(packed + i * (2 * N) + state)
            if i % 2 == 0:
                before = before + (h,)
            h = restart(starts, i, h)
            decay = decay + (tl.exp2(step[i][:, None] * rate),)
            h = decay[i] * h + inflow[i][:, None] * B[None, :]

        ds_row = rows(tl.reshape(ds_tile, (T, CHANNELS, 1)))
        dB = ()
        dC = ()
        dinflow = ()
        drate = ()
        for i in tl.static_range(T - 1, -1, -1):
            # .ca is the default; spelling it out keeps the compiler from holding rows of the first walk in registers
            B = tl.load(packed + i * (2 * N) + state, cache_modifier=".ca")
            C = tl.load(packed + i * (2 * N) + N + state)
            dC = (tl.sum(tl.reshape(h * ds_row[i], (CHANNELS // GROUPS, GROUPS, N)), 0),) + dC
            if i % 2 == 0:
                h = before[i // 2]
            else:
                B_before = tl.load(packed + (i - 1) * (2 * N) + state, cache_modifier=".ca")
                # fma instead of * and +, for the same reason
                h = restart(starts, i - 1, before[i // 2])
                h = tl.fma(decay[i - 1], h, inflow[i - 1][:, None] * B_before[None, :])
            g = q + ds_row[i] * C[None, :]
            dB = (tl.sum(tl.reshape(g * inflow[i][:, None], (CHANNELS // GROUPS, GROUPS, N)), 0),) + dB
            dinflow = (tl.sum(tl.reshape(g * B[None, :], (CHANNELS, 4, N // 4)), 2),) + dinflow
            q = restart(starts, i, g * decay[i])
            w = restart(starts, i, q * h)
            drate = (tl.sum(tl.reshape(w * rate, (CHANNELS, 4, N // 4)), 2),) + drate
            dA_cell += w * step[i][:, None]

        out = partial + tl.arange(0, T)[:, None] * (2 * N) + state[None, :]
        tl.store(out + N, sum_channels(dC, LANES))
        # The next chunk is loaded behind the first barrier after the walk, which fills the registers.
        # the last chunk of the walk loads itself once more
        forth = tl.where(remaining > 0, ahead, 0)
        next_rows = tl.where(remaining > 0, T * 2 * N, 0)
        states -= tl.where(remaining > 0, e * n, 0)
        dt_cell += forth * dt_l
        ds_cell += forth * ds_l
        x_next = tl.load(x + x_cell + forth * x_l, mask=here[None, :], other=0.0)
        dt_next = tl.load(dt + dt_cell, mask=here[None, :], other=float("-inf"))
        ds_next = tl.load(ds + ds_cell, mask=here[None, :], other=0.0)
        h_next = tl.load(states + cell, mask=cell_here, other=0.0)
        touched = touch(packed - next_rows, T * 2 * N)
        tl.store(out, sum_channels(dB, LANES))
        dinflow_tile = sum_states(dinflow)
        drate_tile = sum_states(drate) * LN_2
        # read again, to save registers
        x_tile = tl.load(x + x_cell, mask=inside, other=0.0, cache_modifier=".ca")
        x_tile = x_tile.to(tl.float32)
        skip = tl.load(D + k * e + channel, mask=here, other=0.0)
        dx_tile = dinflow_tile * step_tile + skip[None, :] * ds_tile
        ddt_tile = (dinflow_tile * x_tile + drate_tile) * slope
        tl.store(dx + out_cell, dx_tile.to(dx.dtype.element_ty), mask=inside)
        tl.store(ddt + out_cell, ddt_tile.to(ddt.dtype.element_ty), mask=inside)
        dD_tile += ds_tile * x_tile
        if dt_bias is not None:
            dbias_tile += ddt_tile
        inside = tl.broadcast_to(here[None, :], (T, CHANNELS))
        x_cell += forth * x_l
        out_cell += ahead * e
        packed -= next_rows
        partial -= T * 2 * N
        if starts is not None:
            starts -= T

    if LOG_A:
        dA_cell *= decay_rate(A + k * e * n, cell, cell_here, LOG_A)
    of_image = dparameters + (b.to(tl.int64) * segments + segment) * parameters
    tl.store(of_image + k * e * n + cell, dA_cell, mask=cell_here)
    per_channel = parameters // (n + 2)
    of_image += per_channel * n + k * e + channel
    tl.store(of_image, tl.sum(dD_tile, 0), mask=here)
    tl.store(of_image + per_channel, tl.sum(dbias_tile, 0), mask=here)
    if dinitial is not None:
        tl.store(dinitial + row * e * n + cell, q, mask=cell_here & (first == 0))
    keep(dparameters, unused, length)


def backward(
    inputs: ScanInputs, states: Tensor, ds: Tensor, dfinal: Tensor | None, reverse: Sequence[bool], chunk: int, *,
    log_A: bool = False, dB: Tensor | None = None, dC: Tensor | None = None, ends: Ends | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients dx, ddt, dparameters, dB, dC, dinitial of `forward`, given those of s and of the last state.

    dparameters (k e (n + 2)) is fp32: the gradients of A (of A_log, with `log_A`), of D and of dt_bias (zero if it is
    None), one after the other. dB and dC are written into the tensors (k, b, l, n) that are passed, if any; their last
    axis must have stride 1. dinitial is empty if `inputs.initial` is None. `states` are those of `forward` with the
    same chunk. `ends` are those of `scan_segments_triton.ends_backward`, if they are known already.
    """
    if chunk != CHUNK:
        raise ValueError(f"the backward pass of a scan needs the kept states: chunk is {chunk}, it must be {CHUNK}")
    x, dt, A, B, C, D, dt_bias, initial, image = inputs
    k, b, length, e = x.shape
    n = A.shape[-1]
    width = width_of(n)
    lean = x.dtype != torch.float32 and e % CHANNELS == 0 and image is None and initial is None and dfinal is None
    packed, starts = pack(B, C, image, reverse, width)
    span, segments, dfinal = entering(inputs, ds, packed, starts, reverse, dfinal, ends, log_A)
    many = k * b * segments * cdiv(e, CHANNELS) >= MANY
    channels = channels_of(width, _block(target_of(x.device), lean and many))
    blocks = cdiv(e, channels)
    slots = cdiv(length, CHUNK) * CHUNK
    dx, ddt = x.new_empty(k, b, length, e), dt.new_empty(k, b, length, e)
    dB = B.new_empty(k, b, length, n) if dB is None else dB
    dC = C.new_empty(k, b, length, n) if dC is None else dC
    partial = A.new_empty(k, blocks, b, slots, 2 * width)
    dparameters = A.new_empty(b * segments, k * e * (n + 2))
    dinitial = None if initial is None else torch.empty_like(initial)
    grid = blocks * segments, b, k
    large = is_large(grid, slots, e, 2 * width, x.stride(2), dt.stride(2), ds.stride(2))
    with torch.cuda.device_of(x):
        selective_scan_bwd_kernel[scan_grid(grid, large)](
            x, dt, A, packed, starts, D, dt_bias, states, ds, dfinal,
            dx, ddt, partial, dparameters, dinitial, length, e, mask_of(reverse), span, dparameters.shape[1],
            *x.stride()[:3], *dt.stride()[:3], *ds.stride()[:3],
            n=n, N=width, CHANNELS=channels, UNPADDED=e % channels == 0 and n == width, LANES=_lanes(channels),
            LOG_A=log_A, LARGE=large, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    unpack(partial, dB, dC, reverse)
    return dx, ddt, dparameters.sum(0), dB, dC, A.new_empty(0) if dinitial is None else dinitial


def _block(target: str, lean: bool) -> int:
    """Channels per program. `lean`: 16-bit, full blocks of channels, one image per sequence, no states passed in or
    out. Anything else, and sm_80 always, would spill with CHANNELS.
    """
    return CHANNELS if target.startswith("gfx") or (lean and target != "sm_80") else FEWER_CHANNELS


def _lanes(channels: int) -> int:
    """log2 of the lanes across channels in a program: eight per warp, if there are enough channels."""
    return (min(channels, 8 * WARPS)).bit_length() - 1


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """The kernel as a model of inner width e launches it, at n = 16, for `kernels.aot`: "_packed" has image numbers,
    states passed in and out, and A instead of A_log; "_few" is for few programs; "_segments" walks segments.
    """
    n = 16

    def case(variant: str, lean: bool) -> CompileCase:
        channels = _block(target, lean)
        return scan_case(
            dtype, selective_scan_bwd_kernel,
            {
                "n": n, "N": n, "CHANNELS": channels, "UNPADDED": e % channels == 0, "LANES": _lanes(channels),
                "LOG_A": "_packed" not in variant, "LARGE": False,
            },
            variant, WARPS, segments="_segments" in variant, tokens=CHUNK, channels=channels,
            bytes=5 * dtype.itemsize + 4 * n / CHUNK + 4 * 2 * n / e + 4 * 2 * n / channels, exponentials=n,
        )  # fmt: skip

    lean = dtype != torch.float32 and e % CHANNELS == 0
    return [
        case("", lean), case("_packed", False), case("_segments", lean), case("_packed_segments", False),
        *([case("_few", False)] if lean else []),
    ]  # fmt: skip
