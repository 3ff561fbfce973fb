"""SigLIP's and CLIP's losses over the pairs of all ranks and micro-batches, with their gradients, in bounded memory.

Axes: b pairs of this rank, n pairs of all ranks, w width of the features, k rows of a chunk of logits.

logits = exp(log_scale) images texts^T + bias, (n, n). SigLIP (arXiv:2303.15343): the sum of softplus(-label logit) over
all n^2 pairs, label 1 on the diagonal and -1 elsewhere, divided by n. CLIP (arXiv:2103.00020): the mean of the cross
entropies of rows and of columns against the diagonal.

Both sums split by rows for the gradients of images, and by columns for those of texts. So a rank computes the logits of
its own rows and its own columns, a chunk at a time, and needs of the others only their features (and for CLIP, the
normalizers of their rows and columns). No rank holds n^2 logits, and no gradients travel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["siglip", "clip"]

LOGITS = 2**24
"""Logits that exist at once: 64 MiB in fp32, and as much again for each of a few results of the same shape."""


@dataclass(frozen=True)
class Ranks:
    """How the ranks that hold the pairs meet."""

    first: int
    """This rank's first pair among all pairs."""
    gather: Callable[[Tensor], Tensor]
    """(b, ...) of every rank, in order: (n, ...)."""
    total: Callable[[Tensor], Tensor]
    """Sum over all ranks."""


ALONE = Ranks(0, lambda t: t, lambda t: t)


@dataclass(frozen=True)
class Contrast:
    """The loss of all pairs, (), and its gradients."""

    loss: Tensor
    images: Tensor
    """By this rank's image features, (b, w)."""
    texts: Tensor
    log_scale: Tensor
    bias: Tensor


@torch.no_grad()
def contrast(
    kind: Kind,
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    ranks: Ranks = ALONE,
    logits: int = LOGITS,
) -> Contrast:
    """The loss over the pairs of all ranks, and its gradients by what this rank holds. All ranks call it, with equally
    many pairs; loss and gradients by the scalars are the same on all of them.

    Args:
        images: features of unit length, (b, w).
        texts: of the same pairs, (b, w).
        log_scale: logarithm of the factor on the cosines, ().
        bias: added to all logits, (); CLIP's loss does not depend on it.
        logits: the most that exist at once, if a row has fewer.
    """
    towers = (images, ranks.gather(texts)), (texts, ranks.gather(images))
    scale, n = log_scale.exp(), len(towers[0][1])
    rows = max(logits // n, 1)

    def chunks(own: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor, tuple[Tensor, Tensor]]]:
        """Yield (rows, their logits (k, n), the index of the diagonal in these)."""
        for start in range(0, len(own), rows):
            part = own[start : start + rows]
            index = torch.arange(len(part), device=own.device)
            at = slice(start, start + len(part))
            yield at, (scale * part) @ others.T + bias, (index, index + ranks.first + start)

    norms = []
    if kind == "clip":  # of rows and of columns
        for own, others in towers:
            mine = torch.cat([part.logsumexp(dim=1) for _, part, _ in chunks(own, others)])
            norms.append((mine, ranks.gather(mine)))

    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    of_bias = loss.clone()
    grads = []
    for number, (own, others) in enumerate(towers):
        grad = torch.empty_like(own)
        for at, z, diagonal in chunks(own, others):
            if kind == "siglip":
                z[diagonal] *= -1
                losses = F.softplus(z).sum(dim=1)
                by_logits = z.sigmoid_()
                by_logits[diagonal] *= -1
            else:
                (mine, _), (_, theirs) = norms[number], norms[1 - number]
                losses = 0.5 * (mine[at] + theirs[diagonal[1]]) - z[diagonal]
                by_logits = 0.5 * ((z - mine[at, None]).exp_() + (z - theirs).exp_())
                by_logits[diagonal] -= 1
            grad[at] = (scale / n) * (by_logits @ others)
            if number == 0:
                loss += losses.sum(dtype=torch.float64) / n
                of_bias += by_logits.sum(dtype=torch.float64) / n
        grads.append(grad)
    of_scale = (images * grads[0]).sum(dtype=torch.float64)  # the logits without bias are linear in the images
    loss, of_scale, of_bias = ranks.total(torch.stack([loss, of_scale, of_bias])).to(images.dtype).unbind()
    return Contrast(loss, grads[0], grads[1], of_scale, of_bias)


def losses(kind: Kind, images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of each pair among the b pairs given, (b); their mean is the loss. Differentiable; arguments as of
    `contrast`.
    """
    z = log_scale.exp() * images @ texts.T + bias
    if kind == "siglip":
        return F.softplus(z * (1 - 2 * torch.eye(len(z), dtype=z.dtype, device=z.device))).sum(dim=1)
    return 0.5 * (z.logsumexp(dim=1) + z.logsumexp(dim=0)) - z.diagonal()
