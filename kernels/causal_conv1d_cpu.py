"""The causal convolution in numba, for machines without a GPU: every direction from one pass over x.

Axes: b images, l tokens, e inner channels, k taps; a leading axis of weights and outputs counts directions.

As in causal_conv1d_triton.py, a window of k rows slides over the sequence from position -(k-1) to l-1; its last row is
the token that looks forwards, its first one the token that looks in reverse. A work item is one image and a block of
channels, whose rows stay in the first cache; the inner loops run over the channels of the block.
"""
# what numba compiles infers its types:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu import LOG2E, exp2, kernel, run, sigmoid

# Channels of a work item, a divisor of the presets' inner widths. The backward's 31 rows of them (both directions and
# k = 4) are 46 KB of the first cache, 48 KB on recent servers; with 128 it takes 1.8 times as long, because starting
# such short inner loops shows.
CHANNELS = 384


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (b, l, e), channels side by side, weight (directions, e, k) and bias (directions, e) fp32, image (b, l) int32
    numbers -> y (directions, b, l, e) in x's dtype.
    """
    y = torch.empty(len(weight), *x.shape)
    run(_forward, _items(x), *_inputs(x, weight, bias, image, reverse), silu, y.numpy())
    return y.to(x.dtype)


def backward(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, dy: Tensor, reverse: Sequence[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (directions, b, l, e) contiguous -> dx (b, l, e), summed over the directions, dweight and dbias fp32."""
    directions, e, k = weight.shape
    dx = torch.zeros(x.shape)
    dtaps = torch.zeros(len(x), directions, k, e)
    dbias = torch.zeros(len(x), directions, e)
    run(
        _backward, _items(x), *_inputs(x, weight, bias, image, reverse), silu,
        dy.float().numpy(), dx.numpy(), dtaps.numpy(), dbias.numpy(),
    )  # fmt: skip
    return dx.to(x.dtype), _taps(dtaps.sum(0).transpose(1, 2), reverse).contiguous(), dbias.sum(0)


def _items(x: Tensor) -> int:
    return len(x) * -(-x.shape[-1] // CHANNELS)


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, image: Tensor | None, reverse: Sequence[bool]
) -> tuple[NDArray | int, ...]:
    """What both kernels read. x comes flat, with the strides of its first two axes: compiled once for all of them."""
    x = x.float()
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    flat = x.as_strided((last + 1,), (1,))
    taps = _taps(weight, reverse).transpose(1, 2).contiguous()  # (directions, k, e)
    image = torch.zeros(x.shape[:2], dtype=torch.int32) if image is None else image
    arrays = [t.detach().numpy() for t in (flat, taps, bias, image.contiguous())]
    return arrays[0], x.stride(0), x.stride(1), *arrays[1:], np.array(reverse)


def _taps(weight: Tensor, reverse: Sequence[bool]) -> Tensor:
    """weight with the taps of each direction in the order of the window's rows, or back from it."""
    return torch.stack([w.flip(-1) if r else w for w, r in zip(weight, reverse, strict=True)])


@kernel
def _forward(first, last, x, x_b_stride, x_l_stride, taps, bias, image, reverse, silu, y):
    directions, k, e = taps.shape
    length = image.shape[1]
    blocks = (e + CHANNELS - 1) // CHANNELS
    for item in range(first, last):
        b, start = item // blocks, item % blocks * CHANNELS
        width = min(CHANNELS, e - start)
        for position in range(1 - k, length):
            for d in range(directions):
                token = position if reverse[d] else position + k - 1
                if token < 0 or token >= length:
                    continue
                out = y[d, b, token, start : start + width]
                for c in range(width):
                    out[c] = bias[d, start + c]
                for j in range(k):
                    row = position + j
                    if row < 0 or row >= length or image[b, row] != image[b, token]:
                        continue
                    at = b * x_b_stride + row * x_l_stride + start
                    seen = x[at : at + width]
                    tap = taps[d, j, start : start + width]
                    for c in range(width):
                        out[c] += tap[c] * seen[c]
                if silu:
                    for c in range(width):
                        out[c] *= sigmoid(out[c], exp2(-abs(out[c]) * LOG2E))


@kernel
def _backward(first, last, x, x_b_stride, x_l_stride, taps, bias, image, reverse, silu, dy, dx, dtaps, dbias):
    """dx (b, l, e), dtaps (b, directions, k, e) and dbias (b, directions, e) come as zeros and are added to."""
    directions, k, e = taps.shape
    length = image.shape[1]
    blocks = (e + CHANNELS - 1) // CHANNELS
    dpre = np.empty(CHANNELS, np.float32)
    for item in range(first, last):
        b, start = item // blocks, item % blocks * CHANNELS
        width = min(CHANNELS, e - start)
        for position in range(1 - k, length):
            for d in range(directions):
                token = position if reverse[d] else position + k - 1
                if token < 0 or token >= length:
                    continue
                first_row, last_row = max(position, 0), min(position + k, length)
                dout = dy[d, b, token, start : start + width]
                if silu:
                    for c in range(width):
                        dpre[c] = bias[d, start + c]
                    for row in range(first_row, last_row):
                        if image[b, row] == image[b, token]:
                            at = b * x_b_stride + row * x_l_stride + start
                            seen = x[at : at + width]
                            tap = taps[d, row - position, start : start + width]
                            for c in range(width):
                                dpre[c] += tap[c] * seen[c]
                    for c in range(width):
                        gate = sigmoid(dpre[c], exp2(-abs(dpre[c]) * LOG2E))
                        dpre[c] = dout[c] * gate * (np.float32(1) + dpre[c] * (np.float32(1) - gate))
                else:
                    for c in range(width):
                        dpre[c] = dout[c]
                dbias_sum = dbias[b, d, start : start + width]
                for c in range(width):
                    dbias_sum[c] += dpre[c]
                for row in range(first_row, last_row):
                    if image[b, row] == image[b, token]:
                        at = b * x_b_stride + row * x_l_stride + start
                        seen = x[at : at + width]
                        dseen = dx[b, row, start : start + width]
                        tap = taps[d, row - position, start : start + width]
                        dtap = dtaps[b, d, row - position, start : start + width]
                        for c in range(width):
                            dtap[c] += dpre[c] * seen[c]
                            dseen[c] += dpre[c] * tap[c]
