"""Which sample stands where: order = f(seed, step, place in the batch, shard sizes), whoever asks and whenever.

    step, place in the global batch  ->  lane, turn in it  ->  data set, its own turn  ->  epoch, shard, sample

Each arrow is a function in closed form, so any step is found without the ones before it. An epoch is a permutation of a
data set: shards are permuted, cut into lanes, taken in windows, and the samples of a window permuted. So reading stays
near-sequential, and a node that works on some lanes needs their shards alone.
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
    """A counter-based generator (Philox): reachable at any point without drawing what comes before. `counter`: up to
    three numbers.
    """
    first, second, third = (*counter, 0, 0, 0)[:3]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, second, first, third]))


class SampleRef(NamedTuple):
    """A sample, and where in the run it stands."""

    position: int
    """Images of the run before this one: what its generator is made from."""
    source: int
    """Which data set of the mixture."""
    epoch: int
    shard: int
    sample: int


class Plan:
    """The order of one data set, whose shards hold `counts` samples, epoch after epoch."""

    def __init__(self, counts: np.ndarray, seed: int, window: int = 16, lanes: int = 1, number: int = 0):
        """`number`: which data set of a mixture this is; each has an order of its own."""
        self.samples = int(counts.sum())
        self.lanes = lanes
        self._counts = np.asarray(counts, dtype=np.int64)
        self._seed, self._window, self._number = seed, window, number
        # a batch on the border of two epochs asks for both
        self._epoch = lru_cache(maxsize=2)(self._permuted_shards)
        self._windows = lru_cache(maxsize=2 * lanes)(self._cut)
        self._inside = lru_cache(maxsize=2 * lanes + 2)(self._permuted_samples)

    def locate(self, turn: int, lane: int = 0) -> tuple[int, int, int]:
        """(epoch, shard, index in the shard) of the sample whose turn it is in a lane, which goes through its own part
        of every epoch.
        """
        epoch, at, window = self._find(turn, lane)
        start = int(self._windows(epoch, lane)[window])
        mixed = start + int(self._inside(epoch, lane, window)[at - start])
        shards, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, mixed, side="right"))
        shard = int(shards[number])
        return epoch, shard, mixed - int(ends[number]) + int(self._counts[shard])

    def ahead(self, turn: int, lane: int = 0) -> list[int]:
        """Shards of the window that `turn` lies in, then of the one after it."""
        epoch, _, window = self._find(turn, lane)
        now = self._shards_of(epoch, lane, window)
        if window + 1 < len(self._windows(epoch, lane)):
            return now + self._shards_of(epoch, lane, window + 1)
        return now + self._shards_of(epoch + 1, lane, 0)

    def _find(self, turn: int, lane: int) -> tuple[int, int, int]:
        """(epoch, place in it, window of the lane)."""
        begin, end = self._bounds(lane)
        epoch, offset = divmod(turn, end - begin)
        at = begin + offset
        return epoch, at, int(np.searchsorted(self._windows(epoch, lane), at, side="right")) - 1

    def _bounds(self, lane: int) -> tuple[int, int]:
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def _span(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """Places of the epoch that a window holds."""
        starts = self._windows(epoch, lane)
        return int(starts[window]), int(starts[window + 1]) if window + 1 < len(starts) else self._bounds(lane)[1]

    def _shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        shards, ends = self._epoch(epoch)
        begin, stop = self._span(epoch, lane, window)
        first, last = np.searchsorted(ends, [begin, stop - 1], side="right")
        return [int(shard) for shard in shards[first : last + 1] if self._counts[shard]]

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, and where each one's samples end."""
        shards = generator(self._seed, 2 * epoch, 0, 0, self._number).permutation(len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def _cut(self, epoch: int, lane: int) -> np.ndarray:
        """Where the lane's windows start in the epoch: every `window` shards."""
        begin, end = self._bounds(lane)
        _, ends = self._epoch(epoch)
        first = int(np.searchsorted(ends, begin, side="right"))
        cuts = ends[first + self._window - 1 :: self._window]
        return np.concatenate([[begin], cuts[cuts < end]])

    def _permuted_samples(self, epoch: int, lane: int, window: int) -> np.ndarray:
        begin, stop = self._span(epoch, lane, window)
        mixed = generator(self._seed, 2 * epoch + 1, window, lane, self._number).permutation(stop - begin)
        return mixed.astype(np.uint32)  # each of many worker processes keeps those of its lanes


class Mixture:
    """Which data set the images of a lane come from: exact shares in every block, shuffled inside it."""

    def __init__(self, changes: Sequence[tuple[int, Sequence[float]]], seed: int, lane: int = 0):
        """`changes`: (turn, weights) from which turn on which weights hold; the first from 0."""
        self._seed, self._lane = seed, lane
        self._starts = [turn for turn, _ in changes]
        self._weights = [np.asarray(weights, dtype=np.float64) / sum(weights) for _, weights in changes]
        self._block = lru_cache(maxsize=4)(self._shuffled)
        self._before = [np.zeros(len(self._weights[0]), dtype=np.int64)]
        for part, (start, end) in enumerate(pairwise(self._starts)):
            self._before.append(self._before[-1] + self._inside(part, end - start))

    def locate(self, turn: int) -> tuple[int, int]:
        """(data set, how many images of it come before this one)."""
        part = self._part(turn)
        block, offset = divmod(turn - self._starts[part], MIX_BLOCK)
        sources, ranks = self._block(part, block)
        source = int(sources[offset])
        return source, int(self._before[part][source] + self._quota(part, block)[source] + ranks[offset])

    def before(self, turn: int) -> list[int]:
        """Images of each data set before `turn`."""
        part = self._part(turn)
        counted: list[int] = (self._before[part] + self._inside(part, turn - self._starts[part])).tolist()
        return counted

    def _part(self, turn: int) -> int:
        return int(np.searchsorted(self._starts, turn, side="right")) - 1

    def _inside(self, part: int, turns: int) -> np.ndarray:
        """Images of each data set among the first `turns` of a part."""
        block, offset = divmod(turns, MIX_BLOCK)
        sources, _ = self._block(part, block)
        return self._quota(part, block) + np.bincount(sources[:offset], minlength=len(self._weights[0]))

    def _quota(self, part: int, blocks: int) -> np.ndarray:
        """Images of each data set in the first `blocks` blocks: shares by largest remainder, off by less than one
        image however far. They only grow, since no weight but 0 is below one image a block.
        """
        wanted = self._weights[part] * blocks * MIX_BLOCK
        quota = np.floor(wanted).astype(np.int64)
        missing = blocks * MIX_BLOCK - int(quota.sum())
        quota[np.argsort(quota - wanted, kind="stable")[:missing]] += 1
        return quota

    def _shuffled(self, part: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each image of a block: its data set, and how many of that stand before it in the block."""
        counts = self._quota(part, block + 1) - self._quota(part, block)
        sources = np.repeat(np.arange(len(counts)), counts)
        sources = generator(self._seed, _MIXTURE + part, block, self._lane).permutation(sources)
        ranks = np.empty(MIX_BLOCK, dtype=np.int64)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


class Order:
    """What every place in every batch of a recipe's run holds, for data sets of those shard sizes."""

    def __init__(self, recipe: Recipe, counts: Sequence[np.ndarray], skipped: Sequence[tuple[int, int]] = ()):
        """`skipped`: (step, images): from which step on so many images were passed over."""
        data = recipe.data
        self._recipe = recipe
        self._skipped = list(skipped)
        self._lanes, self._repeats = data.lanes, recipe.augment.repeats
        self._plans = [Plan(count, recipe.seed, data.window, data.lanes, number) for number, count in enumerate(counts)]
        weights = [(0, [source.weight for source in data.sources])]
        weights += [(self._turn(change.step), list(change.weights)) for change in data.reweight]
        self._mixtures = [Mixture(weights, recipe.seed, lane) for lane in range(data.lanes)] if len(counts) > 1 else []

    def at(self, step: int, places: Iterable[int]) -> Iterator[SampleRef]:
        """What stands at those places of the global batch of step `step`."""
        first, first_turn = self._before(step), self._turn(step)
        different, share = self._shares(step)
        for place in places:
            # copies of an image stand far apart, so that pairs that are mixed are of different images
            lane, offset = divmod(place % different, share)
            source, turn = 0, first_turn + offset
            if self._mixtures:
                source, turn = self._mixtures[lane].locate(turn)
            yield SampleRef(first + place, source, *self._plans[source].locate(turn, lane))

    def ahead(self, step: int, places: range) -> list[tuple[int, list[int]]]:
        """(data set, shards) that those places of the batch of step `step` and of the next ones need, soonest first."""
        different, share = self._shares(step)
        lanes = dict.fromkeys(place % different // share for place in places)
        turn = self._turn(step)
        wanted: dict[int, dict[int, None]] = {}
        for lane in lanes:
            turns = self._mixtures[lane].before(turn) if self._mixtures else [turn]
            for source, own in enumerate(turns):
                wanted.setdefault(source, {}).update(dict.fromkeys(self._plans[source].ahead(own, lane)))
        return [(source, list(shards)) for source, shards in wanted.items()]

    def _turn(self, step: int) -> int:
        """Different images of a lane before step `step`."""
        return self._before(step) // (self._repeats * self._lanes)

    def _before(self, step: int) -> int:
        """Positions before step `step`, those that were passed over among them."""
        return self._recipe.consumed(step) + sum(images for at, images in self._skipped if at <= step)

    def _shares(self, step: int) -> tuple[int, int]:
        """(different images of the step's batch, those of one lane)."""
        different = self._recipe.batch_at(step) // self._repeats
        return different, different // self._lanes
