"""The teacher of self-distillation: a copy that gradients do not train, and that follows the student."""

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def without_parameters(module: _Module) -> _Module:
    """Turn all parameters of a module into persistent buffers of the same names; returns the module."""
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                del part._parameters[name]
                part.register_buffer(name, p.detach().clone())
    return module


def momentum(first: float, last: float, step: int, steps: int) -> float:
    """How much of itself the teacher keeps in the update after `step` finished ones, out of `steps`: a cosine."""
    return last - 0.5 * (last - first) * (1 + math.cos(math.pi * step / steps))


def warmed_up(first: float, last: float, step: int, warmup: int) -> float:
    """A value that rises linearly during `warmup` steps, from `first` to `last`, both of them included."""
    if step >= warmup:
        return last
    return first + (last - first) * step / max(warmup - 1, 1)


@torch.no_grad()
def follow(pairs: Iterable[tuple[Tensor, Tensor]], share: Tensor | float) -> None:
    """Move each teacher's tensor by `share` of the way to the student's; pairs are (teacher's, student's)."""
    for teacher, student in pairs:
        teacher.lerp_(student, share)


@torch.no_grad()
def follow_mean(center: Tensor, mean: Tensor, momentum: float, applied: Tensor | None = None) -> None:
    """Move the center (k) towards the mean of a step's logits (k), unless `applied` () is 0: then the mean may not be
    finite.
    """
    moved = center * momentum + mean.to(center.dtype) * (1 - momentum)
    center.copy_(moved if applied is None else torch.where(applied > 0, moved, center))
