"""A linear classifier by LARS behind a BatchNorm: MAE's protocol (`main_linprobe.py`, arXiv:2111.06377).

The rate is 0.1 for a batch of 256 and grows in proportion; it rises over the first ninth of the steps and falls to 0
along a cosine. There is no weight decay. MAE crops the training images at random; these features are of center crops.

Axes: b samples of a batch, f features, c classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.evaluation.classifier import batches, figures
from vimscale.evaluation.embedded import Embedded
from vimscale.runtime.heartbeat import heartbeat

RATE = 0.1
"""Learning rate for a batch of 256."""
EPOCHS = 90
STEPS = 7_000
"""What 90 epochs of ImageNet are. Smaller sets take as many: one changes the weights by at most about TRUST x the rate.
"""
BATCH = 16_384
MOMENTUM = 0.9
TRUST = 0.001
_EPS = 1e-6
_STD = 0.01


def lars_step(parameter: Tensor, gradient: Tensor, momentum: Tensor, rate: float) -> None:
    """Update a parameter and its momentum in place (arXiv:1708.03888). The gradient of a matrix is scaled to TRUST x
    the norm of the parameter, unless either is 0; that of a vector is taken as it is.
    """
    if parameter.ndim > 1:
        norms = parameter.norm(), gradient.norm()
        scale = torch.where((norms[0] > 0) & (norms[1] > 0), TRUST * norms[0] / norms[1], torch.ones_like(norms[0]))
        gradient = gradient * scale
    momentum.mul_(MOMENTUM).add_(gradient)
    parameter.sub_(momentum, alpha=rate)


def rate_at(step: int, steps: int, rate: float) -> float:
    """The learning rate of a step, counted from 0."""
    warm = steps / 9
    if step < warm:
        return rate * step / warm
    return rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def linear(
    train: Embedded,
    tested: Embedded,
    name: str,
    classes: int,
    device: torch.device,
    *,
    steps: int | None = None,
    batch: int = BATCH,
    rate: float = RATE,
    seed: int = 0,
) -> dict[str, float]:
    """Return linear_top1 and linear_top5, on `tested`, of a classifier trained on the feature `name` of `train`.
    `steps`: default: 90 epochs, at least 7,000. A set smaller than a batch is one batch.
    """
    seen, labels = train.features[name], train.labels
    batch = min(batch, len(labels))
    steps = steps or max(math.ceil(EPOCHS * len(labels) / batch), STEPS)
    norm = torch.nn.BatchNorm1d(seen.shape[1], eps=_EPS, affine=False, device=device)
    initial = torch.empty(classes, seen.shape[1])
    torch.nn.init.trunc_normal_(initial, std=_STD, generator=torch.Generator().manual_seed(seed))
    weight, bias = initial.T.contiguous().to(device), torch.zeros(classes, device=device)  # (f, c), (c)
    momenta = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, rows in enumerate(batches(len(labels), batch, steps, seed)):
        heartbeat.beat("evaluate")
        x, truth = norm(seen[rows].to(device).float()), labels[rows].to(device)
        error = (x @ weight + bias).softmax(dim=1) - F.one_hot(truth, classes)
        error /= len(x)
        now = rate_at(step, steps, rate * batch / 256)
        lars_step(weight, x.T @ error, momenta[0], now)
        lars_step(bias, error.sum(dim=0), momenta[1], now)
    norm.eval()
    normed = [norm(some.to(device).float()) for some in tested.features[name].split(8192)]
    return figures(torch.cat(normed), tested.labels, weight, bias)
