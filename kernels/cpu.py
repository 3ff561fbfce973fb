"""What the CPU kernels share: how numba compiles them, how they run on threads, and the tiles that they work on.

numba notices a change of the file that a kernel is in, but not of this one or of simd.py: after editing these, touch
the *_cpu.py files.
"""
# what numba compiles infers its types:
# mypy: disable-error-code="no-untyped-def"

import itertools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from .backend import counting
from .simd import LANES

# NaN and infinity must reach the outputs, so the two flags that assume them away stay off. numpy's error model divides
# without a check for zero: with one, a loop does not become vector instructions.
_COMPILER: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
inline = nb.njit(inline="always", **_COMPILER)

LOG2E = np.float32(1.4426950408889634)


def kernel(function: Callable[..., None]) -> Any:
    """Compiled on its first call, and kept on disk for other processes where there is a folder for that."""
    try:
        return nb.njit(nogil=True, cache=True, **_COMPILER)(function)
    except RuntimeError:  # neither the source's folder nor a cache of the user can be written
        _warn_once()
        return nb.njit(nogil=True, **_COMPILER)(function)


@lru_cache(maxsize=1)
def _warn_once() -> None:
    logging.getLogger(__name__).warning(
        "every process compiles the CPU kernels anew, for want of a writable cache: set NUMBA_CACHE_DIR to one"
    )


# Channels that a kernel works on at a time, and where their vectors begin. With four of them a loop over tokens has
# enough to do between two steps of one recurrence, and what it touches still fits the first cache.
BLOCK = 4 * LANES
COLUMNS = range(0, BLOCK, LANES)


@inline
def zeros(rows, columns):
    """They begin with a cache line: a vector that lies in two takes twice as long to load."""
    numbers = np.zeros(rows * columns + 16, np.float32)
    skipped = -(numbers.ctypes.data // 4) % 16
    return numbers[skipped : skipped + rows * columns].reshape(rows, columns)


@inline
def tile(rows):
    return zeros(rows, BLOCK)


@kernel
def read(x, at, row, width, rows):
    """Rows of `width` channels, `row` apart from `at` on, into a tile whose further channels are zero: these then add
    to no sum.
    """
    for m in range(len(rows)):
        source = x[at + m * row : at + m * row + width]
        for j in range(width):
            rows[m, j] = source[j]
        for j in range(width, BLOCK):
            rows[m, j] = np.float32(0)


@kernel
def write(rows, y, at, row, width):
    for m in range(len(rows)):
        target = y[at + m * row : at + m * row + width]
        for j in range(width):
            target[j] = rows[m, j]


def numbers(t: Tensor) -> np.ndarray:
    """The tensor's numbers, not copied; none of a fake tensor, which has none."""
    return np.empty((0,) * t.ndim, np.float32) if counting() else t.detach().numpy()


def array(t: Tensor | None, axes: int) -> np.ndarray:
    """The tensor as a contiguous fp32 array; an absent one as an empty array of as many axes."""
    if t is None:
        return np.empty((0,) * axes, np.float32)
    return numbers(t.float().contiguous())


def spread(t: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The tensor's fp32 numbers, and how far apart they are along its axes but the last, whose are side by side: no
    copy is made of a slice, and nothing is compiled anew for other strides.
    """
    t = t.detach().float()
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    last = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return numbers(t.as_strided((last + 1,), (1,))), t.stride()[:-1]


def run(kernel: Callable[..., None], items: int, *arguments: Any) -> None:
    """kernel(first, last, *arguments) over consecutive ranges that cover [0, items), on as many threads as torch uses.

    The kernels release the GIL and share nothing, so plain Python threads do: numba's own threading layers abort when
    two threads enter at once (workqueue) or need an OpenMP library that the machine may not have. What an item computes
    must not depend on the range it is in: results are then the same for any number of threads.
    """
    if counting():
        return
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        kernel(0, items, *arguments)
        return
    parts = min(items, 4 * threads)  # a few for each thread, so that none waits long for the slowest
    numbers = itertools.count()

    def work() -> None:
        while (part := next(numbers)) < parts:
            kernel(items * part // parts, items * (part + 1) // parts, *arguments)

    helpers = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # it has begun, or is done
            helper.result()


@lru_cache(maxsize=1)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """One pool for the process: threads do not survive a fork, hence the pid."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vimscale-cpu")
