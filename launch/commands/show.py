"""`vimscale recipes`, `presets`, `schema` and `show`: what comes with the package, and what a recipe resolves to."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import DataError
from vimscale.recipe.recipe import Recipe, load, shipped

from .. import cluster as clusters
from ..display import model_table
from . import plan
from .arguments import OnOption, Overrides, RecipeArgument, WithOption


def recipes() -> None:
    """List the recipes that come with the package."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, path in shipped().items():
        table.add_row(name, path.read_text().splitlines()[0].removeprefix("# "))
    Console(markup=False, emoji=False).print(table)


def presets() -> None:
    """List the model presets with their parameters and FLOPs."""
    Console(markup=False, emoji=False).print(model_table.presets())


def schema(
    of: Annotated[Literal["recipe", "cluster"], typer.Argument(help="The kind of file.")] = "recipe",
) -> None:
    """Print the JSON schema of recipes or cluster files, for editors."""
    described = Recipe if of == "recipe" else clusters.Cluster
    print(json.dumps(described.model_json_schema(), indent=1))


def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of ranks to assume. Default: the cluster's; parallel.context for local."),
    ] = None,
    on: OnOption = "local",
    with_: WithOption = None,
) -> None:
    """Print a resolved recipe, its model layer by layer, and the memory and time it needs. Runs nothing."""
    from vimscale.engine import recompute

    chosen = load(recipe, overrides or ())
    print(chosen.to_yaml())
    cluster = clusters.load(on, with_ or ())
    if workers is None:
        workers = cluster.most_ranks if cluster.backend != "local" or cluster.workers else chosen.parallel.context
    micro, _ = chosen.micro_batch(workers)
    planner, notes = plan.prepare(chosen, cluster, workers)
    device = "cpu"  # a GPU's kernels keep slightly less per layer
    precision, context = chosen.parallel.precision, chosen.parallel.context
    levels = recompute.levels(
        chosen.parallel, planner.config, micro, device, planner.lowest, objective=chosen.objective
    )
    kept = {
        level: recompute.kept_bytes(planner.config, level, micro, precision, device, context, chosen.objective)
        for level in {*levels}
    }
    sizes = [kept[level][i] if i >= planner.lowest else 0 for i, level in enumerate(levels)]
    shared = f"{micro} images" if context == 1 else f"a rank's tokens of {micro} images"
    console = Console(markup=False, emoji=False)
    console.print(model_table.layers(planner.config, sizes, levels, shared))
    console.print()
    if chosen.model.weights is not None:
        for line in _adapted(chosen, Path(chosen.model.weights)):
            console.print(f"model.weights: {line}")
        console.print()
    console.print(plan.summary(planner, planner.outlook(workers), notes))


def _adapted(chosen: Recipe, folder: Path) -> list[str]:
    """What becomes of the weights that the recipe starts from.

    Raises:
        CheckpointError: the recipe's model would compute something else with them.
    """
    from vimscale.data.training_set import TrainingSet
    from vimscale.export import safetensors

    if not folder.exists():
        return [f"{folder} is not there"]
    try:
        manifest = TrainingSet.open(chosen.data, labels=chosen.objective.classifies).manifest
    except DataError as error:
        return [f"what is loaded depends on the training set, which cannot be read from here ({error})"]
    config, model = chosen.shape(len(manifest.classes)), chosen.model
    weights, notes = safetensors.starting_weights(folder, config, manifest, model.grow, model.change)
    return [*notes, *safetensors.groups(folder, config, weights)]
