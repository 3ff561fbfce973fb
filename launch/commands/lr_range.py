"""`vimscale lr-range`: one short run whose learning rate rises exponentially, to find the rates that train."""

from pathlib import Path
from typing import Annotated

import typer

from vimscale.errors import LaunchError, RunFailed
from vimscale.recipe import recipe as recipes
from vimscale.runtime.run_folder import RunFolder

from ..display.lines import print_line
from ..processes import preflight
from ..processes.signals import StopSignal
from ..supervise import progress
from ..sweeps import trials, unattended
from ..sweeps.lr_range import diverged, rising
from .arguments import Overrides, RecipeArgument


def lr_range(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--from", help="The first learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="The last learning rate.")] = 1.0,
    steps: Annotated[int, typer.Option(min=20, help="Steps of the run.")] = 100,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine. Default: one per GPU; without GPUs two on CPUs."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
) -> None:
    """Find the learning rates that train a recipe, in one short run. Everything else of the recipe stays the same."""
    if not 0 < low < high:
        raise LaunchError(f"--from {low:g} --to {high:g}: the rate rises, so write 0 < --from < --to")
    trials.check_installed("matplotlib")
    chosen = rising(recipes.load(recipe, overrides or ()), low, high, steps)
    folder = RunFolder(runs / chosen.name)
    console = progress.console()
    stop = StopSignal()
    if folder.finished(chosen) is None:
        world = preflight.check(chosen, folder, None if workers is None else str(workers), ray=False)
        with stop.installed():
            folder.claim(chosen)
            try:
                code = unattended.run(chosen, folder, world, console, stop)
            except RunFailed as error:
                if not diverged(folder):
                    raise
                first = str(error).splitlines()[0]
                print_line(console, f"the run has diverged, which ends the test: {first}")
            else:
                if code:
                    folder.withdraw()
                    print_line(console, "stopped on request; the same command continues")
                    raise typer.Exit(code)
    from ..display import search_results

    rows = [row for row in folder.rows() if row["kind"] == "train"]
    search_results.lr_range([row["lr"] for row in rows], [row["loss"] for row in rows], chosen, folder, console)
