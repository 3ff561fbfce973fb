"""`vimscale evaluate`: figures of a run's checkpoint on a validation set."""

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
    from vimscale.inference.opened import restored
    from vimscale.runtime.run_folder import RunFolder

    from ..supervise.progress import figures

    folder = RunFolder.of(run)
    keys = [text.partition("=")[0] for text in overrides or ()]
    rule = f"an evaluation may change {', '.join(_CHANGEABLE)}; everything else stays as trained"
    if faults := [f"{key}: {rule}" for key in keys if key not in _CHANGEABLE]:
        raise RecipeError(f"evaluate {run}", faults)
    recipe = folder.recipe(overrides or ())
    if recipe.data.val is None:
        raise RecipeError(f"recipe {recipe.name}", ["data.val: there is no validation set; give one with data.val=..."])
    learner, _, manifest, at = restored(folder, raw=raw, step=step)
    try:
        row = evaluated(learner, recipe, manifest, knn=knn, k=k, linear=linear)
    except DataError as error:
        raise DataError(
            f"{error}\n  give another validation set, or its path on this machine, with data.val=..."
        ) from None
    print_line(Console(), f"step {at:,}: {figures(row)}")


def evaluated(learner: "Learner", recipe: Recipe, manifest: "Manifest", **probes: Any) -> dict[str, float]:
    """A model's figures on the recipe's validation set, computed on this process's device. `probes`: of
    `EvaluationJob`.
    """
    import torch

    from vimscale.inference import job

    temporary.shorten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = job.EvaluationJob(recipe.data, precision=recipe.parallel.precision, **probes)
    return job.run(wanted, learner, manifest, device)
