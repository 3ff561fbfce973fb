"""What linear classifiers of frozen features have in common.

Axes: n samples, f features, c classes.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from vimscale.evaluation.embedded import Embedded

HELD_OUT = 5
"""One in this many samples of the training set chooses among hyperparameters."""
Choose = Literal["held-out", "published"]
"""Which images choose. held-out: every fifth one of the training set, by its number, which then joins the others;
published: the validation set that the result is reported on, as DINOv2 does.
"""
_ROWS = 8192
_TOP = 5


def held_out(train: Embedded) -> Tensor:
    """Which samples of the training set choose: bool (n)."""
    return train.numbers % HELD_OUT == 0


def figures(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    """Return linear_top1 and linear_top5 of logits features (n, f) @ weight (f, c) + bias (c), computed in the dtype of
    `weight` on its device. Five classes or fewer have no top5.
    """
    top = min(_TOP, weight.shape[1])
    first = five = 0
    for start in range(0, len(features), _ROWS):
        some = slice(start, start + _ROWS)
        right = (features[some].to(weight) @ weight + bias).topk(top, dim=1).indices == labels[some, None].to(
            weight.device
        )
        first, five = first + int(right[:, 0].sum()), five + int(right.any(dim=1).sum())
    found = {"linear_top1": first / len(features)}
    return found if weight.shape[1] <= _TOP else {**found, "linear_top5": five / len(features)}


def batches(samples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield int64 (batch) numbers of samples, `steps` times: a new random order in every epoch, which batches may
    straddle. A set smaller than a batch is one batch.
    """
    rng = torch.Generator().manual_seed(seed)
    batch = min(batch, samples)
    rest = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(rest) < batch:
            rest = torch.cat([rest, torch.randperm(samples, generator=rng)])
        yield rest[:batch]
        rest = rest[batch:]
