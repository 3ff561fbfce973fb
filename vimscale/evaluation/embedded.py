"""What a frozen encoder makes of every image of a set: its features.

Axes: n samples, f features.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

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

log = logging.getLogger(__name__)

HEAD: Final = "head"
"""Name of the features that the head reads."""
Embed = Callable[[Inputs], Tensor]
"""Computes what the head reads, (b, f), of a micro-batch."""
Read = Callable[[Inputs], Mapping[str, Tensor]]
"""Computes several features of a micro-batch: (b, f) by name."""


@dataclass(frozen=True)
class Embedded:
    """A set's images as features, on the host and in the set's order. Images that cannot be read are left out."""

    features: dict[str, Tensor]
    """(n, f) by name, in the dtype in which the model computes them."""
    labels: Tensor
    """int64 (n)"""
    numbers: Tensor
    """int64 (n): each image's position in the set."""

    @property
    def head(self) -> Tensor:
        return self.features[HEAD]


def embedded(
    embed: Embed | Read,
    dataset: Dataset,
    manifest: Manifest,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    context: int = 1,
    together: bool = True,
    **reading: Any,
) -> Embedded:
    """Embed every image of a set once over all ranks. `manifest`: the training set's. `together`: whether every rank
    gets all of them, or only its own part. `reading`: size, choice, batch and workers of `stream.evaluation`.

    Raises:
        DataError: no image can be read.
    """
    mean, std = (torch.tensor(values, device=device) for values in (manifest.mean, manifest.std))
    parts = stream.evaluation(dataset, rank=rank // context, world=world // context, **reading)
    found: dict[str, list[Tensor]] = {}
    groups, batch = world // context, reading["batch"]
    with torch.no_grad():
        for number, part in enumerate(parts):
            heartbeat.beat("evaluate")
            for _, description in part.bad:
                log.warning("not embedded: %s", description)
            first = (number * groups + rank // context) * batch
            inputs = Inputs(normalised(part.to(device).images, mean, std), part.labels, weights=part.weights)
            read = embed(inputs)
            features = {HEAD: read} if isinstance(read, Tensor) else read
            numbers = torch.arange(first, first + batch, device=device)
            tensors = {**features, "": torch.stack([part.labels.to(device), numbers], dim=1)}
            weights = part.weights.to(device)
            if together and groups > 1:
                weights = distributed.gathered(weights, context)
                tensors = {name: distributed.gathered(t, context) for name, t in tensors.items()}
            for name, tensor in tensors.items():
                found.setdefault(name, []).append(tensor[weights > 0].cpu())
    of_set = {name: torch.cat(pieces) for name, pieces in found.items()}
    labels, numbers = of_set.pop("").unbind(dim=1)
    count = torch.tensor(len(labels), device=device)
    if not together and groups > 1:
        dist.all_reduce(count)
    if not count:
        raise DataError(f"data {dataset.manifest.name}: none of its images can be read; `vimscale data verify --deep`")
    return Embedded(of_set, labels.contiguous(), numbers.contiguous())
