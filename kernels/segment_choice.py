"""How many segments a GPU's scan is cut into: from its shape alone, so that results do not depend on the machine.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

CHUNK = 8
"""Tokens per iteration of the Triton scans; a segment begins with a chunk."""
SHORT = 1024
"""Shorter sequences stay in one piece: two launches more per pass would cost Python what the device wins."""
LEAST = 16 * CHUNK
"""Tokens of the shortest segment."""
MOST = 64
"""Segments: the chain over them walks one after the other."""
PROCESSORS = 132
"""Multiprocessors of the GPU that the choice is made for, an H100."""
MANY = 2 * PROCESSORS
"""Backward programs of 64 channels that fill it. If there are fewer, programs of 32 channels finish earlier: there are
more of them, and each chunk has half the work.
"""
START = 16
"""A program's start and end cost as much as this many tokens."""
LAUNCHES = 50_000
"""Clocks of the four launches that segments add to a forward and backward pass."""
WORTH = 0.9
"""A sequence stays in one piece unless segments take at most this fraction of its time."""


class Pass(NamedTuple):
    """A kernel's programs and the clocks of one token, as in vimscale/estimate/calibration.py, at n = 16."""

    channels: int
    """Of a program."""
    resident: int
    """Programs that a multiprocessor holds, by their registers."""
    alone: int
    """Clocks of a token while few programs share a multiprocessor."""
    shared: int
    """Clocks of a token per program, while many do."""

    def clocks(self, walks: int, e: int) -> int:
        """Clocks of a token, summed over the waves of all programs; `walks`: directions x images x segments."""
        full, rest = divmod(walks * ceil(e / self.channels), self.resident * PROCESSORS)
        waves = full * max(self.alone, self.resident * self.shared)
        return waves + (max(self.alone, ceil(rest / PROCESSORS) * self.shared) if rest else 0)


# Forward and backward, with many and with few programs: measured on an H100 before these kernels loaded ahead. The pass
# for the ends, forward or backward: from the forward pass, by the instructions of both (docs/kernels.md).
FORWARD, ENDS = Pass(32, 10, 460, 79), Pass(32, 14, 350, 61)
BACKWARD, BACKWARD_FEW = Pass(64, 2, 821, 447), Pass(32, 2, 485, 254)


@lru_cache(maxsize=4096)
def segments(k: int, b: int, length: int, e: int, n: int) -> int:
    """The number that makes a forward and backward pass fastest by the model above; 1: one walk per sequence. No
    segment is empty, and all but the last have as many chunks.
    """
    if length < SHORT:
        return 1
    chunks = ceil(length / CHUNK)
    wide = e * max(n, 16) // 16  # a program with more states per channel has fewer channels
    clocks = {count: _clocks(count, k * b, chunks, wide) for count in range(1, min(MOST, length // LEAST) + 1)}
    best = min(clocks, key=lambda count: clocks[count])
    return ceil(chunks / span(length, best)) if clocks[best] <= WORTH * clocks[1] else 1


def span(length: int, count: int) -> int:
    """Chunks of each segment but the last, which has the rest."""
    return ceil(ceil(length / CHUNK) / count)


def _clocks(count: int, walks: int, chunks: int, e: int) -> int:
    tokens = ceil(chunks / count) * CHUNK + START
    backward = BACKWARD if count * walks * ceil(e / BACKWARD.channels) >= MANY else BACKWARD_FEW
    clocks = FORWARD.clocks(count * walks, e) + backward.clocks(count * walks, e)
    if count == 1:
        return tokens * clocks
    # no state enters the first segment and none is needed after the last
    return tokens * (clocks + 2 * ENDS.clocks((count - 1) * walks, e)) + LAUNCHES
