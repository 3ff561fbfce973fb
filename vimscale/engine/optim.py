"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vimscale.recipe.sections import Optim


class AdamW(torch.optim.AdamW):
    """torch's AdamW. Its own step imports torch's compiler, 1,100 modules, even where nothing is compiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def kind(name: str, no_decay: set[str], optim: Optim) -> str:
    """The optimizer's treatment of a parameter: with weight decay, spared (the names in `no_decay`), or as a gate."""
    last = name.rpartition(".")[2]
    spared = name in no_decay and not (optim.decay == "published" and last == "A_log")
    return "gates" if last == "backward_gate" else "spared" if spared else "decayed"


def optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], no_decay: set[str], optim: Optim, *, fused: bool
) -> torch.optim.Optimizer:
    """AdamW over one group for each `kind` of parameter, by name."""
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "spared": [], "gates": []}
    for name, p in parameters:
        groups[kind(name, no_decay, optim)].append(p)
    return adamw([group for group in groups.items() if group[1]], optim, fused=fused)


def adamw(groups: Iterable[tuple[str, Sequence[nn.Parameter]]], optim: Optim, *, fused: bool) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with its `kind`."""
    gates = optim.weight_decay if optim.gate_decay is None else optim.gate_decay
    decay = {"decayed": optim.weight_decay, "spared": 0.0, "gates": gates}
    chosen = [{"params": list(group), "weight_decay": decay[kind]} for kind, group in groups]
    return AdamW(chosen, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def scale_updates(optimizer: torch.optim.Optimizer, slices: Sequence[tuple[Tensor, Tensor]], factor: float) -> None:
    """Multiply the updates of some slices of tensors by `factor`: a separate learning rate for them, which parameter
    groups cannot express. `slices`: (the tensor that the optimizer updates, a view of it).
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        active = {id(p) for group in optimizer.param_groups for p in group["params"]}  # ZeRO-3 shows some at a time
        kept.extend((view, view.clone()) for flat, view in slices if id(flat) in active)

    def after(*_: Any) -> None:
        for view, old in kept:
            view.copy_(torch.lerp(old, view, factor))
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def clamp_after(optimizer: torch.optim.Optimizer, slices: Sequence[tuple[Tensor, float, float]]) -> None:
    """Clamp some slices of what the optimizer updates to (slice, least, most) after every update, before the model gets
    the new values.
    """

    def after(*_: Any) -> None:
        for view, least, most in slices:
            view.clamp_(least, most)

    optimizer.register_step_post_hook(after)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of the update that follows `step` finished ones, out of `steps`: linear warm-up, then the schedule."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "rise":  # the last update has lr itself
        return optim.min_lr * (optim.lr / optim.min_lr) ** ((step - optim.warmup) / max(steps - optim.warmup - 1, 1))
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(target: float, step: int) -> float:
    """The decay after `step` updates: low at first, so that the initial weights soon leave the average."""
    return min(target, (1 + step) / (10 + step))
