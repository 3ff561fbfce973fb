"""The causal convolution in numba, for machines without a GPU: all directions from one pass over x.

Axes: b images, l tokens, e inner channels, k taps; weights and outputs have a leading axis of directions.

As in causal_conv1d_triton.py, a window of k rows slides over the sequence from position -(k-1) to l-1. Its last row is
the token that looks forwards, its first row the token that looks in reverse. The kernels work on tiles that stay in the
first-level cache: tokens of one image and the k - 1 tokens on each side, for a block of channels; tokens of another
image, or outside the sequence, are zero.
"""
# numba infers the types of what it compiles:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import BLOCK, COLUMNS, kernel, numbers, read_rows, run, spread, tile, write_rows
from .simd import Variable, emitted, sigmoid

# Tokens per tile, and tiles per work item. In the backward pass, each item has its own partial sum of the gradients of
# taps and bias.
_TOKENS = 32
_TILES = 4


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (b, l, e) with contiguous channels, weight (directions, e, k) and bias (directions, e) in fp32, image numbers
    (b, l) int32 -> y (directions, b, l, e) in x's dtype.
    """
    y = torch.empty(len(weight), *x.shape)
    run(_forward, _items(x), tuple(x.shape), *_inputs(x, weight, bias, image, reverse), silu, spread(y))
    return y.to(x.dtype)


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

    A given `dx` is written in place; its channels are contiguous.
    """
    directions, e, k = weight.shape
    dx = torch.empty_like(x) if dx is None else dx
    written = dx if dx.dtype == torch.float32 else torch.empty(x.shape)
    dtaps = torch.zeros(_items(x), directions, k + 1, -(-e // BLOCK) * BLOCK)
    run(
        _backward, _items(x), tuple(x.shape), *_inputs(x, weight, bias, image, reverse), silu,
        spread(dy), spread(written.unsqueeze(0)), numbers(dtaps),
    )  # fmt: skip
    if written is not dx:
        dx.copy_(written)
    total = dtaps.sum(0)[..., :e]
    dweight = torch.stack([t[:k].flip(0).T if r else t[:k].T for t, r in zip(total, reverse, strict=True)])
    return dx, torch.cat([dweight.flatten(), total[:, k].flatten()])


def _items(x: Tensor) -> int:
    return len(x) * -(-x.shape[1] // (_TILES * _TOKENS))


def _inputs(x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool]) -> tuple[Any, ...]:
    """What both kernels read. Taps, then the bias, are (directions, k + 1, e), with e padded to full blocks."""
    taps = torch.cat([_taps(weight, reverse).transpose(1, 2), bias.unsqueeze(1)], dim=1).detach()
    taps = F.pad(taps, (0, -taps.shape[-1] % BLOCK))
    images = np.empty((0, 0), np.int32) if image is None else numbers(image.contiguous())
    return spread(x.unsqueeze(0)), numbers(taps.contiguous()), images, np.array(reverse)


def _taps(weight: Tensor, reverse: Sequence[bool]) -> Tensor:
    """weight with the taps of each direction in the order of the window's rows, or the reverse of that."""
    return torch.stack([w.flip(-1) if r else w for w, r in zip(weight, reverse, strict=True)])


# Tiles are (rows, BLOCK). Window p is the rows from p to p + k - 1 of a tile of x. `taps_at` is the index where a block
# of channels begins in the taps of a direction, which have e channels.


@emitted
def _convolve(code, k, first, last, xs, taps, taps_at, e, y):
    """y[p] = bias + sum over j of taps[j] xs[p + j], for the windows from first to last."""
    with code.loop(first, last) as p:
        sums = [Variable(taps[taps_at + k * e + c]) for c in COLUMNS]
        with code.loop(0, k) as j:
            for c, total in zip(COLUMNS, sums, strict=True):
                total.set(taps[taps_at + j * e + c] * xs[(p + j) * BLOCK + c] + total.get())
        for c, total in zip(COLUMNS, sums, strict=True):
            y[p * BLOCK + c] = total.get()


@emitted
def _silu(code, first, last, y):
    with code.loop(first, last) as p:
        for c in COLUMNS:
            v = y[p * BLOCK + c]
            y[p * BLOCK + c] = v * sigmoid(v)


@emitted
def _silu_backward(code, windows, pre, dy):
    """dy becomes the gradient of pre."""
    with code.loop(0, windows) as p:
        for c in COLUMNS:
            v = pre[p * BLOCK + c]
            gate = sigmoid(v)
            dy[p * BLOCK + c] = dy[p * BLOCK + c] * gate * (v * (gate * -1 + 1) + 1)


@emitted
def _to_rows(code, k, tokens, dpre, taps, taps_at, e, dx):
    """Add to dx[t], the gradient of row t + k - 1, what its k windows contribute."""
    with code.loop(0, tokens) as t:
        sums = [Variable(dx[t * BLOCK + c]) for c in COLUMNS]
        with code.loop(0, k) as j:
            for c, total in zip(COLUMNS, sums, strict=True):
                total.set(taps[taps_at + j * e + c] * dpre[(t + k - 1 - j) * BLOCK + c] + total.get())
        for c, total in zip(COLUMNS, sums, strict=True):
            dx[t * BLOCK + c] = total.get()


@emitted
def _to_taps(code, k, first, last, xs, dpre, dtaps, taps_at, e):
    """For the windows from first to last: add the sum of dpre[p] xs[p + j] to dtaps[j], that of dpre to the bias."""
    with code.loop(0, k) as j:
        sums = [Variable(dtaps[taps_at + j * e + c]) for c in COLUMNS]
        with code.loop(first, last) as p:
            for c, total in zip(COLUMNS, sums, strict=True):
                total.set(dpre[p * BLOCK + c] * xs[(p + j) * BLOCK + c] + total.get())
        for c, total in zip(COLUMNS, sums, strict=True):
            dtaps[taps_at + j * e + c] = total.get()
    sums = [Variable(dtaps[taps_at + k * e + c]) for c in COLUMNS]
    with code.loop(first, last) as p:
        for c, total in zip(COLUMNS, sums, strict=True):
            total.set(dpre[p * BLOCK + c] + total.get())
    for c, total in zip(COLUMNS, sums, strict=True):
        dtaps[taps_at + k * e + c] = total.get()


@kernel
def _tokens_of(item, length):
    """The image of a work item, its first token, and the token after its last."""
    span = _TILES * _TOKENS
    spans = (length + span - 1) // span
    first = item % spans * span
    return item // spans, first, min(first + span, length)


@kernel
def _part(image, b, first, stop, length, reach):
    """The end of the run of tokens of one image, from first up to stop; and the bounds of that run with up to `reach`
    more tokens of the image on either side.
    """
    last = stop
    if image.shape[1] > 0:
        last = first + 1
        while last < stop and image[b, last] == image[b, first]:
            last += 1
    begin, end = max(first - reach, 0), min(last + reach, length)
    if image.shape[1] > 0:
        while image[b, begin] != image[b, first]:
            begin += 1
        while image[b, end - 1] != image[b, first]:
            end -= 1
    return last, begin, end


@kernel
def _read_between(x, strides, k, b, begin, end, first, last, e0, width, rows):
    """Read the tokens from first to last; those before begin and after end become zeros."""
    begin, end = max(begin, first), min(end, last)
    rows[: begin - first] = np.float32(0)
    rows[end - first : last - first] = np.float32(0)
    at = k * strides[0] + b * strides[1] + begin * strides[2] + e0
    read_rows((end - begin, width, BLOCK, x, at, strides[2], rows[begin - first :]))


@kernel
def _forward(first_item, last_item, size, x, taps, image, reverse, silu, y):
    """x (1, b, l, e) and y (directions, b, l, e) are pairs: the numbers, and the strides of the axes."""
    _, length, e = size
    directions, k, padded = taps.shape[0], taps.shape[1] - 1, taps.shape[2]
    reach = k - 1
    xs, ys = tile(_TOKENS + 2 * reach), tile(_TOKENS + reach)
    for item in range(first_item, last_item):
        b, first, stop = _tokens_of(item, length)
        while first < stop:
            last, begin, end = _part(image, b, first, min(first + _TOKENS, stop), length, reach)
            tokens = last - first
            for e0 in range(0, e, BLOCK):
                width = min(BLOCK, e - e0)
                _read_between(x[0], x[1], 0, b, begin, end, first - reach, last + reach, e0, width, xs)
                for d in range(directions):
                    # the window of a token ends with it, or begins with it in reverse
                    p = reach if reverse[d] else 0
                    _convolve((k, p, p + tokens, xs, taps, d * (k + 1) * padded + e0, padded, ys))
                    if silu:
                        _silu((p, p + tokens, ys))
                    at = d * y[1][0] + b * y[1][1] + first * y[1][2] + e0
                    write_rows((tokens, width, BLOCK, ys[p:], y[0], at, y[1][2]))
            first = last


@kernel
def _backward(first_item, last_item, size, x, taps, image, reverse, silu, dy, dx, dtaps):
    """x, dx (1, b, l, e) and dy (directions, b, l, e) are pairs, as in `_forward`. Rows near the border of a part are
    in windows of both neighbours, so the gradients of these windows are computed twice. dtaps (items, directions, k +
    1, e) must be zero; the kernel adds.
    """
    _, length, e = size
    directions, k, padded = taps.shape[0], taps.shape[1] - 1, taps.shape[2]
    reach = k - 1
    xs, pre, dys, dxs = tile(_TOKENS + 2 * reach), tile(_TOKENS + reach), tile(_TOKENS + reach), tile(_TOKENS)
    for item in range(first_item, last_item):
        b, first, stop = _tokens_of(item, length)
        while first < stop:
            last, begin, end = _part(image, b, first, min(first + _TOKENS, stop), length, reach)
            tokens = last - first
            for e0 in range(0, e, BLOCK):
                width = min(BLOCK, e - e0)
                _read_between(x[0], x[1], 0, b, begin, end, first - reach, last + reach, e0, width, xs)
                dxs[:] = np.float32(0)
                for d in range(directions):
                    p = reach if reverse[d] else 0
                    taps_at = d * (k + 1) * padded + e0
                    _read_between(dy[0], dy[1], d, b, begin, end, first - p, last + reach - p, e0, width, dys)
                    if silu:
                        _convolve((k, 0, tokens + reach, xs, taps, taps_at, padded, pre))
                        _silu_backward((tokens + reach, pre, dys))
                    _to_rows((k, tokens, dys, taps, taps_at, padded, dxs))
                    _to_taps((k, p, p + tokens, xs, dys, dtaps[item], taps_at, padded))
                dx_at = b * dx[1][1] + first * dx[1][2] + e0
                write_rows((tokens, width, BLOCK, dxs, dx[0], dx_at, dx[1][2]))
            first = last
