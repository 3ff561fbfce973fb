"""The order of samples: a pure function of seed, step, slot in the batch and shard sizes.

    step, slot in the global batch  ->  lane, turn in it  ->  data set, turn in that  ->  epoch, shard, sample

A turn counts images: those of a lane, or those that a lane takes from one data set. Each arrow is a function in closed
form, so any step is found without computing the steps before it. An epoch is a permutation of a data set: it permutes
the shards, cuts them into lanes, groups each lane's shards into windows, and permutes the samples of each window.
Reading therefore stays near-sequential, and a node that works on some lanes needs only their shards.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import MIX_BLOCK

# Streams of the seed's generators. Epochs count from 0, drop-path and backward drop start at 4 << 60 and 6 << 60.
PER_SAMPLE = 8 << 60
SUBSTITUTE = 9 << 60
PER_PAIR = 10 << 60
_MIXTURE = 11 << 60
PER_VIEW = 12 << 60


def generator(seed: int, stream: int, *counter: int) -> np.random.Generator:
    """Return a counter-based generator (Philox) that starts at any point of a stream without drawing what comes before.

    `counter` is up to three numbers.
    """
    first, second, third = (*counter, 0, 0, 0)[:3]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, second, first, third]))


class SampleRef(NamedTuple):
    """A sample, and its position in the run."""

    position: int
    """Images of the run before this one. It keys the sample's random generator."""
    source: int
    """Index of the data set in the mixture."""
    epoch: int
    shard: int
    sample: int


Skipped = Sequence[tuple[int, int]]
"""(step, images): from that step on, this many more images are skipped."""


def positions_before(recipe: Recipe, step: int, skipped: Skipped) -> int:
    """Count the positions of a run before step `step`, including the skipped ones."""
    return recipe.consumed(step) + sum(images for at, images in skipped if at <= step)


class DatasetOrder:
    """The order of one data set, whose shards hold `counts` samples, epoch after epoch."""

    def __init__(self, counts: np.ndarray, seed: int, window: int = 16, lanes: int = 1, number: int = 0):
        """`number` is the index of the data set in a mixture; each has its own order."""
        self.samples = int(counts.sum())
        self.lanes = lanes
        self._counts = np.asarray(counts, dtype=np.int64)
        self._seed, self._window, self._number = seed, window, number
        # a batch across the border of two epochs needs both
        self._epoch = lru_cache(maxsize=2)(self._permuted_shards)
        self._windows = lru_cache(maxsize=2 * lanes)(self._window_starts)
        self._inside = lru_cache(maxsize=2 * lanes + 2)(self._permuted_samples)

    def locate(self, turn: int, lane: int = 0) -> tuple[int, int, int]:
        """Return (epoch, shard, index in the shard) of a lane's sample number `turn`.

        Each lane goes through its own part of every epoch.
        """
        epoch, offset, window = self._find(turn, lane)
        start = int(self._windows(epoch, lane)[window])
        mixed = start + int(self._inside(epoch, lane, window)[offset - start])
        shards, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, mixed, side="right"))
        shard = int(shards[number])
        return epoch, shard, mixed - int(ends[number]) + int(self._counts[shard])

    def ahead(self, turn: int, lane: int = 0) -> list[int]:
        """List the shards of the window that contains `turn`, then those of the next window."""
        epoch, _, window = self._find(turn, lane)
        now = self._shards_of(epoch, lane, window)
        if window + 1 < len(self._windows(epoch, lane)):
            return now + self._shards_of(epoch, lane, window + 1)
        return now + self._shards_of(epoch + 1, lane, 0)

    def _find(self, turn: int, lane: int) -> tuple[int, int, int]:
        """Return (epoch, offset in it, window of the lane)."""
        begin, end = self._bounds(lane)
        epoch, turn = divmod(turn, end - begin)
        offset = begin + turn
        return epoch, offset, int(np.searchsorted(self._windows(epoch, lane), offset, side="right")) - 1

    def _bounds(self, lane: int) -> tuple[int, int]:
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def _span(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """Return the range of offsets in the epoch that a window covers."""
        starts = self._windows(epoch, lane)
        return int(starts[window]), int(starts[window + 1]) if window + 1 < len(starts) else self._bounds(lane)[1]

    def _shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        shards, ends = self._epoch(epoch)
        begin, stop = self._span(epoch, lane, window)
        first, last = np.searchsorted(ends, [begin, stop - 1], side="right")
        return [int(shard) for shard in shards[first : last + 1] if self._counts[shard]]

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the epoch's order, and the offset in the epoch at which each one's samples end."""
        shards = generator(self._seed, 2 * epoch, 0, 0, self._number).permutation(len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def _window_starts(self, epoch: int, lane: int) -> np.ndarray:
        """Return the offsets in the epoch at which the lane's windows start: every `window` shards."""
        begin, end = self._bounds(lane)
        _, ends = self._epoch(epoch)
        first = int(np.searchsorted(ends, begin, side="right"))
        cuts = ends[first + self._window - 1 :: self._window]
        return np.concatenate([[begin], cuts[cuts < end]])

    def _permuted_samples(self, epoch: int, lane: int, window: int) -> np.ndarray:
        begin, stop = self._span(epoch, lane, window)
        mixed = generator(self._seed, 2 * epoch + 1, window, lane, self._number).permutation(stop - begin)
        return mixed.astype(np.uint32)  # half the memory: every worker process keeps those of its lanes


class Mixture:
    """Which data set each image of a lane comes from: exact shares in every block, shuffled within the block."""

    def __init__(self, changes: Sequence[tuple[int, Sequence[float]]], seed: int, lane: int = 0):
        """`changes` lists (turn, weights): the weights apply from that turn on. The first turn is 0."""
        self._seed, self._lane = seed, lane
        self._starts = [turn for turn, _ in changes]
        self._weights = [np.asarray(weights, dtype=np.float64) / sum(weights) for _, weights in changes]
        self._block = lru_cache(maxsize=4)(self._shuffled)
        self._before = [np.zeros(len(self._weights[0]), dtype=np.int64)]
        for part, (start, end) in enumerate(pairwise(self._starts)):
            self._before.append(self._before[-1] + self._inside(part, end - start))

    def locate(self, turn: int) -> tuple[int, int]:
        """Return (data set, number of its images before this one)."""
        part = self._part(turn)
        block, offset = divmod(turn - self._starts[part], MIX_BLOCK)
        sources, ranks = self._block(part, block)
        source = int(sources[offset])
        return source, int(self._before[part][source] + self._quota(part, block)[source] + ranks[offset])

    def before(self, turn: int) -> list[int]:
        """Count the images of each data set before `turn`."""
        part = self._part(turn)
        counted: list[int] = (self._before[part] + self._inside(part, turn - self._starts[part])).tolist()
        return counted

    def _part(self, turn: int) -> int:
        return int(np.searchsorted(self._starts, turn, side="right")) - 1

    def _inside(self, part: int, turns: int) -> np.ndarray:
        """Count the images of each data set among the first `turns` of a part."""
        block, offset = divmod(turns, MIX_BLOCK)
        sources, _ = self._block(part, block)
        return self._quota(part, block) + np.bincount(sources[:offset], minlength=len(self._weights[0]))

    def _quota(self, part: int, blocks: int) -> np.ndarray:
        """Count the images of each data set in the first `blocks` blocks.

        Shares follow the largest-remainder method, so they are off by less than one image however many blocks there
        are. The counts never decrease, because every weight other than 0 is at least one image per block.
        """
        wanted = self._weights[part] * blocks * MIX_BLOCK
        quota = np.floor(wanted).astype(np.int64)
        missing = blocks * MIX_BLOCK - int(quota.sum())
        quota[np.argsort(quota - wanted, kind="stable")[:missing]] += 1
        return quota

    def _shuffled(self, part: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each image of a block its data set, and how many images of that set precede it in the block."""
        counts = self._quota(part, block + 1) - self._quota(part, block)
        sources = np.repeat(np.arange(len(counts)), counts)
        sources = generator(self._seed, _MIXTURE + part, block, self._lane).permutation(sources)
        ranks = np.empty(MIX_BLOCK, dtype=np.int64)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


class Order:
    """The sample in every slot of every batch of a recipe's run."""

    def __init__(self, recipe: Recipe, counts: Sequence[np.ndarray], skipped: Skipped = ()):
        """`counts` holds the shard sizes of each data set."""
        data = recipe.data
        self._recipe = recipe
        self._skipped = list(skipped)
        self._lanes, self._repeats = data.lanes, recipe.augment.repeats
        self._orders = [
            DatasetOrder(count, recipe.seed, data.window, data.lanes, number) for number, count in enumerate(counts)
        ]
        weights = [(0, [source.weight for source in data.sources])]
        weights += [(self._turn(change.step), list(change.weights)) for change in data.reweight]
        self._mixtures = [Mixture(weights, recipe.seed, lane) for lane in range(data.lanes)] if len(counts) > 1 else []

    def at(self, step: int, slots: Iterable[int]) -> Iterator[SampleRef]:
        """Yield the samples in these slots of the global batch of step `step`."""
        first, first_turn = self._before(step), self._turn(step)
        distinct, per_lane = self._distinct(step)
        for slot in slots:
            # copies of an image are far apart, so that mixed pairs are of different images
            lane, offset = divmod(slot % distinct, per_lane)
            source, turn = 0, first_turn + offset
            if self._mixtures:
                source, turn = self._mixtures[lane].locate(turn)
            yield SampleRef(first + slot, source, *self._orders[source].locate(turn, lane))

    def ahead(self, step: int, slots: range) -> list[tuple[int, list[int]]]:
        """List (data set, shards) that these slots need at step `step` and the next steps, soonest first."""
        distinct, per_lane = self._distinct(step)
        lanes = dict.fromkeys(slot % distinct // per_lane for slot in slots)
        turn = self._turn(step)
        needed: dict[int, dict[int, None]] = {}
        for lane in lanes:
            turns = self._mixtures[lane].before(turn) if self._mixtures else [turn]
            for source, own in enumerate(turns):
                needed.setdefault(source, {}).update(dict.fromkeys(self._orders[source].ahead(own, lane)))
        return [(source, list(shards)) for source, shards in needed.items()]

    def _turn(self, step: int) -> int:
        """Count the distinct images of a lane before step `step`."""
        return self._before(step) // (self._repeats * self._lanes)

    def _before(self, step: int) -> int:
        return positions_before(self._recipe, step, self._skipped)

    def _distinct(self, step: int) -> tuple[int, int]:
        """Return (distinct images of the step's batch, those of one lane)."""
        distinct = self._recipe.batch_at(step) // self._repeats
        return distinct, distinct // self._lanes
