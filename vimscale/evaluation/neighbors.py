"""Classification by nearest neighbors among frozen features.

Axes: q queries, n samples of the bank, f features, k neighbors, c classes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import check_same_labels
from vimscale.evaluation.embedded import Embed, embedded
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

TEMPERATURE = 0.07
"""A neighbor's vote weighs exp(cosine similarity / TEMPERATURE), as in DINO (arXiv:2104.14294)."""
_AT_ONCE = 1 << 24
"""Similarities that are in memory at once."""


def nearest(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    numbers: Tensor,
    *,
    k: int,
    classes: int,
    spread: int = 1,
) -> Tensor:
    """Predict classes by exact k nearest neighbors: int64 (q), from queries (q, f) and a bank (n, f) with labels (n).

    A bank of fewer than k samples uses all of them. Of equal similarities, the lower of `numbers` (n) is nearer. If the
    bank is `spread` over groups of that many ranks each, every rank passes its part and the same queries.
    """
    shared = dist.is_initialized() and dist.get_world_size() > spread
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    own = torch.tensor(len(bank), device=bank.device)
    most = own.clone()
    if shared:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    rows = max(_AT_ONCE // max(int(most), 1), 1)
    predicted = []
    for some in queries.split(rows):
        heartbeat.beat("evaluate")
        # doubles order equal similarities by number, and no others: fp32 differs by more
        keys = (some @ bank.T).double() - 1e-15 * numbers
        near = keys.topk(min(k, len(bank)), dim=1)
        key = torch.full((len(some), k), -torch.inf, dtype=torch.float64, device=bank.device)
        label = torch.zeros(len(some), k, dtype=torch.int64, device=bank.device)
        key[:, : near.values.shape[1]] = near.values
        label[:, : near.values.shape[1]] = labels[near.indices]
        if shared:
            key, label = (distributed.gathered(t.T, spread).T for t in (key, label))  # (q, ranks k)
            best = key.topk(k, dim=1)
            key, label = best.values, label.gather(1, best.indices)
        votes = torch.zeros(len(some), classes, dtype=torch.float64, device=bank.device)
        votes.scatter_add_(1, label, (key / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def knn(
    embed: Embed, bank: Dataset, val: Dataset, manifest: Manifest, *, k: int, context: int = 1, **reading: Any
) -> dict[str, float]:
    """Return knn_top1: the fraction of `val`, labelled, whose class the k nearest images of `bank` vote for. All ranks
    call this; each embeds its part of both sets, and the result does not depend on their number. `reading`: as of
    `embedded`.

    Raises:
        DataError: the sets' classes differ, or a set cannot be read.
    """
    check_same_labels(bank.manifest, val.manifest)
    known = embedded(embed, bank, manifest, together=False, context=context, **reading)
    features, truth, _ = embedded(embed, val, manifest, context=context, **reading)
    predicted = nearest(features, *known, k=k, classes=len(val.manifest.classes), spread=context)
    return {"knn_top1": float((predicted == truth).double().mean())}
