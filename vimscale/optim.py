"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from vimscale.recipe import Optim


def optimizer(model: nn.Module, no_decay: set[str], optim: Optim, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over two groups: what weight decay shrinks, and what it leaves alone."""
    decayed = [p for name, p in model.named_parameters() if name not in no_decay]
    spared = [p for name, p in model.named_parameters() if name in no_decay]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """For the update that follows `step` finished ones, of `steps` in all: linear warm-up, then the schedule."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(target: float, step: int) -> float:
    """Low at first, so that the average is never one of the initial weights."""
    return min(target, (1 + step) / (10 + step))
