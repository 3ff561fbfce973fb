"""Rebuild the model of a checkpoint, with the manifest of the set that it was trained on."""

from vimscale.checkpoint.load import consolidated, read_train_state
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import TrainingSet
from vimscale.model import VisionMamba
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

OF_OBJECTIVE = "objective."
"""What the names of an objective's own parameters and buffers begin with; they are not the encoder's."""


def restore(run: RunFolder, *, raw: bool, step: int | None) -> tuple[VisionMamba, Recipe, Manifest, int]:
    """Load the model of a run's newest checkpoint, or that of `step`, on the CPU, ready to evaluate.

    The weights are the moving average if the checkpoint has one, unless `raw`.

    Returns:
        (model, recipe, training manifest, step). The manifest lists no shards: the training set itself is not needed.

    Raises:
        CheckpointError: there is no intact checkpoint.
        DataError: an old checkpoint does not say what it was trained on, and the training set cannot be read.
    """
    recipe = run.recipe()
    folder = run.newest_checkpoint(step)
    train_state = read_train_state(folder)
    manifest = TrainingSet.recorded(train_state.training_set, recipe)
    model = VisionMamba(recipe.shape(len(manifest.classes)))
    model.backward = model.config.backward_at(train_state.step)
    weights = consolidated(folder, "ema" if train_state.ema and not raw else "weight")
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(OF_OBJECTIVE)})
    return model.eval(), recipe, manifest, train_state.step
