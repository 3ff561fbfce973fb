"""A data set as a Python sequence of samples, for notebooks and other people's loops."""

import logging
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images import bags
from vimscale.data.images.choice import Choice
from vimscale.data.sample import Sample, Size
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import BadSample
from vimscale.model.tiles import Bag

log = logging.getLogger(__name__)

_AHEAD = 2
"""Shards to fetch while one is read, if they are not on this machine."""


def dataset(source: str, cache: str = "100GB") -> "Samples":
    """Open a data set: a folder, an address, or an embedded set such as "digits:val". `cache` limits the size of this
    machine's cache for shards that are elsewhere.

    Raises:
        DataError: there is no such data set, or files of it are missing.
    """
    return Samples(Dataset.open(source, cache))


class Samples:
    """The samples of a data set in its order: `len(samples)`, `samples[i]`, `for sample in samples`. A sample has
    `image` (uint8 (3, h, w), as stored; a `Bag`, if the set holds bags of tiles), `label` (-1 without labels),
    `class_name` and `key`.
    """

    def __init__(self, opened: Dataset):
        self.opened = opened
        self._ends = opened.counts.cumsum()
        tiles = opened.manifest.tiles
        self._bag = None if tiles is None else partial(bags.for_evaluation, choice=Choice(tiles.side))

    @property
    def manifest(self) -> Manifest:
        """What the set says about itself: name, classes, mean, std, number of samples."""
        return self.opened.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the labels; empty: there are no labels."""
        return self.manifest.classes

    def __repr__(self) -> str:
        return f"<data set {self.manifest.name}: {len(self):,} samples, {len(self.classes)} classes>"

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, i: int) -> Sample:
        """Read the i-th sample, or the i-th from the end if negative.

        Raises:
            IndexError: there is no such sample.
            BadSample: its image or label cannot be used.
            DataError: its shard is damaged or unavailable.
        """
        number = i + len(self) if i < 0 else i
        if not 0 <= number < len(self):
            raise IndexError(f"there is no sample {i}: {self.manifest.name} has {len(self)}")
        shard = self._shard(number)
        within = number - int(self._ends[shard]) + int(self.opened.counts[shard])
        sample, _ = stream.read(self.opened, shard, within, _size, lambda sample: {}, self._bag)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        """Read all samples in order, those of the next shards in the background. Samples that cannot be used are left
        out, and the log names them.

        Raises:
            DataError: a shard is damaged or unavailable.
        """
        shard = -1
        for number in range(len(self)):
            if (of := self._shard(number)) != shard:
                shard = of
                self.opened.prefetch(range(shard, min(shard + 1 + _AHEAD, len(self._ends))))
            try:
                yield self[number]
            except BadSample as error:
                log.warning("left out: %s", error)

    def _shard(self, number: int) -> int:
        return int(self._ends.searchsorted(number, side="right"))


def _size(image: Tensor | Bag) -> Size:
    height, width = (image.tiles if isinstance(image, Bag) else image).shape[-2:]
    return height, width
