"""The states between chunks of the state-space-dual scan in Triton, forwards and for the gradient.

Axes: k directions, b images, c chunks, h heads, p channels of a head, n states.
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
from .scan_rows_triton import OPTIONS, mask_of
from .ssd_decay_triton import CHUNK, Decays, Shape, decay_at_edge, number_at_edge, options, ssd_case
from .triton_tiles import product, rounded

# Numbers of a state that a program carries from chunk to chunk.
CARRIED = 1024


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_state_kernel(
    values, keys, step, high, low, total, image, added, length, chunks, h, p, n, images, backwards,
    values_j, values_b, values_l, values_h, keys_j, keys_b, keys_l,
    TILES: tl.constexpr, T: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, ENTERING: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, sum of decay(s to its end) dt_s x_s B_s^T; with ENTERING, what it adds to the
    gradient of the state before it, sum of decay(its start to t) dy_t C_t^T.
    """
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    block, program = program % blocks, program // blocks
    head, program = program % h, program // h
    chunk, row = program % chunks, (program // chunks).to(tl.int64)
    b, k = row % images, row // images
    reverse = (backwards >> k) & 1 == 1
    channel = tl.arange(0, P)
    state = block * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, T)
    slots = chunks * TILES * T
    line = row * h + head
    first = chunk * TILES
    if image is not None:
        image += b * length
        edge = number_at_edge(image, first * T, (first + TILES) * T, length, reverse, not ENTERING)
    values += k * values_j + b * values_b + head * values_h
    keys += k * keys_j + b * keys_b
    found = tl.zeros((P, BLOCK), tl.float32)
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(length, T))):
        start = tl.cast(tile, tl.int64) * T
        inside = start + slot < length
        offset = token_number(slot, LARGE)
        cell = line * slots + start + slot
        factor = decay_at_edge(
            tl.load(high + cell), tl.load(low + cell), total + (line * chunks + chunk) * 2, reverse, not ENTERING
        )
        if not ENTERING:
            factor *= tl.load(step + cell)
        if image is not None:
            factor = tl.where(tl.load(image + start + slot, mask=inside, other=-1) == edge, factor, 0.0)
        x = tl.load(
            values + start * values_l + offset[None, :] * values_l + channel[:, None],
            mask=inside[None, :] & (channel < p)[:, None], other=0.0,
        )  # fmt: skip
        B = tl.load(
            keys + start * keys_l + offset[:, None] * keys_l + state[None, :],
            mask=inside[:, None] & (state < n)[None, :], other=0.0,
        )  # fmt: skip
        found = product(x, rounded(B * factor[:, None], x.dtype), found)
    added += ((row * chunks + chunk) * h + head) * p * n
    tl.store(added + channel[:, None] * n + state[None, :], found, mask=(channel < p)[:, None] & (state < n)[None, :])


@triton.jit(do_not_specialize=["length", "chunks", "backwards"])
def ssd_pass_kernel(
    states, total, image, initial, final, before, across, length, chunks, h, numbers, images, backwards,
    Q: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds by the sum that reaches it, in scan order: h = decay(over the chunk) h + added. With
    `across`, the gradient of the exponents of these decays, from the states `before` each chunk.
    """
    blocks = tl.cdiv(numbers, CARRIED)
    program = tl.program_id(0)
    block, program = program % blocks, program // blocks
    head, row = program % h, (program // h).to(tl.int64)
    b, k = row % images, row // images
    # the gradient passes the other way, over the same decays
    reverse = (backwards >> k) & 1 == 1
    last_first = reverse != (across is not None)
    number = block * CARRIED + tl.arange(0, CARRIED)
    here = number < numbers
    line = row * h + head
    if initial is not None:
        carried = tl.load(initial + line * numbers + number, mask=here, other=0.0)
    else:
        carried = tl.zeros((CARRIED,), tl.float32)
    chunk = tl.where(last_first, chunks - 1, 0)
    ahead = tl.where(last_first, -1, 1)
    place = states + ((row * chunks + chunk) * h + head) * numbers + number
    stride = ahead.to(tl.int64) * h * numbers
    added = tl.load(place, mask=here, other=0.0)
    for i in range(chunks):
        # the next chunk is loaded while this one is computed
        following = tl.load(place + stride, mask=here & (i + 1 < chunks), other=0.0)
        decay = tl.exp2(tl.load(total + (line * chunks + chunk) * 2))
        if image is not None:
            own = image + b * length
            entering = number_at_edge(own, chunk * Q, (chunk + 1) * Q, length, reverse, False)
            leaving = number_at_edge(own, chunk * Q, (chunk + 1) * Q, length, reverse, True)
            decay = tl.where(entering == leaving, decay, 0.0)
        tl.store(place, carried, mask=here)
        if across is not None:
            cell = (row * chunks + chunk) * h + head
            passed = tl.load(before + cell * numbers + number, mask=here, other=0.0)
            tl.store(across + cell * blocks + block, tl.sum(carried * passed, 0) * decay)
        carried = decay * carried + added
        added = following
        place += stride
        chunk += ahead
    tl.store(final + line * numbers + number, carried, mask=here)


def added_states(
    values: Tensor, keys: Tensor, decays: Decays, image: Tensor | None, reverse: Sequence[bool], shape: Shape, *,
    entering: bool,
) -> Tensor:  # fmt: skip
    """What each chunk adds, (k, b, c, h, p, n) in fp32, from x and B or dy and C, whose leading axis is k or 1."""
    k, b, h, _ = decays.step.shape
    p, n = values.shape[-1], keys.shape[-1]
    added = decays.step.new_empty(k, b, shape.chunks, h, p, n)
    block = min(64, width(n))
    ssd_state_kernel[(cdiv(n, block) * h * shape.chunks * b * k,)](
        values, keys, *decays, image, added, shape.length, shape.chunks, h, p, n, b, mask_of(reverse),
        shared_stride(values), *values.stride()[1:4], shared_stride(keys), *keys.stride()[1:3],
        TILES=shape.tiles, T=shape.T, P=width(p), BLOCK=block, ENTERING=entering,
        LARGE=is_large((1, 1, 1), shape.T, values.stride(2), keys.stride(2)), **options(values.dtype),
    )  # fmt: skip
    return added


def pass_states(
    states: Tensor, decays: Decays, image: Tensor | None, initial: Tensor | None, reverse: Sequence[bool],
    shape: Shape, *, before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Replace what each chunk adds, (k, b, c, h, p, n), by the state before it. Returns the state after all of them.

    With the states `before` the chunks, `states` are gradients: replaced by that of the state after each chunk. Returns
    the gradient of the initial state, and those of the exponents of decays across the chunks (k, b, c, h, parts).
    """
    k, b, chunks, h, p, n = states.shape
    final = states.new_empty(k, b, h, p, n)
    if initial is not None:
        initial = initial.contiguous()  # a gradient may have any strides
    blocks = cdiv(p * n, CARRIED)
    across = None if before is None else states.new_empty(k, b, chunks, h, blocks)
    ssd_pass_kernel[(blocks * h * b * k,)](
        states, decays.total, image, initial, final, before, across, shape.length, chunks, h, p * n, b,
        mask_of(reverse), Q=shape.tiles * shape.T, CARRIED=CARRIED, **OPTIONS,
    )  # fmt: skip
    return final, across


def width(size: int) -> int:
    """A size as tl.dot takes it: a power of two from 16 on."""
    return max(16, triton.next_power_of_2(size))


def shared_stride(t: Tensor) -> int:
    """The stride of directions of t (j, ...); 0 where all directions read the same."""
    return t.stride(0) if len(t) > 1 else 0


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Sums of chunks and what passes between chunks, forwards and for the gradient ("_gradient"), packed, for
    `kernels.aot`.
    """
    state = 4 * 64 / CHUNK
    return [
        *(
            ssd_case(
                dtype, ssd_state_kernel, {"ENTERING": entering}, variant, (), options(dtype),
                bytes=dtype.itemsize + state,
            )
            for entering, variant in ((False, ""), (True, "_gradient"))
        ),
        ssd_case(
            dtype, ssd_pass_kernel, {"CARRIED": CARRIED}, "", ["before", "across", "initial"], tokens=CHUNK,
            channels=CARRIED // 64, bytes=2 * state,
        ),
        ssd_case(
            dtype, ssd_pass_kernel, {"CARRIED": CARRIED}, "_gradient", tokens=CHUNK, channels=CARRIED // 64,
            bytes=3 * state,
        ),
    ]  # fmt: skip
