"""Runs on this machine that a program starts instead of a command: `vimscale.train`, a sweep's trials, range tests."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from vimscale.errors import RunFailed, UserError
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..processes import num_ranks, on_local, output, preflight, rank
from ..processes.evaluator import LocalEvaluator
from ..processes.signals import Stopped
from ..supervise import supervisor
from ..supervise.evaluations import Evaluations
from ..supervise.progress import Progress


def train(
    recipe: Recipe | str | Path, overrides: Iterable[str], *, workers: int | str | None, runs: Path, force: bool
) -> RunFolder:
    """See `vimscale.train`."""
    chosen = Recipe.load(recipe, overrides)
    folder = RunFolder(runs / chosen.name)
    # what a notebook shows is what is written to sys.stdout, and its cells are not a terminal
    console = Console(file=sys.stdout, force_jupyter=False)
    progress = Progress(console)
    if folder.finished(chosen) is not None:
        progress.note("info", f"{folder.path} is finished")
        return folder
    world = preflight.check(chosen, folder, None if workers is None else str(workers), ray=False, force=force)
    stop = supervisor.StopSignal()
    try:
        with stop.installed():
            chosen = folder.claim(chosen)
            progress.note("info", f"{chosen.name}: {num_ranks.in_words(world)} as processes on this machine")
            if run(chosen, folder, world, console, stop) == Stopped.exit_code:
                nothing = folder.withdraw()
                how = "no run is left behind" if nothing else supervisor.how_to_resume(folder)
                raise KeyboardInterrupt(f"stopped on request; {how}")
    finally:
        folder.release()  # a notebook may keep this object alive, in the traceback of an error
    return folder


def run(
    recipe: Recipe,
    folder: RunFolder,
    workers: int,
    console: Console,
    stop: supervisor.StopSignal,
    threads: int | None = None,
) -> int:
    """Train as `vimscale launch --no-ray` does, in a claimed folder, with the same exit codes and exceptions."""
    policy = supervisor.Policy()
    progress = Progress(console)

    def make_group() -> supervisor.Group:
        return on_local.LocalGroup(recipe, folder.path, workers, policy.patience_s, threads)

    evaluations = None
    if recipe.evaluate.asynchronous:
        evaluations = Evaluations(recipe, folder, LocalEvaluator(workers), progress)
    try:
        return supervisor.supervise(make_group, folder, stop, progress, policy, evaluations)
    finally:
        progress.close()


def start(folder: Path, workers: int, threads: int | None, cwd: Path) -> subprocess.Popen:
    """Start a process that trains the recipe in `folder`. On SIGTERM it saves a checkpoint and exits. It never outlives
    the process that started it.
    """
    log = _log_file(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    code = "from vimscale.launch.sweeps import unattended; unattended.child()"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"folder": str(folder), "workers": workers, "threads": threads}).encode() + b"\n")
    process.stdin.flush()
    return process


def child() -> None:
    """Run in that process. Its standard input ends when its parent ends; then it exits, as if killed."""
    rank.before_torch()
    sys.stdout, sys.stderr = output.writer(1), output.writer(2)
    order = json.loads(sys.stdin.readline())

    def watch() -> None:
        while os.read(0, 4096):  # sys.stdin would hold a lock when this process ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    stop = supervisor.StopSignal()
    folder = RunFolder(Path(order["folder"]))
    with stop.installed():
        try:
            recipe = folder.recipe()
            folder.claim(recipe)
            code = run(recipe, folder, order["workers"], Console(), stop, order["threads"])
        except (UserError, RunFailed) as error:
            sys.stderr.write(f"{_ERROR}{error}\n")
            code = error.exit_code
    sys.exit(code)


_ERROR = "error: "


def _log_file(folder: Path) -> Path:
    return folder / "logs" / "launch.txt"


def last_error(folder: Path) -> str:
    """The first line of the error that ended the run in `folder` the last time; empty if there is none."""
    log = _log_file(folder)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.removeprefix(_ERROR) for line in reversed(lines) if line.startswith(_ERROR)), "")
