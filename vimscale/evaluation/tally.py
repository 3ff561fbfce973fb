"""What a classifier takes images for: accuracy of each class, confusion, calibration.

Axes: b images of a micro-batch, c classes, k bins of probability.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vimscale.runtime import distributed

BINS = 15
"""Bins of equal width for the probability of the chosen class, as in Guo et al., arXiv:1706.04599."""
_MOST = 2048
"""The most classes whose confusion is counted: it takes 8 bytes per pair of classes."""


@dataclass(frozen=True)
class OfClass:
    """The images of one class."""

    name: str
    images: int
    top1: float


class Tally:
    """Counts over images. Each rank calls `add` for its own images, then all ranks call `total`."""

    def __init__(self) -> None:
        self.classes: tuple[str, ...] = ()
        self.left_out = 0
        """Images of classes that the model lacks."""
        self.unreadable = 0
        self.images = self.hits = torch.zeros(0, dtype=torch.int64)
        """int64 (c), by the true class; empty where the evaluation does not choose among classes."""
        self.confusion: Tensor | None = None
        """int64 (c, c), by true and chosen class; None for very many classes."""
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64)
        """(k, 3): images, hits, and the sum of the probabilities of the chosen class."""

    def begin(self, classes: tuple[str, ...], device: torch.device) -> None:
        """Set the classes to choose among, and the device to count on."""
        self.classes, count = classes, len(classes)
        self.images, self.hits = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        self.bins = self.bins.to(device)
        if count <= _MOST:
            self.confusion = torch.zeros(count, count, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, weights: Tensor, chosen: Tensor, probability: Tensor) -> None:
        """Count a micro-batch: labels (b), weights (b), 0 for images that do not count, the chosen classes (b) and
        their probabilities (b).
        """
        there = weights > 0
        labels, chosen, probability = labels[there], chosen[there], probability[there].double()
        right = labels == chosen
        self.images += labels.bincount(minlength=len(self.classes))
        self.hits += labels[right].bincount(minlength=len(self.classes))
        if self.confusion is not None:
            pairs = labels * len(self.classes) + chosen
            self.confusion.view(-1).index_add_(0, pairs, torch.ones_like(pairs))
        upper = torch.arange(1, BINS, device=labels.device, dtype=torch.float64) / BINS
        rows = torch.stack([torch.ones_like(probability), right.double(), probability], dim=1)
        self.bins.index_add_(0, torch.bucketize(probability, upper), rows)

    def total(self) -> None:
        """Add up all ranks' counts; every rank gets them, on the CPU."""
        counts = torch.tensor([self.left_out, self.unreadable], device=self.images.device)
        self.left_out, self.unreadable = distributed.total(counts).tolist()
        self.images, self.hits, self.bins = (distributed.total(t).cpu() for t in (self.images, self.hits, self.bins))
        if self.confusion is not None:
            self.confusion = distributed.total(self.confusion).cpu()

    @property
    def counted(self) -> bool:
        """Whether the evaluation chose among classes."""
        return bool(self.images.sum())

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (ECE): the mean over images of |accuracy - mean probability| of their bin."""
        images, hits, probability = self.bins.unbind(dim=1)
        return float((hits - probability).abs().sum() / images.sum())

    def per_class(self) -> list[OfClass]:
        """The classes that have images, in the model's order."""
        rows = zip(self.classes, self.images.tolist(), self.hits.tolist(), strict=True)
        return [OfClass(name, images, hits / images) for name, images, hits in rows if images]

    def worst(self, count: int) -> list[OfClass]:
        """The classes with the lowest accuracy; of equals, those with the most images."""
        return sorted(self.per_class(), key=lambda one: (one.top1, -one.images))[:count]

    def confused(self, count: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: (true class, chosen class, images)."""
        if self.confusion is None:
            return []
        wrong = self.confusion.clone().fill_diagonal_(0).flatten()
        best = wrong.sort(descending=True, stable=True)
        pairs = zip(best.values[:count].tolist(), best.indices[:count].tolist(), strict=True)
        names, width = self.classes, len(self.classes)
        return [(names[at // width], names[at % width], images) for images, at in pairs if images]
