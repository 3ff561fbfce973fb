"""The backward pass of the state-space-dual scan in Triton. ssd_triton.py has the axes and the design.

Scores are computed again, as in fused attention. `ssd_mix_kernel` computes dx. `ssd_pairs_kernel` takes a pair of tiles
(t, s) of one image, computes their scores once, and walks the heads in order: it sums the gradient of the scores, and
writes what the exponents of decays and the steps of each head get. `ssd_scores_kernel` multiplies the gradient of
scores by B and C, and adds what passes through the states, heads again in order. All sums have a fixed order.
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
from .ssd_decay_triton import (
    DecayGradients,
    cut,
    decay_at_edge,
    decay_between,
    decays,
    decays_backward,
    number_at_edge,
    options,
    ssd_case,
)
from .ssd_mix_triton import in_rows, load_tile, mix, score_tile, tile_of
from .ssd_state_triton import added_states, pass_states, shared_stride, width
from .triton_tiles import product, rounded


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_pairs_kernel(
    x, dy, B, C, step, high, low, image, dscores, rows, columns, diagonal, trace, length, chunks, h, p, n, images,
    backwards, x_j, x_b, x_l, x_h, dy_b, dy_l, dy_h, B_j, B_b, B_l, C_j, C_b, C_l,
    TILES: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at_t, program = program % TILES, program // TILES
    at_s, program = program % TILES, program // TILES
    chunk, row = program % chunks, (program // chunks).to(tl.int64)
    b, k = row % images, row // images
    reverse = (backwards >> k) & 1 == 1
    t = chunk * TILES + at_t
    s = chunk * TILES + at_s
    exists = tl.maximum(t, s) * T < length
    if exists & tl.where(reverse, s >= t, s <= t):
        slot = tl.arange(0, T)
        channel = tl.arange(0, P)
        start_t, start_s = t.to(tl.int64) * T, s.to(tl.int64) * T
        left_t, left_s = length - t * T, length - s * T
        slots = chunks * TILES * T
        C += k * C_j + b * C_b + start_t * C_l
        B += k * B_j + b * B_b + start_s * B_l
        x += k * x_j + b * x_b + start_s * x_l
        dy += b * dy_b + start_t * dy_l
        first = load_tile(C, C_l, tl.arange(0, BLOCK), left_t, n, T, LARGE)
        scores = score_tile(first, C, C_l, left_t, B, B_l, left_s, n, T, BLOCK, BLOCKS, LARGE)
        sign = tl.where(reverse, -1, 1)
        seen = (sign * (t * T + slot))[:, None] >= (sign * (s * T + slot))[None, :]
        if image is not None:
            image += b * length
            number_t = tl.load(image + start_t + slot, mask=slot < left_t, other=-1)
            number_s = tl.load(image + start_s + slot, mask=slot < left_s, other=-1)
            seen &= number_t[:, None] == number_s[None, :]
        # a token does not decay on the way to itself
        own = (t == s) & (slot[:, None] == slot[None, :])
        own_score = tl.sum(tl.where(own, scores, 0.0), 0)
        scores = tl.where(seen & (own == 0), scores, 0.0)
        gradient = tl.zeros((T, T), tl.float32)
        for head in range(h):
            line = row * h + head
            of_t = line * slots + start_t + slot
            of_s = line * slots + start_s + slot
            size = tl.load(step + of_s)
            own_x = load_tile(x + head * x_h, x_l, channel, left_s, p, T, LARGE)
            own_dy = load_tile(dy + head * dy_h, dy_l, channel, left_t, p, T, LARGE)
            dweights = product(own_dy, tl.trans(own_x), tl.zeros((T, T), tl.float32))
            decay = decay_between(
                tl.load(high + of_t)[:, None], tl.load(low + of_t)[:, None],
                tl.load(high + of_s)[None, :], tl.load(low + of_s)[None, :],
            )  # fmt: skip
            decayed = dweights * decay
            gradient += decayed * size[None, :]
            products = decayed * scores
            tl.store(columns + (line * TILES + at_t) * slots + start_s + slot, tl.sum(products, 0))
            tl.store(rows + (line * TILES + at_s) * slots + start_t + slot, tl.sum(products * size[None, :], 1))
            if t == s:
                of_own = tl.sum(tl.where(slot[:, None] == slot[None, :], dweights, 0.0), 0)
                tl.store(diagonal + of_s, of_own * own_score)
                tl.store(trace + of_s, of_own)
        gradient = tl.where(seen, gradient, 0.0)
        dscores += (((row * chunks + chunk) * TILES + at_t) * TILES + at_s) * T * T
        tl.store(dscores + slot[:, None] * T + slot[None, :], rounded(gradient, dscores.dtype.element_ty))


@triton.jit
def _of_scores(
    dscores, mine, mine_j, mine_b, mine_l, other, other_j, other_b, other_l, values, values_j, values_b, values_l,
    values_h, step, high, low, total, image, states, sums, out, out_j, out_b, out_l, program, length, chunks, h, p, n,
    images, backwards,
    PER: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    LEAVING: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """A block (T, BLOCK) of dC, from B, dy and the states before the chunk; with LEAVING: of dB, from C, x and the
    gradients of the states after it.
    """
    blocks = tl.cdiv(n, BLOCK)
    tiles = tl.cdiv(length, T)
    block, program = program % blocks, program // blocks
    tile, row = program % tiles, (program // tiles).to(tl.int64)
    b, group = row % images, row // images
    slot = tl.arange(0, T)
    channel = tl.arange(0, P)
    state = block * BLOCK + tl.arange(0, BLOCK)
    start = tl.cast(tile, tl.int64) * T
    tokens = length - tile * T
    slots = chunks * TILES * T
    chunk = tile // TILES
    first = chunk * TILES
    found = tl.zeros((T, BLOCK), tl.float32)
    for i in range(PER):
        k = group * PER + i
        reverse = (backwards >> k) & 1 == 1
        later = reverse != LEAVING
        begin = tl.where(later, tile, first)
        end = tl.where(later, tl.minimum(first + TILES, tiles), tile + 1)
        pairs = dscores + ((k * images + b) * chunks + chunk) * TILES * TILES * T * T
        for visited in range(begin, end):
            at = tl.cast(visited, tl.int64) * T
            theirs = load_tile(
                other + k * other_j + b * other_b + at * other_l, other_l, state, length - visited * T, n, T, LARGE
            )
            if LEAVING:
                pair = pairs + ((visited - first) * TILES + tile - first) * T * T
                weights = tl.trans(tl.load(pair + slot[:, None] * T + slot[None, :]))
            else:
                pair = pairs + ((tile - first) * TILES + visited - first) * T * T
                weights = tl.load(pair + slot[:, None] * T + slot[None, :])
            found = product(weights, theirs, found)
        if states is not None:
            ours = load_tile(mine + k * mine_j + b * mine_b + start * mine_l, mine_l, state, tokens, n, T, LARGE)
            seen = slot < tokens
            if image is not None:
                own = image + b * length
                edge = number_at_edge(own, first * T, (first + TILES) * T, length, reverse, LEAVING)
                seen &= tl.load(own + start + slot, mask=seen, other=-1) == edge
            for head in range(h):
                line = (k * images + b) * h + head
                cell = line * slots + start + slot
                edge_decay = decay_at_edge(
                    tl.load(high + cell), tl.load(low + cell), total + (line * chunks + chunk) * 2, reverse, LEAVING
                )
                edge_decay = tl.where(seen, edge_decay, 0.0)
                v = load_tile(
                    values + k * values_j + b * values_b + head * values_h + start * values_l, values_l, channel,
                    tokens, p, T, LARGE,
                )  # fmt: skip
                inside = (channel < p)[:, None] & (state < n)[None, :]
                place = states + (((k * images + b) * chunks + chunk) * h + head) * p * n
                of_head = tl.load(place + channel[:, None] * n + state[None, :], mask=inside, other=0.0)
                passed = product(v, rounded(of_head, v.dtype), tl.zeros((T, BLOCK), tl.float32)) * edge_decay[:, None]
                tl.store(sums + (line * blocks + block) * slots + start + slot, tl.sum(passed * ours.to(tl.float32), 1))
                if LEAVING:
                    passed *= tl.load(step + cell)[:, None]
                found += passed
    # (groups, b, l, n)
    out += group * out_j + b * out_b + start * out_l
    cell = token_number(slot, LARGE)[:, None] * out_l + state[None, :]
    tl.store(out + cell, rounded(found, out.dtype.element_ty), mask=(slot < tokens)[:, None] & (state < n)[None, :])


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_scores_kernel(
    dscores, x, dy, B, C, step, high, low, total, image, before, after, entered, left, dB, dC, length, chunks, h, p, n,
    images, backwards, x_j, x_b, x_l, x_h, dy_b, dy_l, dy_h, B_j, B_b, B_l, C_j, C_b, C_l,
    dB_j, dB_b, dB_l, dC_j, dC_b, dC_l,
    PER: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """Even programs compute a block of dC, odd ones of dB."""
    program = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        _of_scores(
            dscores, C, C_j, C_b, C_l, B, B_j, B_b, B_l, dy, 0, dy_b, dy_l, dy_h, step, high, low, total, image,
            before, entered, dC, dC_j, dC_b, dC_l, program, length, chunks, h, p, n, images, backwards, PER, TILES, T,
            P, BLOCK, False, LARGE,
        )  # fmt: skip
    else:
        _of_scores(
            dscores, B, B_j, B_b, B_l, C, C_j, C_b, C_l, x, x_j, x_b, x_l, x_h, step, high, low, total, image,
            after, left, dB, dB_j, dB_b, dB_l, program, length, chunks, h, p, n, images, backwards, PER, TILES, T, P,
            BLOCK, True, LARGE,
        )  # fmt: skip


def backward(
    inputs: SsdInputs, dy: Tensor, dfinal: Tensor | None, dx: Tensor, dB: Tensor, dC: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the op: writes dx, dB and dC, and returns ddt, dparameters and dinitial, which is None if no state passes
    between chunks.
    """
    inputs = in_rows(inputs)
    x, _, _, B, C, D, _, initial, image = inputs
    dy = (dy if dy.stride(-1) == 1 else dy.contiguous()).unsqueeze(0)
    j, b, length, h, p = x.shape
    k, n = len(reverse), B.shape[-1]
    shape = cut(length, tile_of(x))
    block = min(64, width(n))
    with torch.cuda.device_of(x):
        sums = decays(inputs, reverse, shape)
        before = after = entered = left = dinitial = None
        of_states: tuple[Tensor, Tensor, Tensor] | None = None
        if shape.chunks > 1 or initial is not None or dfinal is not None:
            before = added_states(x, B, sums, image, reverse, shape, entering=False)
            pass_states(before, sums, image, initial, reverse, shape)
            after = added_states(dy, C, sums, image, reverse, shape, entering=True)
            dinitial, across = pass_states(after, sums, image, dfinal, reverse, shape, before=before)
            assert across is not None, "with `before`, there are gradients across chunks"
            entered, left = (x.new_empty(k, b, h, cdiv(n, block), shape.slots, dtype=torch.float32) for _ in range(2))
            of_states = entered, left, across
        mix(B, C, dy, sums, image, D, after, dx, reverse, shape, gradient=True)

        per_pair = DecayGradients(
            *(x.new_empty(k, b, h, shape.tiles, shape.slots, dtype=torch.float32) for _ in range(2)),
            *(x.new_empty(k, b, h, shape.slots, dtype=torch.float32) for _ in range(2)),
        )
        dscores = x.new_empty(k, b, shape.chunks, shape.tiles, shape.tiles, shape.T, shape.T)
        sizes = length, shape.chunks, h, p, n, b, mask_of(reverse)
        strides = (
            shared_stride(x), *x.stride()[1:4], *dy.stride()[1:4],
            shared_stride(B), *B.stride()[1:3], shared_stride(C), *C.stride()[1:3],
        )  # fmt: skip
        constants = {
            "TILES": shape.tiles, "T": shape.T, "P": width(p), "BLOCK": block,
            "LARGE": is_large((1, 1, 1), shape.T, *(t.stride(2) for t in (x, dy, B, C, dB, dC))),
        }  # fmt: skip
        ssd_pairs_kernel[(shape.tiles**2 * shape.chunks * b * k,)](
            x,
            dy,
            B,
            C,
            *sums[:3],
            image,
            dscores,
            *per_pair,
            *sizes,
            *strides,
            BLOCKS=cdiv(n, block),
            **constants,
            **options(x.dtype, 8),
        )
        ssd_scores_kernel[(2 * cdiv(n, block) * cdiv(length, shape.T) * b * j,)](
            dscores, x, dy, B, C, *sums, image, before, after, entered, left, dB, dC, *sizes, *strides,
            *dB.stride()[:3], *dC.stride()[:3], PER=k // j, **constants, **options(x.dtype, stages=1),
        )  # fmt: skip
        ddt, dparameters = decays_backward(inputs, reverse, shape, sums.step, per_pair, of_states)
    return ddt, dparameters, dinitial


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Pairs of tiles, and dB and dC of one direction, for `kernels.aot`. "_packed" has image numbers and states."""
    states = ["image", "before", "after", "entered", "left"]
    return [
        ssd_case(dtype, ssd_pairs_kernel, {}, "", ["image"], options(dtype, 8), bytes=2 * dtype.itemsize),
        ssd_case(dtype, ssd_pairs_kernel, {}, "_packed", (), options(dtype, 8), bytes=2 * dtype.itemsize),
        ssd_case(dtype, ssd_scores_kernel, {}, "", states, options(dtype, stages=1), bytes=2 * dtype.itemsize),
        ssd_case(dtype, ssd_scores_kernel, {}, "_packed", (), options(dtype, stages=1), bytes=2 * dtype.itemsize),
    ]
