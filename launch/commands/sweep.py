"""`vimscale sweep`: the same recipe with other values, the poor ones given up early; a table and a picture. Seeds are
repeats of a setting: they are averaged, and never compared with each other.
"""

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import LaunchError, RunFailed
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..processes.signals import Stopped, StopSignal
from ..sweeps import trials
from ..sweeps.trials import By, Group, Outcome, Trial
from . import memory_check
from .arguments import RecipeArgument

_CLAIM_S = 20
"""How long processes of a sweep that was killed a moment ago may take to end."""
_RUNGS = 8
"""A trial is judged at every so-manieth part of its length, unless --grace says otherwise."""


def sweep(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str],
        typer.Argument(
            help="section.key=value, or several: optim.lr=1e-4,3e-4 seed=0,1,2; with --samples also LOW..HIGH.",
            metavar="A.B=C[,D]...",
        ),
    ],
    by: Annotated[By, typer.Option(help="What trials are compared by; loss: of the training.")] = "top1",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Values drawn from each range LOW..HIGH, by their logarithm.")
    ] = None,
    grace: Annotated[
        int | None, typer.Option(min=1, help="Steps that every trial has; absent: an eighth of the longest.")
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, help="ASHA: one setting in so many goes on past a rung; 1 gives up none.")
    ] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Ranks a trial, all on one machine.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray that exists, or auto; absent: start one.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs' folders are; all trials must see it.")] = Path("runs"),
) -> None:
    """Train a recipe with several values of some keys, and compare; the same command goes on where it was stopped."""
    from vimscale.data.training_set import TrainingSet
    from vimscale.export import starting

    trials.check_installed("pandas", "pyarrow", "fsspec", "matplotlib")
    folder, all_ = trials.plan(recipe, overrides, samples, runs)
    lengths = {}
    for one in all_:
        one.recipe.micro_batch(workers)
        if by == "top1" and one.recipe.data.val is None:
            raise LaunchError("--by top1: the recipe has no data.val to evaluate on; set it, or use --by loss")
        if by == "top1" and one.recipe.objective.headline != "top1":
            raise LaunchError(f"--by top1: objective {one.recipe.objective.kind} does not measure it; use --by loss")
        train_set = TrainingSet.open(one.recipe.data)
        starting.check(one.recipe, RunFolder(one.folder.path), train_set.manifest)
        if address is None and not one.ended:
            memory_check.check(one.recipe, train_set, workers, ray=True)
        lengths[one.name] = one.recipe.length(train_set.samples)
    every = grace or max(max(lengths.values()) // _RUNGS, 1)
    firsts = trials.firsts(all_)
    for one in all_:
        if keep > 1 and not one.ended and firsts[one.name].stopped:  # its setting was given up in an earlier launch
            one.stop(0)
    open_, past = ([one for one in all_ if one.ended is ended] for ended in (False, True))
    console = Console()
    ended = f", {len(past)} of them ended before" if past else ""
    _say(console, f"{folder.name}: {len(all_)} trials{ended}; each in {folder}/TRIAL")
    stop = StopSignal()
    claimed: list[RunFolder] = []
    if open_:
        from ..processes import ray_connection

        with stop.installed():
            with stop.at_once(ray_connection.kill_own):
                ray = ray_connection.Ray(address)
            # once more behind Ray, which takes SIGTERM for itself
            with contextlib.closing(ray), stop.installed():
                from ..sweeps import on_tune

                on_tune.check_room(workers)
                for one in open_:
                    claimed.append(RunFolder(one.folder.path))
                    claimed[-1].claim(_judged(one, by, every), wait_s=_CLAIM_S)
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
                    say=lambda line: _say(console, line),
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
    show(groups, by, folder, console)
    if stop.asked:
        _say(console, "stopped on request; the same command continues")
        raise typer.Exit(Stopped.exit_code)
    left = [one for group in groups for one in group.outcomes if one.status == "unfinished"]
    if left and not any(group.finished for group in groups):
        raise RunFailed(f"no trial finished; {left[0].trial.name}: {left[0].words or 'its process ended'}")


def _judged(trial: Trial, by: By, every: int) -> Recipe:
    """Its recipe, with an evaluation wherever it is judged: those change nothing of what it computes."""
    if by == "loss":
        return trial.recipe
    evaluate = trial.recipe.evaluate.model_copy(update={"every": every})
    return trial.recipe.model_copy(update={"evaluate": evaluate})


def show(groups: list[Group], by: By, folder: Path, console: Console) -> None:
    """Settings from the best to the worst as a table, which one won, and a picture."""
    from ..display import plots

    keys = list(groups[0].outcomes[0].trial.point)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for key in keys:
        if key != "seed":
            table.add_column(key, overflow="fold")
    for title in ("top-1" if by == "top1" else "loss", "seeds", "steps", "images/s", "training"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for number, group in enumerate(groups):
        cells = [value for _, value in group.outcomes[0].trial.setting]
        speeds = [one.images_per_s for one in group.outcomes if one.images_per_s is not None]
        work = sum(map(_operations, group.outcomes))
        table.add_row(
            *cells,
            _result(group, by),
            f"{len(group.finished)}/{len(group.outcomes)}" if "seed" in keys else "",
            " ".join(sorted({f"{one.step:,}" for one in group.outcomes})),
            f"{sum(speeds) / len(speeds):,.0f}" if speeds else "",
            _short_flops(work),
            _remark(group),
            style="bold green" if number == 0 and group.finished else None,
        )
    console.print(table)
    total = _short_flops(sum(_operations(one) for group in groups for one in group.outcomes))
    picture = folder / "sweep.png"
    plots.sweep(groups, by, f"{folder.name}: {len(groups)} settings, {total} of training", picture)
    best = groups[0]
    if best.finished:
        setting = " ".join(shlex.quote(f"{key}={value}") for key, value in best.outcomes[0].trial.setting)
        _say(console, f"best: {setting or 'any'}, {_result(best, by)}; all of it took {total}")
    _say(console, f"picture: {picture}")


def _result(group: Group, by: By) -> str:
    if group.mean is None:
        return "-"
    form = "{:.2%}" if by == "top1" else "{:.4f}"
    return form.format(group.mean) + (f" ± {form.format(group.spread)}" if group.spread is not None else "")


def _remark(group: Group) -> str:
    stopped = sum(one.status == "stopped" for one in group.outcomes)
    words = next((one.words for one in group.outcomes if one.words), "")
    parts = [f"{stopped} given up" if stopped else "", words[:100]]
    parts += ["unfinished"] if any(one.status == "unfinished" for one in group.outcomes) and not words else []
    return "; ".join(part for part in parts if part)


def _operations(one: Outcome) -> float:
    """FLOPs that its training took, a backward pass as two forward ones."""
    from vimscale.model.cost import flops

    return 3.0 * flops(one.trial.recipe.model.shape(classes=1)) * one.trial.recipe.consumed(one.step)


def _short_flops(number: float) -> str:
    unit, size = next((u for u in (("E", 1e18), ("P", 1e15), ("T", 1e12)) if number >= u[1]), ("G", 1e9))
    return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}FLOP"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
