"""Triton functions of the scans; most move values between their two layouts: tiles of tokens, and rows aligned with
states.

A tile (8, c) has one value per lane. A row (c) that is aligned with a state (c, n) is on several lanes: all those of
its channel. `rows` and `stack` convert eight tokens at once, through shared memory. `fold` sums across lanes: splitting
an axis makes the compiler bring it into one lane in exchange for the tokens, which takes a fifth of the instructions of
one butterfly per token.
"""
# The tools take Triton's language for Python; Triton's tuples grow by + only:
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
# ruff: noqa: RUF005

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(t, dtype: tl.constexpr):
    """fp32 numbers in `dtype`, to nearest even; Triton's interpreter would truncate to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = t.to(tl.int32, bitcast=True)
        t = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return t.to(dtype)


@triton.jit
def product(a, b, total):
    """total + a b, in fp32; without tf32. Triton's interpreter would multiply the bits of bf16 numbers as integers."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def sigmoid(x):
    """1 / (1 + u). The exp of tl.sigmoid guards against denormals, which 1 + u absorbs; a division guards against large
    divisors, which the square of rsqrt does not need.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def softplus(v):
    """log(1 + exp(v)) and its derivative. Relative error: 2e-7, and 6e-8 |v| below 0, as exp's argument is rounded.

    softplus(v) = max(v, 0) + log1p(u) with u = exp(-|v|), and log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3. The
    polynomial is the Chebyshev fit of 2 atanh(s) / s in s^2 (4e-9). Above 20 the second term is below half a unit of
    the first.
    """
    u = tl.exp2(tl.abs(v) * -LOG2_E)
    s = u / (2.0 + u)
    q = s * s
    series = 2.0000000078777496 + q * (
        0.6666631593507945 + q * (0.4002485372355047 + q * (0.2796141883337849 + q * 0.28174657270581904))
    )
    return tl.maximum(v, 0.0) + s * series, tl.where(v < 0, u, 1.0) / (1.0 + u)


@triton.jit
def decay_rate(A, cell, here, LOG_A: tl.constexpr):
    """A, which is -exp(A) if A holds logarithms; 0 where there is no channel or state."""
    if LOG_A:
        return -tl.exp(tl.load(A + cell, mask=here, other=float("-inf")))
    else:
        return tl.load(A + cell, mask=here, other=0.0)


@triton.jit
def restart(starts, slot, h):
    """h, or zero if a new image begins at the slot (never, without `starts`). It stops a NaN too."""
    if starts is not None:
        h = tl.where(tl.load(starts + slot) != 0, 0.0, h)
    return h


@triton.jit
def touch(numbers, LENGTH: tl.constexpr):
    """One of every eight numbers (fp32, LENGTH in all), as integers: loading one brings all that share its 32 bytes
    into the first-level cache. `keep` must get the result, or the compiler drops the load.
    """
    return tl.load(numbers + tl.arange(0, LENGTH // 8) * 8).to(tl.int32, bitcast=True)


@triton.jit
def keep(buffer, integers, length):
    """Use integers: a store that never happens, but only we know that no length is negative."""
    at = tl.arange(0, integers.shape[0])
    tl.store(buffer + at, integers.to(tl.float32, bitcast=True), mask=at + length < 0)


@triton.jit
def rows(tile):
    """The eight rows of a tile (8, c, m), each (c, m), in the layout of states."""
    bits = tl.reshape(tl.permute(tile, (1, 2, 0)), (tile.shape[1], tile.shape[2], 2, 2, 2))
    even, odd = tl.split(bits)
    even0, even2 = tl.split(even)
    odd1, odd3 = tl.split(odd)
    r0, r4 = tl.split(even0)
    r1, r5 = tl.split(odd1)
    r2, r6 = tl.split(even2)
    r3, r7 = tl.split(odd3)
    return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def row_pairs(a, b):
    """The eight rows of tile a (8, c), and those of b, in one exchange. For a single tile, the layout pass of Triton
    3.6 would convert the 16-bit inputs instead and then compute every softplus on four lanes; it leaves a pair alone
    (forward 189 -> 124 instructions).
    """
    pairs = rows(tl.join(a, b))
    a_rows = ()
    b_rows = ()
    for i in tl.static_range(8):
        a_row, b_row = tl.split(pairs[i])
        a_rows = a_rows + (a_row,)
        b_rows = b_rows + (b_row,)
    return a_rows, b_rows


@triton.jit
def stack(r):
    """Eight tensors (a, b) as one (8, a, b)."""
    even = tl.join(tl.join(r[0], r[4]), tl.join(r[2], r[6]))
    odd = tl.join(tl.join(r[1], r[5]), tl.join(r[3], r[7]))
    return tl.permute(tl.reshape(tl.join(even, odd), (r[0].shape[0], r[0].shape[1], 8)), (2, 0, 1))


@triton.jit
def fold(x, HALVINGS: tl.constexpr):
    """Sum over the last axis, of 2 ** HALVINGS values; see the top of the file."""
    for _ in tl.static_range(HALVINGS - 1):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
        x = even + odd
    even, odd = tl.split(x)
    return even + odd


@triton.jit
def sum_states(parts):
    """Eight (c, 4) partial sums as one tile (8, c)."""
    return fold(stack(parts), 2)


@triton.jit
def sum_channels(parts, HALVINGS: tl.constexpr):
    """Eight (2 ** HALVINGS, n) partial sums as one tile (8, n)."""
    return fold(tl.permute(stack(parts), (0, 2, 1)), HALVINGS)
