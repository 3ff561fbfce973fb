"""A model's figures on a data set: every image once, over however many ranks there are."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vimscale.checkpoint import load as checkpoint
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalise
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import TrainingSet
from vimscale.errors import DataError
from vimscale.model import VisionMamba
from vimscale.objectives import classification
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import distributed
from vimscale.runtime.heartbeat import pulse
from vimscale.runtime.run_folder import RunFolder

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
            pulse.beat("evaluate")
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


def restore(run: RunFolder, *, raw: bool, step: int | None) -> tuple[VisionMamba, Recipe, Manifest, int]:
    """The model of a run's checkpoint on the CPU, ready to evaluate: (model, recipe, training manifest, step). The
    manifest names no shards, and the training set itself need not be there.

    The moving average is taken where there is one, unless `raw`.

    Raises:
        CheckpointError: there is no whole checkpoint.
        DataError: an old checkpoint does not say what it was trained on, and the training set cannot be read.
    """
    recipe = run.recipe()
    folder = run.newest_checkpoint(step)
    trainer = checkpoint.read_trainer(folder)
    manifest = trained_on(trainer, recipe)
    model = VisionMamba(recipe.model.shape(len(manifest.classes)))
    model.backward = model.config.backward_at(trainer.step)
    model.load_state_dict(checkpoint.consolidated(folder, "ema" if trainer.ema and not raw else "weight"))
    return model.eval(), recipe, manifest, trainer.step


def trained_on(trainer: checkpoint.Trainer, recipe: Recipe) -> Manifest:
    """Name, classes, mean and deviation of the training set, as the checkpoint has them.

    Raises:
        DataError: an old checkpoint does not have them, and the training set cannot be read.
    """
    about = trainer.training_set
    if not about:
        return TrainingSet.open(recipe.data).manifest
    classes, mean, std = (tuple(about[key]) for key in ("classes", "mean", "std"))
    return Manifest(name=about["name"], classes=classes, shards=(), mean=mean, std=std)
