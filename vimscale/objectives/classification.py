"""Supervised classification: cross entropy with label smoothing; top-1 and top-5. Trains the encoder's own head.

Axes: b images, c classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.objectives.base import Inputs, Learner, Objective, Observe
from vimscale.recipe.objective import ClassificationOptions

_TOP = 5


class Classification(Objective):
    Options = ClassificationOptions
    options: ClassificationOptions

    def loss(self, model: Learner, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(model.logits(inputs), inputs.targets, self.options.label_smoothing), {}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        smoothing = self.options.label_smoothing
        return F.cross_entropy(model.logits(inputs), inputs.targets, label_smoothing=smoothing, reduction="none")

    def evaluation_sums(self, model: Learner, inputs: Inputs) -> Tensor:
        assert inputs.weights is not None
        return sums(model.logits(inputs), inputs.targets, inputs.weights, inputs.observe)

    def figures(self, sums: Tensor) -> dict[str, float]:
        """`top5` is left out for five classes or fewer: it would always be 1."""
        images, top1, top5, nll = sums.tolist()
        found = {"images": int(images), "top1": top1 / images, "top5": top5 / images, "loss": nll / images}
        return {key: value for key, value in found.items() if key != "top5" or self.config.num_classes > _TOP}


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy of logits (b, c), with label smoothing (arXiv:1512.00567).

    Targets are classes, int64 (b), or each class's share of an image, (b, c).
    """
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def sums(logits: Tensor, labels: Tensor, weights: Tensor, observe: Observe | None = None) -> Tensor:
    """(4): images, hits of the first guess, hits among the first five, cross entropy, each weighted by weights (b).
    `observe`: as of `Inputs`.
    """
    best = logits.topk(min(_TOP, logits.shape[1]), dim=1)
    if observe is not None:
        observe(best.indices[:, 0], (best.values[:, 0] - logits.logsumexp(dim=1)).exp())
    order = best.indices == labels[:, None]  # (b, 5)
    nll = F.cross_entropy(logits, labels, reduction="none")
    rows = torch.stack([torch.ones_like(weights), order[:, 0], order.any(dim=1), nll])  # (4, b)
    return (rows * weights).sum(dim=1, dtype=torch.float64)
