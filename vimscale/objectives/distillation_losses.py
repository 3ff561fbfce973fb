"""Losses of self-distillation: DINO (arXiv:2104.14294), Sinkhorn-Knopp (arXiv:2006.09882), iBOT (arXiv:2111.07832),
KoLeo (arXiv:1806.03198).

A teacher's target for a row of logits is softmax(logits / temperature + bias): with centering, the bias is minus the
center over the temperature; with Sinkhorn-Knopp, the logarithm of the columns' factors. So one vector (k) is all that
the rows of a step share, and targets need not be kept.

Axes: c crops, b images, n rows, k prototypes, f features.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place or not, and returns the sum."""
_EPS = 1e-8


def wide(x: Tensor) -> Tensor:
    """At least fp32: autocast's products are bf16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def targets(logits: Tensor, temperature: Tensor | float, bias: Tensor) -> Tensor:
    """The teacher's distribution over prototypes for each row (..., k)."""
    return (wide(logits) / temperature + bias).softmax(dim=-1)


def centering_bias(center: Tensor, temperature: Tensor | float) -> Tensor:
    """The bias (k) that subtracts the center from the logits."""
    return -center / temperature


def sinkhorn_bias(
    rows: Sequence[Callable[[], Tensor]],
    weights: Sequence[Tensor | None],
    temperature: Tensor | float,
    iterations: int,
    total: Total,
    largest: Total,
) -> Tensor:
    """The bias (k) of Sinkhorn-Knopp's targets over the rows of all ranks: every prototype gets as much of them.

    Args:
        rows: each computes the logits (n, k) of some rows, as often as it is called.
        weights: (n) for each of them: 1, or 0 for rows that do not count; None: all count.
        total, largest: sum and maximum over ranks.
    """
    scaled = [lambda make=make: wide(make()) / temperature for make in rows]
    high = largest(torch.stack([make().amax() for make in scaled]).amax())  # cancels; the original overflows without
    factors: list[Tensor | None] = [None] * len(rows)
    columns: Tensor | None = None
    for turn in range(iterations):
        sums = None
        for i, (make, weight) in enumerate(zip(scaled, weights, strict=True)):
            q = (make() - high).exp()
            if turn:
                assert columns is not None
                factors[i] = 1 / (q @ columns)
            each = [f for f in (factors[i], weight) if f is not None]
            row = each[0] if len(each) == 1 else each[0] * each[1] if each else q.new_ones(len(q))
            added = row @ q
            sums = added if sums is None else sums + added
        assert sums is not None
        sums = total(sums)
        columns = sums.mean() / sums  # the mean keeps factors near 1; a common factor cancels in every row
    assert columns is not None
    return columns.log()


def dino(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross entropy of each image (b): mean over all pairs of a teacher's view and another crop.

    Args:
        student: logits (c, b, k); the first two crops are the teacher's views.
        teacher: targets (2, b, k).
    """
    log_p = (wide(student) / temperature).log_softmax(dim=-1)
    crossed = -(teacher.flip(0) * log_p[:2]).sum(dim=-1).sum(dim=0)  # (b)
    local = -(teacher.sum(dim=0) * log_p[2:]).sum(dim=-1).sum(dim=0)
    return (crossed + local) / (2 * len(student) - 2)


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of each row (n), between logits (n, k) and targets (n, k)."""
    return -(teacher * (wide(student) / temperature).log_softmax(dim=-1)).sum(dim=-1)


def cross_entropy_in_chunks(
    student: Callable[[Tensor], Tensor], x: Tensor, teacher: Callable[[Tensor], Tensor], y: Tensor, chunk: int, t: float
) -> Tensor:
    """As `cross_entropy`, of logits `student(x)` and targets `teacher(y)` for rows x, y (n, ...), which exist for
    `chunk` rows at a time, in the backward pass too.
    """

    def of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(student(x), teacher(y), t)

    if not torch.is_grad_enabled():
        return torch.cat([of(*part) for part in zip(x.split(chunk), y.split(chunk), strict=True)])
    parts = zip(x.split(chunk), y.split(chunk), strict=True)
    return torch.cat([checkpoint(of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def ibot_weights(masked: Tensor) -> Tensor:
    """How much each patch counts, for masks (..., l): 1 / (masked patches of that crop); 0 where it is not masked."""
    masked = masked.to(torch.get_default_dtype() if masked.dtype == torch.bool else masked.dtype)
    return masked / masked.sum(dim=-1, keepdim=True).clamp_min(1)


def nearest(x: Tensor) -> Tensor:
    """The nearest other row of each row of x (n, f), whose rows have unit length: (n) int64."""
    similar = x @ x.T
    similar.fill_diagonal_(-2)
    return similar.argmax(dim=1)


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, as KoLeo has them."""
    return torch.nn.functional.normalize(wide(x), dim=-1, eps=_EPS)


def koleo(x: Tensor, others: Tensor) -> Tensor:
    """Mean of -log(distance) of rows x (n, f) to `others` (n, f), rows of unit length."""
    return -(torch.nn.functional.pairwise_distance(x, others, eps=_EPS) + _EPS).log().mean()


def entropy(p: Tensor) -> Tensor:
    """Of distributions (..., k), as a fraction of the largest possible: (...)."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=-1) / math.log(p.shape[-1])
