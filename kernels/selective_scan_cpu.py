"""The selective scan on a CPU, compiled by numba: parallel over image and channels, the state in the cache.

Axes: k directions, b images, l tokens, e inner channels, n states a channel. A work item walks one direction of one
image for a block of channels, a chunk of tokens at a time. Inner loops run over the channels of the block, so that each
becomes vector instructions, and what they work on stays in the first caches. The forward keeps the state before each
chunk; the backward rebuilds the states of one chunk at a time from there. Nothing of size l x e x n exists.

Arithmetic is fp32; 16-bit tensors are converted on the way in and out.
"""
# what numba compiles infers its types:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .cpu import LOG2E, array, exp2, inline, kernel, run, sigmoid, softplus

CHUNK = 16  # tokens between kept states: fp32 states then cost n / 16 values a token and channel
# Channels of a work item. Fewer leave too little behind each loop's start (64: 1.2 times as long in the backward).
_BLOCK = 128


@kernel
def _read(x, k, b, tokens, e0, width, block):
    """A block of channels of the tokens into (chunk, BLOCK). An unsigned index cannot mean "from the end", which would
    keep the loop from becoming vector instructions.
    """
    for m in range(len(tokens)):
        for j in range(width):
            block[m, j] = x[k, b, tokens[m], np.uintp(e0 + j)]


@kernel
def _write(block, y, k, b, tokens, e0, width):
    for m in range(len(tokens)):
        for j in range(width):
            y[k, b, tokens[m], np.uintp(e0 + j)] = block[m, j]


@kernel
def _walk(image, b, start, length, reverse, tokens, kept):
    """The tokens of a chunk in scan order, and for each 1, or 0 if it begins an image and the state starts anew."""
    for m in range(len(tokens)):
        t = length - 1 - start - m if reverse else start + m
        previous = t + 1 if reverse else t - 1
        tokens[m] = t
        kept[m] = np.float32(1)
        if image.shape[1] > 0 and previous < length:
            number = image[b, previous] if previous >= 0 else 0
            if image[b, t] != number:
                kept[m] = np.float32(0)


@kernel
def _enter(tokens, width, step, dt_bias, k, e0, xs, slope, entering):
    """`step` becomes softplus(dt + bias), with its slope; what enters the state at a token is entering x B."""
    for m in range(len(tokens)):
        for j in range(width):
            v = step[m, j] + dt_bias[k, np.uintp(e0 + j)]
            u = exp2(-abs(v) * LOG2E)
            step[m, j] = softplus(v, u)
            slope[m, j] = sigmoid(v, u)
            entering[m, j] = step[m, j] * xs[m, j]


@kernel
def _advance(tokens, width, kept, step, A, entering, xs, D, k, e0, B, kB, C, kC, b, h, y):
    """The forward's inner loops: the state h and y, token by token. A comes scaled by log2(e)."""
    for m in range(len(tokens)):
        t = tokens[m]
        if kept[m] == 0:
            h[:] = np.float32(0)
        for j in range(width):
            y[m, j] = D[k, np.uintp(e0 + j)] * xs[m, j]
        for i in range(len(A)):
            B_i = B[kB, b, t, i]
            C_i = C[kC, b, t, i]
            for j in range(width):
                h_ij = exp2(step[m, j] * A[i, j]) * h[i, j] + entering[m, j] * B_i
                h[i, j] = h_ij
                y[m, j] += h_ij * C_i


@kernel
def _rebuild(tokens, width, kept, step, A, entering, B, kB, b, before, decay):
    """The decays of a chunk, the state before each of its tokens, and the one after the last."""
    for m in range(len(tokens)):
        for i in range(len(A)):
            B_i = B[kB, b, tokens[m], i]
            for j in range(width):
                a = exp2(step[m, j] * A[i, j]) * kept[m]
                decay[m, i, j] = a
                before[m + 1, i, j] = a * before[m, i, j] + entering[m, j] * B_i


@kernel
def _retreat(
    tokens, width, step, A, entering, B, kB, C, kC, k, b, before, decay,
    ds, g, dA, dentering, dstep, dB, dC, block,
):  # fmt: skip
    """The backward's inner loops. With g the gradient that reaches a state h_t:  g = C_t ds_t + (decay g) of the token
    after it in scan order; on return g is what reaches the state before the chunk.
    """
    for m in range(len(tokens) - 1, -1, -1):
        t = tokens[m]
        for j in range(width):
            dentering[m, j] = np.float32(0)
            dstep[m, j] = np.float32(0)
        for i in range(len(A)):
            B_i = B[kB, b, t, i]
            C_i = C[kC, b, t, i]
            dB_i = np.float32(0)
            dC_i = np.float32(0)
            for j in range(width):
                g_ij = g[i, j] + ds[m, j] * C_i
                dC_i += ds[m, j] * before[m + 1, i, j]
                dB_i += g_ij * entering[m, j]
                dentering[m, j] += g_ij * B_i
                carried = g_ij * decay[m, i, j]
                g[i, j] = carried
                dexponent = carried * before[m, i, j]
                dA[i, j] += dexponent * step[m, j]
                dstep[m, j] += dexponent * A[i, j]
            dB[block, k, b, t, i] = dB_i
            dC[block, k, b, t, i] = dC_i


@kernel
def _leave(tokens, width, step, slope, xs, D, ds, dentering, dstep, dD, dbias, k, b, e0):
    """From the gradients of what entered and of the steps to those of x and dt, in place."""
    for m in range(len(tokens)):
        for j in range(width):
            c = np.uintp(e0 + j)
            dstep[m, j] = (dstep[m, j] / LOG2E + dentering[m, j] * xs[m, j]) * slope[m, j]
            dentering[m, j] = dentering[m, j] * step[m, j] + D[k, c] * ds[m, j]
            dD[b, k, c] += ds[m, j] * xs[m, j]
            dbias[b, k, c] += dstep[m, j]


@inline
def _tile():
    """Each is an allocation of its own: what shares one may overlap for all the compiler knows, and stays scalar."""
    return np.empty((CHUNK, _BLOCK), np.float32)


@kernel
def _forward(first, last, x, dt, A, B, C, D, dt_bias, initial, image, reverse, s, final, states):
    _, images, length, e = s.shape
    n = A.shape[2]
    blocks = (e + _BLOCK - 1) // _BLOCK
    tokens, kept = np.empty(CHUNK, np.intp), np.empty(CHUNK, np.float32)
    h, A_block = np.empty((n, _BLOCK), np.float32), np.empty((n, _BLOCK), np.float32)
    xs, step, slope, entering, y = _tile(), _tile(), _tile(), _tile(), _tile()
    for item in range(first, last):
        k, b, e0 = item // (images * blocks), item // blocks % images, item % blocks * _BLOCK
        # a tensor that all directions share has one of them
        kx, kdt, kB, kC = min(k, len(x) - 1), min(k, len(dt) - 1), min(k, len(B) - 1), min(k, len(C) - 1)
        width = min(_BLOCK, e - e0)
        for i in range(n):
            for j in range(width):
                A_block[i, j] = A[k, e0 + j, i] * LOG2E
                h[i, j] = initial[k, b, e0 + j, i] if len(initial) else np.float32(0)
        for start in range(0, length, CHUNK):
            here = tokens[: min(CHUNK, length - start)]
            _walk(image, b, start, length, reverse[k], here, kept)
            if len(states):
                for i in range(n):
                    for j in range(width):
                        states[k, b, start // CHUNK, i, np.uintp(e0 + j)] = h[i, j]
            _read(x, kx, b, here, e0, width, xs)
            _read(dt, kdt, b, here, e0, width, step)
            _enter(here, width, step, dt_bias, k, e0, xs, slope, entering)
            _advance(here, width, kept, step, A_block, entering, xs, D, k, e0, B, kB, C, kC, b, h, y)
            _write(y, s, k, b, here, e0, width)
        for i in range(n):
            for j in range(width):
                final[k, b, e0 + j, i] = h[i, j]


@kernel
def _backward(
    first, last, x, dt, A, B, C, D, dt_bias, image, reverse, states, ds, dfinal,
    dx, ddt, dA, dB, dC, dD, dbias, dinitial,
):  # fmt: skip
    _, images, length, e = dx.shape
    n = A.shape[2]
    blocks = (e + _BLOCK - 1) // _BLOCK
    tokens, kept = np.empty(CHUNK, np.intp), np.empty(CHUNK, np.float32)
    before = np.empty((CHUNK + 1, n, _BLOCK), np.float32)  # [m]: the state before the chunk's m-th token
    decay = np.empty((CHUNK, n, _BLOCK), np.float32)
    A_block, dA_block, g = np.empty_like(decay[0]), np.empty_like(decay[0]), np.empty_like(decay[0])
    xs, step, slope, entering = _tile(), _tile(), _tile(), _tile()
    dss, dentering, dstep = _tile(), _tile(), _tile()
    for item in range(first, last):
        k, b, block = item // (images * blocks), item // blocks % images, item % blocks
        kx, kdt, kB, kC = min(k, len(x) - 1), min(k, len(dt) - 1), min(k, len(B) - 1), min(k, len(C) - 1)
        kds = min(k, len(ds) - 1)
        e0 = block * _BLOCK
        width = min(_BLOCK, e - e0)
        for i in range(n):
            for j in range(width):
                A_block[i, j] = A[k, e0 + j, i] * LOG2E
                g[i, j] = dfinal[k, b, e0 + j, i] if len(dfinal) else np.float32(0)
        dA_block[:] = np.float32(0)
        dD[b, k, e0 : e0 + width] = np.float32(0)
        dbias[b, k, e0 : e0 + width] = np.float32(0)
        for c in range((length - 1) // CHUNK, -1, -1):
            here = tokens[: min(CHUNK, length - c * CHUNK)]
            _walk(image, b, c * CHUNK, length, reverse[k], here, kept)
            for i in range(n):
                for j in range(width):
                    before[0, i, j] = states[k, b, c, i, np.uintp(e0 + j)]
            _read(x, kx, b, here, e0, width, xs)
            _read(dt, kdt, b, here, e0, width, step)
            _read(ds, kds, b, here, e0, width, dss)
            _enter(here, width, step, dt_bias, k, e0, xs, slope, entering)
            _rebuild(here, width, kept, step, A_block, entering, B, kB, b, before, decay)
            _retreat(
                here, width, step, A_block, entering, B, kB, C, kC, k, b, before, decay,
                dss, g, dA_block, dentering, dstep, dB, dC, block,
            )  # fmt: skip
            _leave(here, width, step, slope, xs, D, dss, dentering, dstep, dD, dbias, k, b, e0)
            _write(dentering, dx, k, b, here, e0, width)
            _write(dstep, ddt, k, b, here, e0, width)
        for i in range(n):
            for j in range(width):
                dA[b, k, e0 + j, i] = dA_block[i, j]
                if len(dinitial):
                    dinitial[k, b, e0 + j, i] = g[i, j]


@kernel
def _combine(first, last, s, z, scale, y):
    for row in range(first, last):
        _sum_directions(s, row, y[row])
        if len(z) == 0:
            for j in range(y.shape[1]):
                y[row, j] *= scale
        else:
            for j in range(y.shape[1]):
                v = z[row, j]
                y[row, j] *= scale * v * sigmoid(v, exp2(-abs(v) * LOG2E))


@kernel
def _combine_backward(first, last, dy, s, z, scale, ds, dz):
    for row in range(first, last):
        _sum_directions(s, row, dz[row])
        for j in range(dy.shape[1]):
            v = z[row, j]
            gate = sigmoid(v, exp2(-abs(v) * LOG2E))
            upstream = dy[row, j] * scale
            ds[row, j] = upstream * v * gate
            dz[row, j] *= upstream * gate * (np.float32(1) + v * (np.float32(1) - gate))


@inline
def _sum_directions(s, row, total):
    for j in range(len(total)):
        total[j] = s[0, row, j]
    for k in range(1, len(s)):
        for j in range(len(total)):
            total[j] += s[k, row, j]


def _each(t: Tensor) -> np.ndarray:
    """One array a direction; one for all of them, uncopied, where the tensor is expanded over directions."""
    return array(t[:1] if t.stride(0) == 0 else t, 4)


def _total(parts: Tensor) -> Tensor:
    """Their sum over the first axis, in a fixed order; so small that waking torch's threads would take longer."""
    return torch.from_numpy(parts.numpy().sum(0))


def _items(k: int, b: int, e: int) -> int:
    return k * b * -(-e // _BLOCK)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    reverse: Sequence[bool],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """s (k, b, l, e) in x's dtype, the final states (k, b, e, n), and those kept (k, b, chunks, e n) if chunk > 0."""
    assert chunk in (0, CHUNK)
    k, b, length, e = x.shape
    n = A.shape[-1]
    s = torch.empty(k, b, length, e)
    final = torch.empty(k, b, e, n)
    states = torch.empty(k, b, -(-length // chunk), n, e) if chunk else torch.empty(0, 0, 0, 0, 0)
    run(
        _forward,
        _items(k, b, e),
        *(_each(t) for t in (x, dt)),
        A.numpy(),
        *(_each(t) for t in (B, C)),
        D.numpy(),
        torch.zeros_like(D).numpy() if dt_bias is None else dt_bias.numpy(),
        array(initial, 4),
        np.empty((0, 0), np.int32) if image is None else image.numpy(),
        np.array(reverse),
        s.numpy(),
        final.numpy(),
        states.numpy(),
    )
    return s.to(x.dtype), final, states.flatten(3) if chunk else states.flatten()


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    image: Tensor | None,
    states: Tensor,
    ds: Tensor,
    dfinal: Tensor | None,
    reverse: Sequence[bool],
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state, the last two empty where there is none."""
    assert chunk == CHUNK
    k, b, length, e = x.shape
    n = A.shape[-1]
    blocks = -(-e // _BLOCK)
    dx, ddt = torch.empty(k, b, length, e), torch.empty(k, b, length, e)
    dA, dD, dbias = torch.empty(b, k, e, n), torch.empty(b, k, e), torch.empty(b, k, e)
    dB, dC = torch.empty(blocks, k, b, length, n), torch.empty(blocks, k, b, length, n)
    dinitial = torch.empty((0, 0, 0, 0) if initial is None else (k, b, e, n))
    run(
        _backward,
        _items(k, b, e),
        *(_each(t) for t in (x, dt)),
        A.numpy(),
        *(_each(t) for t in (B, C)),
        D.numpy(),
        torch.zeros_like(D).numpy() if dt_bias is None else dt_bias.numpy(),
        np.empty((0, 0), np.int32) if image is None else image.numpy(),
        np.array(reverse),
        states.view(k, b, -1, n, e).numpy(),
        _each(ds),
        array(dfinal, 4),
        *(t.numpy() for t in (dx, ddt, dA, dB, dC, dD, dbias, dinitial)),
    )
    no_bias = dt_bias is None
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        _total(dA),
        _total(dB).to(B.dtype),
        _total(dC).to(C.dtype),
        _total(dD),
        dbias.new_empty(0) if no_bias else _total(dbias),
        dinitial.flatten() if initial is None else dinitial,
    )


def combine(s: Tensor, z: Tensor | None, scale: float) -> Tensor:
    """scale silu(z) (sum of s over directions): (b, l, e) from s (k, b, l, e)."""
    y = torch.empty(s.shape[1:])
    rows, e = y.numel() // y.shape[-1], y.shape[-1]
    gate = array(z, 2).reshape(-1, e)
    run(_combine, rows, array(s, 4).reshape(-1, rows, e), gate, np.float32(scale), y.view(rows, e).numpy())
    return y.to(s.dtype)


def combine_backward(dy: Tensor, s: Tensor, z: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of s, the same for every direction (b, l, e), and of z."""
    if z is None:
        return dy * scale, dy.new_empty(0)
    ds, dz = torch.empty(dy.shape), torch.empty(dy.shape)
    e = dy.shape[-1]
    rows = dy.numel() // e
    run(
        _combine_backward,
        rows,
        array(dy, 3).reshape(rows, e),
        array(s, 4).reshape(-1, rows, e),
        array(z, 3).reshape(rows, e),
        np.float32(scale),
        ds.view(rows, e).numpy(),
        dz.view(rows, e).numpy(),
    )
    return ds.to(s.dtype), dz.to(z.dtype)
