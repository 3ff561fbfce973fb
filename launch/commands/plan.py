"""`vimscale plan`, and `show --on`: what a recipe needs, takes and costs on a cluster, as tables, a picture or JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import ClusterError, DataError, LaunchError, RecipeError, shortened
from vimscale.estimate.devices import DEVICES
from vimscale.recipe import recipe as recipes

from .. import cluster as clusters
from ..display import model_table
from ..hardware import cpus, gpus
from ..processes.num_ranks import usual
from ..sweeps.trials import check_installed
from .arguments import OnOption, Overrides, RecipeArgument, WithOption
from .memory_check import this_machine

if TYPE_CHECKING:
    from vimscale.estimate.planner import Outlook, Planner, Target


def command(
    recipe: RecipeArgument,
    on: OnOption,
    overrides: Overrides = None,
    with_: WithOption = None,
    counts: Annotated[
        str | None,
        typer.Option("--gpus", help="GPU counts to compare: 8,64,512; default: 8 to 4,096, or this machine's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures, in bytes and seconds, for programs.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw memory, days and cost against GPUs into a PNG.")] = None,
) -> None:
    """Say what a recipe will need and cost on a cluster, before it runs; refuse what cannot run there."""
    if picture is not None:
        check_installed("matplotlib")
        if picture.suffix.lower() != ".png":
            raise LaunchError(f"--picture {picture}: it is a PNG; give it a name that ends in .png")
    chosen = recipes.load(recipe, overrides or ())
    cluster = clusters.load(on, with_ or ())
    world = ranks(cluster)
    planner, notes = prepare(chosen, cluster, world)
    planner.refuse(world)
    rows = outlooks(planner, _counts(counts, cluster, world))
    if picture is not None:
        _draw(planner, rows, picture)
    here = planner.outlook(world)
    options = list(planner.options(world))
    if as_json:
        figures = {
            "recipe": chosen.name,
            "cluster": on,
            "parameters": planner.whole,
            "flops": planner.flops,
            "steps": planner.steps,
            "checkpoint": planner.checkpoint,
            "notes": notes,
            "here": dataclasses.asdict(here),
            "options": [dataclasses.asdict(option) | {"total": option.need.total} for option in options],
            "counts": [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(figures, indent=1))
        return
    console = Console()
    console.print(summary(planner, here, notes))
    console.print()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title="a rank, GB", title_justify="left")
    for title in (
        "ZeRO",
        "recompute",
        "states",
        "gradients",
        "buckets",
        "activations",
        "in all",
        "largest micro-batch",
    ):
        table.add_column(title, justify="left" if title == "recompute" else "right")
    for option in options:
        need = option.need
        mine = (option.zero, option.recompute) == (chosen.parallel.zero, chosen.parallel.recompute)
        sizes = (need.held.between_steps, need.gradients, need.buckets + need.gathered, need.activations, need.total)
        table.add_row(
            str(option.zero),
            option.recompute,
            *(_gb(size) for size in sizes),
            str(option.largest or "none"),
            style="bold" if mine else "" if option.fits else "dim",
        )
    console.print(table)
    console.print()
    console.print(_comparison(rows, device=planner.target.device is not None))


def _draw(planner: "Planner", rows: list["Outlook | dict[str, Any]"], picture: Path) -> None:
    from ..display import plots

    drawn = [row for row in rows if not isinstance(row, dict) and row.fits]
    if not drawn:
        raise LaunchError("--picture: the recipe fits on none of the numbers of ranks; give others with --gpus")
    try:
        plots.plan(planner, drawn, picture)
    except OSError as error:
        raise LaunchError(f"--picture {picture} cannot be written: {error.strerror}") from None


def show(chosen: recipes.Recipe, cluster: clusters.Cluster, workers: int | None, console: Console) -> None:
    """The model as a picture, and what follows for the recipe on `workers` ranks, or as many as the cluster has."""
    from vimscale.engine import recompute

    if workers is None:
        workers = ranks(cluster) if cluster.backend != "local" or cluster.workers else 1
    micro, _ = chosen.micro_batch(workers)
    planner, notes = prepare(chosen, cluster, workers)
    device = "cpu"  # what a layer keeps is a little less in a GPU's kernels
    precision = chosen.parallel.precision
    levels = recompute.levels(chosen.parallel, planner.config, micro, device)
    kept = {level: recompute.kept_bytes(planner.config, level, micro, precision, device) for level in {*levels}}
    console.print(
        model_table.picture(planner.config, [kept[level][i] for i, level in enumerate(levels)], levels, micro)
    )
    console.print()
    console.print(summary(planner, planner.outlook(workers), notes))


def ranks(cluster: clusters.Cluster) -> int:
    """How many ranks run there, at most."""
    if cluster.workers is not None:
        return int(cluster.workers.rpartition(":")[2])
    if _is_this_machine(cluster):
        return usual(cpus(), gpus())
    return cluster.nodes * cluster.gpus or max(cluster.nodes, 2)


def prepare(chosen: recipes.Recipe, cluster: clusters.Cluster, world: int) -> tuple["Planner", list[str]]:
    """What plans the recipe on `world` ranks there, and what is to be said of its data.

    Raises:
        ClusterError: the cluster does not say which GPUs it has.
    """
    from vimscale.data.training_set import TrainingSet
    from vimscale.estimate.planner import Planner, lanes_and_shards

    notes = []
    classes, samples = 1000, 0
    try:
        data = TrainingSet.open(chosen.data)
        classes, samples = len(data.manifest.classes), data.samples
        shards = [len(dataset.manifest.shards) for dataset in data.datasets]
        notes = lanes_and_shards(chosen, shards, cluster.nodes, remote=any(dataset.remote for dataset in data.datasets))
    except DataError as error:
        notes.append(f"data not readable from here: 1,000 classes assumed ({error})")
    config = chosen.model.shape(classes)
    here = this_machine(chosen, config, world, ray=True) if _is_this_machine(cluster) else None
    planner = Planner(chosen, config, here or _place(cluster), samples)
    if planner.steps is None:
        notes.append(f"days and cost are of one step: how many steps {chosen.epochs:g} epochs are, only the data say")
    return planner, notes


def _is_this_machine(cluster: clusters.Cluster) -> bool:
    """Whether a plan is for what this machine has, and not for what a file says of one."""
    return cluster.backend == "local" and not {"gpus", "memory"} & cluster.model_fields_set


def _place(cluster: clusters.Cluster) -> "Target":
    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    out = cluster.fabric * 1e9 / 8
    if not cluster.gpus:
        a_node = max(ranks(cluster) // cluster.nodes, 1)
        price = None if cluster.price is None else cluster.price / a_node
        return Target("CPUs", None, int(cluster.memory * 1e9 / a_node), Fabric(a_node, out, out), price)
    if cluster.gpu is None:
        fault = f"gpu: a plan needs to know which the {cluster.gpus} GPUs of a node are; known: {', '.join(DEVICES)}"
        raise ClusterError("cluster", [fault])
    device = DEVICES[cluster.gpu]
    return Target(cluster.gpu, device, device.memory, Fabric(cluster.gpus, device.link, out), cluster.price)


def _counts(text: str | None, cluster: clusters.Cluster, world: int) -> list[int]:
    """Numbers of ranks to compare; of a machine alone, those that it has room for."""
    from vimscale.estimate.planner import COUNTS

    if text is None:
        here = [1 << i for i in range(world.bit_length()) if 1 << i < world]
        return [*here, world] if cluster.backend == "local" else list(COUNTS)
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part, re.ASCII) for part in parts):
        raise LaunchError(f"--gpus {shortened(text, 80)!r} is no list of numbers from 1 to 999,999; write 8,64,512")
    return [int(part) for part in parts]


def outlooks(planner: "Planner", counts: list[int]) -> list["Outlook | dict[str, Any]"]:
    """An outlook for each number of ranks, or why there is none."""
    rows: list[Outlook | dict[str, Any]] = []
    for world in counts:
        try:
            rows.append(planner.outlook(world))
        except RecipeError as error:
            rows.append({"world": world, "fault": error.faults[0]})
    return rows


def summary(planner: "Planner", here: "Outlook", notes: list[str]) -> Table:
    """What follows for the ranks that the cluster has."""
    from vimscale.model.cost import flops

    recipe, place, need, sent = planner.recipe, planner.target, here.need, here.sent
    held = need.held
    kinds = {"all-reduce": sent.all_reduce, "reduce-scatter": sent.reduce_scatter, "all-gather": sent.all_gather}
    ranks_ = f"{here.world:,} rank{'s' * (here.world > 1)}"
    rows = {
        "recipe": f"{recipe.name}, ZeRO-{recipe.parallel.zero}, {recipe.parallel.precision}",
        "where": f"{place.name}, {_size(place.room)} a rank to use",
        "parameters": f"{planner.whole:,}",
        "an image": f"{planner.config.tokens:,} tokens, {flops(planner.config) / 1e9:.3f} GFLOPs forward",
        "a step": f"{planner.flops / 1e12:,.3f} TFLOPs (backward as two forwards), {recipe.batch:,} images",
        "micro-batch": f"{here.micro:,} images x {here.accumulation} micro-steps on {ranks_}"
        + ("" if here.given else ": the recipe's own does not fit"),
        "states a rank": f"{_size(held.between_steps)}: parameters {_size(held.parameters)}, their fp32 copy"
        f" {_size(held.weights)}, AdamW {_size(held.optimizer)}, average {_size(held.ema)}",
        "gradients a rank": f"{_size(held.gradients)} at a step's end",
        "at its peak": f"{_size(need.total)}: states, {_size(need.activations)} activations, {_size(need.buckets)}"
        f" buckets, {_size(need.gathered)} gathered, {_size(need.gradients)} gradients",
        "communication": ", ".join(f"{kind} {_size(size)}" for kind, size in kinds.items() if size) or "none",
        "checkpoint": f"{_size(planner.checkpoint)}, stops the loop for {here.stall_s:.2f} s (predicted)",
    }
    if planner.samples:
        rows["training set"] = f"{planner.samples:,} images"
    length = f"{planner.steps:,} steps" if planner.steps else f"{recipe.epochs:g} epochs"
    if not here.fits:
        rows["at its peak"] += "; DOES NOT FIT"
    if place.device is None:
        rows["the run"] = length
    else:
        mean = ", mean of all phases" if recipe.phases else ""
        rows["a step takes"] = f"{here.step_s:.3f} s, MFU {100 * here.mfu:.0f} %{mean} (a roofline's prediction)"
        cost = "" if here.money is None else f", costs {here.money:,.0f}"
        length = length if planner.steps else "one step"
        rows["the run"] = f"{length}: {here.days:.2f} days, {here.rank_hours:,.0f} GPU hours{cost}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    for note in notes:
        table.add_row("note", note)
    return table


def _comparison(rows: list["Outlook | dict[str, Any]"], *, device: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", caption="*: the largest micro-batch that fits")
    first = "GPUs" if device else "ranks"
    for title in (first, "micro-batch", "GB", "sent GB", "s a step", "MFU", "days", "GPU hours", "money"):
        table.add_column(title, justify="right")
    for row in rows:
        if isinstance(row, dict):
            table.add_row(f"{row['world']:,}", "-", *[""] * 7, style="dim")
            continue
        micro = f"{row.micro:,} x {row.accumulation}" + ("" if row.given else "*")
        figures = [f"{row.step_s:.3f}", f"{100 * row.mfu:.0f} %", f"{row.days:.2f}", f"{row.rank_hours:,.0f}"]
        money = "" if row.money is None else f"{row.money:,.0f}"
        if not row.fits:
            micro = "too large"
        if not row.fits or not device:  # how fast CPUs are is not known
            figures, money = [""] * 4, ""
        table.add_row(f"{row.world:,}", micro, _gb(row.need.total), _gb(row.sent.total), *figures, money)
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _size(size: float) -> str:
    return f"{model_table.short(size)}B"
