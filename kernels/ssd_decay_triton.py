"""The steps and decays of the state-space-dual scan in Triton, and their gradients.

Axes: k directions, b images, l tokens, h heads, c chunks of CHUNK tokens, which are cut into tiles of T tokens.

The exponent of a decay is a difference of two sums over the chunk, q_t - q_s, so that a tile (t, s) of decays costs one
exponential per element and no scan. In fp32 a difference of large sums has no digits left. Sums here are fp64, and are
stored as two fp32 numbers, `high` and `low`: (high_t - high_s) + (low_t - low_s) is off by half a unit of its last
digit, or 2^-48 of the sums if that is more. A pair of tokens that does not see each other is selected away, never
multiplied by zero.

q_t is the sum of the logarithms up to and including token t forwards, and minus the sum over those before t in reverse:
in both, the decay from s to t is exp2(q_t - q_s). The state that enters a chunk has q = 0 forwards, minus the sum over
the chunk in reverse, and the state that leaves it has q = the sum over the chunk forwards, 0 in reverse.
"""
# The tools take Triton's language for Python:
# mypy: disable-error-code="no-untyped-def, assignment"

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import TRITON_TYPE, CompileCase
from .large import cdiv, is_large, token_number
from .scan_rows_triton import OPTIONS, mask_of
from .ssd import SsdInputs
from .triton_tiles import LOG2_E, rounded, sigmoid, softplus

# Tokens of a chunk: a shorter sequence is one chunk, and needs no states. Per token, longer chunks have more decays and
# fewer states to write and read. A program of the decays handles HEADS heads of one chunk.
CHUNK, HEADS = 256, 4


class Shape(NamedTuple):
    """How a scan is cut: constants of all its launches."""

    length: int
    chunks: int
    tiles: int
    """Tiles of a chunk."""
    T: int
    """Tokens of a tile."""

    @property
    def slots(self) -> int:
        """Tokens of all chunks; those after the last token have a step of zero."""
        return self.chunks * self.tiles * self.T


def cut(length: int, T: int) -> Shape:
    tiles = cdiv(min(length, CHUNK), T)
    return Shape(length, cdiv(length, tiles * T), tiles, T)


class Decays(NamedTuple):
    """In fp32; of padding, the step is zero."""

    step: Tensor
    """(k, b, h, slots), after the softplus."""
    high: Tensor
    """(k, b, h, slots), q in binary logarithms; see the top of the file."""
    low: Tensor
    total: Tensor
    """(k, b, h, c, 2), the sum over each chunk as two numbers."""


@triton.jit
def decay_between(high_to, low_to, high_from, low_from):
    """exp2(q_to - q_from) as a tile; 1 where it would be above, which callers select away."""
    return tl.exp2(tl.minimum((high_to - high_from) + (low_to - low_from), 0.0))


@triton.jit
def decay_at_edge(high, low, total, reverse, LEAVING: tl.constexpr):
    """The decay of what enters the chunk up to each token, or from each token to what leaves the chunk."""
    kept = tl.where(reverse != LEAVING, 1.0, 0.0)
    total_high = kept * tl.load(total)
    total_low = kept * tl.load(total + 1)
    if LEAVING:
        high = -high
        low = -low
    return tl.exp2(tl.minimum((high + total_high) + (low + total_low), 0.0))


@triton.jit
def number_at_edge(image, start, stop, length, reverse, LEAVING: tl.constexpr):
    """The number of the image whose state enters the chunk start .. stop - 1, or leaves it."""
    if LEAVING:
        return tl.load(image + tl.where(reverse, start, tl.minimum(stop, length) - 1))
    else:
        # whatever precedes the sequence is image 0, and whatever follows it continues the last one
        at = tl.where(reverse, tl.minimum(stop, length - 1), start - 1)
        return tl.load(image + at, mask=at >= 0, other=0)


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_decay_fwd_kernel(
    dt, A_log, dt_bias, step, high, low, total, length, chunks, h, images, backwards, dt_k, dt_b, dt_l, dt_h,
    Q: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """SLOTS: Q tokens of a chunk as a power of two."""
    program = tl.program_id(0)
    block, program = program % tl.cdiv(h, HEADS), program // tl.cdiv(h, HEADS)
    chunk, row = program % chunks, (program // chunks).to(tl.int64)
    b, k = row % images, row // images
    slot = tl.arange(0, SLOTS)[:, None]
    head = (block * HEADS + tl.arange(0, HEADS))[None, :]
    valid = (slot < Q) & (chunk * Q + slot < length) & (head < h)
    dt += k * dt_k + b * dt_b + chunk.to(tl.int64) * Q * dt_l
    v = tl.load(dt + token_number(slot, LARGE) * dt_l + head * dt_h, mask=valid, other=float("-inf")).to(tl.float32)
    if dt_bias is not None:
        v += tl.load(dt_bias + k * h + head, mask=head < h, other=0.0)
    size, _ = softplus(v)
    rate = -tl.exp(tl.load(A_log + k * h + head, mask=head < h, other=0.0)) * LOG2_E
    log = (size * rate).to(tl.float64)
    upto = tl.cumsum(log, 0)
    q = tl.where((backwards >> k) & 1 == 1, log - upto, upto)

    cell = (row * h + head) * (chunks * Q) + chunk * Q + slot
    here = (slot < Q) & (head < h)
    tl.store(step + cell, size, mask=here)
    rounded = q.to(tl.float32)
    tl.store(high + cell, rounded, mask=here)
    tl.store(low + cell, (q - rounded.to(tl.float64)).to(tl.float32), mask=here)
    sums = tl.sum(log, 0)[None, :]
    rounded = sums.to(tl.float32)
    cell = ((row * h + head) * chunks + chunk) * 2
    tl.store(total + cell, rounded, mask=head < h)
    tl.store(total + cell + 1, (sums - rounded.to(tl.float64)).to(tl.float32), mask=head < h)


@triton.jit
def _sum_parts(parts, cell, mask, pitch, COUNT: tl.constexpr):
    """The sum of COUNT numbers, `pitch` apart."""
    found = tl.load(parts + cell, mask=mask, other=0.0)
    for i in tl.static_range(1, COUNT):
        found += tl.load(parts + cell + i * pitch, mask=mask, other=0.0)
    return found


@triton.jit
def _sum_tokens(numbers):
    """Per head."""
    return tl.sum(tl.sum(numbers, 1), 0)


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_decay_bwd_kernel(
    dt, A_log, dt_bias, step, rows, columns, diagonal, trace, entered, left, across, ddt, parts, length, chunks, h,
    images, backwards, dt_k, dt_b, dt_l, dt_h,
    TILES: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """From the gradients of exponents to those of dt, A_log, D and dt_bias; `entered`, `left` and `across` are those of
    what enters, leaves and passes the chunk, in BLOCKS and PARTS partial sums.

    A token's decay is a factor of every decay from a token before it to itself or one after it. Sums run inside a tile,
    and those of tiles before and after are added whole: a difference of sums over the chunk would have lost digits.
    """
    Q: tl.constexpr = TILES * T
    program = tl.program_id(0)
    block, program = program % tl.cdiv(h, HEADS), program // tl.cdiv(h, HEADS)
    chunk, row = program % chunks, (program // chunks).to(tl.int64)
    b, k = row % images, row // images
    reverse = (backwards >> k) & 1 == 1
    # axes: tiles, tokens of a tile, heads; of `through`: tiles, those before and after them, heads
    tile = tl.arange(0, SLOTS // T)[:, None, None]
    other = tl.arange(0, SLOTS // T)[None, :, None]
    token = tl.arange(0, T)[None, :, None]
    slot = tile * T + token
    head = (block * HEADS + tl.arange(0, HEADS))[None, None, :]
    here = (slot < Q) & (chunk * Q + slot < length) & (head < h)
    dt += k * dt_k + b * dt_b + chunk.to(tl.int64) * Q * dt_l
    raw = tl.load(dt + token_number(slot, LARGE) * dt_l + head * dt_h, mask=here, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + k * h + head, mask=head < h, other=0.0)
    A = -tl.exp(tl.load(A_log + k * h + head, mask=head < h, other=0.0))

    slots = chunks * Q
    line = row * h + head
    cell = line * slots + chunk * Q + slot
    size = tl.load(step + cell, mask=here, other=0.0)
    # the token that a scan reads before this one, in the same tile
    shift = tl.where(reverse, 1, -1)
    follows = (token + shift >= 0) & (token + shift < T) & (slot < Q) & (chunk * Q + slot + shift < length) & (head < h)
    size_before = tl.load(step + cell + shift, mask=follows, other=0.0)
    # per token: what reaches it, what leaves it, what left the token before; per pair of tiles: what passes between
    reaching = tl.zeros((SLOTS // T, T, HEADS), tl.float32)
    leaving = tl.zeros((SLOTS // T, T, HEADS), tl.float32)
    left_before = tl.zeros((SLOTS // T, T, HEADS), tl.float32)
    through = tl.zeros((SLOTS // T, SLOTS // T, HEADS), tl.float32)
    # tiles from this one to the other, as the scan goes
    ahead = tl.where(reverse, tile - other, other - tile)
    # partial sums exist for the tiles that see each other
    for i in tl.static_range(TILES):
        exists = (chunk * TILES + i) * T < length
        past = tl.where(reverse, i - tile, tile - i)
        part = (line * TILES + i) * slots + chunk * Q + slot
        of_row = tl.load(rows + part, mask=here & exists & (past >= 0), other=0.0)
        of_column = tl.load(columns + part, mask=here & exists & (past <= 0), other=0.0)
        reaching += of_row - tl.where(past == 0, size * of_column, 0.0)
        leaving += of_column
        left_before += tl.load(columns + part + shift, mask=follows & exists & (past < 0), other=0.0)
        to_tile = tl.sum(of_row, 1)[None, :, :]
        through += tl.where((past > 0) & (ahead > 0), to_tile, 0.0)
    direct = leaving + tl.load(diagonal + cell, mask=here, other=0.0)
    if left is not None:
        part = line * BLOCKS * slots + chunk * Q + slot
        of_entered = _sum_parts(entered, part, here, slots, BLOCKS)
        of_left = _sum_parts(left, part, here, slots, BLOCKS)
        reaching += of_entered
        direct += of_left
        left_before += _sum_parts(left, part + shift, follows, slots, BLOCKS)
        to_tile = tl.sum(of_entered, 1)[None, :, :]
        from_tile = tl.sum(of_left * size, 1)[None, :, :]
        through += tl.where(ahead > 0, to_tile, tl.where(ahead < 0, from_tile, 0.0))
    left_before *= size_before
    downwards = tl.where(reverse, left_before, reaching)
    upwards = tl.where(reverse, reaching, left_before)
    dlog = tl.cumsum(downwards, 1, reverse=True) + tl.cumsum(upwards, 1) + tl.sum(through, 1)[:, None, :]
    if across is not None:
        part = ((row * chunks + chunk) * h + head) * PARTS
        dlog += _sum_parts(across, part, head < h, 1, PARTS)
    dlog = tl.where(here, dlog, 0.0)
    draw = (dlog * A + direct) * sigmoid(raw)
    draw = tl.where(here, draw, 0.0)
    ddt += (row * length + chunk * Q) * h
    tl.store(ddt + slot * h + head, rounded(draw, ddt.dtype.element_ty), mask=here)
    # (b c, 3, k, h): A_log, D, dt_bias
    each = tl.num_programs(0) // (tl.cdiv(h, HEADS) * chunks * images) * h
    parts += (b * chunks + chunk) * 3 * each + k * h
    head = block * HEADS + tl.arange(0, HEADS)
    A = -tl.exp(tl.load(A_log + k * h + head, mask=head < h, other=0.0))
    tl.store(parts + head, _sum_tokens(dlog * size) * A, mask=head < h)
    tl.store(parts + each + head, _sum_tokens(tl.load(trace + cell, mask=here, other=0.0)), mask=head < h)
    tl.store(parts + 2 * each + head, _sum_tokens(draw), mask=head < h)


def options(dtype: torch.dtype, warps: int = 4, stages: int = 2) -> dict[str, Any]:
    """Of launches with products. fp32 has none on matrix units, and needs more lanes to hold what it multiplies."""
    return {"num_warps": warps if dtype.itemsize == 2 else 8, "num_stages": stages, **OPTIONS}


def decays(inputs: SsdInputs, reverse: Sequence[bool], shape: Shape) -> Decays:
    k, b, length, h = inputs.dt.shape
    like = inputs.A_log
    step, high, low = (like.new_empty(k, b, h, shape.slots) for _ in range(3))
    found = Decays(step, high, low, like.new_empty(k, b, h, shape.chunks, 2))
    grid = (cdiv(h, HEADS) * shape.chunks * b * k,)
    tokens = shape.tiles * shape.T
    ssd_decay_fwd_kernel[grid](
        inputs.dt, inputs.A_log, inputs.dt_bias, *found, length, shape.chunks, h, b, mask_of(reverse),
        *inputs.dt.stride(), Q=tokens, SLOTS=triton.next_power_of_2(tokens), HEADS=HEADS,
        LARGE=is_large((1, 1, 1), triton.next_power_of_2(tokens), *inputs.dt.stride()[2:]), **OPTIONS,
    )  # fmt: skip
    return found


class DecayGradients(NamedTuple):
    """What the kernels of the backward pass add up for each token, in fp32."""

    rows: Tensor
    """(k, b, h, tiles, slots), the gradients of the exponents of decays to each token, summed over a tile of others."""
    columns: Tensor
    """(k, b, h, tiles, slots), those from each token, over its step."""
    diagonal: Tensor
    """(k, b, h, slots), what a step gets from its own token."""
    trace: Tensor
    """(k, b, h, slots), what D gets."""


def decays_backward(
    inputs: SsdInputs, reverse: Sequence[bool], shape: Shape, step: Tensor, found: DecayGradients,
    of_states: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ddt (k, b, l, h) and the gradients of A_log, D and dt_bias (3, k, h). `of_states`: what reaches the exponents of
    decays into a chunk and out of it (k, b, h, blocks, slots) and across it (k, b, c, h, parts).
    """
    k, b, length, h = inputs.dt.shape
    ddt = inputs.dt.new_empty(k, b, length, h)
    parts = inputs.A_log.new_empty(b * shape.chunks, 3, k, h)
    entered, left, across = of_states if of_states is not None else (None, None, None)
    grid = (cdiv(h, HEADS) * shape.chunks * b * k,)
    slots = triton.next_power_of_2(shape.tiles * shape.T)
    ssd_decay_bwd_kernel[grid](
        inputs.dt, inputs.A_log, inputs.dt_bias, step, *found, entered, left, across, ddt, parts, length, shape.chunks,
        h, b, mask_of(reverse), *inputs.dt.stride(), TILES=shape.tiles, T=shape.T,
        BLOCKS=1 if left is None else left.shape[3], PARTS=1 if across is None else across.shape[4], SLOTS=slots,
        HEADS=HEADS, LARGE=is_large((1, 1, 1), slots, *inputs.dt.stride()[2:]), **OPTIONS,
    )  # fmt: skip
    return ddt, parts.sum(0)


def ssd_case(
    dtype: torch.dtype, kernel: Any, constants: dict[str, Any], variant: str = "", absent: Sequence[str] = (),
    launch: Mapping[str, Any] | None = None, tokens: int | None = None, channels: int = 64, bytes: float = 0,
) -> CompileCase:  # fmt: skip
    """A kernel of the scan as a model with heads of 64 channels and 64 states launches it in `dtype`. `tokens`: those
    of a tile by default.
    """
    T = 64 if dtype.itemsize == 2 else 32
    sizes = {
        "T": T, "TILES": CHUNK // T, "P": 64, "BLOCK": 64, "BLOCKS": 1, "PER": 1, "Q": CHUNK, "SLOTS": CHUNK,
        "HEADS": HEADS, "PARTS": 4, "LARGE": False,
    }  # fmt: skip
    sizes = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    given = {**sizes, **constants, **dict.fromkeys(absent)}
    activations = ["x", "dy", "dt", "B", "C", "queries", "keys", "values", "out", "dB", "dC", "ddt", "dscores"]
    types = dict.fromkeys(activations, TRITON_TYPE[dtype]) | {"image": "*i32"}
    numbers = ["length", "chunks", "images", "backwards", "h", "p", "n", "numbers"]
    types |= dict.fromkeys(numbers, "i32")
    signature = {
        argument: "constexpr" if argument in given
        else types.get(argument, "i32" if argument.endswith(("_k", "_j", "_b", "_l", "_h")) else "*fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    loose = frozenset([*numbers[:5], "dt", "dt_k", "dt_b", "dt_l", "dt_h"])
    return CompileCase(
        kernel=kernel, variant=variant, signature=signature,
        constexprs={name: given[name] for name in kernel.arg_names if name in given},
        options={"num_warps": 4, **OPTIONS, **(launch or {})},
        tokens=tokens or T, channels=channels, bytes=bytes, loose=loose,
    )  # fmt: skip


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Steps and decays, and their gradients, for `kernels.aot`. "_states" has those of states."""
    of_states = ["entered", "left", "across"]
    case = partial(ssd_case, dtype, tokens=CHUNK, channels=HEADS)
    return [
        case(ssd_decay_fwd_kernel, {}, bytes=dtype.itemsize + 12),
        case(ssd_decay_bwd_kernel, {}, "", of_states, bytes=2 * dtype.itemsize + 44),
        case(ssd_decay_bwd_kernel, {}, "_states", bytes=2 * dtype.itemsize + 52),
    ]
