"""Jobs of this machine: `vimscale launch` as a process of its own session, which outlives the shell it came from.

What there is to know of a job lies in its run's folder, runs/NAME/job: the recipe as submitted, job.json, log.txt, and
ended.json once it has ended. A process is known by its id and its start, so that another of the same id is not taken
for it.
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
from .backend import Job, State, completed, environment, job_files, launch_arguments, lines_of, reason, unknown


@dataclass
class _About:
    """job.json"""

    pid: int
    start: int | None
    began: float
    log: int
    """Bytes of log.txt before the job's own."""


@dataclass
class _Ended:
    """ended.json"""

    code: int
    at: float


class LocalJobs:
    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._runs = Path(cluster.runs).absolute()
        self._where = f"this machine, under {self._runs}"

    def submit(self, recipe: recipes.Recipe) -> Job:
        recipe = completed(recipe, self._cluster)
        num_ranks.sizes(self._cluster.workers, recipe, cpus(), gpus(), "this machine")
        if missing := [name for name in self._cluster.secrets if not os.environ.get(name)]:
            raise LaunchError(
                f"secret {missing[0]} is not set in the environment; export {missing[0]}=…, and submit again"
            )
        folder = self._folder(recipe.name)
        with _claimed(folder):
            if (job := self._job(folder)) is not None and job.state in ("running", "stopping"):
                raise LaunchError(
                    f"job {recipe.name} is {job.state} on {self._where}; stop it first, or choose another name="
                )
            for left in ("ended.json", "stopping"):
                (folder / left).unlink(missing_ok=True)
            files.write(folder / "recipe.yaml", recipe.to_yaml())
            with (folder / "log.txt").open("a") as log:
                began = log.tell()
                process = subprocess.Popen(
                    [sys.executable, "-m", "vimscale.launch.jobs.on_local", str(folder), *self._arguments(folder)],
                    env=os.environ | environment(self._cluster),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            about = {"pid": process.pid, "start": _start(process.pid), "began": time.time(), "log": began}
            try:
                _write(folder / "job.json", about)
            except OSError:  # a job that nothing is known of could not be stopped
                process.kill()
                raise
        job = self._job(folder)
        assert job is not None
        return job

    def render(self, recipe: recipes.Recipe) -> str:
        recipe = completed(recipe, self._cluster)
        folder = self._folder(recipe.name)
        variables = [f"{name}={value}" for name, value in environment(self._cluster).items()]
        command = shlex.join([*variables, "vimscale", *self._arguments(folder)])
        return f"# {folder}/recipe.yaml\n{recipe.to_yaml()}\n# with its output in {folder}/log.txt\n{command}"

    def jobs(self) -> list[Job]:
        found = [job for path in job_files(self._runs, "job.json") if (job := self._job(path.parent)) is not None]
        return sorted(found, key=lambda job: job.began or 0.0, reverse=True)

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        folder, about = self._known(job)

        def text() -> str:
            with (folder / "log.txt").open() as file:
                file.seek(about["log"])
                return file.read()

        return lines_of(text, lambda: not follow or not _lives(about))

    def stop(self, job: str) -> None:
        folder, about = self._known(job)
        if not _lives(about):
            raise LaunchError(f"job {job} does not run: it is {self._state(folder, about)[0]}")
        (folder / "stopping").touch()
        os.kill(about["pid"], signal.SIGTERM)

    def recipe(self, job: str) -> recipes.Recipe:
        folder, _ = self._known(job)
        return recipes.load(folder / "recipe.yaml")

    def _folder(self, run: str) -> Path:
        return self._runs / run / "job"

    def _arguments(self, folder: Path) -> list[str]:
        ranks = ["--workers", self._cluster.workers] if self._cluster.workers is not None else []
        return [*launch_arguments(self._cluster, str(folder / "recipe.yaml"), str(self._runs)), *ranks]

    def _known(self, job: str) -> tuple[Path, dict[str, Any]]:
        folder = self._folder(job)
        if (about := _read(folder / "job.json", _About)) is None:
            raise unknown(job, [each.id for each in self.jobs()], self._where)
        return folder, about

    def _job(self, folder: Path) -> Job | None:
        about = _read(folder / "job.json", _About)
        if about is None:
            return None
        state, ended = self._state(folder, about)
        name = folder.parent.name
        message = reason("\n".join(self.logs(name, follow=False))) if state == "failed" else ""
        return Job(name, state, about["began"], ended, message)

    def _state(self, folder: Path, about: dict[str, Any]) -> tuple[State, float | None]:
        """How it is, and when it ended. A job that is killed leaves no word of its end but its log's last change."""
        if _lives(about):
            return "stopping" if (folder / "stopping").exists() else "running", None
        if (ended := _read(folder / "ended.json", _Ended)) is None:
            return "failed", (folder / "log.txt").stat().st_mtime
        states: dict[int, State] = {0: "finished", 3: "stopped"}
        return states.get(ended["code"], "failed"), ended["at"]


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Of two that submit at the same time, one waits."""
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
    """When a process started, in ticks since this machine did; None if it has ended, even where nobody took notice."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _lives(about: dict[str, Any]) -> bool:
    return about["start"] is not None and _start(about["pid"]) == about["start"]


def _read(path: Path, kind: type) -> dict[str, Any] | None:
    try:
        return asdict(untrusted.build(kind, untrusted.loads(untrusted.read(path))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read: {error}; remove it to forget the job") from None


def _write(path: Path, about: dict[str, Any]) -> None:
    files.write(path, json.dumps(about) + "\n")


def _run(folder: Path, arguments: list[str]) -> int:
    """A job's process: the command line, and a word of how it ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # until the launcher listens itself, nothing is to be saved
    sys.argv = ["vimscale", *arguments]
    code = 1
    try:
        from ..commands import app

        app.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        _write(folder / "ended.json", {"code": code, "at": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(_run(Path(sys.argv[1]), sys.argv[2:]))
