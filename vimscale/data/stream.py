"""Positions to batches. Batch t is a pure function of (manifest, seed, t, augment); ranks take contiguous slices of it.

Step t owns positions [t B, (t + 1) B) of the plan, rank r of W its r-th W-th, cut into micro-batches. No rank, worker
or restart enters into what a batch holds, so the only state of the stream is the number of steps done.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vimscale.data import augment, decode
from vimscale.data.dataset import Dataset
from vimscale.data.plan import Plan, generator
from vimscale.recipe import Recipe

Size = tuple[int, int]
"""Height and width of a batch's images."""
_PER_SAMPLE = 1 << 63
"""Keeps the generators of samples apart from the plan's, which count epochs from 0."""


@dataclass
class Batch:
    """One micro-batch of one rank."""

    images: Tensor
    """uint8 (b, 3, h, w)"""
    labels: Tensor
    """int64 (b)"""
    weights: Tensor
    """fp32 (b): 0 for the images that only fill up the last batch of an evaluation"""
    keys: list[str]

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.weights.pin_memory(), self.keys)


def training(
    recipe: Recipe, dataset: Dataset, *, rank: int, world: int, start: int, steps: int, size: Size, pin: bool = False
) -> Iterator[Batch]:
    """The micro-batches of this rank for steps [start, steps), in order; images are (3, *size)."""
    source = _Training(recipe, dataset, size, rank, world, range(start, steps))
    return iter(_loader(source, recipe.data.workers, pin))


def evaluation(dataset: Dataset, *, rank: int, world: int, batch: int, size: Size, workers: int = 0) -> Iterator[Batch]:
    """Every sample once over all ranks, unaugmented, in order; all ranks get as many batches, of the same size."""
    return iter(_loader(_Evaluation(dataset, size, rank, world, batch), workers, pin=False))


def _loader(source: IterableDataset, workers: int, pin: bool) -> DataLoader:
    # forkserver: a process with Ray's and gloo's threads must not be forked
    context = "forkserver" if workers else None
    return DataLoader(source, batch_size=None, num_workers=workers, pin_memory=pin, multiprocessing_context=context)


class _Training(IterableDataset):
    def __init__(self, recipe: Recipe, dataset: Dataset, size: Size, rank: int, world: int, steps: range):
        self.recipe, self.source, self.size, self.steps = recipe, dataset, size, steps
        self.micro, self.accumulation = recipe.micro_batch(world)
        self.first = rank * self.micro * self.accumulation  # of this rank, in a global batch

    def __iter__(self) -> Iterator[Batch]:
        plan = Plan(self.source.counts, self.recipe.seed)
        for k in _share(range(self.steps.start * self.accumulation, self.steps.stop * self.accumulation)):
            step, part = divmod(k, self.accumulation)
            begin = step * self.recipe.batch + self.first + part * self.micro
            samples = [self._sample(plan, position) for position in range(begin, begin + self.micro)]
            yield _collate(samples, torch.ones(self.micro))

    def _sample(self, plan: Plan, position: int) -> tuple[Tensor, int, str]:
        image, label, key = _read(self.source, *plan.locate(position))
        rng = generator(self.recipe.seed, _PER_SAMPLE, position)
        return augment.for_training(image, self.size, self.recipe.augment, rng), label, key


class _Evaluation(IterableDataset):
    def __init__(self, dataset: Dataset, size: Size, rank: int, world: int, batch: int):
        self.source, self.size, self.rank, self.world, self.batch = dataset, size, rank, world, batch

    def __iter__(self) -> Iterator[Batch]:
        places = [(shard, i) for shard, count in enumerate(self.source.counts) for i in range(count)]
        rounds = -(-len(places) // (self.batch * self.world))
        for k in _share(range(rounds)):
            begin = (k * self.world + self.rank) * self.batch
            mine = places[begin : begin + self.batch]
            fill = self.batch - len(mine)
            samples = [self._sample(*place) for place in mine + [places[0]] * fill]
            yield _collate(samples, torch.tensor([1.0] * len(mine) + [0.0] * fill))

    def _sample(self, shard: int, i: int) -> tuple[Tensor, int, str]:
        image, label, key = _read(self.source, shard, i)
        return augment.for_evaluation(image, self.size), label, key


def _read(dataset: Dataset, shard: int, i: int) -> tuple[Tensor, int, str]:
    """(image, label, key) of a sample."""
    raw = dataset.read(shard, i)
    image, label = decode.decode(raw, dataset.where(shard), len(dataset.manifest.classes))
    return image, label, raw["__key__"]


def _collate(samples: list[tuple[Tensor, int, str]], weights: Tensor) -> Batch:
    images, labels, keys = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), weights, list(keys))


def _share(turns: range) -> range:
    """This worker's turns: a DataLoader takes batches from its workers in rotation."""
    info = get_worker_info()
    return turns if info is None else turns[info.id :: info.num_workers]
