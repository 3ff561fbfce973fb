"""What both passes of the scan on a GPU share: the rows of B and C, and how programs and launches are described.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.
"""
# The tools take Triton's language for Python:
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import TRITON_TYPE, CompileCase
from .large import cdiv, is_large, scan_grid, scan_program, token_number

CHUNK = 8
"""Tokens between kept states, and tokens per iteration of the main loops: `rows` and `stack` are written for eight."""

# tokens per program of selective_scan_pack_kernel
ROWS = 32

OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def walk_program(chunks, span, e, CHANNELS: tl.constexpr, LARGE: tl.constexpr):
    """The program's block of channels, image, direction and segment, and its chunks (from, to); then the numbers of
    blocks, images and segments. A segment has `span` chunks, the last one the rest; without `span`, a sequence is one.
    """
    if span is None:
        block, b, k, blocks, images = scan_program(tl.cdiv(e, CHANNELS), LARGE)
        return block, b, k, 0, 0, chunks, blocks, images, 1
    else:
        blocks = tl.cdiv(e, CHANNELS)
        segments = tl.cdiv(chunks, span)
        program, b, k, _, images = scan_program(blocks * segments, LARGE)
        segment = program // blocks
        first = segment * span
        return program % blocks, b, k, segment, first, tl.minimum(first + span, chunks), blocks, images, segments


@triton.jit(do_not_specialize=["length", "slots", "backwards"])
def selective_scan_pack_kernel(
    B, C, image, packed, starts, length, slots, backwards,
    B_k, B_b, B_l, C_k, C_b, C_l,
    n: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Write B and C of one direction as fp32 rows (slots, 2, N) in scan order, zero where there is no token or state,
    so that the scans read both at constant offsets; with `image`, also write whether the state restarts at each slot.
    """
    tile, b, k, _, images = scan_program(tl.cdiv(slots, ROWS), LARGE)
    slot = token_number(tile * ROWS + tl.arange(0, ROWS), LARGE)
    backward = (backwards >> k) & 1
    token = tl.where(backward == 1, length - 1 - slot, slot)
    valid = slot < length
    state = tl.arange(0, N)
    cell = valid[:, None] & (state < n)[None, :]
    row = (k * images + b).to(tl.int64) * slots

    B += k.to(tl.int64) * B_k + b.to(tl.int64) * B_b
    C += k.to(tl.int64) * C_k + b.to(tl.int64) * C_b
    B_rows = tl.load(B + token[:, None] * B_l + state[None, :], mask=cell, other=0.0).to(tl.float32)
    C_rows = tl.load(C + token[:, None] * C_l + state[None, :], mask=cell, other=0.0).to(tl.float32)
    packed += (row + slot)[:, None] * (2 * N) + state[None, :]
    tl.store(packed, B_rows, mask=(slot < slots)[:, None])
    tl.store(packed + N, C_rows, mask=(slot < slots)[:, None])

    if image is not None:
        image += b.to(tl.int64) * length
        number = tl.load(image + token, mask=valid, other=0)
        # the predecessor of the first token in scan order is image 0 forwards, and the token's own image in reverse
        first = slot == 0
        before = tl.load(image + token - 1 + 2 * backward, mask=valid & (slot > 0), other=0)
        before = tl.where(first & (backward == 1), number, before)
        tl.store(starts + row + slot, (number != before).to(tl.int32), mask=slot < slots)


@triton.jit(do_not_specialize=["length", "blocks", "backwards"])
def selective_scan_unpack_kernel(
    partial, dB, dC, length, blocks, backwards,
    dB_k, dB_b, dB_l, dC_k, dC_b, dC_l,
    n: tl.constexpr, N: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Sum the partial sums of the channel blocks, in the order of the blocks; write dB and dC in token order."""
    T: tl.constexpr = 8
    chunk, b, k, chunks, images = scan_program(tl.cdiv(length, T), LARGE)
    chunks = chunks.to(tl.int64)
    state = tl.arange(0, N)
    cell = tl.arange(0, T)[:, None] * (2 * N) + state[None, :]

    partial += ((k * blocks * images + b) * chunks + chunk) * T * (2 * N)
    dB_rows = tl.zeros((T, N), tl.float32)
    dC_rows = tl.zeros((T, N), tl.float32)
    for _ in range(blocks):
        dB_rows += tl.load(partial + cell)
        dC_rows += tl.load(partial + N + cell)
        partial += images * chunks * T * (2 * N)

    slot = chunk * T + tl.arange(0, T)
    token = tl.where((backwards >> k) & 1 == 1, length - 1 - slot, slot)
    dB += k.to(tl.int64) * dB_k + b.to(tl.int64) * dB_b
    dC += k.to(tl.int64) * dC_k + b.to(tl.int64) * dC_b
    inside = (slot < length)[:, None] & (state < n)[None, :]
    tl.store(dB + token[:, None] * dB_l + state[None, :], dB_rows.to(dB.dtype.element_ty), mask=inside)
    tl.store(dC + token[:, None] * dC_l + state[None, :], dC_rows.to(dC.dtype.element_ty), mask=inside)


def pack(
    B: Tensor, C: Tensor, image: Tensor | None, reverse: Sequence[bool], width: int
) -> tuple[Tensor, Tensor | None]:
    """The rows (k, b, slots, 2, width) of B and C, and where states restart (k, b, slots), if `image` is given."""
    k, b, length, n = B.shape
    slots = cdiv(length, CHUNK) * CHUNK
    packed = B.new_empty(k, b, slots, 2, width, dtype=torch.float32)
    starts = None if image is None else B.new_empty(k, b, slots, dtype=torch.int32)
    grid = cdiv(slots, ROWS), b, k
    large = is_large(grid, length, B.stride(2), C.stride(2))
    with torch.cuda.device_of(B):
        selective_scan_pack_kernel[scan_grid(grid, large)](
            B, C, image, packed, starts, length, slots, mask_of(reverse),
            *B.stride()[:3], *C.stride()[:3], n=n, N=width, ROWS=ROWS, LARGE=large, **OPTIONS,
        )  # fmt: skip
    return packed, starts


def unpack(partial: Tensor, dB: Tensor, dC: Tensor, reverse: Sequence[bool]) -> None:
    """Write the sums of partial (k, blocks, b, slots, 2 width) over blocks into dB and dC (k, b, l, n)."""
    k, b, length, n = dB.shape
    _, blocks, _, slots, columns = partial.shape
    grid = slots // CHUNK, b, k
    large = is_large(grid, slots, columns, dB.stride(2), dC.stride(2))
    with torch.cuda.device_of(dB):
        selective_scan_unpack_kernel[scan_grid(grid, large)](
            partial, dB, dC, length, blocks, mask_of(reverse), *dB.stride()[:3], *dC.stride()[:3],
            n=n, N=columns // 2, LARGE=large, num_warps=1, **OPTIONS,
        )  # fmt: skip


def mask_of(reverse: Sequence[bool]) -> int:
    """The directions as one integer: bit i is set where direction i runs in reverse."""
    return sum(backward << i for i, backward in enumerate(reverse))


def width_of(n: int) -> int:
    """States per channel in a tile: a power of two that four lanes can divide."""
    if n > 512:
        raise ValueError(f"a channel has {n} states; a tile of these kernels holds at most 512 (use backend reference)")
    return max(4, triton.next_power_of_2(n))


def channels_of(width: int, channels: int) -> int:
    """Channels per program: fewer if a channel has more than 16 states, so that registers stay the same."""
    return max(1, channels * 16 // max(width, 16))


def scan_case(
    dtype: torch.dtype, kernel: Any, constants: dict[str, Any], variant: str = "", warps: int = 4, *,
    segments: bool = False, **facts: Any,
) -> CompileCase:  # fmt: skip
    """A kernel as a model launches it in `dtype`. "_packed" has image numbers, and states passed in and out;
    `segments`: it walks segments, and what enters each is given.
    """
    types = dict.fromkeys(["x", "dt", "B", "C", "s", "ds", "dx", "ddt", "dB", "dC"], TRITON_TYPE[dtype])
    numbers = ["length", "slots", "blocks", "backwards", "parameters", "span", "count", "segments"]
    types |= dict.fromkeys(["e", *numbers], "i32")
    types |= dict.fromkeys(["image", "starts"], "*i32")
    # B, C and their gradients are slices of the rows of a projection
    slices = [f"{name}{axis}" for name in ("B", "C", "dB", "dC") for axis in ("", "_k", "_b", "_l")]
    absent = set() if "_packed" in variant else {"image", "starts", "initial", "dfinal", "dinitial"}
    absent = absent - {"initial", "dfinal"} if segments else absent | {"span"}
    given = {**dict.fromkeys(absent), **constants}
    signature = {
        argument: "constexpr" if argument in given
        else types.get(argument, "i32" if argument.endswith(("_k", "_b", "_l")) else "*fp32")
        for argument in kernel.arg_names
    }  # fmt: skip
    return CompileCase(
        kernel=kernel, variant=variant, signature=signature,
        constexprs={argument: given[argument] for argument in kernel.arg_names if argument in given},
        options={"num_warps": warps, **OPTIONS},
        loose=frozenset([*numbers, *slices]), **facts,
    )  # fmt: skip


def compile_cases(dtype: torch.dtype, e: int, target: str) -> list[CompileCase]:
    """Both kernels for an inner width of e at n = 16, for `kernels.aot`."""
    n, blocks = 16, 64
    constants = {"n": n, "N": n, "LARGE": False}
    rows = 2 * n / e
    return [
        scan_case(
            dtype, selective_scan_pack_kernel, {**constants, "ROWS": ROWS}, tokens=ROWS, channels=e,
            bytes=(dtype.itemsize + 4) * rows,
        ),
        scan_case(
            # four blocks per iteration: the compiler unrolls
            dtype, selective_scan_unpack_kernel, constants, warps=1, tokens=4 * CHUNK, channels=blocks,
            bytes=4 * 2 * n / blocks + dtype.itemsize * rows,
        ),
    ]  # fmt: skip
