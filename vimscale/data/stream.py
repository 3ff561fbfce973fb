"""Batches of a run. Global batch t is a pure function of (manifests, seed, t, augment).

Each rank takes one contiguous slice of it: rank r of W takes the r-th of W equal slices, cut into micro-batches; with
parallel.context N, the slice r // N of W / N. Worker processes take micro-batches in rotation. What a batch holds does
not depend on ranks, workers or restarts: the only state of the stream is the number of steps done.
"""

import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.queues
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vimscale.data.dataset import Dataset, Traffic
from vimscale.data.images import augment, bags, decode, mix, own
from vimscale.data.images.choice import Choice, check_kind
from vimscale.data.order import PER_PAIR, PER_SAMPLE, PER_VIEW, SUBSTITUTE, Order, SampleRef, Skipped, generator
from vimscale.data.sample import Sample, Size, Views, no_views
from vimscale.data.training_set import TrainingSet
from vimscale.errors import BadSample, DataError, LaunchError, UserError, WorkerDied
from vimscale.model.presets import VimConfig
from vimscale.model.tiles import Bag
from vimscale.recipe.recipe import Recipe

log = logging.getLogger(__name__)

Images = Tensor | list[Tensor] | list[Bag]
"""(b, 3, h, w), or b images (3, h, w) where shapes may differ, or b bags of tiles"""
_ATTEMPTS = 100
"""Bad samples in a row after which reading a shard fails."""


@dataclass
class Batch:
    """One micro-batch of one rank."""

    images: Images
    """uint8"""
    labels: Tensor
    """int64 (b); -1 where a data set has no labels"""
    weights: Tensor
    """fp32 (b): 0 for samples that an evaluation does not count, which are padding of the last batch and bad samples"""
    keys: list[str]
    refs: list[SampleRef]
    """One per training sample; empty for evaluation."""
    erase: Tensor | None = None
    """int64 (b, 5), see `mix.draw_erase`; stays on the host"""
    mix: Tensor | None = None
    """fp32 (b / 2, 5), see `mix.draw_mix`; stays on the host"""
    views: dict[str, Tensor] = field(default_factory=dict)
    """What the objective makes of each sample, stacked: (b, ...) by name."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Cause and description of each bad sample that was replaced or, in evaluation, left out."""
    traffic: Traffic = field(default_factory=Traffic)
    """Bytes and cache hits of reading this batch."""

    @property
    def packed(self) -> bool:
        return isinstance(self.images, list)

    def share(self) -> None:
        """Move the tensors into shared memory.

        Raises:
            LaunchError: the tensors do not fit.
        """
        host = (self.labels, self.weights, self.erase, self.mix, *self.views.values())
        tensors = [t for t in (*tensors_of(self.images), *host) if t is not None]
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError as error:
            if "No space left" not in str(error):
                raise
            size, free = sum(t.nbytes for t in tensors), shutil.disk_usage("/dev/shm").free
            raise LaunchError(
                f"/dev/shm is full: a batch takes {size / 1e6:.1f} MB of this shared memory, {free / 1e6:.1f} MB are"
                " free, and each of the data.workers holds three batches; enlarge it (docker run --shm-size=8g), or set"
                " data.workers=0"
            ) from None

    def pin_memory(self) -> "Batch":
        images = mapped(self.images, Tensor.pin_memory)
        views = {name: view.pin_memory() for name, view in self.views.items()}
        return replace(self, images=images, labels=self.labels.pin_memory(), views=views)

    def to(self, device: torch.device) -> "Batch":
        """Copy images, labels and views to the device; from pinned memory, without waiting for the copy."""
        images = mapped(self.images, lambda image: image.to(device, non_blocking=True))
        views = {name: view.to(device, non_blocking=True) for name, view in self.views.items()}
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=True), views=views)


def tensors_of(images: Images) -> list[Tensor]:
    """List the tensors that a batch's images consist of."""
    parts = [images] if isinstance(images, Tensor) else images
    return [tensor for part in parts for tensor in (part if isinstance(part, Bag) else (part,))]


def mapped(images: Images, change: Callable[[Tensor], Tensor]) -> Images:
    """Return images of the same kind, with each tensor changed."""
    if isinstance(images, Tensor):
        return change(images)
    return [Bag(*map(change, each)) if isinstance(each, Bag) else change(each) for each in images]  # type: ignore[return-value]


def training(
    recipe: Recipe,
    data: TrainingSet,
    config: VimConfig,
    *,
    rank: int,
    world: int,
    start: int,
    steps: int,
    skipped: Skipped = (),
    pin: bool = False,
    views: Views = no_views,
    augmented: bool = True,
) -> Iterator[Batch]:
    """Start the recipe's data workers; then yield the micro-batches of this rank for steps [start, steps), in order.
    The generator that `views` gets depends on the seed and the sample's position. The ranks of a context group get the
    same. `augmented`: whether the images are needed; otherwise they are empty, (b, 3, 0, 0), unless they are bags.

    Raises:
        DataError: at once, if the model takes bags of tiles and the data are images, or the other way round; while
            iterating, if a shard is damaged or unavailable, or none of its samples is usable.
        WorkerDied: at any time, if a worker's process has ended.
    """
    source = _Training(recipe, data, config, rank, world, range(start, steps), skipped, views, augmented)
    return _batches(source, recipe.data.workers, pin)


def evaluation(
    dataset: Dataset,
    *,
    rank: int,
    world: int,
    batch: int,
    size: Size,
    choice: Choice | None = None,
    workers: int = 0,
    views: Views = no_views,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield every sample once over all ranks, unaugmented, in order. `rank` of `world`: those that read different
    samples, data ranks. `choice`: what a model takes that takes bags. `start`: batches of each rank to leave out first.

    All ranks get the same number of batches, all of the same size. The generator that `views` gets depends on the
    sample's number alone.

    Raises:
        DataError: the model takes bags of tiles and the data are images, or the other way round.
    """
    return _batches(_Evaluation(dataset, size, choice, rank, world, batch, views, start), workers, pin=False)


def start_fork_server() -> None:
    """Start the server that data workers are forked from, so that it imports torch while this process does something
    else. It starts with the first workers otherwise.
    """
    # forking a process with Ray's and gloo's threads is unsafe; forking a server that has imported torch is cheap
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.forkserver.ensure_running()


def _batches(source: IterableDataset, workers: int, pin: bool) -> Iterator[Batch]:
    """Start the workers, and return what they read."""
    options: dict[str, Any] = {}
    if workers:
        start_fork_server()
        options = {"multiprocessing_context": "forkserver", "worker_init_fn": partial(_end_with, os.getpid())}
    loader = DataLoader(source, batch_size=None, num_workers=workers, pin_memory=pin, **options)
    with _deaths():
        received = iter(loader)
    return _checked(received)


def _checked(received: Iterator[Batch | UserError]) -> Iterator[Batch]:
    with _deaths():
        for batch in received:
            if isinstance(batch, UserError):
                raise batch
            yield batch


_GONE = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)
"""What a loader raises when a worker or the fork server is gone; the last three come from the server's socket."""


@contextmanager
def _deaths() -> Iterator[None]:
    """Turn what a loader raises when a worker ended before its work was done into a WorkerDied. An exception raised
    inside a worker propagates as it is.
    """
    try:
        yield
    except _GONE as error:
        died = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if died is None and (isinstance(error, RuntimeError) or str(error).startswith("Caught ")):
            raise
        raise WorkerDied(f"data worker {died[1] if died else 'process'} died") from error


def _end_with(rank: int, worker: int) -> None:
    """End this worker process when the rank's process ends, however it ends.

    The parent is the fork server, so torch's own check of the parent never notices. Also end the worker when it cannot
    send a batch: the queue would drop the batch, and the rank would wait for it forever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_not_sent)  # type: ignore[attr-defined]

    def watch() -> None:
        while True:
            try:
                os.kill(rank, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def _not_sent(error: Exception, item: Any) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _caught(batches: Iterator[Batch]) -> Iterator[Batch | UserError]:
    """Yield the batches, and a UserError as the last item: raised in a worker, it would arrive as a traceback's text.

    A worker moves its batches into shared memory here, because the thread that sends them drops what does not fit.
    """
    worker = get_worker_info()
    try:
        for batch in batches:
            if worker is not None:
                batch.share()
            yield batch
    except UserError as error:
        yield error


class _Training(IterableDataset):
    def __init__(
        self,
        recipe: Recipe,
        data: TrainingSet,
        config: VimConfig,
        rank: int,
        world: int,
        steps: range,
        skipped: Skipped,
        views: Views,
        augmented: bool,
    ):
        self.skipped, self.views, self.augmented = skipped, views, augmented
        self.recipe, self.data, self.size, self.steps = recipe, data, config.size, steps
        self.data_rank, self.world = rank // recipe.parallel.context, world
        self.choice = Choice.of(config, recipe.data)
        for dataset in data.datasets:
            check_kind(dataset.manifest, self.choice)
        self.buckets = augment.buckets(config.size, config.patch_size, recipe.augment.buckets)

    def __iter__(self) -> Iterator[Batch | UserError]:
        return _caught(self._batches())

    def _batches(self) -> Iterator[Batch]:
        recipe, datasets = self.recipe, self.data.datasets
        order = Order(recipe, [dataset.counts for dataset in datasets], self.skipped)
        _, accumulation = recipe.micro_batch(self.world)
        last = own.build(recipe.augment.own)
        ahead: list[tuple[int, list[int]]] = []
        for k in _of_this_worker(range(self.steps.start * accumulation, self.steps.stop * accumulation)):
            step, part = divmod(k, accumulation)
            cut = recipe.micro_batch(self.world, step)
            if _first_worker():
                before, ahead = ahead, order.ahead(step, cut.rank_rows(self.data_rank))
                for source, shards in ahead if ahead != before else ():
                    datasets[source].prefetch(shards)
            refs = list(order.at(step, cut.rows(self.data_rank, part)))
            yield self._batch(refs, recipe.size_at(step, self.size), last)

    def _batch(self, refs: list[SampleRef], size: Size, last: own.Augmentation | None) -> Batch:
        before = self.data.traffic
        options, seed = self.recipe.augment, self.recipe.seed
        images: list[Any] = []
        labels, keys, erase, views, bad = [], [], [], [], []
        for ref in refs:
            sample, made, replaced = self._read(ref, size)
            bad += replaced
            rng = generator(seed, PER_SAMPLE, ref.position)
            image, size = sample.image, sample.size
            if isinstance(image, Bag):
                images.append(image)
            elif self.augmented:
                images.append(augment.for_training(image, size, options, rng, last))
            else:
                images.append(image.new_empty(3, 0, 0))
            views.append(made)
            labels.append(sample.label)
            keys.append(sample.key)
            if options.erase:
                erase.append(mix.draw_erase(size, options.erase, rng))
        pairs = [
            mix.draw_mix(size, options, generator(seed, PER_PAIR, ref.position))
            for ref in (refs[::2] if options.mixes else ())
        ]
        return Batch(
            torch.stack(images) if self.choice is None and len(self.buckets) == 1 else images,
            torch.tensor(labels),
            torch.ones(len(refs)),
            keys,
            refs,
            torch.tensor(erase) if erase else None,
            torch.tensor(pairs) if pairs else None,
            _stacked(views),
            bad,
            self.data.traffic - before,
        )

    def _read(self, ref: SampleRef, size: Size) -> tuple[Sample, dict[str, Tensor], list[tuple[str, str]]]:
        """Return (sample, its views, bad samples that were tried first).

        Another sample of the same shard, drawn by position, replaces a bad one. So every reader of this position
        agrees, and no other shard is needed.
        """

        def bag(raw: dict, where: str) -> Bag:
            assert self.choice is not None
            rng = generator(self.recipe.seed, PER_SAMPLE, ref.position)
            return bags.for_training(raw, where, self.choice, self.recipe.augment.flip, rng)

        def size_of(image: Tensor | Bag) -> Size:
            if isinstance(image, Bag) or len(self.buckets) == 1:
                return size
            return augment.bucket_for(image.shape[1], image.shape[2], self.buckets)

        def see(sample: Sample) -> dict[str, Tensor]:
            return self.views(sample, generator(self.recipe.seed, PER_VIEW, ref.position))

        dataset = self.data.datasets[ref.source]
        bad: list[tuple[str, str]] = []
        number = ref.sample
        while True:
            try:
                return *read(dataset, ref.shard, number, size_of, see, None if self.choice is None else bag), bad
            except BadSample as error:
                bad.append((error.cause, str(error)))
                if len(bad) == _ATTEMPTS:
                    raise DataError(
                        f"{dataset.where(ref.shard)}: {_ATTEMPTS} samples drawn from it in a row cannot be used, the"
                        f" last because of: {error}; `vimscale data verify --deep` lists them all"
                    ) from None
            rng = generator(self.recipe.seed, SUBSTITUTE, ref.position, len(bad))
            number = int(rng.integers(dataset.counts[ref.shard]))


class _Evaluation(IterableDataset):
    def __init__(
        self,
        dataset: Dataset,
        size: Size,
        choice: Choice | None,
        rank: int,
        world: int,
        batch: int,
        views: Views,
        start: int,
    ):
        check_kind(dataset.manifest, choice)
        self.start = start
        self.source, self.size, self.rank, self.world, self.batch = dataset, size, rank, world, batch
        self.choice, self.views = choice, views

    def __iter__(self) -> Iterator[Batch | UserError]:
        return _caught(self._batches())

    def _batches(self) -> Iterator[Batch]:
        ends = self.source.counts.cumsum()
        total = int(ends[-1])
        choice = self.choice
        bag = None if choice is None else partial(bags.for_evaluation, choice=choice)
        rounds = -(-total // (self.batch * self.world))
        for k in _of_this_worker(range(self.start, rounds)):
            begin = (k * self.world + self.rank) * self.batch
            before = replace(self.source.traffic)
            images: Any = (
                torch.zeros(self.batch, 3, *self.size, dtype=torch.uint8)
                if choice is None
                else [bags.blank(choice.side)] * self.batch
            )
            labels, weights = torch.zeros(self.batch, dtype=torch.int64), torch.zeros(self.batch)
            keys, bad = [""] * self.batch, []
            views: list[dict[str, Tensor] | None] = [None] * self.batch
            for i, number in enumerate(range(begin, min(begin + self.batch, total))):
                shard = int(ends.searchsorted(number, side="right"))
                sample = number - int(ends[shard]) + int(self.source.counts[shard])
                try:
                    one, views[i] = read(self.source, shard, sample, lambda _: self.size, self._seeing(number), bag)
                except BadSample as error:
                    bad.append((error.cause, str(error)))
                    continue
                image = one.image
                images[i] = image if isinstance(image, Bag) else augment.for_evaluation(image, self.size)
                labels[i], keys[i] = one.label, one.key
                weights[i] = 1
            traffic = self.source.traffic - before
            # rows that do not count have the views of any other row
            blank = Sample(images[0], 0, "", {}, self.size)
            some = next((each for each in views if each is not None), None)
            if some is None:
                some = self.views(blank, generator(0, PER_VIEW, begin))
            stacked = _stacked([each if each is not None else some for each in views])
            yield Batch(images, labels, weights, keys, [], views=stacked, bad=bad, traffic=traffic)

    def _seeing(self, number: int) -> Callable[[Sample], dict[str, Tensor]]:
        return lambda sample: self.views(sample, generator(0, PER_VIEW, number))


def _stacked(views: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in views]) for name in views[0]}


def read(
    dataset: Dataset,
    shard: int,
    number: int,
    size_of: Callable[[Tensor | Bag], Size],
    see: Callable[[Sample], dict[str, Tensor]],
    bag: Callable[[dict, str], Bag] | None = None,
) -> tuple[Sample, dict[str, Tensor]]:
    """Return (sample, its views). `bag` reads the tiles of a sample; None: samples are images.

    Raises:
        BadSample: it cannot be used.
        DataError: its shard is damaged or unavailable.
    """
    raw = dataset.read(shard, number)
    manifest, where = dataset.manifest, dataset.where(shard)
    image: Tensor | Bag
    try:
        if bag is None:
            image, label = decode.decode(raw, where, len(manifest.classes), manifest.image)
        else:
            label = decode.label_of(raw, f"{where}, sample {raw['__key__']}", len(manifest.classes))
            image = bag(raw, where)
        name = manifest.classes[label] if 0 <= label < len(manifest.classes) else ""
        sample = Sample(image, label, raw["__key__"], raw, size_of(image), name)
        try:
            return sample, see(sample)
        except BadSample as error:
            raise BadSample(error.cause, f"{where}, sample {sample.key}: {error}") from None
    except BadSample:
        if dataset.recheck(shard):  # a damaged copy in the cache must not change which sample is read
            return read(dataset, shard, number, size_of, see, bag)
        raise


def _of_this_worker(batches: range) -> range:
    """Select the batches of this worker: a DataLoader takes batches from its workers in rotation."""
    info = get_worker_info()
    return batches if info is None else batches[info.id :: info.num_workers]


def _first_worker() -> bool:
    info = get_worker_info()
    return info is None or info.id == 0
