"""Linear classifiers of frozen features.

Axes: n samples, f features, c classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import check_same_labels
from vimscale.evaluation.embedded import Embed, embedded
from vimscale.runtime.heartbeat import heartbeat

L2 = tuple(10.0**-i for i in range(7))
"""Factors on half the sum of squared weights that the linear classifier chooses from."""
_HELD_OUT = 5
"""One in this many samples chooses the factor."""
_ITERATIONS = 200


def fitted(features: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression to features (n, f) in fp64 by L-BFGS on all of them: (weights (f, c),
    biases (c)) that minimize the mean cross entropy + l2 / 2 x the sum of squared weights.
    """
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        heartbeat.beat("evaluate")
        solver.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float(((features @ weight + bias).argmax(dim=1) == labels).double().mean())


def linear(
    embed: Embed, train: Dataset, val: Dataset, manifest: Manifest, *, factors: Sequence[float] = L2, **reading: Any
) -> dict[str, float]:
    """Return linear_top1, on `val`, of a logistic regression on standardized features of `train`, and the factor that
    it took: the best on every fifth image of `train`, which then joins the others. Takes 8 bytes per image and feature.

    Raises:
        DataError: the sets' classes differ, or a set cannot be read.
    """
    check_same_labels(train.manifest, val.manifest)
    classes = len(val.manifest.classes)
    seen, labels, numbers = embedded(embed, train, manifest, **reading)
    tested, truth, _ = embedded(embed, val, manifest, **reading)
    mean, std = seen.double().mean(dim=0), seen.double().std(dim=0, correction=0).clamp_min(1e-12)
    x, y = (seen - mean) / std, (tested - mean) / std
    held_out = numbers % _HELD_OUT == 0
    chosen = factors[0]
    if len(factors) > 1 and 0 < int(held_out.sum()) < len(x):
        scores = [
            _accuracy(x[held_out], labels[held_out], *fitted(x[~held_out], labels[~held_out], classes, l2))
            for l2 in factors
        ]
        chosen = factors[scores.index(max(scores))]
    return {"linear_top1": _accuracy(y, truth, *fitted(x, labels, classes, chosen)), "linear_l2": chosen}
