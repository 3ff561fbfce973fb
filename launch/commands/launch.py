"""`vimscale launch`: train a recipe on this machine or on a Ray cluster, under supervision."""

import contextlib
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vimscale.errors import LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.runtime.run_folder import RunFolder, checkpoints

from .. import cluster as clusters
from ..display.lines import print_line
from ..hardware import nvidia_devices
from ..processes import num_ranks
from ..processes.signals import Stopped, StopSignal
from .arguments import AddressOption, Overrides, RecipeArgument

_STARTED = time.perf_counter()
"""About when the command began."""


def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Number of ranks, or MIN:MAX for as many as there are devices for. Default: one per GPU; without GPUs"
            " two on CPUs."
        ),
    ] = None,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Start the ranks as plain processes on this machine.")
    ] = False,
    address: AddressOption = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs; every rank must see it.")] = Path("runs"),
    restarts: Annotated[int, typer.Option(min=0, help="How many times to restart lost ranks within 1,000 steps.")] = 10,
    hang_after: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds without progress after which a run counts as hung. Default: 60, or the time of 20 steps if"
            " longer.",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to save and exit after a stop request. Default: as long as it takes."),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="45m, 12h or 7d, after which the run saves and stops; the same command resumes it."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Train the run of this name to a larger number of steps or epochs.")
    ] = False,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="RUN@STEP",
            help="Start from that checkpoint of another run, with its optimizer's state and its position in the data.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the recipe is not expected to fit into memory.")
    ] = False,
) -> None:
    """Train a recipe; resume an interrupted run of the same name."""
    from ..processes import on_local, preflight
    from ..processes.evaluator import Evaluator, LocalEvaluator
    from ..supervise import continued, supervisor
    from ..supervise.evaluations import Evaluations
    from ..supervise.progress import Progress
    from ..supervise.progress import console as run_console

    if no_ray and address is not None:
        raise LaunchError("--no-ray and --address exclude each other; leave one out")
    stop = StopSignal(after=_seconds(time_limit))
    chosen = recipes.load(recipe, overrides or ())
    folder = RunFolder(runs / chosen.name)
    console = run_console()
    forked = continued.Fork.of(fork, chosen, runs) if fork is not None else None
    if forked is not None:
        forked.check(folder)
    if (result := folder.finished(chosen, extend=extend)) is not None:
        print_line(console, f"{folder.path} is finished: {_summary(result)}")
        print_line(console, "  to train it longer, give more steps and --extend")
        print_line(console, "  to train again, choose another name= or remove the folder")
        return
    with contextlib.ExitStack() as cleanup:
        # the checks import torch if there are GPUs, which takes seconds; the ranks do it at the same time
        spares = on_local.Spares(_likely(workers) if no_ray else 0)
        cleanup.callback(spares.close)
        if address is None:  # on another cluster perhaps only the nodes see the data: there, the ranks check
            world = preflight.check(chosen, folder, workers, ray=not no_ray, force=force)
        elif workers is not None:
            num_ranks.check(workers, chosen)

        progress = Progress(console)
        progress.phase("command", time.perf_counter() - _STARTED)
        policy = supervisor.Policy(restarts=restarts, hang_after=hang_after, grace=grace)
        cleanup.enter_context(stop.installed())
        described = continued.extension(folder, chosen) if extend else []
        chosen = folder.claim(chosen, extend=extend)
        if forked is not None:
            try:
                described += forked.into(folder)
            except BaseException:
                folder.withdraw()
                raise
        for line in described:
            progress.note("info", line)
        evaluator: Evaluator
        if no_ray:
            where = "as processes on this machine"
            evaluator = LocalEvaluator(world)

            def make_group() -> supervisor.Group:
                return on_local.LocalGroup(chosen, folder.path, world, policy.patience_s, spares=spares)
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
            cleanup.callback(ray.close)
            progress.phase("Ray")
            cpus, gpus = ray.resources()
            allowed = num_ranks.sizes(workers, chosen, cpus, gpus, "the Ray cluster")
            world = num_ranks.largest(allowed, cpus, gpus)
            evaluator = on_ray.RayEvaluator(ray, gpu=gpus > 0)
            where = f"on the Ray at {address}" if address else "on a Ray of this machine"

            def make_group() -> supervisor.Group:
                return on_ray.RayGroup(ray, chosen, folder.path, allowed, gpu=gpus > 0, patience_s=policy.patience_s)

        cleanup.callback(progress.close)
        parallel = chosen.parallel
        progress.note(
            "info",
            f"{chosen.name}: {num_ranks.in_words(world)} {where}, ZeRO-{parallel.zero}, {parallel.precision}",
        )
        evaluations = None
        if chosen.evaluate.asynchronous:
            evaluations = Evaluations(chosen, folder, evaluator, progress)
        code = supervisor.supervise(make_group, folder, stop, progress, policy, evaluations)
        if code == Stopped.exit_code and not no_ray:
            ray.abandon()
    if code == Stopped.exit_code:
        raise _stopped(folder, console)
    result = folder.result()
    assert result is not None
    print_line(console, f"finished: {_summary(result)}", style="green")
    evaluate, export = (shlex.join(["vimscale", command, str(folder.path)]) for command in ("evaluate", "export"))
    print_line(console, f"  the run is in {folder.path}; next: {evaluate}")
    print_line(console, f"  or: {export} --to safetensors")


def _likely(workers: str | None) -> int:
    """Return how many ranks a machine with GPUs will probably get."""
    devices = nvidia_devices()
    return min(devices, int(workers)) if workers is not None and workers.isdigit() else devices


def _stopped(folder: RunFolder, console: Console) -> typer.Exit:
    """Print what a stopped launch leaves behind: nothing, if it trained nothing."""
    from ..supervise.supervisor import how_to_resume

    if folder.withdraw() and not checkpoints(folder.checkpoints):
        print_line(console, "stopped on request before the first step; no run is left behind")
    else:
        print_line(console, f"stopped on request; {how_to_resume(folder)}")
    return typer.Exit(Stopped.exit_code)


def _seconds(time_limit: str | None) -> float:
    if time_limit is None:
        return float("inf")
    if (seconds := clusters.seconds(time_limit)) is None:
        raise LaunchError(f"--time-limit {time_limit}: write 45m, 12h or 7d")
    return seconds


def _summary(result: dict) -> str:
    from ..supervise.progress import figures

    return f"{result['steps']:,} steps" + (f", {figures(result)}" if "images" in result else "")
