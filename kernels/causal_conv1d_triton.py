"""The causal convolution in Triton: all directions from one read of x, forward and backward pass.

Axes: b images, l tokens, e inner channels, k taps; weights and outputs have a leading axis of directions.

A window of k consecutive rows x_p .. x_{p+k-1} slides over the sequence; its position p goes from -(k-1) to l-1. The
window holds what two tokens need: the last one, p + k - 1, forwards, and the first one, p, in reverse. So directions
differ only in the order of the taps and in the token that the output belongs to. A program slides over a tile of
positions with the window in registers: each row is read once, except the k - 1 rows where two tiles overlap.
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
from .large import is_large, tile_grid, tile_program, token_number
from .triton_tiles import sigmoid

# Channels per program, which is one warp; they divide the inner widths of all presets. The forward kernel has 4 per
# lane (of NVIDIA's 32): loads of 8 bytes in 16 bits, of 16 bytes in fp32, 80-130 registers. The backward kernel has 2
# per lane and 96-146 registers: with 4, the window, the taps and the gradients of both took all 255 registers, and
# spilled if there were image numbers.
FORWARD_CHANNELS = 128
BACKWARD_CHANNELS = 64
# Most positions per program: the rows where two tiles overlap are then 1/20 of all reads, and the benchmarks have 9 or
# more programs for each of 132 multiprocessors.
POSITIONS = 64
# Rows whose loads are in flight together.
ROWS = 4
LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (b, l, e) with contiguous channels, weight (directions, e, k) and bias (directions, e) in fp32, image numbers
    (b, l) int32 -> y (directions, b, l, e) in x's dtype.
    """
    b, length, e = x.shape
    directions, _, k = weight.shape
    y = x.new_empty(directions, b, length, e)
    tiles, tile = _tiles(length + k - 1)
    grid = triton.cdiv(e, FORWARD_CHANNELS), tiles, b
    large = is_large(grid, length, e, x.stride(1))
    with torch.cuda.device_of(x):
        causal_conv1d_fwd_kernel[tile_grid(grid, large)](
            x, weight, bias, image, y, length, e, tile, *x.stride()[:2],
            *_constants(reverse, k, silu, FORWARD_CHANNELS), LARGE=large, **LAUNCH,
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
    """dy (directions, b, l, e) contiguous -> dx (b, l, e), summed over directions, and the gradients of the parameters
    (directions, k + 1, e) in fp32: those of the taps in the order of weight's last axis, then that of the bias.

    A given `dx` is written in place; its channels are contiguous, and its other strides are free.
    """
    b, length, e = x.shape
    directions, _, k = weight.shape
    tiles, tile = _tiles(length)
    dx = x.new_empty(x.shape) if dx is None else dx
    parts = weight.new_empty(b * tiles, directions, k + 1, e)
    grid = triton.cdiv(e, BACKWARD_CHANNELS), tiles, b
    large = is_large(grid, length, e, x.stride(1), dx.stride(1))
    with torch.cuda.device_of(x):
        causal_conv1d_bwd_kernel[tile_grid(grid, large)](
            x, weight, bias, image, dy, dx, parts, length, e, tile, *x.stride()[:2], *dx.stride()[:2],
            *_constants(reverse, k, silu, BACKWARD_CHANNELS), LARGE=large, **LAUNCH,
        )  # fmt: skip
    return dx, parts.sum(0)


def _tiles(positions: int) -> tuple[int, int]:
    """The number of tiles and the positions of each, as even as full batches of ROWS rows allow."""
    tiles = triton.cdiv(positions, POSITIONS)
    return tiles, triton.cdiv(triton.cdiv(positions, tiles), ROWS) * ROWS


def _constants(reverse: Sequence[bool], k: int, silu: bool, channels: int) -> tuple[int, int, int, bool, int, int]:
    """The compile-time arguments of the kernels; bit i of REVERSED is set if direction i is in reverse."""
    return len(reverse), sum(bool(r) << i for i, r in enumerate(reverse)), k, silu, channels, ROWS


@triton.jit
def _load_rows(rows, first, length, stride, channel, e, COUNT: tl.constexpr):
    """COUNT rows from `first` on, in fp32; zero outside the sequence."""
    loaded = ()
    for i in tl.static_range(COUNT):
        row = first + i
        inside = (channel < e) & (row >= 0) & (row < length)
        loaded += (tl.load(rows + row * stride + channel, mask=inside, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def _load_numbers(image, first, length, COUNT: tl.constexpr):
    """The image numbers of COUNT rows, -1 outside the sequence; not used if `image` is None."""
    loaded = ()
    for i in tl.static_range(COUNT):
        if image is None:
            loaded += (0,)
        else:
            inside = (first + i >= 0) & (first + i < length)
            loaded += (tl.load(image + first + i, mask=inside, other=-1),)
    return loaded


@triton.jit
def _within_image(value, image, numbers, j: tl.constexpr, REVERSE: tl.constexpr):
    """`value` at row j of the window; zero if that row and the token that looks through the window are of different
    images.
    """
    if image is None:
        return value
    else:
        looking = numbers[0] if REVERSE else numbers[len(numbers) - 1]
        return tl.where(numbers[j] == looking, value, 0.0)


@triton.jit
def _load_taps(weight, channel, e, DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr):
    """The taps of each direction in the order of the window's rows, K per direction."""
    taps = ()
    for d in tl.static_range(DIRECTIONS):
        for j in tl.static_range(K):
            tap = (d * e + channel) * K + (K - 1 - j if (REVERSED >> d) & 1 else j)
            taps += (tl.load(weight + tap, mask=channel < e, other=0.0),)
    return taps


@triton.jit
def _load_bias(bias, channel, e, DIRECTIONS: tl.constexpr):
    loaded = ()
    for d in tl.static_range(DIRECTIONS):
        loaded += (tl.load(bias + d * e + channel, mask=channel < e, other=0.0),)
    return loaded


@triton.jit(do_not_specialize=["length", "tile"])
def causal_conv1d_fwd_kernel(
    x, weight, bias, image, y, length, e, tile, x_b_stride, x_l_stride,
    DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    block, number, b, _, images = tile_program(tl.cdiv(e, CHANNELS), tl.cdiv(length + K - 1, tile), LARGE)
    b = b.to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    x += b * x_b_stride
    if image is not None:
        image += b * length

    taps = _load_taps(weight, channel, e, DIRECTIONS, REVERSED, K)
    biases = _load_bias(bias, channel, e, DIRECTIONS)

    first = token_number(number * tile - (K - 1), LARGE)
    last = tl.minimum(first + tile, length)
    window = _load_rows(x, first, length, x_l_stride, channel, e, K - 1)
    numbers = _load_numbers(image, first, length, K - 1)
    for at in range(first, last, ROWS):
        start = token_number(at, LARGE)
        rows = _load_rows(x, start + K - 1, length, x_l_stride, channel, e, ROWS)
        row_numbers = _load_numbers(image, start + K - 1, length, ROWS)
        for i in tl.static_range(ROWS):
            window += (rows[i],)
            numbers += (row_numbers[i],)
            for d in tl.static_range(DIRECTIONS):
                out = biases[d]
                for j in tl.static_range(K):
                    out += taps[d * K + j] * _within_image(window[j], image, numbers, j, (REVERSED >> d) & 1)
                if SILU:
                    out *= sigmoid(out)
                token = start + i + (0 if (REVERSED >> d) & 1 else K - 1)
                y_row = y + ((d * images + b) * length + token) * e
                inside = (channel < e) & (token >= 0) & (token < length)
                tl.store(y_row + channel, out.to(y.dtype.element_ty), mask=inside)
            window = window[1:]
            numbers = numbers[1:]


@triton.jit(do_not_specialize=["length", "tile"])
def causal_conv1d_bwd_kernel(
    x, weight, bias, image, dy, dx, parts, length, e, tile, x_b_stride, x_l_stride, dx_b_stride, dx_l_stride,
    DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Compute `tile` rows of dx. A row is complete when the window has left it, so positions start k - 1 before the
    tile. What these positions add to the parameters' gradients belongs to the previous tile, except in the first tile.
    """
    block, number, b, tiles, images = tile_program(tl.cdiv(e, CHANNELS), tl.cdiv(length, tile), LARGE)
    b = b.to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    x += b * x_b_stride
    dx += b * dx_b_stride
    if image is not None:
        image += b * length

    taps = _load_taps(weight, channel, e, DIRECTIONS, REVERSED, K)
    biases = _load_bias(bias, channel, e, DIRECTIONS)
    zero = tl.zeros((CHANNELS,), tl.float32)
    dtaps = ()
    for _ in tl.static_range(DIRECTIONS * K):
        dtaps += (zero,)
    dbiases = ()
    for _ in tl.static_range(DIRECTIONS):
        dbiases += (zero,)

    begin = token_number(number * tile, LARGE)
    end = tl.minimum(begin + tile, length)
    first = begin - (K - 1)
    first_owned = tl.where(begin == 0, first, begin)
    window = _load_rows(x, first, length, x_l_stride, channel, e, K - 1)
    numbers = _load_numbers(image, first, length, K - 1)
    dwindow = ()
    for _ in tl.static_range(K - 1):
        dwindow += (zero,)
    for at in range(first, end, ROWS):
        start = token_number(at, LARGE)
        rows = _load_rows(x, start + K - 1, length, x_l_stride, channel, e, ROWS)
        row_numbers = _load_numbers(image, start + K - 1, length, ROWS)
        dy_rows = ()
        for d in tl.static_range(DIRECTIONS):
            dy_first = start if (REVERSED >> d) & 1 else start + K - 1
            dy_direction = dy + (d * images + b) * length * e
            dy_rows += _load_rows(dy_direction, dy_first, length, e, channel, e, ROWS)
        for i in tl.static_range(ROWS):
            window += (rows[i],)
            numbers += (row_numbers[i],)
            dwindow += (zero,)
            position = start + i
            owned = (position >= first_owned) & (position < end)
            dtaps_so_far, dtaps = dtaps, ()
            dbiases_so_far, dbiases = dbiases, ()
            for d in tl.static_range(DIRECTIONS):
                dpre = dy_rows[d * ROWS + i]
                if SILU:
                    pre = biases[d]
                    for j in tl.static_range(K):
                        pre += taps[d * K + j] * _within_image(window[j], image, numbers, j, (REVERSED >> d) & 1)
                    gate = sigmoid(pre)
                    dpre *= gate * (1 + pre * (1 - gate))
                dpre_owned = tl.where(owned, dpre, 0.0)
                dbiases += (dbiases_so_far[d] + dpre_owned,)
                dwindow_so_far, dwindow = dwindow, ()
                for j in tl.static_range(K):
                    seen = _within_image(window[j], image, numbers, j, (REVERSED >> d) & 1)
                    dseen = _within_image(taps[d * K + j] * dpre, image, numbers, j, (REVERSED >> d) & 1)
                    dtaps += (dtaps_so_far[d * K + j] + dpre_owned * seen,)
                    dwindow += (dwindow_so_far[j] + dseen,)
            inside = (channel < e) & (position >= begin) & (position < end)
            tl.store(dx + position * dx_l_stride + channel, dwindow[0].to(dx.dtype.element_ty), mask=inside)
            window = window[1:]
            numbers = numbers[1:]
            dwindow = dwindow[1:]

    parts += (b * tiles + number) * DIRECTIONS * (K + 1) * e
    for d in tl.static_range(DIRECTIONS):
        for j in tl.static_range(K):
            tap = K - 1 - j if (REVERSED >> d) & 1 else j
            tl.store(parts + (d * (K + 1) + tap) * e + channel, dtaps[d * K + j], mask=channel < e)
        tl.store(parts + (d * (K + 1) + K) * e + channel, dbiases[d], mask=channel < e)


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Both directions, four taps and SiLU, as the mixer launches them; "_packed" has image numbers."""
    activation = dict.fromkeys(("x", "y", "dy", "dx"), TRITON_TYPE[dtype])
    parameter = dict.fromkeys(("weight", "bias", "parts"), "*fp32")
    loose = {"length", "tile"} | ({"e", "x_b_stride", "x_l_stride", "dx_b_stride", "dx_l_stride"} if e % 16 else set())
    cases = []
    # a program computes both directions, so bytes and exponentials count both: x and two y; then x, dx and two dy
    for kernel, channels, tensors in (
        (causal_conv1d_fwd_kernel, FORWARD_CHANNELS, 3),
        (causal_conv1d_bwd_kernel, BACKWARD_CHANNELS, 4),
    ):
        for packed in (False, True):
            names = ("DIRECTIONS", "REVERSED", "K", "SILU", "CHANNELS", "ROWS")
            constants: dict[str, Any] = dict(zip(names, _constants((False, True), 4, True, channels), strict=True))
            constants["LARGE"] = False
            constants |= {} if packed else {"image": None}
            types = activation | parameter | {"image": "*i32"} | dict.fromkeys(constants, "constexpr")
            cases.append(
                CompileCase(
                    kernel=kernel,
                    variant="_packed" if packed else "",
                    signature={argument: types.get(argument, "i32") for argument in kernel.arg_names},
                    constexprs=constants,
                    options=LAUNCH,
                    tokens=ROWS,
                    channels=channels,
                    bytes=tensors * dtype.itemsize,
                    exponentials=2,
                    loose=frozenset(loose),
                )
            )
    return cases
