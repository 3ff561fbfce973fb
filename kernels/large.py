"""LARGE, the second form of the Triton kernels: 64-bit token numbers, and all images on the first axis of the grid.

The usual form computes offsets inside an image (token x stride) in 32 bits, and puts images on the second or third axis
of the grid, where CUDA allows 65,535 programs; the first axis allows 2^31 - 1. A launcher calls `is_large` and compiles
LARGE if a launch exceeds either limit. Offsets of images and directions are 64-bit in both forms.
"""
# mypy takes Triton's language for Python:
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

OFFSETS = 2**31
PROGRAMS = 65_535

Grid = tuple[int, int, int]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes 2 us, as it also serves inside kernels."""
    return -(-a // b)


def is_large(grid: Grid, tokens: int, *strides: int) -> bool:
    """Whether a launch needs LARGE; `strides` are the token strides, in elements, of the tensors that it indexes."""
    return tokens * max(strides) >= OFFSETS or grid[1] > PROGRAMS or grid[2] > PROGRAMS


def scan_grid(grid: Grid, large: bool) -> tuple[int, ...]:
    """The grid to launch for (blocks, images, directions); `scan_program` decodes it."""
    blocks, images, directions = grid
    return (blocks * images, directions) if large else grid


def tile_grid(grid: Grid, large: bool) -> tuple[int, ...]:
    """The grid to launch for (blocks, tiles, images); `tile_program` decodes it."""
    blocks, tiles, images = grid
    return (blocks * tiles * images,) if large else grid


@triton.jit
def token_number(index, LARGE: tl.constexpr):
    """A token number, or a value that it is computed from, in the width that offsets need."""
    if LARGE:
        return tl.cast(index, tl.int64)
    else:
        return index


@triton.jit
def scan_program(blocks, LARGE: tl.constexpr):
    """The program's block, image and direction, then the numbers of blocks and images."""
    if LARGE:
        program = tl.program_id(0)
        return program % blocks, program // blocks, tl.program_id(1), blocks, tl.num_programs(0) // blocks
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)


@triton.jit
def tile_program(blocks, tiles, LARGE: tl.constexpr):
    """The program's block, tile and image, then the numbers of tiles and images."""
    if LARGE:
        program = tl.program_id(0)
        row = program // blocks
        return program % blocks, row % tiles, row // tiles, tiles, tl.num_programs(0) // (blocks * tiles)
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1), tl.num_programs(2)
