"""Jobs: a recipe handed to a cluster, which runs it after this process has ended. One file a backend implements this.

On every backend a job is `vimscale launch` on the run's resolved recipe, in a place where `cluster.runs` is. So all of
them resume alike: what is submitted again goes on from the newest checkpoint, and a job that is stopped saves first.
"""

import importlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vimscale.errors import LaunchError, RecipeError, suggest
from vimscale.recipe.recipe import Recipe
from vimscale.storage import addresses

from ..cluster import Cluster

_POLL_S = 0.5
"""How often a job that is followed is asked for more, unless an answer takes long."""

_TOOL_S = 300
"""How long squeue, kubectl and their like have to answer."""

State = Literal["waiting", "running", "stopping", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class Job:
    """What a cluster was given."""

    id: str
    """The run's name: a cluster has one job of a run at a time."""
    state: State
    began: float | None
    """Seconds since the epoch."""
    ended: float | None
    message: str = ""
    """Why it waits or failed, in the backend's words."""


class Backend(Protocol):
    """A cluster that takes jobs. All methods raise LaunchError, whose message names the cluster, if it cannot be asked
    or refuses."""

    def submit(self, recipe: Recipe) -> Job:
        """Hand over a run; one that was stopped or failed goes on.

        Raises:
            LaunchError: a job of that name waits or runs; there is less room than asked for; a secret is not set.
        """
        ...

    def render(self, recipe: Recipe) -> str:
        """What `submit` would hand over, to read or to apply by hand."""
        ...

    def jobs(self) -> list[Job]:
        """All that it remembers, newest first."""
        ...

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """The launcher's lines; `follow`: until the job ends."""
        ...

    def stop(self, job: str) -> None:
        """Ask it to save and end; returns when it is asked."""
        ...

    def recipe(self, job: str) -> Recipe:
        """What was submitted, to `submit` it again."""
        ...


_BACKENDS = {
    "local": ("on_local", "LocalJobs"),
    "ray": ("on_ray", "RayJobs"),
    "kuberay": ("on_kuberay", "KubeRayJobs"),
    "slurm": ("on_slurm", "SlurmJobs"),
}


def open_backend(cluster: Cluster) -> Backend:
    """The backend of a cluster, which is asked no earlier than by the first call.

    Raises:
        LaunchError: what it needs on this machine is not there.
    """
    file, name = _BACKENDS[cluster.backend]
    backend: Backend = getattr(importlib.import_module(f"vimscale.launch.jobs.{file}"), name)(cluster)
    return backend


def launch_arguments(cluster: Cluster, recipe: str, runs: str) -> list[str]:
    """What stands behind `vimscale` in a job, but for where its ranks are."""
    limit = ["--time-limit", cluster.time_limit] if cluster.time_limit is not None else []
    return ["launch", recipe, "--runs", runs, "--grace", str(cluster.grace), *limit]


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables that every process of a job gets; secrets are not among them."""
    named = (
        {}
        if cluster.interface is None
        else dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.interface)
    )
    return named | cluster.environment


def completed(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with what the cluster adds to it.

    Raises:
        RecipeError: it names files by paths that mean nothing where the job runs.
    """
    if recipe.checkpoint.mirror is None and cluster.mirror is not None:
        recipe = recipe.model_copy(
            update={"checkpoint": recipe.checkpoint.model_copy(update={"mirror": cluster.mirror})}
        )
    if cluster.backend == "local":
        return recipe
    places = [("data.train", source.data) for source in recipe.data.sources]
    named = {
        "data.val": recipe.data.val,
        "model.weights": recipe.model.weights,
        "checkpoint.mirror": recipe.checkpoint.mirror,
    }
    places += [(key, place) for key, place in named.items() if place is not None]
    faults = [
        f"{key}: takes {name} from the environment, which jobs get by name alone; add it to the cluster's secrets"
        for key, place in places
        for name in addresses.variables(place)
        if name not in cluster.secrets and name not in cluster.environment
    ]
    faults += [
        f"{key} {place}: a job starts in a folder of its own; give the full path, as the nodes of the cluster see it"
        for key, place in places
        if not re.match(r"/|[a-z0-9+]+:", place)
    ]
    if faults:
        raise RecipeError(f"recipe {recipe.name}", faults)
    return recipe


def unknown(job: str, known: Collection[str], where: str) -> LaunchError:
    """There is no such job."""
    return LaunchError(f"there is no job {job} on {where}{suggest(job, known) if known else '; it has none'}")


def ask(command: list[str], where: str, way_out: str, text: str | None = None, name: str = "") -> str:
    """What a cluster's own tool prints; `name`: of the question, for messages.

    Raises:
        LaunchError: it is not there (`way_out` says what to do), cannot be run, fails, or does not answer.
    """
    tool = command[0]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=_TOOL_S
        )
    except FileNotFoundError:
        raise LaunchError(f"{where}: there is no {tool} here; {way_out}") from None
    except OSError as error:
        raise LaunchError(f"{where}: {tool} cannot be run: {error.strerror}; {way_out}") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{where}: {name or tool} has had no answer for {_TOOL_S} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not re.match(r"[EWI]\d{4} ", line)]  # kubectl's own log
        raise LaunchError(
            f"{where}: {name or tool} said: {' '.join(said) or done.stdout.strip() or f'exit code {done.returncode}'}"
        )
    return done.stdout


def job_files(runs: Path, name: str) -> list[Path]:
    """RUNS/RUN/job/NAME of every run that has it.

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
    return [path for run in found if os.path.isfile(path := runs / run / "job" / name)]


def reason(log: str) -> str:
    """Why a job failed, by the end of its log: the last error in one line, else the last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it left no word"])[-1].removeprefix("error: ").strip()


def lines_of(text: Callable[[], str], ended: Callable[[], bool]) -> Iterator[str]:
    """Lines of a growing text until it has ended, for backends that can only give all of it.

    Texts of days take long to give: at most a tenth of the time is spent on that.
    """
    shown = 0
    while True:
        last = ended()  # asked first: what was written before the end is then in the text
        began = time.monotonic()
        whole = text()
        new = whole[shown:] if last else whole[shown : whole.rfind("\n") + 1]
        shown += len(new)
        yield from new.splitlines()
        if last:
            return
        time.sleep(max(_POLL_S, 9 * (time.monotonic() - began)))
