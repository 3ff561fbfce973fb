"""Jobs on this machine: `vimscale launch` in its own session, which outlives the shell that submitted it.

All that is known of a job is in its run's folder, runs/NAME/job: the recipe as submitted, job.json, log.txt, and
ended.json once it has ended (local_child writes it). A process is identified by its pid and its start time, so that
another process that gets the same pid is not taken for the job.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vimscale.errors import LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.storage import files, untrusted

from ..cluster import Cluster
from ..hardware import cpus, gpus
from ..processes import num_ranks
from .backend import (
    Job,
    State,
    check_active,
    check_ended,
    check_secrets,
    environment,
    follow_file,
    for_cluster,
    job_files,
    job_folder,
    launch_arguments,
    newest_first,
    reason,
    state_of,
    unknown,
)
from .local_child import Ended


@dataclass
class _Record:
    """job.json"""

    pid: int
    start: int | None
    """See `_start`."""
    began: float
    log: int
    """Bytes in log.txt before this job's own."""


class LocalJobs:
    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._runs = Path(cluster.runs).absolute()
        self._where = f"this machine, under {self._runs}"

    def submit(self, recipe: recipes.Recipe) -> Job:
        recipe = for_cluster(recipe, self._cluster)
        num_ranks.sizes(self._cluster.ranks, recipe, cpus(), gpus(), "this machine")
        check_secrets(self._cluster)
        folder = job_folder(self._runs, recipe.name)
        with _locked(folder):
            if (job := self._job(folder)) is not None:
                check_ended(job, self._where)
            for name in ("ended.json", "stopping"):
                (folder / name).unlink(missing_ok=True)
            files.write(folder / "recipe.yaml", recipe.to_yaml())
            with (folder / "log.txt").open("a") as log:
                log_start = log.tell()
                command = [sys.executable, "-m", "vimscale.launch.cli", *self._arguments(folder)]
                process = subprocess.Popen(
                    [sys.executable, "-m", "vimscale.launch.jobs.local_child", str(folder), *command],
                    env=os.environ | environment(self._cluster),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            record = _Record(process.pid, _start(process.pid), time.time(), log_start)
            try:
                files.write(folder / "job.json", json.dumps(asdict(record)) + "\n")
            except OSError:  # without its record, the job could not be stopped
                process.kill()
                raise
        job = self._job(folder)
        assert job is not None
        return job

    def render(self, recipe: recipes.Recipe) -> str:
        recipe = for_cluster(recipe, self._cluster)
        folder = job_folder(self._runs, recipe.name)
        variables = [f"{name}={value}" for name, value in environment(self._cluster).items()]
        command = shlex.join([*variables, "vimscale", *self._arguments(folder)])
        return f"# {folder}/recipe.yaml\n{recipe.to_yaml()}\n# with its output in {folder}/log.txt\n{command}"

    def jobs(self) -> list[Job]:
        found = [self._job(path.parent) for path in job_files(self._runs, "job.json")]
        return newest_first(job for job in found if job is not None)

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        folder, record = self._known(job)
        return follow_file(folder / "log.txt", record["log"], lambda: not follow or not _lives(record))

    def stop(self, job: str) -> None:
        folder, record = self._known(job)
        state, ended = self._state(folder, record)
        check_active(Job(job, state, record["began"], ended), self._where)
        (folder / "stopping").touch()
        os.kill(record["pid"], signal.SIGTERM)

    def recipe(self, job: str) -> recipes.Recipe:
        folder, _ = self._known(job)
        return recipes.load(folder / "recipe.yaml")

    def _arguments(self, folder: Path) -> list[str]:
        return launch_arguments(self._cluster, str(folder / "recipe.yaml"), str(self._runs))

    def _known(self, job: str) -> tuple[Path, dict[str, Any]]:
        folder = job_folder(self._runs, job)
        if (record := _read(folder / "job.json", _Record)) is None:
            raise unknown(job, [each.id for each in self.jobs()], self._where)
        return folder, record

    def _job(self, folder: Path) -> Job | None:
        record = _read(folder / "job.json", _Record)
        if record is None:
            return None
        state, ended = self._state(folder, record)
        name = folder.parent.name
        message = reason("\n".join(self.logs(name, follow=False))) if state == "failed" else ""
        return Job(name, state, record["began"], ended, message)

    def _state(self, folder: Path, record: dict[str, Any]) -> tuple[State, float | None]:
        """Return the job's state and when it ended. A job whose process was killed leaves no ended.json: it ended at
        the log's last change.
        """
        if _lives(record):
            return "stopping" if (folder / "stopping").exists() else "running", None
        if (ended := _read(folder / "ended.json", Ended)) is None:
            return "failed", (folder / "log.txt").stat().st_mtime
        return state_of(ended["code"]), ended["at"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make one of two simultaneous submissions wait for the other."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise LaunchError(
            f"{folder} cannot be written: {error.strerror}; choose other runs in the cluster file"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the machine booted; None if it has ended, even where its
    parent has not collected it.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _lives(record: dict[str, Any]) -> bool:
    return record["start"] is not None and _start(record["pid"]) == record["start"]


def _read(path: Path, kind: type) -> dict[str, Any] | None:
    try:
        return asdict(untrusted.build(kind, untrusted.loads(untrusted.read(path))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read: {error}; remove it to forget the job") from None
