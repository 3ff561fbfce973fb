"""The protocol for clusters that take jobs, and what its implementations (one on_*.py file each) have in common.

A job hands a recipe to a cluster, which runs it after this process has ended. On every backend a job is
`vimscale launch` with the run's resolved recipe, on machines that see `cluster.runs`. So all backends resume the same
way: a recipe that is submitted again resumes from the newest checkpoint, and a job that is stopped saves first.
"""

import importlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vimscale.errors import LaunchError, RecipeError, suggest
from vimscale.recipe.recipe import Recipe
from vimscale.storage import addresses
from vimscale.tracking.trackers import missing_variables

from ..cluster import Cluster
from ..processes import num_ranks

_POLL_S = 0.5
"""Pause between two reads of a log that is followed, unless a read takes long."""

_TOOL_S = 300
"""Time limit for one call of squeue, kubectl and the like."""

State = Literal["waiting", "running", "stopping", "stopped", "finished", "failed"]
ACTIVE: Collection[State] = ("waiting", "running", "stopping")
"""States of a job that has not ended."""


@dataclass(frozen=True)
class Job:
    """The state of one job on a cluster."""

    id: str
    """The run's name: a cluster has at most one job per run at a time."""
    state: State
    began: float | None
    """Seconds since the epoch."""
    ended: float | None
    message: str = ""
    """Why it waits or failed, in the backend's words."""


class Backend(Protocol):
    """A cluster that takes jobs. Every method raises LaunchError, with a message that names the cluster, if the cluster
    cannot be reached or refuses."""

    def submit(self, recipe: Recipe) -> Job:
        """Submit a run. A run that was stopped or has failed resumes.

        Raises:
            LaunchError: a job of that name waits or runs; there is less room than requested; a secret is not set.
        """
        ...

    def render(self, recipe: Recipe) -> str:
        """Return what `submit` would hand over, to read or to apply by hand."""
        ...

    def jobs(self) -> list[Job]:
        """Return all jobs that the cluster remembers, newest first."""
        ...

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """Yield the launcher's lines; with `follow`, until the job ends."""
        ...

    def stop(self, job: str) -> None:
        """Request that the job saves and ends; return without waiting for it."""
        ...

    def recipe(self, job: str) -> Recipe:
        """Return the recipe that was submitted, to `submit` it again."""
        ...


_BACKENDS = {
    "local": ("on_local", "LocalJobs"),
    "ray": ("on_ray", "RayJobs"),
    "kuberay": ("on_kuberay", "KubeRayJobs"),
    "slurm": ("on_slurm", "SlurmJobs"),
}


def open_backend(cluster: Cluster) -> Backend:
    """Return the backend of a cluster. The first call of a method is the first to contact the cluster.

    Raises:
        LaunchError: this machine lacks what the backend needs.
    """
    file, name = _BACKENDS[cluster.backend]
    backend: Backend = getattr(importlib.import_module(f"vimscale.launch.jobs.{file}"), name)(cluster)
    return backend


# ---- what a job runs


def launch_arguments(cluster: Cluster, recipe: str, runs: str) -> list[str]:
    """Return the arguments of `vimscale` in a job. Backends other than local start Ray first; the job joins it."""
    arguments = ["launch", recipe, "--runs", runs, "--grace", str(cluster.grace)]
    if cluster.time_limit is not None:
        arguments += ["--time-limit", cluster.time_limit]
    if cluster.backend != "local":
        arguments += ["--address", "auto"]
    return [*arguments, "--workers", cluster.ranks]


def environment(cluster: Cluster) -> dict[str, str]:
    """Return the environment variables that every process of a job gets, without the secrets."""
    variables = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    interfaces = {} if cluster.interface is None else dict.fromkeys(variables, cluster.interface)
    return interfaces | cluster.environment


def for_cluster(recipe: Recipe, cluster: Cluster) -> Recipe:
    """Return the recipe with what the cluster adds to it.

    Raises:
        RecipeError: the cluster's number of ranks does not suit the recipe; the recipe names files by paths that mean
            nothing where the job runs, or takes variables from the environment that the job would not have.
    """
    if recipe.checkpoint.mirror is None and cluster.mirror is not None:
        recipe = recipe.model_copy(
            update={"checkpoint": recipe.checkpoint.model_copy(update={"mirror": cluster.mirror})}
        )
    if cluster.backend == "local":
        return recipe
    num_ranks.check(cluster.ranks, recipe)
    named = [("data.train", source.data) for source in recipe.data.sources]
    optional = {
        "data.val": recipe.data.val,
        "model.weights": recipe.model.weights,
        "checkpoint.mirror": recipe.checkpoint.mirror,
    }
    named += [(key, address) for key, address in optional.items() if address is not None]
    variables = {*cluster.secrets, *cluster.environment}
    faults = [
        f"{key}: takes {name} from the environment, but jobs get only the variables that the cluster file names; add"
        " it to the cluster's secrets"
        for key, address in named
        for name in addresses.variables(address)
        if name not in variables
    ]
    faults += [
        f"{key} {address}: a job starts in its own folder; give the full path, as the nodes of the cluster see it"
        for key, address in named
        if not re.match(r"/|[a-z0-9+]+:", address)
    ]
    faults += [
        f"log.to: {tracker} needs {names}, but jobs get only the variables that the cluster file names; add a secret to"
        " its secrets, anything else to its environment"
        for tracker, names in missing_variables(recipe.log.to, variables).items()
    ]
    if faults:
        raise RecipeError(f"recipe {recipe.name}", faults)
    return recipe


# ---- states, and what a state allows


def state_of(exit_code: int) -> State:
    """Return the state of a job whose launcher ended with this code."""
    ended: dict[int, State] = {0: "finished", 3: "stopped"}
    return ended.get(exit_code, "failed")


def newest_first(jobs: Iterable[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: job.began or 0.0, reverse=True)


def check_ended(job: Job, where: str) -> None:
    """Check before a submission that an earlier job of the same run has ended.

    Raises:
        LaunchError: the job still waits or runs.
    """
    if job.state in ACTIVE:
        raise LaunchError(f"job {job.id} is {job.state} on {where}; stop it first, or choose another name=")


def check_active(job: Job, where: str) -> None:
    """Check before a stop that the job has not ended.

    Raises:
        LaunchError: the job has ended.
    """
    if job.state not in ACTIVE:
        raise LaunchError(f"job {job.id} on {where} has already {job.state}; there is nothing to stop")


def check_secrets(cluster: Cluster) -> None:
    """Check that the submitter's environment, which the job inherits, has all secrets.

    Raises:
        LaunchError: some are not set, or are empty.
    """
    if missing := [name for name in cluster.secrets if not os.environ.get(name)]:
        names = f"secrets {', '.join(missing)} are" if len(missing) > 1 else f"secret {missing[0]} is"
        raise LaunchError(f"{names} not set in this environment; export {' '.join(missing)}, then submit again")


def unknown(job: str, known: Collection[str], where: str) -> LaunchError:
    """Return the error for a job that does not exist."""
    return LaunchError(f"there is no job {job} on {where}{suggest(job, known) if known else '; it has none'}")


# ---- tools, files and logs


def run_tool(command: list[str], where: str, remedy: str, text: str | None = None, name: str = "") -> str:
    """Run a cluster's own tool and return what it prints. `text` is its input; `name` is what messages call it.

    Raises:
        LaunchError: the tool is not installed (the message ends with `remedy`), cannot be run, fails, or does not
            answer.
    """
    tool = command[0]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=_TOOL_S
        )
    except FileNotFoundError:
        raise LaunchError(f"{where}: there is no {tool} here; {remedy}") from None
    except OSError as error:
        raise LaunchError(f"{where}: {tool} cannot be run: {error.strerror}; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{where}: {name or tool} has not answered within {_TOOL_S} s") from None
    if done.returncode:
        own_log = re.compile(r"[EWI]\d{4} ")  # kubectl's
        said = " ".join(line for line in done.stderr.splitlines() if not own_log.match(line))
        raise LaunchError(
            f"{where}: {name or tool} said: {said or done.stdout.strip() or f'exit code {done.returncode}'}"
        )
    return done.stdout


def job_folder(runs: Path, run: str) -> Path:
    """Return the folder for what a backend on a shared file system knows of a run's job."""
    return runs / run / "job"


def job_files(runs: Path, name: str) -> list[Path]:
    """Return the file `name` of every run's job folder that has it.

    Raises:
        LaunchError: the folder of runs cannot be read.
    """
    try:
        found = sorted(os.listdir(runs))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LaunchError(
            f"runs {runs} cannot be read: {error.strerror}; is `runs` in the cluster file right?"
        ) from None
    return [path for run in found if os.path.isfile(path := job_folder(runs, run) / name)]


def reason(log: str) -> str:
    """Return why a job failed, from the end of its log: the last error in one line, else the last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ").strip()


def follow_file(path: Path, start: int, ended: Callable[[], bool], pause_s: float = _POLL_S) -> Iterator[str]:
    """Yield the lines of a growing file from byte `start` until it has `ended`, each line once it is complete. A file
    that does not exist yet counts as empty.
    """
    while True:
        last = ended()  # ask before reading: the file then holds all that was written before the end
        if path.exists():
            with path.open("rb") as file:
                file.seek(start)
                for line in file:
                    if not last and not line.endswith(b"\n"):  # it is still being written
                        break
                    start += len(line)
                    yield line.decode(errors="replace").rstrip("\n")
        if last:
            return
        time.sleep(pause_s)


def follow_text(text: Callable[[], str], ended: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a growing text until it has `ended`, for backends that can only return all of it.

    The log of several days takes long to fetch: fetching takes at most a tenth of the time.
    """
    shown = 0
    while True:
        last = ended()  # ask before reading, as above
        began = time.monotonic()
        fetched = text()
        new = fetched[shown:] if last else fetched[shown : fetched.rfind("\n") + 1]
        shown += len(new)
        yield from new.splitlines()
        if last:
            return
        time.sleep(max(_POLL_S, 9 * (time.monotonic() - began)))
