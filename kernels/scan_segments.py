"""Segments of a scan: what each of them adds, so that all can be scanned at the same time, on one device or on several.

A segment is affine in the state that enters it:  h_out = exp(A t) h_in + end,  where t is the sum of its steps and
`end` the state that it ends with if it starts from zero. If an image begins inside, nothing of h_in is left. The
gradient that a segment passes on to the state before it is affine in the one that reaches it, with the same factor.

Axes: k directions, b images, S segments in scan order, e inner channels, n states per channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import fused_module
from .scan_inputs import ScanInputs
from .selective_scan import _begins, _order, _walk, _with_rows, decay_rates


class Ends(NamedTuple):
    """What each segment adds."""

    end: Tensor
    """(k, b, S, e, n) fp32: the state after the segment, or the gradient before it, if zero enters it."""
    steps: Tensor
    """(k, b, S, e) fp32: the sum of its steps; negative if an image begins inside, so that the factor is zero."""


def ends(inputs: ScanInputs, reverse: Sequence[bool], log_A: bool, backend: str, dt_proj: Tensor | None = None) -> Ends:
    """What each segment adds to the state; `inputs.initial` is ignored. The number of segments follows from the shape
    alone. `inputs.A` holds log(-A) with `log_A`. With dt_proj (k, e, r), on a CPU, `inputs.dt` is (k, b, l, r).
    """
    inputs = inputs._replace(initial=None)
    if backend == "triton":
        return fused_module("scan_segments", backend).ends(_with_rows(inputs), reverse, log_A=log_A)
    inputs = inputs._replace(A=decay_rates(inputs.A, log_A))
    if backend == "cpu":
        return fused_module("scan_segments", backend).ends(_with_rows(inputs), reverse, dt_proj)
    return _reference(inputs, reverse, None)


def ends_backward(
    inputs: ScanInputs, ds: Tensor, reverse: Sequence[bool], log_A: bool, backend: str, dt_proj: Tensor | None = None
) -> Ends:
    """What each segment adds to the gradient that it passes on to the state before it; ds (k, b, l, e) is the gradient
    of s. The other arguments are those of `ends`.
    """
    inputs = inputs._replace(initial=None)
    if backend == "triton":
        return fused_module("scan_segments", backend).ends_backward(_with_rows(inputs), ds, reverse, log_A=log_A)
    inputs = inputs._replace(A=decay_rates(inputs.A, log_A))
    if backend == "cpu":
        return fused_module("scan_segments", backend).ends_backward(_with_rows(inputs), ds, reverse, dt_proj)
    return _reference(inputs, reverse, ds)


def chain(ends: Ends, A: Tensor, first: Tensor | None = None, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Pass `first` (k, b, e, n; default: zero) through the segments, from the last to the first if `backward`. Returns
    what enters each segment (k, b, S, e, n) and what leaves the chain (k, b, e, n). A (k, e, n) is negative.
    """
    end, steps = ends
    steps = steps.unsqueeze(-1)
    begins, factor = steps < 0, torch.exp(steps * A[:, None, None])
    passed = torch.zeros_like(end[:, :, 0]) if first is None else first
    entering = torch.empty_like(end)
    count = end.shape[2]
    for s in range(count - 1, -1, -1) if backward else range(count):
        entering[:, :, s] = passed
        own = end[:, :, s]
        passed = torch.where(begins[:, :, s], own, torch.addcmul(own, factor[:, :, s], passed))  # NaN must not pass
    return entering, passed


def _reference(inputs: ScanInputs, reverse: Sequence[bool], ds: Tensor | None) -> Ends:
    """One segment: the whole sequence."""
    with torch.autocast(inputs.x.device.type, enabled=False):
        found, steps = [], []
        for k, backwards in enumerate(reverse):
            walk = _walk(inputs, k, backwards)
            order = _order(len(walk.decay), backwards)
            if ds is None:
                found.append(walk.after[order[-1]])
            else:
                q = torch.zeros_like(walk.decay[0])
                for t in reversed(order):
                    g = q + ds[k, :, t].to(q.dtype).unsqueeze(-1) * walk.C[:, t].unsqueeze(1)
                    q = g * walk.decay[t]
                found.append(q)
            total = walk.step.sum(1)
            if inputs.image is not None:
                total[_begins(inputs.image, backwards).any(1)] = -1
            steps.append(total)
        return Ends(torch.stack(found).unsqueeze(2), torch.stack(steps).unsqueeze(2))
