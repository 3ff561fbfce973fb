"""What a frozen encoder's features say about classes: nearest neighbors, and a linear classifier.

Axes: q queries, n samples of the bank, f features, k neighbors, c classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalised
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import check_same_labels
from vimscale.errors import DataError
from vimscale.objectives.base import Inputs
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

TEMPERATURE = 0.07
"""A neighbor's vote weighs exp(cosine similarity / TEMPERATURE), as in DINO (arXiv:2104.14294)."""
L2 = tuple(10.0**-i for i in range(7))
"""Factors on half the sum of squared weights that the linear classifier chooses from."""
_AT_ONCE = 1 << 24
"""Similarities that are in memory at once."""
_HELD_OUT = 5
"""One in this many samples chooses the factor."""
_ITERATIONS = 200

Embed = Callable[[Inputs], Tensor]
"""Computes what the head reads, (b, f), of a micro-batch."""


def embedded(
    embed: Embed,
    dataset: Dataset,
    manifest: Manifest,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    context: int = 1,
    together: bool = True,
    **reading: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed every image of a set once over all ranks: (features fp32 (n, f), labels (n), numbers in the set (n)), in
    the set's order. Images that cannot be read are left out. `manifest`: the training set's. `together`: whether every
    rank gets all of them, or only its own part. `reading`: size, choice, batch and workers of `stream.evaluation`.

    Raises:
        DataError: no image can be read.
    """
    mean, std = (torch.tensor(values, device=device) for values in (manifest.mean, manifest.std))
    parts = stream.evaluation(dataset, rank=rank // context, world=world // context, **reading)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    groups, batch = world // context, reading["batch"]
    with torch.no_grad():
        for number, part in enumerate(parts):
            heartbeat.beat("evaluate")
            first = (number * groups + rank // context) * batch
            inputs = Inputs(normalised(part.to(device).images, mean, std), part.labels, weights=part.weights)
            of_part = embed(inputs).float(), part.labels.to(device), part.weights.to(device)
            numbers = torch.arange(first, first + batch, device=device)
            tensors = [*of_part, numbers]
            if together and groups > 1:
                tensors = [distributed.gathered(tensor, context) for tensor in tensors]
            features, labels, weights, numbers = tensors
            there = weights > 0
            found.append((features[there], labels[there], numbers[there]))
    features, labels, numbers = (torch.cat(each) for each in zip(*found, strict=True))
    count = torch.tensor(len(labels), device=device)
    if not together and groups > 1:
        dist.all_reduce(count)
    if not count:
        raise DataError(f"data {dataset.manifest.name}: none of its images can be read; `vimscale data verify --deep`")
    return features, labels, numbers


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


# ---- a linear classifier


def fitted(features: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression to features (n, f) in fp64 by L-BFGS on all of them: (weights (f, c),
    biases (c)) that minimize the mean cross entropy + l2 / 2 x the sum of squared weights.
    """
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        heartbeat.beat("evaluate")
        solver.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float(((features @ weight + bias).argmax(dim=1) == labels).double().mean())


def linear(
    embed: Embed, train: Dataset, val: Dataset, manifest: Manifest, *, factors: Sequence[float] = L2, **reading: Any
) -> dict[str, float]:
    """Return linear_top1, on `val`, of a logistic regression on standardized features of `train`, and the factor that
    it took: the best on every fifth image of `train`, which then joins the others. Takes 8 bytes per image and feature.

    Raises:
        DataError: the sets' classes differ, or a set cannot be read.
    """
    check_same_labels(train.manifest, val.manifest)
    classes = len(val.manifest.classes)
    seen, labels, numbers = embedded(embed, train, manifest, **reading)
    tested, truth, _ = embedded(embed, val, manifest, **reading)
    mean, std = seen.double().mean(dim=0), seen.double().std(dim=0, correction=0).clamp_min(1e-12)
    x, y = (seen - mean) / std, (tested - mean) / std
    held_out = numbers % _HELD_OUT == 0
    chosen = factors[0]
    if len(factors) > 1 and 0 < int(held_out.sum()) < len(x):
        scores = [
            _accuracy(x[held_out], labels[held_out], *fitted(x[~held_out], labels[~held_out], classes, l2))
            for l2 in factors
        ]
        chosen = factors[scores.index(max(scores))]
    return {"linear_top1": _accuracy(y, truth, *fitted(x, labels, classes, chosen)), "linear_l2": chosen}
