"""Common parts of the CPU kernels: how numba compiles them, how they run on threads, and the tiles that they work on.

numba notices changes to the file that contains a kernel, but not to this file, scan_loops_cpu.py or simd.py: after
editing these, delete the *.nbi files in kernels/__pycache__.
"""
# numba infers the types of what it compiles:
# mypy: disable-error-code="no-untyped-def"

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from .backend import counting
from .simd import LANES, emitted

# NaN and infinity must reach the outputs, so the two flags that assume they never occur stay off. numpy's error model
# divides without a check for zero; a loop with such a check is not vectorized.
_COMPILER: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
inline = nb.njit(inline="always", **_COMPILER)

_DENORMAL = np.float32(1e-39)
LOG2E = np.float32(1.4426950408889634)


def kernel(function: Callable[..., None]) -> Any:
    """Compile on the first call, and cache the result on disk for other processes if a folder for it exists."""
    try:
        return nb.njit(nogil=True, cache=True, **_COMPILER)(function)
    except RuntimeError:  # neither the source's folder nor the user's cache is writable
        _warn_once()
        return nb.njit(nogil=True, **_COMPILER)(function)


@lru_cache(maxsize=1)
def _warn_once() -> None:
    logging.getLogger(__name__).warning(
        "no cache for compiled CPU kernels is writable, so every process compiles them again: set NUMBA_CACHE_DIR to a"
        " writable folder"
    )


# Channels that a kernel works on at a time, and the index where each of their vectors begins. With four vectors, a loop
# over tokens has enough work between two steps of one recurrence, and its data still fits the first-level cache.
BLOCK = 4 * LANES
COLUMNS = range(0, BLOCK, LANES)


@inline
def zeros(rows, columns):
    """Zeros that start on a cache line: a vector that crosses two lines takes twice as long to load."""
    numbers = np.zeros(rows * columns + 16, np.float32)
    skipped = -(numbers.ctypes.data // 4) % 16
    return numbers[skipped : skipped + rows * columns].reshape(rows, columns)


@inline
def tile(rows, block=BLOCK):
    return zeros(rows, block)


@inline
def sum_lanes(lanes):
    """The sum of LANES numbers (1, LANES)."""
    total = np.float32(0)
    for lane in range(LANES):
        total += lanes[0, lane]
    return total


@emitted
def read_rows(code, rows, width, block, x, at, row, tile):
    """Read rows of `width` channels, from index `at` on and `row` apart, into a tile of `block` channels. Sets the
    remaining channels of the tile to zero, so that they add nothing to sums.
    """
    with code.loop(0, rows) as m, code.loop(0, block, LANES) as j:
        tile[m * block + j] = x.load(at + m * row + j, width - j)


@emitted
def write_rows(code, rows, width, block, tile, y, at, row):
    """The reverse of `read_rows`: write the first `width` channels of a tile."""
    with code.loop(0, rows) as m, code.loop(0, width, LANES) as j:
        y.store(at + m * row + j, tile[m * block + j], width - j)


def numbers(t: Tensor) -> np.ndarray:
    """The tensor as an array, without a copy; an empty array while bytes are counted: fake tensors have no numbers."""
    return np.empty((0,) * t.ndim, np.float32) if counting() else t.detach().numpy()


def array(t: Tensor | None, axes: int) -> np.ndarray:
    """The tensor as a contiguous fp32 array; None as an empty array with that number of axes."""
    if t is None:
        return np.empty((0,) * axes, np.float32)
    return numbers(t.float().contiguous())


def spread(t: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The tensor's fp32 numbers, and the strides of its axes but the last, which is contiguous. A slice is not copied,
    and other strides do not need another compilation.
    """
    t = t.detach().float()
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    last = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return numbers(t.as_strided((last + 1,), (1,))), t.stride()[:-1]


def run(kernel: Callable[..., None], items: int, *arguments: Any) -> None:
    """Call kernel(first, last, *arguments) over consecutive ranges that cover [0, items), on as many threads as torch
    uses.

    The kernels release the GIL and have no common state, so plain Python threads suffice: numba's own threading layers
    abort when two threads enter at once (workqueue) or need an OpenMP library that the machine may not have. What an
    item computes must not depend on its range, so that results are the same for any number of threads.
    """
    if counting():
        return
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        with _without_denormals():
            kernel(0, items, *arguments)
        return
    parts = min(items, 4 * threads)  # a few per thread, so that no thread waits long for the slowest
    numbers = itertools.count()

    def work() -> None:
        with _without_denormals():
            while (part := next(numbers)) < parts:
                kernel(items * part // parts, items * (part + 1) // parts, *arguments)

    helpers = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # it is running or done
            helper.result()


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers below 2^-126 are zero on this thread. A state or gradient that decays over 100,000 tokens spends many of
    them below that, where a CPU takes a hundred times as long for each.
    """
    before = not _DENORMAL * np.float32(0.5)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def leaves_threads_idle(items: int) -> bool:
    """Whether threads would lose more than a fifth of their time, because there are few items, or one too many."""
    threads = torch.get_num_threads()
    return items < 0.8 * threads * -(-items // threads)


@lru_cache(maxsize=1)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """One pool per process. Threads do not survive a fork, hence the pid."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vimscale-cpu")
