"""Classification by nearest neighbors among frozen features, as in DINO (arXiv:2104.14294).

Axes: q queries, n samples of the bank, f features, k neighbors, c classes.
"""

from collections.abc import Sequence
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

KS = (10, 20, 100, 200)
"""Numbers of neighbors that DINO reports."""
HEADLINE = 20
"""The k of the figure knn_top1, if it is among them."""
TEMPERATURE = 0.07
"""A neighbor's vote weighs exp(cosine similarity / TEMPERATURE)."""
_AT_ONCE = 1 << 24
"""Similarities that are in memory at once."""
_TOP = 5


def nearest(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    numbers: Tensor,
    *,
    ks: Sequence[int],
    classes: int,
    spread: int = 1,
) -> Tensor:
    """Rank classes by the votes of the exact k nearest neighbors, for each k: int64 (len(ks), q, min(c, 5)), the class
    with the most votes first. Queries are (q, f), the bank is (n, f) with labels (n).

    A bank of fewer than k samples uses all of them. Of equal similarities, the lower of `numbers` (n) is nearer; of
    equal votes, the lower class wins. If the bank is `spread` over groups of that many ranks each, every rank passes
    its part and the same queries.
    """
    shared = dist.is_initialized() and dist.get_world_size() > spread
    queries, bank = (F.normalize(t.float(), dim=1) for t in (queries, bank))
    most = torch.tensor(len(bank), device=bank.device)
    if shared:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    rows = max(_AT_ONCE // max(int(most), 1), 1)
    widest, top = max(ks), min(_TOP, classes)
    ranked = queries.new_zeros(len(ks), len(queries), top, dtype=torch.int64)
    for start in range(0, len(queries), rows):
        heartbeat.beat("evaluate")
        some = queries[start : start + rows]
        # doubles order equal similarities by number, and no others: fp32 differs by more
        keys = (some @ bank.T).double() - 1e-15 * numbers
        near = keys.topk(min(widest, len(bank)), dim=1)
        key = torch.full((len(some), widest), -torch.inf, dtype=torch.float64, device=bank.device)
        label = torch.zeros(len(some), widest, dtype=torch.int64, device=bank.device)
        key[:, : near.values.shape[1]] = near.values
        label[:, : near.values.shape[1]] = labels[near.indices]
        if shared:
            key, label = (distributed.gathered(t.T, spread).T for t in (key, label))  # (q, ranks k)
            best = key.topk(widest, dim=1)
            key, label = best.values, label.gather(1, best.indices)
        vote = (key / TEMPERATURE).exp()
        for i, k in enumerate(ks):
            votes = torch.zeros(len(some), classes, dtype=torch.float64, device=bank.device)
            votes.scatter_add_(1, label[:, :k], vote[:, :k])
            ranked[i, start : start + rows] = votes.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return ranked


def figures(ranked: Tensor, truth: Tensor, ks: Sequence[int], classes: int) -> dict[str, float]:
    """Return knn_top1 and knn_top5 of `ranked`, as `nearest` has it, for labels `truth` (q): with k 20, or the first k
    if 20 is not among them; and knnK_top1 and knnK_top5 of each of several. Five classes or fewer have no top5.
    """
    found = {}
    for k, order in zip(ks, ranked, strict=True):
        right = order == truth[:, None]  # (q, 5)
        found[k] = {"top1": float(right[:, 0].double().mean())}
        if classes > _TOP:
            found[k]["top5"] = float(right.any(dim=1).double().mean())
    headline = HEADLINE if HEADLINE in ks else ks[0]
    named = {f"knn_{name}": value for name, value in found[headline].items()}
    if len(ks) > 1:
        named |= {f"knn{k}_{name}": value for k, each in found.items() for name, value in each.items()}
    return named


def knn(
    embed: Embed,
    bank: Dataset,
    val: Dataset,
    manifest: Manifest,
    *,
    k: int | Sequence[int],
    device: torch.device,
    context: int = 1,
    **reading: Any,
) -> dict[str, float]:
    """Return the `figures` of `val`, labelled: the fractions of its images whose class the k nearest images of `bank`
    vote for, first or among the first five. All ranks call this; each embeds its part of both sets, and the result does
    not depend on their number. `reading`: as of `embedded`.

    Raises:
        DataError: the sets' classes differ, or a set cannot be read.
    """
    check_same_labels(bank.manifest, val.manifest)
    ks, classes = [k] if isinstance(k, int) else list(k), len(val.manifest.classes)
    known = embedded(embed, bank, manifest, together=False, device=device, context=context, **reading)
    queries = embedded(embed, val, manifest, device=device, context=context, **reading)
    own = (t.to(device) for t in (queries.head, known.head, known.labels, known.numbers))
    return figures(nearest(*own, ks=ks, classes=classes, spread=context).cpu(), queries.labels, ks, classes)
