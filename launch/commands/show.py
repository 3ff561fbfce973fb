"""`vimscale recipes`, `presets`, `schema` and `show`: what comes with the package, and what a recipe resolves to."""

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

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
    levels = recompute.levels(chosen.parallel, planner.config, micro, device, chosen.objective)
    kept = {
        level: recompute.kept_bytes(planner.config, level, micro, precision, device, context, chosen.objective)
        for level in {*levels}
    }
    sizes = [kept[level][i] for i, level in enumerate(levels)]
    shared = f"{micro} images" if context == 1 else f"a rank's tokens of {micro} images"
    console = Console(markup=False, emoji=False)
    console.print(model_table.layers(planner.config, sizes, levels, shared))
    console.print()
    console.print(plan.summary(planner, planner.outlook(workers), notes))
