"""Many linear classifiers at once, by SGD: DINOv2's protocol (`dinov2/eval/linear.py`).

Every learning rate trains one head on each choice of features: the last layer's or those of the last four, with or
without the mean of the image's tokens. There is no weight decay and no BatchNorm. DINOv2 augments the training images;
these features are of center crops.

Axes: b samples of a batch, f features, h heads that read the same features, c classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vimscale.evaluation.classifier import Choose, batches, figures, held_out
from vimscale.evaluation.embedded import Embedded
from vimscale.runtime.heartbeat import heartbeat

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for a batch of 256; they grow in proportion to the batch."""
STEPS = 12_500
"""DINOv2's 10 epochs of 1,250 steps."""
BATCH = 1024
"""DINOv2's 128 images on each of 8 GPUs."""
MOMENTUM = 0.9
_STD = 0.01


@dataclass(frozen=True)
class Head:
    """One linear classifier: what it reads and how fast it learns."""

    names: tuple[str, ...]
    """Features, concatenated."""
    rate: float
    """Learning rate for a batch of 256."""


class _Group:
    """Heads that read the same features, in fp32. They start from the same weights, whatever other heads there are."""

    def __init__(
        self,
        names: tuple[str, ...],
        rates: Sequence[float],
        wide: int,
        classes: int,
        seed: int,
        device: torch.device,
    ):
        self.names = names
        initial = torch.empty(wide, classes).normal_(std=_STD, generator=torch.Generator().manual_seed(seed))
        self.weight = initial[:, None].repeat(1, len(rates), 1).to(device)  # (f, h, c)
        self.bias = torch.zeros(len(rates), classes, device=device)
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)[:, None]
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def step(self, x: Tensor, labels: Tensor, factor: float) -> None:
        """Take one step on the mean cross entropy of x (b, f) and labels (b), with `factor` on the learning rates."""
        logits = (x @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias  # (b, h, c)
        error = logits.softmax(dim=2)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error /= len(x)
        gradients = (x.T @ error.flatten(1)).view_as(self.weight), error.sum(dim=0)
        for parameter, momentum, gradient in zip((self.weight, self.bias), self.momenta, gradients, strict=True):
            momentum.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(momentum * (factor * self.rates))


def trained(
    train: Embedded,
    heads: Sequence[Head],
    classes: int,
    device: torch.device,
    *,
    rows: Tensor | None = None,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Train heads, those with the same features next to each other, on the same batches: (weights (f, c), biases (c))
    of each, in fp32. Learning rates fall to 0 along a cosine. `rows`: the samples to train on; default: all.
    """
    if rows is None:
        rows = torch.arange(len(train.labels))
    batch = min(batch, len(rows))
    groups = []
    for names, members in groupby(heads, key=lambda head: head.names):
        rates = [head.rate * batch / 256 for head in members]
        wide = sum(train.features[name].shape[1] for name in names)
        groups.append(_Group(names, rates, wide, classes, seed, device))
    for step, numbers in enumerate(batches(len(rows), batch, steps, seed)):
        heartbeat.beat("evaluate")
        labels = train.labels[rows[numbers]].to(device)
        read = {name: train.features[name][rows[numbers]].to(device).float() for g in groups for name in g.names}
        for group in groups:
            x = torch.cat([read[name] for name in group.names], dim=1)
            group.step(x, labels, (1 + math.cos(math.pi * step / steps)) / 2)
    return [
        (weight, bias)
        for group in groups
        for weight, bias in zip(group.weight.unbind(dim=1), group.bias.unbind(dim=0), strict=True)
    ]


def best_of(
    train: Embedded,
    tested: Embedded,
    heads: Sequence[Head],
    classes: int,
    device: torch.device,
    *,
    choose: Choose = "held-out",
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> tuple[dict[str, float], Head]:
    """Return linear_top1 and linear_top5, on `tested`, of the best head, and linear_lr, its learning rate for a batch
    of 256; and the head. The one that is best on the held-out images trains again on all of `train`.
    """
    options: dict[str, Any] = {"steps": steps, "batch": batch, "seed": seed}
    if choose == "published":
        scores = _figures(tested, None, heads, trained(train, heads, classes, device, **options))
        found = max(scores, key=lambda each: each["linear_top1"])
        chosen = heads[scores.index(found)]
    else:
        apart = held_out(train)
        every = trained(train, heads, classes, device, rows=(~apart).nonzero()[:, 0], **options)
        scores = _figures(train, apart.nonzero()[:, 0], heads, every)
        chosen = heads[scores.index(max(scores, key=lambda each: each["linear_top1"]))]
        (found,) = _figures(tested, None, [chosen], trained(train, [chosen], classes, device, **options))
    return {**found, "linear_lr": chosen.rate}, chosen


def _figures(
    of: Embedded, rows: Tensor | None, heads: Sequence[Head], fits: Sequence[tuple[Tensor, Tensor]]
) -> list[dict[str, float]]:
    """Figures of each head on some samples of a set; None: all."""
    rows = torch.arange(len(of.labels)) if rows is None else rows
    found = []
    for names, members in groupby(zip(heads, fits, strict=True), key=lambda each: each[0].names):
        x = torch.cat([of.features[name][rows] for name in names], dim=1)
        found += [figures(x, of.labels[rows], *fit) for _, fit in members]
    return found
