"""`vimscale recipes`, `presets`, `schema`, `show` and `report`: what comes with the package, what a recipe resolves to,
and what became of a run.
"""

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import DataError, LaunchError
from vimscale.recipe.recipe import Recipe, load, shipped
from vimscale.storage import files

from .. import cluster as clusters
from ..display import model_table
from ..display.lines import print_line
from ..processes.signals import Stopped
from ..sweeps.trials import check_installed
from . import plan
from .arguments import OnOption, Overrides, RecipeArgument, WithOption

if TYPE_CHECKING:
    from vimscale.report.page import Content
    from vimscale.report.planned import Planned


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
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/recipe.md: every key of a recipe and what it means.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes or cluster files, for editors."""
    if markdown:
        from vimscale.recipe import markdown as recipe_page

        if of != "recipe":
            raise LaunchError("--markdown describes recipes; leave out cluster, or --markdown")
        print(recipe_page.page(), end="")
        return
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


def report(
    runs: Annotated[list[str], typer.Argument(help="Runs, by name under runs/ or by folder; several are overlaid.")],
    to: Annotated[
        Path | None,
        typer.Option(help="The page to write. Default: NAME_report.html in the current folder.", metavar="FILE.html"),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine and refresh it while the runs grow.")
    ] = False,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="With --serve. Default: any free port.")] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="With --serve: an address without a token, open to every local user.")
    ] = False,
    on: OnOption = "local",
    with_: WithOption = None,
) -> None:
    """Write a page about a run, or several, that needs no network: curves, evaluations, layers, failures, the guard's
    findings, the plan next to what was measured, recipe and environment. --on: the machine to plan for.
    """
    check_installed("bokeh", extra="report")
    if not serve and (port is not None or no_token):
        raise LaunchError("--port and --no-token go with --serve; add it, or leave them out")
    if serve and to is not None:
        raise LaunchError("--serve writes no file; leave out --to")
    if to is not None and to.suffix.lower() not in (".html", ".htm"):
        raise LaunchError(f"--to {to}: the page is HTML; give it a name that ends in .html")
    from vimscale.report import page, record

    cluster = clusters.load(on, with_ or ())
    plans: dict[str, Planned | str] = {}
    sets: dict[str, dict[str, Any]] = {}
    console = Console(markup=False, emoji=False)

    def collect() -> "Content":
        found = [record.read(run) for run in runs]
        for one in found:
            if one.recipe is not None and not one.about:
                if one.text not in sets:
                    sets[one.text] = _about(one.recipe)
                one.train_state["training_set"] = sets[one.text]
            key = f"{one.text} {one.world} {one.about}"
            if key not in plans:
                plans[key] = plan.of_run(one, cluster)
        return page.collect(found, [plans[f"{one.text} {one.world} {one.about}"] for one in found])

    content = collect()
    if not serve:
        path = to or Path(f"{content.names[0] if len(runs) == 1 else 'runs'}_report.html")
        text = page.html(content)
        files.write(path, text)
        print_line(console, f"{path} ({len(text.encode()) / 1e6:.2f} MB); it needs no network and no other file")
        return
    from vimscale.report.serve import Reports, Server

    folders = [record.RunFolder.of(run).path for run in runs]
    with Server(Reports(folders, collect), port or 0, None if no_token else secrets.token_urlsafe(16)) as server:
        print_line(console, f"serving {', '.join(content.names)} at\n{server.address}\nCtrl-C ends it")
        try:
            server.serve_forever()
        except Stopped:
            print_line(console, "stopped")


def _about(recipe: Recipe) -> dict[str, Any]:
    """What a run without a checkpoint trains on, for its length and classes; empty if the data are not here."""
    from vimscale.data.training_set import TrainingSet

    if any("://" in source.data for source in recipe.data.sources):
        return {}
    try:
        return TrainingSet.open(recipe.data, labels=recipe.objective.classifies).about
    except DataError:
        return {}
