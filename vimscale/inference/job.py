"""One rank's part of an evaluation of a trained model, on a data set that it may never have seen."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vimscale.data.dataset import Dataset
from vimscale.data.images.choice import Choice
from vimscale.data.shards.manifest import Manifest
from vimscale.evaluation import linear as linear_probe
from vimscale.evaluation import neighbors
from vimscale.evaluation.figures import evaluate
from vimscale.objectives.base import Inputs, Learner
from vimscale.recipe.sections import Data


@dataclass(frozen=True)
class EvaluationJob:
    """What to compute of a model. Another process gets it by pickle."""

    data: Data
    """`val` is the set to evaluate on; workers and cache are those of the recipe."""
    figures: bool = True
    """The objective's own figures."""
    knn: str | None = None
    """A labelled set whose nearest images classify `data.val`."""
    k: int = 20
    linear: str | None = None
    """A labelled set to train a linear classifier of frozen features on."""
    precision: str = "fp32"


def run(
    job: EvaluationJob, learner: Learner, manifest: Manifest, device: torch.device, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """The figures of a model, the same on every rank; each of the `world` ranks reads its part of the images.
    `manifest`: of the set that the model was trained on, as `Opened` has it.

    Raises:
        DataError: a set cannot be read, or has other classes than the model.
    """
    assert job.data.val is not None
    val = Dataset.open(job.data.val, job.data.cache)
    learner.to(device)
    config = learner.encoder.config
    reading: dict[str, Any] = {
        "size": config.size,
        "choice": Choice.of(config, job.data),
        "batch": 64 if config.tiles is None else 1,
        "device": device,
        "workers": job.data.workers,
        "rank": rank,
        "world": world,
    }

    def embed(inputs: Inputs) -> Tensor:
        return learner.ask("embedding", inputs)

    found: dict[str, float] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        if job.figures:
            ask = partial(learner.ask, "evaluation_sums"), partial(learner.ask, "evaluation_shared")
            found |= evaluate(ask[0], learner.objective, val, manifest, shared_of=ask[1], **reading)
        if job.knn is not None:
            found |= neighbors.knn(embed, Dataset.open(job.knn, job.data.cache), val, manifest, k=job.k, **reading)
        if job.linear is not None:
            found |= linear_probe.linear(embed, Dataset.open(job.linear, job.data.cache), val, manifest, **reading)
    return found
