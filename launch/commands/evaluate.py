"""`vimscale evaluate`: figures of a run's checkpoint on a validation set."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vimscale.errors import DataError, RecipeError
from vimscale.recipe.recipe import Recipe

from ..display.lines import print_line
from ..processes import temporary
from .arguments import RawOption, RunArgument, StepOption

if TYPE_CHECKING:
    from vimscale.data.shards.manifest import Manifest
    from vimscale.objectives.base import Inputs, Learner

_CHANGEABLE = ("data.val", "data.workers", "data.cache", "parallel.precision")
"""Keys of a run's recipe that an evaluation may change."""


def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="data.val=... for another validation set, or another path to it.", metavar="[A.B=C]..."),
    ] = None,
    step: StepOption = None,
    raw: RawOption = False,
    knn: Annotated[
        str | None,
        typer.Option(metavar="SET", help="A data set with labels whose nearest images classify the validation set."),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Number of nearest images that vote.")] = 20,
    linear: Annotated[
        str | None,
        typer.Option(metavar="SET", help="A data set with labels to train a linear classifier of frozen features on."),
    ] = None,
) -> None:
    """Evaluate a run's newest checkpoint on its validation set, or on another one with the same classes."""
    from vimscale.runtime.run_folder import RunFolder
    from vimscale.train.evaluate import load

    from ..supervise.progress import figures

    folder = RunFolder.of(run)
    keys = [text.partition("=")[0] for text in overrides or ()]
    rule = f"an evaluation may change {', '.join(_CHANGEABLE)}; everything else stays as trained"
    if faults := [f"{key}: {rule}" for key in keys if key not in _CHANGEABLE]:
        raise RecipeError(f"evaluate {run}", faults)
    recipe = folder.recipe(overrides or ())
    if recipe.data.val is None:
        raise RecipeError(f"recipe {recipe.name}", ["data.val: there is no validation set; give one with data.val=..."])
    learner, _, manifest, at = load(folder, raw=raw, step=step)
    try:
        row = evaluated(learner, recipe, manifest) | probed(learner, recipe, manifest, knn, k, linear)
    except DataError as error:
        raise DataError(
            f"{error}\n  give another validation set, or its path on this machine, with data.val=..."
        ) from None
    print_line(Console(), f"step {at:,}: {figures(row)}")


def evaluated(learner: "Learner", recipe: Recipe, manifest: "Manifest") -> dict[str, float]:
    """A model's figures on the recipe's validation set, computed on this process's device."""
    import torch

    from vimscale.data.dataset import Dataset
    from vimscale.train.evaluate import evaluate

    assert recipe.data.val is not None
    reading = _reading(learner, recipe)
    with torch.autocast(reading["device"].type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16"):
        return evaluate(
            partial(learner.ask, "evaluation_sums"),
            learner.objective,
            Dataset.open(recipe.data.val, recipe.data.cache),
            manifest,
            **reading,
            shared_of=partial(learner.ask, "evaluation_shared"),
        )


def probed(
    learner: "Learner", recipe: Recipe, manifest: "Manifest", knn: str | None, k: int, linear: str | None
) -> dict[str, float]:
    """Figures of the frozen features on the recipe's validation set: of nearest neighbors in the set `knn`, and of a
    linear classifier trained on the set `linear`.
    """
    import torch

    from vimscale.data.dataset import Dataset
    from vimscale.train import probes

    if knn is None and linear is None:
        return {}
    assert recipe.data.val is not None
    reading = _reading(learner, recipe)
    val = Dataset.open(recipe.data.val, recipe.data.cache)

    def embed(inputs: "Inputs") -> torch.Tensor:
        with torch.autocast(reading["device"].type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16"):
            return learner.ask("embedding", inputs)

    found: dict[str, float] = {}
    if knn is not None:
        found |= probes.knn(embed, Dataset.open(knn, recipe.data.cache), val, manifest, k=k, **reading)
    if linear is not None:
        found |= probes.linear(embed, Dataset.open(linear, recipe.data.cache), val, manifest, **reading)
    return found


def _reading(learner: "Learner", recipe: Recipe) -> dict[str, Any]:
    """How this process reads images for the model, which moves to its device."""
    import torch

    from vimscale.data.images.choice import Choice

    temporary.shorten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner.to(device)
    config = learner.encoder.config
    return {
        "size": config.size,
        "choice": Choice.of(config, recipe.data),
        "batch": 64 if config.tiles is None else 1,
        "device": device,
        "workers": recipe.data.workers,
    }
