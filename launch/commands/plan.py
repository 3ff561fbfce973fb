"""`vimscale plan`: the memory, time and money that a recipe takes on a cluster, as tables, a plot or JSON."""

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import ClusterError, DataError, LaunchError, RecipeError, UserError, shortened
from vimscale.estimate.calibration import basis
from vimscale.estimate.devices import DEVICES
from vimscale.recipe import recipe as recipes
from vimscale.report.stack import short

from .. import cluster as clusters
from ..processes.num_ranks import in_words
from ..processes.preflight import HEAP, RANK, this_machine
from ..sweeps.trials import check_installed
from .arguments import OnOption, Overrides, RecipeArgument, WithOption

if TYPE_CHECKING:
    from vimscale.estimate.planner import Outlook, Planner, Target
    from vimscale.report.planned import Planned
    from vimscale.report.record import Record


def plan(
    recipe: RecipeArgument,
    on: OnOption,
    overrides: Overrides = None,
    with_: WithOption = None,
    counts: Annotated[
        str | None,
        typer.Option(
            "--gpus", help="Numbers of GPUs to compare: 8,64,512. Default: 8 to 4,096; on local, this machine's."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Plot memory, days and GPU hours over the number of GPUs into this PNG.")
    ] = None,
) -> None:
    """Predict a recipe's memory, time and cost on a cluster. Exits with 2 if it cannot run there."""
    if picture is not None:
        check_installed("matplotlib")
        if picture.suffix.lower() != ".png":
            raise LaunchError(f"--picture {picture}: the plot is a PNG; give it a name that ends in .png")
    chosen = recipes.load(recipe, overrides or ())
    cluster = clusters.load(on, with_ or ())
    world = cluster.most_ranks
    planner, notes = prepare(chosen, cluster, world)
    planner.refuse(world)
    rows = outlooks(planner, _counts(counts, cluster, world, chosen.parallel.context))
    if picture is not None:
        _plot(planner, rows, picture)
    here = planner.outlook(world)
    options = list(planner.options(world))
    if as_json:
        figures = {
            "recipe": chosen.name,
            "cluster": on,
            "parameters": planner.whole + sum(planner.frozen),
            "frozen": sum(planner.frozen),
            "flops": planner.flops,
            "steps": planner.steps,
            "checkpoint": planner.checkpoint,
            "times": None if planner.target.device is None else basis(planner.target.device, planner.config),
            "notes": notes,
            "here": dataclasses.asdict(here),
            "options": [dataclasses.asdict(option) | {"total": option.need.total} for option in options],
            "counts": [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(figures, indent=1))
        return
    console = Console(markup=False, emoji=False)
    console.print(summary(planner, here, notes))
    console.print()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title="memory per rank, GB", title_justify="left")
    for title in (
        "ZeRO",
        "recompute",
        "states",
        "gradients",
        "buckets",
        "activations",
        "total",
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


def _plot(planner: "Planner", rows: list["Outlook | dict[str, Any]"], picture: Path) -> None:
    from ..display import plots

    fitting = [row for row in rows if not isinstance(row, dict) and row.fits]
    if not fitting:
        raise LaunchError("--picture: the recipe fits on none of these numbers of ranks; give others with --gpus")
    try:
        plots.plan(planner, fitting, picture)
    except OSError as error:
        raise LaunchError(f"--picture {picture} cannot be written: {error.strerror}") from None


def prepare(chosen: recipes.Recipe, cluster: clusters.Cluster, world: int) -> tuple["Planner", list[str]]:
    """A planner of the recipe for `world` ranks there, and notes on its data.

    Raises:
        ClusterError: the cluster does not say which GPUs it has.
    """
    from vimscale.data.training_set import TrainingSet
    from vimscale.estimate.planner import Planner, lanes_and_shards

    notes = []
    classes, samples = 1000, 0
    try:
        data = TrainingSet.open(chosen.data, labels=chosen.objective.classifies)
        classes, samples = len(data.manifest.classes), data.samples
        shards = [len(dataset.manifest.shards) for dataset in data.datasets]
        notes = lanes_and_shards(chosen, shards, cluster.nodes, remote=any(dataset.remote for dataset in data.datasets))
    except DataError as error:
        notes.append(f"the data cannot be read from here, so 1,000 classes are assumed ({error})")
    config = chosen.largest(chosen.shape(classes))
    here = this_machine(chosen, config, world, ray=True) if cluster.is_this_machine else None
    planner = Planner(chosen, config, here or _target(cluster), samples)
    if planner.steps is None:
        notes.append(f"days and cost are for one step: without the data, {chosen.epochs:g} epochs have no known length")
    return planner, notes


def of_run(record: "Record", cluster: clusters.Cluster) -> "Planned | str":
    """What a plan for `cluster` says of a run with the ranks that it had; or why there is no plan."""
    from vimscale.estimate.planner import Planner
    from vimscale.report.planned import Planned

    recipe, config, world = record.recipe, record.config, record.world
    if recipe is None or config is None:
        return record.refused or "the recipe does not fit this version"
    if world is None:
        return "the run's folder does not say how many ranks there were"
    try:
        target = this_machine(recipe, config, world, ray=False) if cluster.is_this_machine else _target(cluster)
        if target is None:
            return "this machine's GPUs are not in the table of devices; name the run's machine with --on CLUSTER"
        samples = record.about.get("samples")
        planner = Planner(recipe, config, target, samples if type(samples) is int else 0)
        micro, accumulation = recipe.micro_batch(world)
        need = planner.most(recipe.parallel.zero, recipe.parallel.recompute, micro, accumulation, world, exact=False)
        step_s = None if target.device is None else planner.outlook(world).step_s
    except UserError as error:
        return str(error)
    parts = {
        "states": need.held.between_steps,
        "gradients": need.gradients,
        "buckets": need.buckets + need.gathered,
        "activations": need.activations,
        "images": need.images,
        "CUDA graphs": need.graphs,
        "the objective's buffers": need.buffers,
    }
    if target.device is None:
        grown = {name: int(HEAP * size) for name, size in parts.items()}
        return Planned("CPUs", world, micro, accumulation, grown, int(RANK), None, "no plan knows the speed of CPUs")
    return Planned(target.name, world, micro, accumulation, parts, 0, step_s, basis(target.device, planner.config))


def _target(cluster: clusters.Cluster) -> "Target":
    """What a cluster file says of its nodes.

    Raises:
        ClusterError: it does not say which GPUs they have.
    """
    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    out = cluster.fabric * 1e9 / 8
    if not cluster.gpus:
        per_node = max(cluster.most_ranks // cluster.nodes, 1)
        price = None if cluster.price is None else cluster.price / per_node
        return Target("CPUs", None, int(cluster.memory * 1e9 / per_node), Fabric(per_node, out, out), price)
    if cluster.gpu is None:
        fault = f"gpu: a plan needs the model of a node's {cluster.gpus} GPUs; known: {', '.join(DEVICES)}"
        raise ClusterError("cluster", [fault])
    device = DEVICES[cluster.gpu]
    return Target(cluster.gpu, device, device.memory, Fabric(cluster.gpus, device.link, out), cluster.price)


def _counts(text: str | None, cluster: clusters.Cluster, world: int, context: int) -> list[int]:
    """Numbers of ranks to compare. On a single machine, powers of two up to `world` that `context` divides."""
    from vimscale.estimate.planner import COUNTS

    if text is None:
        smaller = [1 << i for i in range(world.bit_length()) if 1 << i < world and (1 << i) % context == 0]
        return [*smaller, world] if cluster.backend == "local" else list(COUNTS)
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part, re.ASCII) for part in parts):
        raise LaunchError(f"--gpus {shortened(text, 80)!r} is not a list of numbers from 1 to 999,999; write 8,64,512")
    return [int(part) for part in parts]


def outlooks(planner: "Planner", counts: list[int]) -> list["Outlook | dict[str, Any]"]:
    """An outlook for each number of ranks; or, where there is none, its `world` and `fault`."""
    rows: list[Outlook | dict[str, Any]] = []
    for world in counts:
        try:
            rows.append(planner.outlook(world))
        except RecipeError as error:
            rows.append({"world": world, "fault": error.faults[0]})
    return rows


def summary(planner: "Planner", here: "Outlook", notes: list[str]) -> Table:
    """The outlook for one number of ranks, as a table of two columns."""
    from vimscale.model.cost import flops

    recipe, target, need, sent = planner.recipe, planner.target, here.need, here.sent
    held, context, exchanged = need.held, recipe.parallel.context, here.exchanged
    kinds = {"all-reduce": sent.all_reduce, "reduce-scatter": sent.reduce_scatter, "all-gather": sent.all_gather}
    groups, share = {}, ""
    if context > 1:
        most = -(-planner.config.tokens // context)
        share = f"; {context} ranks share it, with {most:,} tokens each at most"
        within = {"halos": exchanged.halo, "states": exchanged.summaries, "keys and values": exchanged.attention}
        groups["within groups"] = ", ".join(f"{kind} {_size(size)}" for kind, size in within.items() if size)
    of = "" if planner.config.tiles is None else f" of at most {planner.config.bag_size:,} tiles"
    relative, objective = planner.relative_work(), {}
    if relative != 1:
        objective["objective"] = f"{recipe.objective.kind}: {relative:.2f} times the work of classification"
    if planner.buffers:
        objective["buffers per rank"] = f"{_size(planner.buffers)} of the objective, such as a teacher"
    rows = {
        "recipe": f"{recipe.name}, ZeRO-{recipe.parallel.zero}, {recipe.parallel.precision}",
        "where": f"{target.name}, {_size(target.room)} per rank",
        "parameters": f"{planner.whole + sum(planner.frozen):,}"
        + (f", {sum(planner.frozen):,} of them frozen" if planner.frozen else ""),
        "per image": f"{planner.config.tokens:,} tokens{of}, {flops(planner.config) / 1e9:.3f} GFLOPs forward{share}",
        **objective,
        "per step": f"{planner.flops / 1e12:,.3f} TFLOPs (backward as two forwards), {recipe.batch:,} images",
        "micro-batch": f"{here.micro:,} images x {here.accumulation} micro-step{'s' * (here.accumulation > 1)}"
        f" on {in_words(here.world)}" + ("" if here.given else "; the recipe's own does not fit"),
        "states per rank": f"{_size(held.between_steps)}: parameters {_size(held.parameters)}, their fp32 copy"
        f" {_size(held.weights)}, AdamW {_size(held.optimizer)}, moving average {_size(held.ema)}",
        "gradients per rank": f"{_size(held.gradients)} at the end of a step",
        "peak per rank": f"{_size(need.total)}: states, {_size(need.activations)} activations, {_size(need.buckets)}"
        f" buckets, {_size(need.gathered)} gathered, {_size(need.gradients)} gradients, {_size(need.graphs)} for CUDA"
        " graphs",
        "communication": ", ".join(f"{kind} {_size(size)}" for kind, size in kinds.items() if size) or "none",
        **groups,
        "checkpoint": f"{_size(planner.checkpoint)}, stops training for {here.stall_s:.2f} s (predicted)",
    }
    if planner.samples:
        rows["training set"] = f"{planner.samples:,} images"
    length = f"{planner.steps:,} steps" if planner.steps else f"{recipe.epochs:g} epochs"
    if not here.fits:
        rows["peak per rank"] += "; DOES NOT FIT"
    if target.device is None:
        rows["run"] = length
    else:
        mean = ", mean of all phases" if recipe.phases else ""
        replays = planner.replays(recipe.parallel.zero)
        rows["time per step"] = (
            f"{here.step_s:.3f} s, MFU {100 * here.mfu:.0f} %{mean}: kernels {here.kernels_s:.3f} s, launches"
            f" {here.host_s:.3f} s of the host unless CUDA graphs replay them; {here.other_s:.3f} s"
            f" {'without' if replays else 'with'} graphs"
        )
        rows["these times"] = f"{basis(target.device, planner.config)}; assumed: communication, checkpoints"
        cost = "" if here.money is None else f", costs {here.money:,.0f}"
        length = length if planner.steps else "one step"
        rows["run"] = f"{length}: {here.days:.2f} days, {here.rank_hours:,.0f} GPU hours{cost}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    for note in notes:
        table.add_row("note", note)
    return table


def _comparison(rows: list["Outlook | dict[str, Any]"], *, device: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", caption="*: the largest micro-batch that fits")
    first = "GPUs" if device else "ranks"
    for title in (first, "micro-batch", "GB", "sent GB", "s per step", "MFU", "days", "GPU hours", "money"):
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
        if not row.fits or not device:  # there is no model of the speed of CPUs
            figures, money = [""] * 4, ""
        table.add_row(
            f"{row.world:,}", micro, _gb(row.need.total), _gb(row.sent.total + row.exchanged.total), *figures, money
        )
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _size(size: float) -> str:
    return f"{short(size)}B"
