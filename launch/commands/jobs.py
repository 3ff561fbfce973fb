"""`vimscale submit`, `jobs`, `logs`, `stop` and `resume`: jobs on a cluster; `vimscale top`: runs and jobs, live."""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.typed_yaml import check_name

from .. import cluster as clusters
from ..processes.signals import Stopped
from .arguments import JsonOption, OnOption, Overrides, RecipeArgument, WithOption

if TYPE_CHECKING:
    from ..display.runs_table import RunsTable
    from ..jobs.backend import Backend
    from ..jobs.overview import Overview

JobArgument = Annotated[str, typer.Argument(help="The job's name, which is its run's name.")]
FollowOption = Annotated[
    bool,
    typer.Option(
        "--follow", help="Print the log until the job ends. Exit with 0 if it finished, 3 if stopped, else 1."
    ),
]

_EXIT = {"finished": 0, "stopped": 3}
_REFRESH_S = 2.0
"""Interval at which `top` looks again."""

jobs = typer.Typer()


@jobs.command()
def submit(
    recipe: RecipeArgument,
    on: OnOption,
    overrides: Overrides = None,
    changes: WithOption = None,
    render: Annotated[bool, typer.Option("--render", help="Print what would be submitted; submit nothing.")] = False,
    follow: FollowOption = False,
) -> None:
    """Submit a recipe to a cluster, which trains it even if this shell ends."""
    chosen = recipes.load(recipe, overrides or ())
    backend = _open(on, changes)
    if render:
        print(backend.render(chosen))
        return
    _submit(backend, chosen, on, changes, follow)


@jobs.command(name="jobs")
def list_jobs(
    on: OnOption,
    changes: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a cluster's jobs, newest first."""
    found = _open(on, changes).jobs()
    if as_json:
        print(json.dumps([dataclasses.asdict(job) for job in found], indent=1))
        return
    from ..supervise.progress import duration

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("job", "state", "began", "took", ""):
        table.add_column(title, overflow="fold")
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else ""
        took = duration((job.ended or time.time()) - job.began) if job.began else ""
        table.add_row(job.id, job.state, began, took, job.message)
    Console(markup=False, emoji=False).print(table if found else f"no jobs on {on}")


@jobs.command()
def top(
    runs: Annotated[
        Path | None, typer.Argument(help="Folder of runs. Default: `runs` of the cluster file, here runs/.")
    ] = None,
    on: Annotated[str, typer.Option("--on", help="Cluster whose jobs are listed. Default: this machine.")] = "local",
    changes: WithOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show all runs and jobs, live; q ends it. Without a terminal, print them once."""
    from ..jobs.overview import Overview

    cluster = clusters.load(on, changes or ())
    overview = Overview(cluster, runs)
    console = Console(markup=False, emoji=False, highlight=False)
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in overview.read()], indent=1))
    elif once or not console.is_terminal or console.is_dumb_terminal or not sys.stdin.isatty():
        console.print(_top(overview))
    else:
        with contextlib.suppress(Stopped):
            _follow(overview, console)


def _top(overview: "Overview", height: int | None = None, footer: str = "") -> "RunsTable":
    from ..display.runs_table import RunsTable

    found = overview.read()
    counts = ", ".join(f"{count} {state}" for state, count in Counter(one.state for one in found).items())
    title = f"{overview.where}: {counts or 'no runs'}"
    problem = f"its jobs are not known: {overview.problem}" if overview.problem else footer
    return RunsTable(title, found, problem, height=height)


def _follow(overview: "Overview", console: Console) -> None:
    """Show the table until a key says to end. It stays when it ends."""
    from rich.live import Live

    from ..display.keys import Keys

    with Keys() as keys:
        with Live(_top(overview), console=console, screen=True, auto_refresh=False) as live:
            while keys.read(_REFRESH_S) not in ("q", "Q", "\x04"):
                live.update(_top(overview, console.height, f"q: quit   {time.strftime('%H:%M:%S')}"), refresh=True)
        console.print(_top(overview, console.height))


@jobs.command()
def logs(
    job: JobArgument,
    on: OnOption,
    changes: WithOption = None,
    follow: FollowOption = False,
) -> None:
    """Print the log of a job."""
    backend = _open(on, changes)
    _show(backend, _checked(job), on, changes, follow=follow)


@jobs.command()
def stop(job: JobArgument, on: OnOption, changes: WithOption = None) -> None:
    """Ask a job to save a checkpoint and exit."""
    _open(on, changes).stop(_checked(job))
    print(f"asked {job} to save and exit; to resume it: {_command('resume', job, on, changes)}")


@jobs.command()
def resume(job: JobArgument, on: OnOption, changes: WithOption = None, follow: FollowOption = False) -> None:
    """Submit a stopped or failed job again; it resumes from its newest checkpoint."""
    backend = _open(on, changes)
    chosen = backend.recipe(_checked(job))
    if next((each.state for each in backend.jobs() if each.id == job), "") == "finished":
        raise LaunchError(f"job {job} is finished; to train it longer or again, submit it with another name=")
    _submit(backend, chosen, on, changes, follow)


def _open(on: str, changes: list[str] | None) -> "Backend":
    from ..jobs.backend import open_backend

    return open_backend(clusters.load(on, changes or ()))


def _checked(job: str) -> str:
    """The name, if it can name a job."""
    try:
        return check_name(job)
    except ValueError as error:
        raise LaunchError(f"job {error}") from None


def _submit(backend: "Backend", recipe: recipes.Recipe, on: str, changes: list[str] | None, follow: bool) -> None:
    job = backend.submit(recipe)
    print(f"submitted {job.id} to {on}; its log: {_command('logs', job.id, on, changes)} --follow", flush=True)
    if follow:
        _show(backend, job.id, on, changes, follow=True)


def _show(backend: "Backend", job: str, on: str, changes: list[str] | None, *, follow: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
        try:
            for line in backend.logs(job, follow=follow):
                print(line, flush=True)
        except Stopped:
            print(f"{job} continues; to stop it: {_command('stop', job, on, changes)}")
            return
    if follow:
        state = next(each.state for each in backend.jobs() if each.id == job)
        raise typer.Exit(_EXIT.get(state, 1))


def _command(verb: str, job: str, on: str, changes: list[str] | None) -> str:
    """A command about the job for the user to paste, quoted for a shell."""
    repeated = [part for change in changes or () for part in ("--with", change)]
    return shlex.join(["vimscale", verb, job, "--on", on, *repeated])
