"""Segments of a scan: what each of them adds, so that all can be scanned at the same time, on one device or on several.

A segment is affine in the state that enters it:  h_out = exp(A t) h_in + end,  where t is the sum of its steps and
`end` the state that it ends with if it starts from zero. If an image begins inside, nothing of h_in is left. The
gradient that a segment passes on to the state before it is affine in the one that reaches it, with the same factor.

Axes: k directions, b images, S segments in scan order, e inner channels, n states per channel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import fused_module
from .recurrence import add_gradients, begins_image
from .scan_inputs import ScanInputs
from .selective_scan import decay_rates, walk_of, with_rows
from .torch_op import torch_op


class Ends(NamedTuple):
    """What each segment adds."""

    end: Tensor
    """(k, b, S, e, n) fp32: the state after the segment, or the gradient before it, if zero enters it."""
    steps: Tensor
    """(k, b, S, e) fp32: the sum of its steps; negative if an image begins inside, so that the factor is zero."""


@torch_op("selective_scan_ends", shown=2)
def _ends(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, image: Tensor | None,
    ds: Tensor | None, dt_proj: Tensor | None, reverse: Sequence[bool], log_A: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = with_rows(ScanInputs(x, dt, A, B, C, D, dt_bias, None, image))
    if backend == "triton":
        module = fused_module("scan_segments", backend)
        if ds is None:
            return module.ends(inputs, reverse, log_A=log_A)
        return module.ends_backward(inputs, ds, reverse, log_A=log_A)
    inputs = inputs._replace(A=decay_rates(A, log_A))
    if backend == "cpu":
        module = fused_module("scan_segments", backend)
        if ds is None:
            return module.ends(inputs, reverse, dt_proj)
        return module.ends_backward(inputs, ds, reverse, dt_proj)
    return _reference(inputs, reverse, ds)


@_ends.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (k, b, _, e), n = x.shape, A.shape[-1]
    return A.new_empty(k, b, 1, e, n), A.new_empty(k, b, 1, e)


def ends(
    inputs: ScanInputs, reverse: Sequence[bool], log_A: bool, backend: str, *, ds: Tensor | None = None,
    dt_proj: Tensor | None = None,
) -> Ends:  # fmt: skip
    """What each segment adds to the state; or, with the gradient ds (k, b, l, e) of s, to the gradient that it passes
    on to the state before it. `inputs.initial` is ignored. The number of segments follows from the shape alone.
    `inputs.A` holds log(-A) with `log_A`. With dt_proj (k, e, r), on a CPU, `inputs.dt` is (k, b, l, r).
    """
    x, dt, A, B, C, D, dt_bias, _, image = inputs
    return Ends(*_ends.inside(x, dt, A, B, C, D, dt_bias, image, ds, dt_proj, reverse, log_A, backend))


def chain(ends: Ends, A: Tensor, first: Tensor | None = None, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Pass `first` (k, b, e, n; default: zero) through the segments, from the last to the first if `backward`. Returns
    what enters each segment (k, b, S, e, n) and what leaves the chain (k, b, e, n). A (k, e, n) is negative.
    Where an image begins, nothing of what entered is left, not even a NaN.
    """
    end, steps = ends
    begins = steps.unsqueeze(-1) < 0
    factor = torch.exp(steps.unsqueeze(-1) * A[:, None, None])
    passed = torch.zeros_like(end[:, :, 0]) if first is None else first
    entering = torch.empty_like(end)
    count = end.shape[2]
    for s in range(count - 1, -1, -1) if backward else range(count):
        entering[:, :, s] = passed
        passed = torch.where(begins[:, :, s], end[:, :, s], torch.addcmul(end[:, :, s], factor[:, :, s], passed))
    return entering, passed


def _reference(inputs: ScanInputs, reverse: Sequence[bool], ds: Tensor | None) -> Ends:
    """One segment: the whole sequence."""
    with torch.autocast(inputs.x.device.type, enabled=False):
        found, steps = [], []
        for k, backwards in enumerate(reverse):
            walk = walk_of(inputs, k, backwards)
            if ds is None:
                found.append(walk.after[0 if backwards else -1])
            else:
                g = ds[k].to(walk.C.dtype).transpose(0, 1).unsqueeze(-1) * walk.C.transpose(0, 1).unsqueeze(2)
                found.append(add_gradients(g, walk.decay, None, backwards))
            total = walk.step.sum(1)
            if inputs.image is not None:
                total[begins_image(inputs.image, backwards).any(1)] = -1
            steps.append(total)
        return Ends(torch.stack(found).unsqueeze(2), torch.stack(steps).unsqueeze(2))
