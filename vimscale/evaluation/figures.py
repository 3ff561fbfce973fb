"""A model's figures on a data set: every image once, whatever the number of ranks."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalised, normalised_views
from vimscale.data.images.choice import Choice
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError, RunFailed
from vimscale.evaluation.matching import LACKING, Matched
from vimscale.evaluation.tally import Tally
from vimscale.objectives.base import Inputs, Objective
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import heartbeat

log = logging.getLogger(__name__)


def evaluate(
    sums_of: Callable[[Inputs], Tensor],
    objective: Objective,
    dataset: Dataset,
    manifest: Manifest,
    *,
    size: tuple[int, int],
    choice: Choice | None,
    batch: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    context: int = 1,
    workers: int = 0,
    shared_of: Callable[[Inputs], dict[str, Tensor]] | None = None,
    matched: Matched | None = None,
    tally: Tally | None = None,
) -> dict[str, float]:
    """The objective's figures, from `sums_of`, which answers `evaluation_sums` with a model, and `shared_of`, which
    answers `evaluation_shared`. `manifest`: the training set's, for its mean and std. Groups of `context` of the
    `world` ranks read the same images. All ranks call `sums_of` equally often, so it may communicate. Images that
    cannot be read are left out, and the log names them. `choice`: what a model takes that takes bags of tiles.
    `matched`: what the set's labels mean; default: what they mean in `manifest`, whose classes the set must have.
    `tally`: counts more, in total over all ranks; after that it is on the CPU.

    Raises:
        DataError: the data set has other classes than the model was trained on, or no image can be evaluated.
        RunFailed: the objective's figures are incomplete.
    """
    assert tally is None or context == 1
    if matched is None and objective.options.classifies and dataset.manifest.classes != manifest.classes:
        raise DataError(
            f"data {dataset.manifest.name} has other classes than {manifest.name}, which the model is trained on;"
            " prepare both with the same --classes"
        )
    mean, std = (torch.tensor(values, device=device) for values in (manifest.mean, manifest.std))
    parts = stream.evaluation(
        dataset,
        rank=rank // context,
        world=world // context,
        batch=batch,
        size=size,
        choice=choice,
        workers=workers,
        views=objective.evaluation_views,
    )
    sums = torch.zeros((), dtype=torch.float64, device=device)
    classes = None if matched is None else torch.tensor(matched.classes, device=device)
    if tally is not None:
        tally.begin(dataset.manifest.classes if classes is None else manifest.classes, device)
    with torch.no_grad():
        shared: dict[str, Tensor] = {}
        if known := objective.before_evaluation(dataset):
            assert shared_of is not None
            none = torch.zeros(0, 3, *size, device=device)
            views = {name: t.to(device) for name, t in known.items()}
            shared = shared_of(Inputs(none, torch.zeros(0, device=device), views))
        for part in parts:
            heartbeat.beat("evaluate")
            for _, description in part.bad:
                log.warning("not evaluated: %s", description)
            part = part.to(device)
            images = normalised(part.images, mean, std)
            views, weights, labels = normalised_views(part.views, mean, std), part.weights.to(device), part.labels
            if classes is not None:
                labels = classes[labels]
                lacking = labels == LACKING
                if tally is not None:
                    tally.left_out += int(weights[lacking].sum())
                labels, weights = labels.where(~lacking, 0), weights.where(~lacking, 0)
            observe = None
            if tally is not None:
                tally.unreadable += len(part.bad)
                observe = partial(tally.add, labels, weights)
            sums = sums + sums_of(Inputs(images, labels, views, weights=weights, shared=shared, observe=observe))
    sums = distributed.total_of_groups(sums, context)
    if not sums[0]:
        what = "can be read" if classes is None else "can be read and is of a class that the model has"
        raise DataError(f"data {dataset.manifest.name}: none of its images {what}; `vimscale data verify --deep`")
    if tally is not None:
        tally.total()
    figures = objective.figures(sums)
    if missing := sorted({"images", "loss"} - figures.keys()):
        raise RunFailed(f"objective {objective.options.kind}: its figures lack {' and '.join(missing)}; add them")
    return figures
