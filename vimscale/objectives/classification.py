"""Supervised classification: cross entropy with label smoothing; top-1 and top-5.

Axes: b images, c classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.recipe.sections import Objective

_FIRST = 5


def loss(logits: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """Mean cross entropy of logits (b, c), with the recipe's label smoothing (arXiv:1512.00567).

    Targets are classes, int64 (b), or their shares in each image, (b, c).
    """
    return F.cross_entropy(logits, targets, label_smoothing=objective.label_smoothing)


def sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(4): images, hits of the first guess, hits among the first five, cross entropy, each weighted by weights (b)."""
    order = logits.topk(min(_FIRST, logits.shape[1]), dim=1).indices == labels[:, None]  # (b, 5)
    nll = F.cross_entropy(logits, labels, reduction="none")
    rows = torch.stack([torch.ones_like(weights), order[:, 0], order.any(dim=1), nll])  # (4, b)
    return (rows * weights).sum(dim=1, dtype=torch.float64)


def figures(sums: Tensor, classes: int) -> dict[str, float]:
    """What `sums` come to. With five classes or fewer the first five guesses are always right, and top5 is left out."""
    images, top1, top5, nll = sums.tolist()
    found = {"images": int(images), "top1": top1 / images, "top5": top5 / images, "loss": nll / images}
    return found if classes > _FIRST else {key: value for key, value in found.items() if key != "top5"}
