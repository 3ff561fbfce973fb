"""One rank's part of an evaluation of a trained model, on a data set that it may never have seen."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vimscale.data.dataset import Dataset
from vimscale.data.images.choice import Choice, check_kind
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.evaluation.figures import evaluate
from vimscale.evaluation.matching import Matched, match
from vimscale.evaluation.probes import Probes, probed
from vimscale.evaluation.tally import Tally
from vimscale.inference.opened import open_model
from vimscale.model import VisionMamba
from vimscale.model.published.quirks import PublishedVim
from vimscale.objectives.base import Learner, ObjectiveOptions
from vimscale.objectives.build import build
from vimscale.recipe.sections import Data


@dataclass(frozen=True)
class EvaluationJob:
    """What to compute of a model. Another process gets it by pickle."""

    data: Data
    """`val` is the set to evaluate on; workers and cache are those of the recipe."""
    figures: bool = True
    """The objective's own figures."""
    probes: Probes = field(default_factory=Probes)
    """What to read of the frozen features."""
    precision: str = "fp32"
    by_name: bool = True
    """Match the set's classes to the model's by name; otherwise they must be the same, as in training."""
    objective: ObjectiveOptions | None = None
    """Options to evaluate with; default: those that the model was trained with."""


def check(job: EvaluationJob, learner: Learner, manifest: Manifest, *, named: bool = True) -> Matched | None:
    """Check whether the model can be evaluated so, and match the set's classes to the model's; None if the evaluation
    does not use the model's classes. Reads no image. Arguments are those of `run`.

    Raises:
        DataError: the set cannot be opened, or is of another kind than the model takes, or of other classes.
        CheckpointError: the model does not answer what is asked.
    """
    assert job.data.val is not None
    val = Dataset.open(job.data.val, job.data.cache).manifest
    encoder = learner.encoder
    check_kind(val, Choice.of(encoder.config, job.data))
    if isinstance(encoder, PublishedVim) and (channels := encoder.arguments["channels"]) != 3:
        raise CheckpointError(f"the model takes images of {channels} channels, and a data set's images have 3")
    if not (job.figures and job.by_name and learner.objective.options.classifies):
        return None
    if encoder.head is None:
        raise CheckpointError(
            "the model has no head, so it names no class; ask for --knn SET or --linear SET, which classify by its"
            " features with the labels of another set"
        )
    _check_logits(encoder)
    return match(manifest.classes, val, named=named)


def _check_logits(encoder: VisionMamba) -> None:
    """Raises CheckpointError if a published model does not give one logit per class."""
    if not isinstance(encoder, PublishedVim):
        return
    device = next(encoder.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        shape = tuple(encoder(torch.zeros(1, 3, *encoder.config.size, device=device)).shape)
    if shape != (1, encoder.config.num_classes):
        pooling = encoder.arguments["final_pool_type"]
        raise CheckpointError(
            f"the model's final_pool_type {pooling} gives logits of shape {shape[1:]} for an image, not one per class;"
            " ask for --knn SET or --linear SET"
        )


def run(
    job: EvaluationJob,
    learner: Learner,
    manifest: Manifest,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    *,
    named: bool = True,
    identity: str | None = None,
    tally: Tally | None = None,
) -> dict[str, float]:
    """The figures of a model, the same on every rank; each of the `world` ranks reads its part of the images.
    `manifest` of the set that the model was trained on, `named` (whether its classes are names) and `identity` (without
    it, no features are kept) are those of an `Opened`. `tally`: filled with counts per class, if the model chooses
    among classes; then the figures have `ece`.

    Raises:
        DataError, CheckpointError: as of `check`, or a set cannot be read.
    """
    assert job.data.val is not None
    if job.objective is not None:
        learner.objective = build(job.objective, learner.encoder.config)
    matched = check(job, learner, manifest, named=named)
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

    found: dict[str, float] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        if job.figures:
            ask = partial(learner.ask, "evaluation_sums"), partial(learner.ask, "evaluation_shared")
            reading_all = reading | {"shared_of": ask[1], "matched": matched, "tally": tally}
            found |= evaluate(ask[0], learner.objective, val, manifest, **reading_all)
            if tally is not None and tally.counted:
                found["ece"] = tally.calibration_error
        found |= probed(
            learner,
            val,
            manifest,
            job.probes,
            identity=identity,
            precision=job.precision,
            cache=job.data.cache,
            **reading,
        )
    return found


def opened_and_run(
    job: EvaluationJob,
    source: str | Path,
    device: torch.device,
    rank: int,
    world: int,
    *,
    step: int | None = None,
    raw: bool = False,
    own_code: bool = False,
    published_as: str | None = None,
    ema: bool = False,
) -> tuple[dict[str, float], Tally]:
    """Open a model, and return what `run` does and fills. Errors and the other arguments are those of `open_model`."""
    opened = open_model(source, step=step, raw=raw, own_code=own_code, published_as=published_as, ema=ema)
    tally = Tally()
    known: dict[str, Any] = {"named": opened.named, "identity": opened.identity, "tally": tally}
    return run(job, opened.learner, opened.manifest, device, rank, world, **known), tally
