"""The causal convolution in Triton: all directions from one read of x, forward and backward pass.

Axes: b images, l tokens, e inner channels, k taps, g groups of tokens; weights and outputs have a leading axis of
directions.

A window of k consecutive rows x_p .. x_{p+k-1} slides over the sequence; its position p goes from -(k-1) to l-1. The
window holds what two tokens need: the last one, p + k - 1, forwards, and the first one, p, in reverse. So directions
differ only in the order of the taps and in the token that the output belongs to.

A program handles tiles of (g, channels): its groups follow each other along the sequence, and each slides its own
window, which is in registers. Tokens are not an axis of tiles, so the window moves without a shuffle; a row of a group
is one 128-byte line in 16 bits. Strides of tokens are compile-time constants, so that a row costs a load and a
comparison, but no address.
"""
# mypy takes Triton's language for Python:
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import TRITON_TYPE, CompileCase
from .large import cdiv, is_large, tile_grid, tile_program, token_number
from .triton_tiles import sigmoid

# Channels per program; they divide the inner widths of all presets.
CHANNELS = 64
# The forward kernel has no loop: a group is at most FORWARD_ROWS positions, whose loads are all in flight together.
# Programs are short and follow each other through memory.
FORWARD_GROUPS, FORWARD_ROWS = 8, 8
# The backward kernel carries window, gradients and sums from batch to batch of rows, and loads the next batch before it
# computes this one. Long groups have fewer rows where two overlap and fewer partial sums; short ones are more programs.
# PROGRAMS fill 132 multiprocessors three times with four programs of four warps. A batch is the number of rows that
# wastes fewer; packed sequences always take the last: with more comparisons of images, registers spill on sm_100 and
# gfx942.
BACKWARD_GROUPS, BACKWARD_ROWS = 4, (5, 3)
BACKWARD_TOKENS, PROGRAMS = (16, 64), 1536
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (b, l, e) with contiguous channels, weight (directions, e, k) and bias (directions, e) in fp32, image numbers
    (b, l) int32 -> y (directions, b, l, e) in x's dtype.
    """
    b, length, e = x.shape
    directions, _, k = weight.shape
    y = x.new_empty(directions, b, length, e)
    positions = length + k - 1
    tiles = cdiv(positions, FORWARD_GROUPS * FORWARD_ROWS)
    rows = cdiv(positions, FORWARD_GROUPS * tiles)
    grid = cdiv(e, CHANNELS), tiles, b
    large = is_large(grid, length, e, x.stride(1))
    with torch.cuda.device_of(x):
        causal_conv1d_fwd_kernel[tile_grid(grid, large)](
            x, weight, bias, image, y, length, x.stride(0), e, x.stride(1),
            *_constants(reverse, k, silu, FORWARD_GROUPS, rows), LARGE=large, **LAUNCH,
        )  # fmt: skip
    return y


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    image: Tensor | None,
    dy: Tensor,
    reverse: Sequence[bool],
    silu: bool,
    *,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dy (directions, b, l, e) contiguous -> dx (b, l, e), summed over directions, and the gradients of weight and bias
    in fp32, one after the other.

    A given `dx` is written in place; its channels are contiguous, and its other strides are free.
    """
    b, length, e = x.shape
    directions, _, k = weight.shape
    tiles, tile, rows = _backward_tiles(b, length, cdiv(e, CHANNELS), image is not None)
    dx = x.new_empty(x.shape) if dx is None else dx
    parts = weight.new_empty(b * tiles, directions * e * (k + 1))
    grid = cdiv(e, CHANNELS), tiles, b
    large = is_large(grid, length, e, x.stride(1), dx.stride(1))
    with torch.cuda.device_of(x):
        causal_conv1d_bwd_kernel[tile_grid(grid, large)](
            x, weight, bias, image, dy, dx, parts, length, tile, x.stride(0), dx.stride(0), e, x.stride(1),
            dx.stride(1), *_constants(reverse, k, silu, BACKWARD_GROUPS, rows), EARLY=_early(k, rows), LARGE=large,
            **LAUNCH,
        )  # fmt: skip
    return dx, parts.sum(0)


def _backward_tiles(b: int, length: int, blocks: int, packed: bool) -> tuple[int, int, int]:
    """The number of tiles, the tokens of each of their groups, and the rows of a batch, which divide these tokens."""
    most, fewest = (cdiv(length, BACKWARD_GROUPS * tokens) for tokens in BACKWARD_TOKENS)
    tiles = min(max(cdiv(PROGRAMS, blocks * b), fewest), most)
    tokens = cdiv(length, BACKWARD_GROUPS * tiles)
    rows = min(BACKWARD_ROWS[-packed:], key=lambda rows: -tokens % rows)
    tile = cdiv(tokens, rows) * rows
    return cdiv(length, BACKWARD_GROUPS * tile), tile, rows


def _early(k: int, rows: int) -> int:
    """How many positions a group of the backward kernel starts early: k - 1 in full batches of `rows`."""
    return cdiv(k - 1, rows) * rows


def _constants(reverse: Sequence[bool], k: int, silu: bool, groups: int, rows: int) -> tuple[Any, ...]:
    """Compile-time arguments that both kernels have; bit i of REVERSED is set if direction i is in reverse, and
    2 ** TAP_BITS is the first power of two that k does not exceed.
    """
    reversed_bits = sum(bool(r) << i for i, r in enumerate(reverse))
    return len(reverse), reversed_bits, k, (k - 1).bit_length(), silu, groups, CHANNELS, rows


@triton.jit
def _load_rows(pointer, first, limit, inside, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of each group, from its row `first` on, which is at `pointer`; zero outside 0 .. limit - 1."""
    loaded = ()
    for i in tl.static_range(COUNT):
        within = inside & (first + i >= 0) & (first + i < limit)
        loaded += (tl.load(pointer + i * STRIDE, mask=within, other=0.0),)
    return loaded


@triton.jit
def _load_numbers(image, first, length, COUNT: tl.constexpr):
    """The image numbers (g, 1) of COUNT rows, -1 outside the sequence; not used if `image` is None."""
    loaded = ()
    for i in tl.static_range(COUNT):
        if image is None:
            loaded += (0,)
        else:
            inside = (first + i >= 0) & (first + i < length)
            loaded += (tl.load(image + (first + i), mask=inside, other=-1),)
    return loaded


@triton.jit
def _within_image(value, otherwise, image, numbers, j: tl.constexpr, REVERSE: tl.constexpr):
    """`value`, or `otherwise` if row j of the window and the token that looks through it are of different images."""
    if image is None:
        return value
    else:
        looking = numbers[0] if REVERSE else numbers[len(numbers) - 1]
        return tl.where(numbers[j] == looking, value, otherwise)


@triton.jit
def _load_taps(
    weight, bias, block, E: tl.constexpr, DIRECTIONS: tl.constexpr, K: tl.constexpr, TAP_BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each direction, the taps (channels, 2 ** TAP_BITS), as they lie in memory: a load of one tap, whose channels
    are k apart, would touch as many lines as the load of all. And the biases (1, channels).
    """
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.arange(0, 1 << TAP_BITS)[None, :]
    inside = (channel[:, None] < E) & (tap < K)
    taps = ()
    biases = ()
    for d in tl.static_range(DIRECTIONS):
        taps += (tl.load(weight + (d * E + channel[:, None]) * K + tap, mask=inside, other=0.0),)
        biases += (tl.load(bias + d * E + channel[None, :], mask=channel[None, :] < E, other=0.0),)
    return taps, biases


@triton.jit
def _split_taps(taps, K: tl.constexpr, TAP_BITS: tl.constexpr, CHANNELS: tl.constexpr, REVERSE: tl.constexpr):
    """The loaded taps of a direction as K tensors (1, channels), in the order of the window's rows. Each step splits
    off the lowest bit of the columns' numbers.
    """
    columns = (taps,)
    for bit in tl.static_range(TAP_BITS):
        columns_so_far, columns, odd_columns = columns, (), ()
        for i in tl.static_range(1 << bit):
            pairs = tl.reshape(columns_so_far[i], (CHANNELS, 1 << (TAP_BITS - 1 - bit), 2))
            even, odd = tl.split(pairs)
            columns += (even,)
            odd_columns += (odd,)
        columns += odd_columns
    rows = ()
    for j in tl.static_range(K):
        rows += (tl.reshape(columns[K - 1 - j if REVERSE else j], (1, CHANNELS)),)
    return rows


@triton.jit
def _pre_activation(window, numbers, image, taps, bias, K: tl.constexpr, REVERSE: tl.constexpr):
    out = bias
    for j in tl.static_range(K):
        out += taps[j] * _within_image(window[j], 0.0, image, numbers, j, REVERSE)
    return out


@triton.jit(do_not_specialize=["length"])
def causal_conv1d_fwd_kernel(
    x, weight, bias, image, y, length, x_b_stride, E: tl.constexpr, X_STRIDE: tl.constexpr,
    DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr, TAP_BITS: tl.constexpr, SILU: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of GROUPS x ROWS positions."""
    block, number, b, _, images = tile_program(tl.cdiv(E, CHANNELS), tl.cdiv(length + K - 1, GROUPS * ROWS), LARGE)
    b = b.to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < E
    first = token_number((number * GROUPS + tl.arange(0, GROUPS)[:, None]) * ROWS - (K - 1), LARGE)
    if image is not None:
        image += b * length

    rows = _load_rows(x + b * x_b_stride + first * X_STRIDE + channel, first, length, inside, X_STRIDE, ROWS + K - 1)
    numbers = _load_numbers(image, first, length, ROWS + K - 1)
    all_taps, biases = _load_taps(weight, bias, block, E, DIRECTIONS, K, TAP_BITS, CHANNELS)
    for d in tl.static_range(DIRECTIONS):
        taps = _split_taps(all_taps[d], K, TAP_BITS, CHANNELS, (REVERSED >> d) & 1)
        token = first + (0 if (REVERSED >> d) & 1 else K - 1)
        y_rows = y + (d * images + b) * length * E + token * E + channel
        for i in tl.static_range(ROWS):
            window = ()
            for j in tl.static_range(K):
                window += (rows[i + j].to(tl.float32),)
            out = _pre_activation(window, numbers[i : i + K], image, taps, biases[d], K, (REVERSED >> d) & 1)
            if SILU:
                out *= sigmoid(out)
            within = inside & (token + i >= 0) & (token + i < length)
            tl.store(y_rows + i * E, out.to(y.dtype.element_ty), mask=within)


@triton.jit
def _backward_position(
    window, dwindow, numbers, image, dys, taps, biases, sums,
    DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Add one position to the gradients of the window's rows, and to those of the parameters: K taps in the order of
    the window and the bias, per direction.
    """
    sums_so_far, sums = sums, ()
    for d in tl.static_range(DIRECTIONS):
        dpre = dys[d].to(tl.float32)
        if SILU:
            pre = _pre_activation(window, numbers, image, taps[d], biases[d], K, (REVERSED >> d) & 1)
            gate = sigmoid(pre)
            dpre *= gate
            dpre += dpre * (pre - pre * gate)
        dwindow_so_far, dwindow = dwindow, ()
        for j in tl.static_range(K):
            so_far = dwindow_so_far[j]
            dwindow += (_within_image(so_far + taps[d][j] * dpre, so_far, image, numbers, j, (REVERSED >> d) & 1),)
            seen = _within_image(window[j], 0.0, image, numbers, j, (REVERSED >> d) & 1)
            sums += (sums_so_far[d * (K + 1) + j] + dpre * seen,)
        sums += (sums_so_far[d * (K + 1) + K] + dpre,)
    return dwindow, sums


@triton.jit(do_not_specialize=["length", "tile"])
def causal_conv1d_bwd_kernel(
    x, weight, bias, image, dy, dx, parts, length, tile, x_b_stride, dx_b_stride,
    E: tl.constexpr, X_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr,
    DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr, TAP_BITS: tl.constexpr, SILU: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute `tile` rows of dx per group. A row is complete when the window has left it, so a group starts k - 1
    positions or more early, in full batches. What these add to the parameters' gradients belongs to the previous group,
    if there is one.
    """
    block, number, b, tiles, images = tile_program(tl.cdiv(E, CHANNELS), tl.cdiv(length, GROUPS * tile), LARGE)
    b = b.to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < E
    begin = token_number((number * GROUPS + tl.arange(0, GROUPS)[:, None]) * tile, LARGE)
    first = begin - EARLY
    end = tl.minimum(begin + tile, length)
    x_end = tl.minimum(begin + tile + (K - 1), length)
    if image is not None:
        image += b * length

    x_rows = x + b * x_b_stride + first * X_STRIDE + channel
    early_rows = _load_rows(x_rows, first, x_end, inside, X_STRIDE, K - 1)
    early_numbers = _load_numbers(image, first, length, K - 1)
    x_rows += (K - 1) * X_STRIDE
    rows = _load_rows(x_rows, first + (K - 1), x_end, inside, X_STRIDE, ROWS)
    row_numbers = _load_numbers(image, first + (K - 1), length, ROWS)
    dys = ()
    dy_rows = ()
    for d in tl.static_range(DIRECTIONS):
        token = first + (0 if (REVERSED >> d) & 1 else K - 1)
        dy_end = end if (REVERSED >> d) & 1 else x_end
        dy_rows += (dy + (d * images + b) * length * E + token * E + channel,)
        dys += (_load_rows(dy_rows[d], token, dy_end, inside, E, ROWS),)
    all_taps, biases = _load_taps(weight, bias, block, E, DIRECTIONS, K, TAP_BITS, CHANNELS)
    taps = ()
    for d in tl.static_range(DIRECTIONS):
        taps += (_split_taps(all_taps[d], K, TAP_BITS, CHANNELS, (REVERSED >> d) & 1),)

    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    window = ()
    numbers = ()
    dwindow = ()
    for i in tl.static_range(K - 1):
        window += (early_rows[i].to(tl.float32),)
        numbers += (early_numbers[i],)
        dwindow += (zero,)
    sums = ()
    for _ in tl.static_range(DIRECTIONS * (K + 1)):
        sums += (zero,)
    dx_rows = dx + b * dx_b_stride + first * DX_STRIDE + channel
    for at in range(-EARLY, tile, ROWS):
        start = begin + at
        now_rows, now_numbers, now_dys = rows, row_numbers, dys
        x_rows += ROWS * X_STRIDE
        rows = _load_rows(x_rows, start + (ROWS + K - 1), x_end, inside, X_STRIDE, ROWS)
        row_numbers = _load_numbers(image, start + (ROWS + K - 1), length, ROWS)
        dys = ()
        dy_rows_so_far, dy_rows = dy_rows, ()
        for d in tl.static_range(DIRECTIONS):
            dy_rows += (dy_rows_so_far[d] + ROWS * E,)
            token = start + (ROWS if (REVERSED >> d) & 1 else ROWS + K - 1)
            dy_end = end if (REVERSED >> d) & 1 else x_end
            dys += (_load_rows(dy_rows[d], token, dy_end, inside, E, ROWS),)
        for i in tl.static_range(ROWS):
            window += (now_rows[i].to(tl.float32),)
            numbers += (now_numbers[i],)
            dwindow += (zero,)
            position_dys = ()
            for d in tl.static_range(DIRECTIONS):
                position_dys += (now_dys[d][i],)
            dwindow, sums = _backward_position(
                window, dwindow, numbers, image, position_dys, taps, biases, sums, DIRECTIONS, REVERSED, K, SILU
            )
            within = inside & (at >= 0) & (start + i < end)
            tl.store(dx_rows + i * DX_STRIDE, dwindow[0].to(dx.dtype.element_ty), mask=within)
            window = window[1:]
            numbers = numbers[1:]
            dwindow = dwindow[1:]
        dx_rows += ROWS * DX_STRIDE
        if at == -ROWS:
            sums_so_far, sums = sums, ()
            for i in tl.static_range(DIRECTIONS * (K + 1)):
                sums += (tl.where(begin == 0, sums_so_far[i], 0.0),)

    part = parts + (b * tiles + number) * DIRECTIONS * (K + 1) * E
    for d in tl.static_range(DIRECTIONS):
        weight_row = part + (d * E + channel) * K
        for j in tl.static_range(K):
            tap = K - 1 - j if (REVERSED >> d) & 1 else j
            tl.store(weight_row + tap, tl.sum(sums[d * (K + 1) + j], 0, keep_dims=True), mask=inside)
        dbias = tl.sum(sums[d * (K + 1) + K], 0, keep_dims=True)
        tl.store(part + DIRECTIONS * K * E + d * E + channel, dbias, mask=inside)


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Both directions, four taps and SiLU, as the mixer launches them on 197 tokens, which are half of a projection;
    "_packed" has image numbers.
    """
    activation = dict.fromkeys(("x", "y", "dy", "dx"), TRITON_TYPE[dtype])
    parameter = dict.fromkeys(("weight", "bias", "parts"), "*fp32")
    loose = {"length", "tile"} | ({"x_b_stride", "dx_b_stride"} if e % 16 else set())
    cases = []
    # a program computes both directions, so bytes and exponentials count both: x and two y; then x, dx and two dy
    for kernel, groups, tensors in (
        (causal_conv1d_fwd_kernel, FORWARD_GROUPS, 3),
        (causal_conv1d_bwd_kernel, BACKWARD_GROUPS, 4),
    ):
        for packed in (False, True):
            rows = 7 if kernel is causal_conv1d_fwd_kernel else BACKWARD_ROWS[packed]
            names = ("DIRECTIONS", "REVERSED", "K", "TAP_BITS", "SILU", "GROUPS", "CHANNELS", "ROWS")
            constants = dict(zip(names, _constants((False, True), 4, True, groups, rows), strict=True))
            constants |= {"E": e, "X_STRIDE": 2 * e, "LARGE": False} | ({} if packed else {"image": None})
            if "dx" in kernel.arg_names:
                constants |= {"DX_STRIDE": 2 * e, "EARLY": _early(4, rows)}
            types = activation | parameter | {"image": "*i32"} | dict.fromkeys(constants, "constexpr")
            cases.append(
                CompileCase(
                    kernel=kernel,
                    variant="_packed" if packed else "",
                    signature={argument: types.get(argument, "i32") for argument in kernel.arg_names},
                    constexprs=constants,
                    options=LAUNCH,
                    tokens=groups * rows,
                    channels=CHANNELS,
                    bytes=tensors * dtype.itemsize,
                    exponentials=2,
                    loose=frozenset(loose),
                )
            )
    return cases
