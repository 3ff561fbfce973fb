"""LARGE, the second form of the Triton kernels: 64-bit token numbers, and all images on the first axis of the grid.

The usual form computes offsets inside an image (token x stride) in 32 bits, and has images on the second or third axis
of the grid, where CUDA takes 65,535 programs; the first takes 2^31 - 1. A launcher asks `is_large` and compiles LARGE
where either limit is passed. Offsets of images and directions are 64-bit in both forms.
"""
# Triton's own language, which mypy takes for Python:
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

OFFSETS = 2**31
PROGRAMS = 65_535

Grid = tuple[int, int, int]


def is_large(grid: Grid, tokens: int, *strides: int) -> bool:
    """Whether a launch needs LARGE; `strides`, in elements, lead from token to token in the tensors it indexes."""
    return tokens * max(strides) >= OFFSETS or grid[1] > PROGRAMS or grid[2] > PROGRAMS


def scan_grid(grid: Grid, large: bool) -> tuple[int, ...]:
    """The grid to launch for (blocks, images, directions); `scan_program` takes it apart."""
    blocks, images, directions = grid
    return (blocks * images, directions) if large else grid


def tile_grid(grid: Grid, large: bool) -> tuple[int, ...]:
    """The grid to launch for (blocks, tiles, images); `tile_program` takes it apart."""
    blocks, tiles, images = grid
    return (blocks * tiles * images,) if large else grid


@triton.jit
def token_number(index, LARGE: tl.constexpr):
    """A token's number, or what it is computed from, in the width that offsets need."""
    if LARGE:
        return tl.cast(index, tl.int64)
    else:
        return index


@triton.jit
def scan_program(blocks, LARGE: tl.constexpr):
    """The program's block, image and direction, then the number of blocks and images."""
    if LARGE:
        program = tl.program_id(0)
        return program % blocks, program // blocks, tl.program_id(1), blocks, tl.num_programs(0) // blocks
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)


@triton.jit
def tile_program(blocks, tiles, LARGE: tl.constexpr):
    """The program's block, tile and image, then the number of tiles and images."""
    if LARGE:
        program = tl.program_id(0)
        row = program // blocks
        return program % blocks, row % tiles, row // tiles, tiles, tl.num_programs(0) // (blocks * tiles)
    else:
        return tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1), tl.num_programs(2)
