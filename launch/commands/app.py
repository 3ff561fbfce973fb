"""The command line: `vimscale …`. Everything slow is imported by the command that needs it."""

import contextlib
import errno
import io
import json
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import CheckpointError, DataError, LaunchError, RecipeError, RunFailed, UserError
from vimscale.recipe import recipe as recipes
from vimscale.storage import files

from .. import cluster as clusters
from ..processes import rank, temporary
from ..processes.signals import Stopped, StopSignal
from . import checkpoints as checkpoint_commands
from . import data as data_commands
from . import jobs, lr_range, plan, sweep
from .arguments import OnOption, Overrides, RecipeArgument, RunArgument, WithOption

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vimscale.data.shards.manifest import Manifest
    from vimscale.model import VisionMamba
    from vimscale.objectives.base import Learner
    from vimscale.runtime.run_folder import RunFolder

_STARTED = time.perf_counter()

app = typer.Typer(
    name="vimscale",
    help="Distributed large-scale pretraining of Vision Mamba.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_commands.data, name="data")
app.add_typer(checkpoint_commands.checkpoints, name="checkpoints")
app.add_typer(jobs.jobs)
app.command()(sweep.sweep)
app.command(name="lr-range")(lr_range.lr_range)
app.command(name="plan")(plan.command)

StepOption = Annotated[int | None, typer.Option(help="Take the checkpoint of this step, not the newest.")]
RawOption = Annotated[bool, typer.Option(help="Take the weights themselves, not their moving average.")]


def main() -> None:
    """Run a command: what a user can change ends in one message and an exit code, a bug in its traceback."""
    rank.before_torch()
    try:
        os.getcwd()
    except FileNotFoundError:
        _end("error: the folder that this shell is in is not there any more; cd to another one", UserError.exit_code)
    terminal, encoding = sys.stdout.isatty(), sys.stdout.encoding
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, encoding, errors=sys.stdout.errors, line_buffering=terminal)
    stop = StopSignal()
    with stop.installed():
        try:
            try:
                with stop.at_once():
                    app(standalone_mode=True)
            finally:
                sys.stdout.flush()
        except (UserError, RunFailed) as error:
            _end(f"error: {error}", error.exit_code)
        except Stopped as stopped:
            _end("stopped on request", stopped.exit_code)
        except OSError as error:
            if error.filename is None:
                raise
            if error.filename == _OUTPUT:
                if error.errno != errno.EPIPE:  # whoever reads no further knows
                    os.write(2, f"error: the output cannot be written: {error.strerror}\n".encode())
                os._exit(1)  # what is left of it would fail once more at the end of the process
            _end(f"error: {files.refusal(error)}", 1 if error.errno in files.FULL else 2)


_OUTPUT = "standard output"


class _Output(io.FileIO):
    """Standard output, named in what prevents it."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = _OUTPUT
            raise


def _end(message: str, code: int) -> None:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, emoji=False, soft_wrap=True)
    sys.exit(code)


@app.command(name="recipes")
def list_recipes() -> None:
    """List the recipes that come with the package."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, path in recipes.shipped().items():
        table.add_row(name, path.read_text().splitlines()[0].removeprefix("# "))
    Console().print(table)


@app.command()
def presets() -> None:
    """List the model presets with their parameters and operations."""
    from ..display import model_table as stack

    Console().print(stack.presets())


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(help="Ranks to reckon with; absent: the cluster's, or one.")] = None,
    on: OnOption = "local",
    with_: WithOption = None,
) -> None:
    """Print the resolved recipe, its model as a picture, and what follows from both; run nothing."""
    chosen = recipes.load(recipe, overrides or ())
    print(chosen.to_yaml())
    plan.show(chosen, clusters.load(on, with_ or ()), workers, Console())


@app.command()
def schema(
    of: Annotated[Literal["recipe", "cluster"], typer.Argument(help="Which kind of file.")] = "recipe",
) -> None:
    """Print the JSON schema of recipes, or of cluster files, for editors."""
    from ..cluster import Cluster

    described = recipes.Recipe if of == "recipe" else Cluster
    print(json.dumps(described.model_json_schema(), indent=1))


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Ranks, or MIN:MAX for as many as there is room for; absent: one a GPU, or two on CPUs."),
    ] = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Start the ranks as plain processes on this machine.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray that exists, or auto; absent: start one.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs' folders are; all ranks must see it.")] = Path("runs"),
    restarts: Annotated[
        int, typer.Option(min=0, help="How often ranks that are lost are started again within 1,000 steps.")
    ] = 10,
    hang_after: Annotated[
        float | None,
        typer.Option(
            min=1, help="Seconds without progress that are a hang; absent: 60, or 20 steps if that is longer."
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to save and end in once a stop is asked for; absent: what it takes."),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="45m, 12h or 7d, after which the run saves and stops; the same command goes on.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start also what does not fit into memory by the plan.")
    ] = False,
) -> None:
    """Train a recipe; go on where an interrupted run of its name stopped."""
    from vimscale.data.dataset import Dataset
    from vimscale.data.training_set import TrainingSet
    from vimscale.export import starting
    from vimscale.runtime.run_folder import RunFolder

    from .. import hardware
    from ..processes import on_local
    from ..processes.num_ranks import sizes
    from ..supervise import supervisor
    from ..supervise.progress import Progress
    from ..supervise.progress import console as run_console
    from . import memory_check

    if no_ray and address is not None:
        raise LaunchError("--no-ray and --address exclude each other; leave one out")
    stop = StopSignal(after=_seconds(time_limit))
    chosen = recipes.load(recipe, overrides or ())
    folder = RunFolder(runs / chosen.name)
    console = run_console()
    if (result := folder.finished(chosen)) is not None:
        console.print(f"{folder.path} is finished: {_summary(result)}", highlight=False, soft_wrap=True)
        console.print("  to train again, choose another name= or remove the folder", highlight=False)
        return
    if address is None:  # on another cluster the data may be visible to its nodes only: there the ranks check
        train_set = TrainingSet.open(chosen.data)
        if chosen.data.val is not None:
            Dataset.open(chosen.data.val, chosen.data.cache)
        starting.check(chosen, folder, train_set.manifest)
        cpus, gpus = hardware.cpus(), hardware.gpus()
        allowed = sizes(workers, chosen, cpus, gpus, "this machine")
        if not force:
            world = next(size for size in allowed if size <= (gpus or cpus))
            memory_check.check(chosen, train_set, world, ray=not no_ray)

    progress = Progress(console)
    progress.phase("command", time.perf_counter() - _STARTED)
    policy = supervisor.Policy(restarts=restarts, hang_after=hang_after, grace=grace)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.installed())
        chosen = folder.claim(chosen)
        if no_ray:
            allowed = [size for size in allowed if size <= (gpus or cpus)]
            where = "as processes of this machine"

            def make_group() -> supervisor.Group:
                return on_local.LocalGroup(chosen, folder.path, allowed[0], policy.patience_s)
        else:
            from ..processes import on_ray, ray_connection

            def give_up() -> None:
                ray_connection.kill_own()
                folder.withdraw()

            try:
                with stop.at_once(give_up):
                    ray = ray_connection.Ray(address)
            except Stopped:
                raise _stopped(folder, console) from None
            stack.callback(ray.close)
            stack.enter_context(stop.installed())  # once more behind Ray, which takes SIGTERM for itself
            progress.phase("Ray")
            cpus, gpus = ray.resources()
            allowed = sizes(workers, chosen, cpus, gpus, "the Ray cluster")
            where = f"on the Ray at {address}" if address else "on a Ray of this machine"

            def make_group() -> supervisor.Group:
                return on_ray.RayGroup(ray, chosen, folder.path, allowed, gpu=gpus > 0, patience_s=policy.patience_s)

        stack.callback(progress.close)
        world = next(size for size in allowed if size <= (gpus or cpus))
        ranks = f"{world} ranks" if world > 1 else "1 rank"
        progress.note(
            "info", f"{chosen.name}: {ranks} {where}, ZeRO-{chosen.parallel.zero}, {chosen.parallel.precision}"
        )
        code = supervisor.supervise(make_group, folder, stop, progress, policy)
        if code == Stopped.exit_code and not no_ray:
            ray.abandon()
    if code == Stopped.exit_code:
        raise _stopped(folder, console)
    result = folder.result()
    assert result is not None
    console.print(f"finished: {_summary(result)}", style="green", highlight=False, soft_wrap=True)
    evaluate, export = (shlex.join(["vimscale", command, str(folder.path)]) for command in ("evaluate", "export"))
    console.print(f"  everything is in {folder.path}; next: {evaluate}", highlight=False, soft_wrap=True)
    console.print(f"  or: {export} --to safetensors", highlight=False, soft_wrap=True)


def _stopped(folder: "RunFolder", console: Console) -> typer.Exit:
    """Say what a launch that was stopped leaves behind: nothing, if it trained nothing."""
    from vimscale.runtime.run_folder import checkpoints

    from ..supervise.supervisor import how_to_resume

    if folder.withdraw() and not checkpoints(folder.checkpoints):
        console.print("stopped on request before the first step; no run is left behind", highlight=False)
    else:
        console.print(f"stopped on request; {how_to_resume(folder)}", highlight=False)
    return typer.Exit(Stopped.exit_code)


def _seconds(time_limit: str | None) -> float:
    from ..cluster import seconds

    if time_limit is None:
        return float("inf")
    if (found := seconds(time_limit)) is None:
        raise LaunchError(f"--time-limit {time_limit}: write 45m, 12h or 7d")
    return found


def _summary(result: dict) -> str:
    from ..supervise.progress import figures

    return f"{result['steps']:,} steps" + (f", {figures(result)}" if "images" in result else "")


_EVALUATION = ("data.val", "data.workers", "data.cache", "parallel.precision")
"""What an evaluation may change of a run's recipe."""


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="data.val=... for another validation set or place of it.", metavar="[A.B=C]..."),
    ] = None,
    step: StepOption = None,
    raw: RawOption = False,
) -> None:
    """Evaluate a run's newest checkpoint on its validation set, or another of the same classes."""
    from vimscale.runtime.run_folder import RunFolder
    from vimscale.train.evaluate import load

    from ..supervise.progress import figures

    folder = RunFolder.of(run)
    others = [key for text in overrides or () if (key := text.partition("=")[0]) not in _EVALUATION]
    if others:
        known = f"an evaluation may change {', '.join(_EVALUATION)}; everything else is as it was trained"
        raise RecipeError(f"evaluate {run}", [f"{key}: {known}" for key in others])
    recipe = folder.recipe(overrides or ())
    if recipe.data.val is None:
        raise RecipeError(f"recipe {recipe.name}", ["data.val: there is no validation set; give one with data.val=..."])
    learner, _, manifest, at = load(folder, raw=raw, step=step)
    try:
        row = _evaluated(learner, recipe, manifest)
    except DataError as error:
        raise DataError(
            f"{error}\n  data.val=... names another validation set, or where it is on this machine"
        ) from None
    Console().print(f"step {at:,}: {figures(row)}", highlight=False, soft_wrap=True)


def _evaluated(learner: "Learner", recipe: recipes.Recipe, manifest: "Manifest") -> dict[str, float]:
    """Figures of a model on the recipe's validation set, on this process's device."""
    import torch

    from vimscale.data.dataset import Dataset
    from vimscale.train.evaluate import evaluate

    temporary.shorten()
    assert recipe.data.val is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learner.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16"):
        return evaluate(
            partial(learner.ask, "evaluation_sums"),
            learner.objective,
            Dataset.open(recipe.data.val, recipe.data.cache),
            manifest,
            size=learner.encoder.config.size,
            batch=64,
            device=device,
            workers=recipe.data.workers,
        )


@app.command(name="inspect-batch")
def inspect_batch(
    run: RunArgument,
    step: Annotated[int | None, typer.Argument(help="The bad step; absent: the last one with a report.")] = None,
) -> None:
    """Show the batch of a step that the guard found bad: what was seen, its samples, and a picture of them."""
    from vimscale.runtime.run_folder import RunFolder

    from . import inspect_batch

    inspect_batch.show(RunFolder.of(run), step, Console())


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        Literal["safetensors", "hustvl"], typer.Option(help="The format; hustvl: what the published Vim code loads.")
    ] = "safetensors",
    output: Annotated[Path | None, typer.Option(help="Folder to write; absent: export/ in the run's.")] = None,
    step: StepOption = None,
    raw: RawOption = False,
    prune_directions: Annotated[
        float | None,
        typer.Option(min=0, help="Leave out backward paths whose gate is below this, and say what that costs."),
    ] = None,
    objective: Annotated[
        bool, typer.Option("--objective", help="Also write the objective's own modules, to objective.safetensors.")
    ] = False,
) -> None:
    """Write a run's weights for others to use, load them again, and compare logits."""
    from vimscale.checkpoint.restore import restore
    from vimscale.export import published, safetensors
    from vimscale.runtime.run_folder import RunFolder
    from vimscale.train.evaluate import export_objective, load

    folder = RunFolder.of(run)
    if prune_directions is not None:
        learner, recipe, manifest, at = load(folder, raw=raw, step=step)
        model = _pruned(learner, prune_directions, recipe, manifest)
    else:
        model, recipe, manifest, at = restore(folder, raw=raw, step=step)
    target = output or folder.path / ("export" if to == "safetensors" else f"export_{to}")
    if to == "hustvl":
        published.write(target, model, manifest)
        difference = published.largest_difference(target, model)
    else:
        about = {"run": recipe.name, "step": at, "weights": "raw" if raw else "ema"}
        safetensors.write(target, model, manifest, about)
        difference = safetensors.largest_difference(target, model)
    if objective:
        export_objective(folder, target / "objective.safetensors", raw=raw, step=step)
    _say_same(target, f"step {at:,}", difference)


def _pruned(learner: "Learner", threshold: float, recipe: recipes.Recipe, manifest: "Manifest") -> "VisionMamba":
    from vimscale.export import prune
    from vimscale.model.cost import flops, parameters

    model = learner.encoder
    layers = prune.closed(model, threshold)
    smaller = prune.pruned(model, layers)
    console = Console()
    named = f"{len(layers)} of {len(model.config.optional)} backward paths are pruned"
    console.print(f"{named}: {smaller.config.directions}", highlight=False, soft_wrap=True)
    for what, one in (("before", model), ("after", smaller)):
        size = f"{parameters(one.config):,} parameters, {flops(one.config) / 1e9:.3f} GFLOPs an image"
        console.print(
            f"  {what:7}{size}; {_figures(learner.with_encoder(one), recipe, manifest)}",
            highlight=False,
            soft_wrap=True,
        )
    return smaller.cpu()


def _figures(learner: "Learner", recipe: recipes.Recipe, manifest: "Manifest") -> str:
    """An evaluation in words, or why there is none: a run may be far from its data."""
    from ..supervise.progress import figures

    if recipe.data.val is None:
        return "not evaluated: the recipe has no data.val"
    try:
        return figures(_evaluated(learner, recipe, manifest))
    except DataError as error:
        return f"not evaluated: {str(error).splitlines()[0]}"


def _say_same(target: Path, what: str, difference: float) -> None:
    if not difference <= 0:
        raise RunFailed(f"{target}: loaded again, its logits differ by up to {difference:.1e}; do not use it")
    Console().print(
        f"{target}: {what}; loaded again, it gives the same logits on 8 images", highlight=False, soft_wrap=True
    )


@app.command(name="import")
def import_published(
    file: Annotated[
        Path,
        typer.Argument(help="A published checkpoint of Vim, Mamba-R or ARM: .pth, .safetensors or an .index.json."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A published model's name, or JSON of its arguments; absent: what the file tells."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; absent: named after the file.")] = None,
    ema: Annotated[bool, typer.Option(help="Take the moving average, where the file has one.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Resize the position embedding for such images.")] = None,
) -> None:
    """Read published weights, write them as a model of this package, load that again, and compare logits."""
    from vimscale.export import published, safetensors, unwrap
    from vimscale.model.published.weights import from_published

    state, args, notes = unwrap.read(file, ema=ema)
    arguments, reasons = published.arguments_for(state, args, model, file)
    imported = from_published(arguments, state, resize_to=image_size).eval()
    manifest, about, origin = published.manifest_for(file, arguments["num_classes"])
    target = output or file.with_suffix("")
    if target.is_file():
        raise CheckpointError(f"{target} is a file, and the model's folder would have its name; give another --output")
    console = Console()
    for note in (*notes, *reasons, origin):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    safetensors.write(target, imported, manifest, {"file": str(file), "published": arguments, **about})
    parameters = sum(p.numel() for p in imported.parameters())
    _say_same(target, f"{parameters:,} parameters", safetensors.largest_difference(target, imported))


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option(help="Where runs' folders are to be.")] = Path("runs"),
) -> None:
    """Say what this machine has, what will therefore run, and how to mend what will not."""
    from . import doctor

    raise typer.Exit(doctor.show(doctor.examine(runs), Console()))


if __name__ == "__main__":
    main()
