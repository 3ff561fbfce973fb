"""`vimscale sweep`: train a recipe with several values of some keys, give up poor ones early, and compare. `vimscale
lr-range`: one short run whose learning rate rises exponentially, to find the rates that train.

Seeds repeat a setting: their results are averaged, and never compared with each other.
"""

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vimscale.errors import LaunchError, RunFailed
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..display.lines import print_line
from ..processes import preflight
from ..processes.signals import Stopped, StopSignal
from ..supervise import progress
from ..sweeps import trials, unattended
from ..sweeps.lr_range import diverged, rising
from ..sweeps.trials import By, Trial
from .arguments import AddressOption, Overrides, RecipeArgument

_CLAIM_S = 20
"""How long to wait for the processes of a sweep that was just killed to end."""
_RUNGS = 8
"""Without --grace, trials are judged this many times in their length."""


def sweep(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str],
        typer.Argument(
            help="section.key=value, or several values: optim.lr=1e-4,3e-4 seed=0,1,2. With --samples also LOW..HIGH.",
            metavar="A.B=C[,D]...",
        ),
    ],
    by: Annotated[
        By, typer.Option(help="What to compare trials by: top-1 of the evaluations, or the training loss.")
    ] = "top1",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of values to draw from each range LOW..HIGH, log-uniformly.")
    ] = None,
    grace: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that every trial gets. Default: an eighth of the longest trial's steps."),
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, help="ASHA: one in this many settings continues past each rung; 1 gives up none.")
    ] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Ranks per trial, all on one machine.")] = 1,
    address: AddressOption = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs; every trial must see it.")] = Path("runs"),
) -> None:
    """Train a recipe with several values of some keys, and compare. The same command resumes a stopped sweep."""
    from ..display import search_results

    trials.check_installed("pandas", "pyarrow", "fsspec", "matplotlib")
    folder, all_ = trials.create(recipe, overrides, samples, runs)
    lengths = {}
    for one in all_:
        one.recipe.micro_batch(workers)
        if by == "top1" and one.recipe.data.val is None:
            raise LaunchError("--by top1: the recipe has no data.val to evaluate on; set it, or use --by loss")
        if by == "top1" and one.recipe.objective.headline != "top1":
            raise LaunchError(f"--by top1: objective {one.recipe.objective.kind} does not measure it; use --by loss")
        train_set = preflight.check_inputs(one.recipe, RunFolder(one.folder.path))
        if address is None and not one.ended:
            preflight.check_memory(one.recipe, train_set, workers, ray=True)
        lengths[one.name] = one.recipe.length(train_set.samples)
    every = grace or max(max(lengths.values()) // _RUNGS, 1)
    firsts = trials.firsts(all_)
    for one in all_:
        if keep > 1 and not one.ended and firsts[one.name].stopped:  # an earlier launch gave up its setting
            one.stop(0)
    open_, past = ([one for one in all_ if one.ended is ended] for ended in (False, True))
    console = Console(markup=False, emoji=False)
    ended = f", {len(past)} of them ended before" if past else ""
    print_line(console, f"{folder.name}: {len(all_)} trials{ended}; each in {folder}/TRIAL")
    stop = StopSignal()
    claimed: list[RunFolder] = []
    if open_:
        from ..processes import ray_connection

        with stop.installed():
            with stop.at_once(ray_connection.kill_own):
                ray = ray_connection.Ray(address)
            with contextlib.closing(ray):
                from ..sweeps import on_tune

                on_tune.check_room(workers)
                for one in open_:
                    claimed.append(RunFolder(one.folder.path))
                    claimed[-1].claim(_with_evaluations(one, by, every), wait_s=_CLAIM_S)
                    claimed[-1].release()  # to its trial
                on_tune.run(
                    ray,
                    open_,
                    past,
                    firsts=firsts,
                    folder=folder,
                    steps=lambda one: lengths[one.name],
                    by=by,
                    every=every,
                    keep=keep if keep > 1 else None,
                    workers=workers,
                    stop=stop,
                    say=lambda line: print_line(console, line),
                )
                if stop.asked:
                    ray.abandon()
    outcomes = [trials.outcome(one, by, every) for one in all_]
    if stop.asked:
        for trial in reversed(claimed):
            trial.withdraw()
        if not any(one.step for one in outcomes):
            raise Stopped
    groups = trials.ranked(outcomes, by)
    search_results.sweep(groups, by, folder, console)
    if stop.asked:
        print_line(console, "stopped on request; the same command continues")
        raise typer.Exit(Stopped.exit_code)
    unfinished = [one for group in groups for one in group.outcomes if one.status == "unfinished"]
    if unfinished and not any(group.finished for group in groups):
        first = unfinished[0]
        raise RunFailed(f"no trial finished; {first.trial.name}: {first.error or 'its process ended'}")


def _with_evaluations(trial: Trial, by: By, every: int) -> Recipe:
    """The trial's recipe, evaluated wherever the trial is judged. Evaluations do not change what it computes."""
    if by == "loss":
        return trial.recipe
    evaluate = trial.recipe.evaluate.model_copy(update={"every": every, "asynchronous": False})
    return trial.recipe.model_copy(update={"evaluate": evaluate})


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
