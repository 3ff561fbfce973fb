"""`vimscale evaluate`: figures of a run's checkpoint on a validation set."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vimscale.errors import DataError, RecipeError
from vimscale.recipe.recipe import Recipe

from ..display.lines import print_line
from ..processes import temporary
from .arguments import RawOption, RunArgument, StepOption

if TYPE_CHECKING:
    from vimscale.data.shards.manifest import Manifest
    from vimscale.objectives.base import Learner

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
        row = evaluated(learner, recipe, manifest)
    except DataError as error:
        raise DataError(
            f"{error}\n  give another validation set, or its path on this machine, with data.val=..."
        ) from None
    print_line(Console(), f"step {at:,}: {figures(row)}")


def evaluated(learner: "Learner", recipe: Recipe, manifest: "Manifest") -> dict[str, float]:
    """A model's figures on the recipe's validation set, computed on this process's device."""
    import torch

    from vimscale.data.dataset import Dataset
    from vimscale.data.images.choice import Choice
    from vimscale.train.evaluate import evaluate

    temporary.shorten()
    assert recipe.data.val is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = learner.encoder.config
    learner.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16"):
        return evaluate(
            partial(learner.ask, "evaluation_sums"),
            learner.objective,
            Dataset.open(recipe.data.val, recipe.data.cache),
            manifest,
            size=config.size,
            choice=Choice.of(config, recipe.data),
            batch=64 if config.tiles is None else 1,
            device=device,
            workers=recipe.data.workers,
            shared_of=partial(learner.ask, "evaluation_shared"),
        )
