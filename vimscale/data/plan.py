"""Which sample stands at which position: order = f(seed, position, shard sizes), whoever asks and whenever.

Positions count samples over all epochs. An epoch is a permutation: shards are permuted, taken in windows, and the
samples of a window permuted. So reading stays near-sequential, and any position is found without the ones before it.
"""

import numpy as np

WINDOW = 16
"""Shards whose samples are mixed with each other."""


class Plan:
    """The order of a data set whose shards hold `counts` samples."""

    def __init__(self, counts: np.ndarray, seed: int, window: int = WINDOW):
        self.samples = int(counts.sum())
        self._counts = np.asarray(counts, dtype=np.int64)
        self._seed = seed
        self._window = window
        self._epoch = -1
        self._windows: dict[int, np.ndarray] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index in the shard) of the sample at `position`."""
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            self._enter(epoch)
        window = int(np.searchsorted(self._window_starts, place, side="right")) - 1
        start = int(self._window_starts[window])
        mixed = start + int(self._inside(window)[place - start])
        turn = int(np.searchsorted(self._shard_ends, mixed, side="right"))
        shard = int(self._shards[turn])
        return shard, mixed - int(self._shard_ends[turn]) + int(self._counts[shard])

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        self._windows.clear()
        self._shards = generator(self._seed, 2 * epoch, 0).permutation(len(self._counts))
        self._shard_ends = np.cumsum(self._counts[self._shards])
        starts = np.concatenate([[0], self._shard_ends])[:: self._window]
        self._window_starts = starts[starts < self.samples]

    def _inside(self, window: int) -> np.ndarray:
        """The permutation of a window's samples; the last few are kept."""
        if window not in self._windows:
            ends = np.append(self._window_starts[1:], self.samples)
            size = int(ends[window] - self._window_starts[window])
            if len(self._windows) == 4:
                self._windows.pop(next(iter(self._windows)))
            self._windows[window] = generator(self._seed, 2 * self._epoch + 1, window).permutation(size)
        return self._windows[window]


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """A counter-based generator (Philox): reachable at any point without drawing what comes before."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, counter, 0]))
