"""Jobs: a recipe handed to a cluster, which runs it after this process has ended. One file a backend implements this.

On every backend a job is `vimscale launch` on the run's resolved recipe, in a place where `cluster.runs` is. So all of
them resume alike: what is submitted again goes on from the newest checkpoint, and a job that is stopped saves first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from vimscale.recipe import Recipe

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
