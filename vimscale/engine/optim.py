"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vimscale.recipe.sections import Optim


class AdamW(torch.optim.AdamW):
    """torch's AdamW. Its own step imports torch's compiler, 1,100 modules, even where nothing is compiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


LATE = "late "
"""What the kinds of parameters begin with that are not updated before a step of the objective's choice."""


def kind(name: str, no_decay: set[str], optim: Optim, late: Collection[str] = ()) -> str:
    """The optimizer's treatment of a parameter: with weight decay, spared (the names in `no_decay`), or as a gate; and
    whether it is one of the names in `late`.
    """
    last = name.rpartition(".")[2]
    decayed = {"fixed": False, "published": last == "A_log", "all": True}[optim.decay]
    spared = name in no_decay and not decayed
    usual = "gates" if last == "backward_gate" else "spared" if spared else "decayed"
    return f"{LATE}{usual}" if name in late else usual


def optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    no_decay: set[str],
    optim: Optim,
    *,
    fused: bool,
    late: Collection[str] = (),
    factors: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over one group for each `kind` of parameter, by name, and factor on the learning rate. `factors`: default:
    1 for all.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {(kind, 1.0): [] for kind in ("decayed", "spared", "gates")}
    for name, p in parameters:
        factor = 1.0 if factors is None else factors[name]
        groups.setdefault((kind(name, no_decay, optim, late), factor), []).append(p)
    return adamw([(*key, members) for key, members in groups.items() if members], optim, fused=fused)


def adamw(
    groups: Iterable[tuple[str, float, Sequence[nn.Parameter]]], optim: Optim, *, fused: bool
) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with its `kind` and its factor on the learning rate."""
    chosen = [{"params": list(members), "kind": kind, "factor": factor} for kind, factor, members in groups]
    adamw = AdamW(chosen, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)
    set_decay(adamw, optim, optim.weight_decay)
    return adamw


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups to what it is while that of groups with factor 1 is `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def set_decay(optimizer: torch.optim.Optimizer, optim: Optim, decay: float) -> None:
    """Set the weight decay of all groups to what it is while that of matrices is `decay`."""
    gates = decay if optim.gate_decay is None else optim.gate_decay
    of_kind = {"decayed": decay, "spared": 0.0, "gates": gates}
    for group in optimizer.param_groups:
        group["weight_decay"] = of_kind[group["kind"].removeprefix(LATE)]


def leave_out_late(optimizer: torch.optim.Optimizer) -> None:
    """Let the next update pass over the late parameters: no decay, no moments, no update counted."""
    for group in optimizer.param_groups:
        if group["kind"].startswith(LATE):
            for p in group["params"]:
                p.grad = None


def clip_each(
    slots: Sequence[int], grads: list[Tensor], limit: float, count: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Clip the gradient of each of `count` parameters, by itself, to a norm of `limit`; returns the norms before,
    (count).

    Args:
        slots: the number of the parameter that each of `grads` is a part of.
        total: sums over the ranks that hold the other parts.
    """
    device, dtype = (grads[0].device, grads[0].dtype) if grads else (None, None)
    squares = torch.zeros(count, device=device, dtype=dtype)
    if grads:
        mine = _members(tuple(slots), count, grads[0].device)
        squares = torch.where(mine, torch.stack(torch._foreach_norm(grads)).square(), squares[:, None]).sum(dim=1)
    norms = total(squares).sqrt()
    factors = (limit / (norms + 1e-6)).clamp_max(1)
    for slot, grad in zip(slots, grads, strict=True):
        grad.mul_(factors[slot])
    return norms


@lru_cache(maxsize=4)
def _members(slots: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Which parts belong to which parameter, (count, parts) bool."""
    return (torch.arange(count)[:, None] == torch.tensor(slots)).to(device)


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
        if optim.warmup_from is None:
            return optim.lr * (step + 1) / optim.warmup
        return optim.warmup_from + (optim.lr - optim.warmup_from) * step / max(optim.warmup - 1, 1)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "rise":  # the last update has lr itself
        return optim.min_lr * (optim.lr / optim.min_lr) ** ((step - optim.warmup) / max(steps - optim.warmup - 1, 1))
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def weight_decay(optim: Optim, step: int, steps: int) -> float:
    """The weight decay of the update that follows `step` finished ones, out of `steps`."""
    if optim.weight_decay_end is None:
        return optim.weight_decay
    first, last = optim.weight_decay, optim.weight_decay_end
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / steps))


def ema_decay(target: float, step: int) -> float:
    """The decay after `step` updates: low at first, so that the initial weights soon leave the average."""
    return min(target, (1 + step) / (10 + step))
