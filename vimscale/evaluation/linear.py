"""Multinomial logistic regression of frozen features, exact.

Axes: n samples, f features, c classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.evaluation.classifier import Choose, figures, held_out
from vimscale.evaluation.embedded import Embedded
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

L2 = tuple(10.0**-i for i in range(7))
"""Factors on half the sum of squared weights that the classifier chooses from; 1 / (n C) in scikit-learn's terms."""
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


def logistic(
    train: Embedded,
    tested: Embedded,
    name: str,
    classes: int,
    device: torch.device,
    *,
    choose: Choose = "held-out",
    factors: Sequence[float] = L2,
) -> dict[str, float]:
    """Return linear_top1 and linear_top5, on `tested`, of a logistic regression on the feature `name` of `train`,
    standardized, and linear_l2, the factor that is best on the images that choose. Takes 8 bytes per image and feature.
    Ranks share the factors, and return the same.
    """
    seen, labels, truth = (t.to(device) for t in (train.features[name].double(), train.labels, tested.labels))
    mean, std = seen.mean(dim=0), seen.std(dim=0, correction=0).clamp_min(1e-12)
    x, y = (seen - mean) / std, (tested.features[name].to(device).double() - mean) / std
    apart = held_out(train).to(device)
    fit_on, judges = ~apart, (x[apart], labels[apart])
    if choose == "published":
        fit_on, judges = torch.ones_like(apart), (y, truth)
    chosen = factors[0]
    if len(factors) > 1 and len(judges[0]) and len(x[fit_on]):
        scores = torch.zeros(len(factors), dtype=torch.float64, device=device)
        for i in range(distributed.rank(), len(factors), distributed.world()):
            fit = fitted(x[fit_on], labels[fit_on], classes, factors[i])
            scores[i] = figures(*judges, *fit)["linear_top1"]
        chosen = factors[int(distributed.total(scores).argmax())]
    return {**figures(y, truth, *fitted(x, labels, classes, chosen)), "linear_l2": chosen}
