"""Products of the state-space-dual scan in Triton: outputs and the gradient of x, in one kernel. ssd_triton.py has the
axes and the design.
"""
# The tools take Triton's language for Python:
# mypy: disable-error-code="no-untyped-def, assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .large import cdiv, is_large, token_number
from .scan_rows_triton import mask_of
from .ssd import SsdInputs
from .ssd_decay_triton import Decays, Shape, decay_at_edge, decay_between, number_at_edge, options, ssd_case
from .ssd_state_triton import shared_stride, width
from .triton_tiles import product, rounded

# Tokens of a tile, for heads of up to 64 channels in 16 bits, and for others. The largest that a program can hold.
TILE, SMALL_TILE = 64, 32
CHANNELS, STATES = 128, 256


def tile_of(x: Tensor) -> int:
    return TILE if x.element_size() == 2 and x.shape[-1] <= 64 else SMALL_TILE


def in_rows(inputs: SsdInputs) -> SsdInputs:
    """The inputs with contiguous channels and states, copied only where they are not.

    Raises:
        ValueError: heads or states are wider than a program can hold.
    """
    p, n = inputs.x.shape[-1], inputs.B.shape[-1]
    if p > CHANNELS or n > STATES:
        raise ValueError(
            f"ssd: heads of {p} channels with {n} states; the Triton kernels hold at most {CHANNELS} channels and"
            f" {STATES} states: use smaller ones (d_head, ssd_state), or backend reference"
        )
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (inputs.x, inputs.B, inputs.C))
    return inputs._replace(x=x, B=B, C=C)


@triton.jit
def load_tile(pointer, stride, column, tokens, columns, T: tl.constexpr, LARGE: tl.constexpr):
    """T rows from `pointer` on, of which `tokens` exist, at the columns of `column` below `columns`; zero elsewhere."""
    slot = tl.arange(0, T)
    inside = (slot < tokens)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + token_number(slot, LARGE)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def score_tile(
    first, queries, queries_l, queries_tokens, keys, keys_l, keys_tokens, n,
    T: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Scores (T, T) of rows of `queries` and `keys`, (tokens, n). `first` is the first block of states of `queries`."""
    state = tl.arange(0, BLOCK)
    other = load_tile(keys, keys_l, state, keys_tokens, n, T, LARGE)
    found = product(first, tl.trans(other), tl.zeros((T, T), tl.float32))
    for i in tl.static_range(1, BLOCKS):
        own = load_tile(queries, queries_l, i * BLOCK + state, queries_tokens, n, T, LARGE)
        other = load_tile(keys, keys_l, i * BLOCK + state, keys_tokens, n, T, LARGE)
        found = product(own, tl.trans(other), found)
    return found


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_mix_kernel(
    queries, keys, values, step, high, low, total, image, D, states, out, length, chunks, h, p, n, images, backwards,
    queries_j, queries_b, queries_l, keys_j, keys_b, keys_l, values_j, values_b, values_l, values_h,
    out_j, out_b, out_l,
    PER: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, GRADIENT: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """A tile (T, p) of y, summed over PER directions, from C, B and x. With GRADIENT: of dx, from B, C and dy; the
    tokens that it visits are then those that the tile's tokens reach, and `states` are gradients.
    """
    tiles = tl.cdiv(length, T)
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    head, row = program % h, (program // h).to(tl.int64)
    b, group = row % images, row // images
    slot = tl.arange(0, T)
    channel = tl.arange(0, P)
    start = tl.cast(tile, tl.int64) * T
    tokens = length - tile * T
    slots = chunks * TILES * T
    chunk = tile // TILES
    first = chunk * TILES
    values += b * values_b + head * values_h
    queries += b * queries_b + start * queries_l
    keys += b * keys_b
    if image is not None:
        image += b * length
        own_image = tl.load(image + start + slot, mask=slot < tokens, other=-1)
    y = tl.zeros((T, P), tl.float32)
    for i in range(PER):
        k = group * PER + i
        reverse = (backwards >> k) & 1 == 1
        line = (k * images + b) * h + head
        own_high = tl.load(high + line * slots + start + slot)
        own_low = tl.load(low + line * slots + start + slot)
        own_queries = queries + k * queries_j
        own_block = load_tile(own_queries, queries_l, tl.arange(0, BLOCK), tokens, n, T, LARGE)
        summed = tl.zeros((T, P), tl.float32) if GRADIENT else y
        later = reverse != GRADIENT
        sign = tl.where(later, 1, -1)
        begin = tl.where(later, tile, first)
        end = tl.where(later, tl.minimum(first + TILES, tiles), tile + 1)
        for other in range(begin, end):
            at = tl.cast(other, tl.int64) * T
            others = length - other * T
            scores = score_tile(
                own_block, own_queries, queries_l, tokens, keys + k * keys_j + at * keys_l, keys_l, others, n,
                T, BLOCK, BLOCKS, LARGE,
            )  # fmt: skip
            cell = line * slots + at + slot
            its_high = tl.load(high + cell)
            its_low = tl.load(low + cell)
            if GRADIENT:
                decay = decay_between(its_high[None, :], its_low[None, :], own_high[:, None], own_low[:, None])
            else:
                decay = decay_between(own_high[:, None], own_low[:, None], its_high[None, :], its_low[None, :])
                decay *= tl.load(step + cell)[None, :]
            seen = (sign * (other * T + slot))[None, :] >= (sign * (tile * T + slot))[:, None]
            if image is not None:
                seen &= own_image[:, None] == tl.load(image + at + slot, mask=slot < others, other=-1)[None, :]
            v = load_tile(values + k * values_j + at * values_l, values_l, channel, others, p, T, LARGE)
            weights = scores * tl.where(seen, decay, 0.0)
            summed = product(rounded(weights, v.dtype), v, summed)
        if states is not None:
            factor = decay_at_edge(own_high, own_low, total + (line * chunks + chunk) * 2, reverse, GRADIENT)
            if image is not None:
                edge = number_at_edge(image, first * T, (first + TILES) * T, length, reverse, GRADIENT)
                factor = tl.where(own_image == edge, factor, 0.0)
            passed = tl.zeros((T, P), tl.float32)
            state = tl.arange(0, BLOCK)
            place = states + (((k * images + b) * chunks + chunk) * h + head) * p * n
            for block in tl.static_range(BLOCKS):
                inside = (channel < p)[:, None] & (block * BLOCK + state < n)[None, :]
                of_block = tl.load(
                    place + channel[:, None] * n + block * BLOCK + state[None, :], mask=inside, other=0.0
                )
                block_queries = load_tile(own_queries, queries_l, block * BLOCK + state, tokens, n, T, LARGE)
                passed = product(block_queries, tl.trans(rounded(of_block, block_queries.dtype)), passed)
            summed += factor[:, None] * passed
        if GRADIENT:
            summed = y + summed * tl.load(step + line * slots + start + slot)[:, None]
        own = load_tile(values + k * values_j + start * values_l, values_l, channel, tokens, p, T, LARGE)
        y = summed + tl.load(D + k * h + head) * own.to(tl.float32)
    # (groups, b, l, h, p)
    out += group * out_j + b * out_b + start * out_l + head * p
    cell = token_number(slot, LARGE)[:, None] * out_l + channel[None, :]
    tl.store(out + cell, rounded(y, out.dtype.element_ty), mask=(slot < tokens)[:, None] & (channel < p)[None, :])


def mix(
    queries: Tensor, keys: Tensor, values: Tensor, decays: Decays, image: Tensor | None, D: Tensor,
    states: Tensor | None, out: Tensor, reverse: Sequence[bool], shape: Shape, *, gradient: bool,
) -> None:  # fmt: skip
    """Write `out` (groups, b, l, h, p), whose heads are contiguous: each group is the sum of k / groups directions.
    queries and keys (j, b, l, n), values (j, b, l, h, p), where j is k or 1, and states (k, b, c, h, p, n).
    """
    groups, b, length, h, p = out.shape
    n = queries.shape[-1]
    block = min(64, width(n))
    ssd_mix_kernel[(cdiv(length, shape.T) * h * b * groups,)](
        queries, keys, values, *decays, image, D, states, out, length, shape.chunks, h, p, n, b, mask_of(reverse),
        shared_stride(queries), *queries.stride()[1:3], shared_stride(keys), *keys.stride()[1:3],
        shared_stride(values), *values.stride()[1:4], *out.stride()[:3], PER=len(reverse) // groups,
        TILES=shape.tiles, T=shape.T,
        P=width(p), BLOCK=block, BLOCKS=cdiv(n, block), GRADIENT=gradient,
        LARGE=is_large((1, 1, 1), shape.T, queries.stride(2), keys.stride(2), values.stride(2), out.stride(2)),
        **options(values.dtype),
    )  # fmt: skip


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """y of two directions and dx of one, for `kernels.aot`. "_packed" has image numbers and states."""
    absent = {"": ["image", "states"], "_packed": []}
    return [
        ssd_case(
            dtype, ssd_mix_kernel, {"PER": per, "GRADIENT": gradient}, ("_gradient" if gradient else "") + packed,
            absent[packed], options(dtype), bytes=2 * dtype.itemsize,
        )
        for gradient, per in ((False, 2), (True, 1))
        for packed in absent
    ]  # fmt: skip
