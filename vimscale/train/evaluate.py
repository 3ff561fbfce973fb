"""A model's figures on a data set: every image once, over however many ranks there are."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalise
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.objectives import classification
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

log = logging.getLogger(__name__)


def evaluate(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    manifest: Manifest,
    *,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Top-1, top-5 (of six classes or more) and mean cross entropy of logits = forward(images). `manifest`: the
    training set's, for its mean and std. All ranks call `forward` as often as each other, so it may communicate. Images
    that cannot be read are left out, and named in the log.

    Raises:
        DataError: the data set has other classes than the model was trained on.
    """
    if dataset.manifest.classes != manifest.classes:
        raise DataError(
            f"data {dataset.manifest.name} has other classes than {manifest.name}, which the model is trained on;"
            " prepare both with the same --classes"
        )
    mean, std = (torch.tensor(values, device=device) for values in (manifest.mean, manifest.std))
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with torch.no_grad():
        for part in stream.evaluation(dataset, rank=rank, world=world, batch=batch, size=size, workers=workers):
            heartbeat.beat("evaluate")
            for _, description in part.bad:
                log.warning("not evaluated: %s", description)
            part = part.to(device)
            assert isinstance(part.images, Tensor)
            logits = forward(normalise(part.images, mean, std))
            sums += classification.sums(logits, part.labels, part.weights.to(device))
    sums = distributed.total(sums)
    if not sums[0]:
        raise DataError(f"data {dataset.manifest.name}: none of its images can be read; `vimscale data verify --deep`")
    return classification.figures(sums, len(manifest.classes))
