"""The runs of a folder together with the jobs of the cluster that trains there."""

import dataclasses
import threading
import time
from pathlib import Path

from vimscale.errors import LaunchError
from vimscale.report.glance import Glance, Runs

from ..cluster import Cluster
from .backend import ACTIVE, Job, open_backend

_JOBS_S = 10.0
"""Interval between questions to the cluster about its jobs, at least."""


class Overview:
    """What `vimscale top` shows. The cluster is asked in a thread, because squeue and kubectl may take long."""

    def __init__(self, cluster: Cluster, runs: Path | None):
        """`runs`: the folder of runs; default: the cluster's.

        Raises:
            LaunchError: it is not a folder, and was given or is this machine's; the cluster cannot be reached.
        """
        folder = runs or Path(cluster.runs)
        readable = folder.is_dir()
        if not readable and (runs is not None or cluster.backend == "local"):
            raise LaunchError(f"runs {folder} is not a folder; name the one that `vimscale launch --runs` got")
        self.where = str(folder) if cluster.backend == "local" else f"{cluster.backend} cluster, {folder}"
        self.problem = ""
        """Why the jobs are not known, or only those of before."""
        self._runs = Runs(folder) if readable else None
        if cluster.backend == "local":
            cluster = cluster.model_copy(update={"runs": str(folder)})
        self._backend = open_backend(cluster)
        self._jobs = self._backend.jobs()
        self._asked = time.monotonic()
        self._asking: threading.Thread | None = None

    def read(self) -> list[Glance]:
        """How every run and job is doing now."""
        if time.monotonic() - self._asked > _JOBS_S and (self._asking is None or not self._asking.is_alive()):
            self._asking = threading.Thread(target=self._ask, daemon=True)
            self._asking.start()
        found = {one.name: one for one in (self._runs.read() if self._runs is not None else ())}
        for job in self._jobs:
            found[job.id] = _joined(job, found.get(job.id))
        return sorted(found.values(), key=lambda one: (one.state not in _MOVING, -one.changed))

    def _ask(self) -> None:
        try:
            self._jobs, self.problem = self._backend.jobs(), ""
        except LaunchError as error:
            self.problem = str(error)
        self._asked = time.monotonic()


_MOVING = {"starting", "running", "stalled", *ACTIVE}


def _joined(job: Job, run: Glance | None) -> Glance:
    """A run as its folder shows it, with what only its job knows: whether it waits, and why it failed."""
    if run is None:
        return Glance(job.id, job.state, job.message, changed=job.ended or job.began or 0.0)
    if job.state == "waiting" or (job.state == "stopping" and run.state in _MOVING):
        return dataclasses.replace(run, state=job.state, note=job.message)
    if job.state == "running" and run.state not in (*_MOVING, "finished"):  # on a machine whose last row is old
        return dataclasses.replace(run, state="stalled" if run.step else "starting", note="")
    if job.state == "failed" and run.state in ("died", "empty"):
        return dataclasses.replace(run, state="failed", note=job.message or run.note)
    return run
