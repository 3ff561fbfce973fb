"""Batches on the device, one step ahead: copied on a separate CUDA stream, then normalised and mixed there."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vimscale.data.images import augment, mix
from vimscale.data.shards.manifest import Manifest
from vimscale.data.stream import Batch, Images, tensors_of


class Prefetcher:
    """Hands the model its input, batch after batch."""

    def __init__(self, batches: Iterator[Batch], manifest: Manifest, device: torch.device):
        self._batches, self._device = batches, device
        self._classes = len(manifest.classes)
        self._mean, self._std = (torch.tensor(values, device=device) for values in (manifest.mean, manifest.std))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | None = None
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = 0.0

    def take(self) -> tuple[Images, Tensor, Batch]:
        """Return (images fp32, labels or soft targets, the batch that they come from)."""
        if self._next is None:
            self.ahead()
        batch, self._next = self._next, None
        assert batch is not None
        if self._copies is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._copies)
            for tensor in (*tensors_of(batch.images), batch.labels, *batch.views.values()):
                tensor.record_stream(now)
            if self._idle:
                self._idle[-1][1].record(now)
        return *self.prepare(batch), batch

    def prepare(self, batch: Batch) -> tuple[Images, Tensor]:
        """Return (images fp32, labels or soft targets) of a batch on the device."""
        images = augment.normalised(batch.images, self._mean, self._std)
        if isinstance(images, list):
            return images, batch.labels
        return mix.apply(images, batch.labels, batch.erase, batch.mix, self._classes)

    def views(self, batch: Batch) -> dict[str, Tensor]:
        """Return the views of a batch on the device; pictures are normalised like images."""
        return augment.normalised_views(batch.views, self._mean, self._std)

    def ahead(self) -> None:
        """Read the next batch and start its copy. If one waits, or at the end of the stream, do nothing.

        Call this after queueing the step's work, so that the device computes meanwhile.
        """
        if self._next is not None:
            return
        if self._copies is None:
            asked = time.perf_counter()
            self._next = next(self._batches, None)
            self._waited += time.perf_counter() - asked
            return
        # the device idles from the end of its work to the start of the next step
        ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ends[0].record(torch.cuda.current_stream(self._device))
        batch = next(self._batches, None)
        if batch is not None:
            self._idle.append(ends)
            with torch.cuda.stream(self._copies):
                self._next = batch.to(self._device)

    def tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def waited(self) -> float:
        """Return the seconds that the device was idle for lack of data since the last call. Waits for the device."""
        if self._idle:
            torch.cuda.synchronize(self._device)
            # the last pair may still be open: its batch has not been taken
            ended, self._idle = (self._idle, []) if self._next is None else (self._idle[:-1], self._idle[-1:])
            self._waited += sum(begin.elapsed_time(end) for begin, end in ended) / 1000
        waited, self._waited = self._waited, 0.0
        return waited
