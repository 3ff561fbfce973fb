"""What a frozen encoder makes of every image of a set: its features.

Axes: n samples, f features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalised
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.objectives.base import Inputs
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

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
