"""A run on this machine that a program starts, and not a person: one trial of a sweep, or a range test."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from rich.console import Console

from vimscale.errors import RunFailed, UserError
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

from ..processes import on_local, output, rank
from ..supervise import supervisor
from ..supervise.progress import Progress


def run(
    recipe: Recipe,
    folder: RunFolder,
    workers: int,
    console: Console,
    stop: supervisor.StopSignal,
    threads: int | None = None,
) -> int:
    """Train as `vimscale launch --no-ray` does, in a folder that is claimed; the same exit codes and exceptions."""
    policy = supervisor.Policy()
    progress = Progress(console)

    def make_group() -> supervisor.Group:
        return on_local.LocalGroup(recipe, folder.path, workers, policy.patience_s, threads)

    try:
        return supervisor.supervise(make_group, folder, stop, progress, policy)
    finally:
        progress.close()


def start(folder: Path, workers: int, threads: int | None, cwd: Path) -> subprocess.Popen:
    """The same as a process of its own, of the recipe that lies in `folder`. SIGTERM asks it for a checkpoint and an
    end; it never outlives the process that started it.
    """
    log = log_file(folder)
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
    """What that process does. Its standard input ends with whoever started it, and so does it then, as if killed."""
    rank.before_torch()
    sys.stdout, sys.stderr = output.writer(1), output.writer(2)
    order = json.loads(sys.stdin.readline())

    def watch() -> None:
        while os.read(0, 4096):  # not by sys.stdin, which would be locked when this process ends
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


def log_file(folder: Path) -> Path:
    return folder / "logs" / "launch.txt"


def last_words(folder: Path) -> str:
    """Why the run in `folder` ended badly the last time, in a line; empty if it did not say."""
    log = log_file(folder)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.removeprefix(_ERROR) for line in reversed(lines) if line.startswith(_ERROR)), "")
