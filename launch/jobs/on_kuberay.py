"""Jobs on Kubernetes with the KubeRay operator, through the user's own kubectl.

A job is a ConfigMap, which holds the recipe and stays, and a RayJob, which exists while the job waits or runs and after
it has ended by itself. To stop a job, delete the RayJob: Kubernetes then ends its pods, and pods that end make the run
save.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from vimscale.errors import LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

from ..cluster import Cluster
from .backend import ACTIVE, Job, State, check_active, check_ended, for_cluster, run_tool, unknown
from .kuberay_manifest import OURS, RUN, kubernetes_name, manifest

_LOG_POLL_S = 2.0
"""Pause between two looks for a job's log."""
_JOBS, _RECIPES = "rayjobs.ray.io", "configmaps"
_STATES: dict[str, State] = {
    "Running": "running",
    "Complete": "finished",
    "Failed": "failed",
    "ValidationFailed": "failed",
    "Suspending": "stopping",
}
"""States of RayJobs, by jobDeploymentStatus. With any other status a job waits: for pods, for a retry, in a queue."""


class KubeRayJobs:
    def __init__(self, cluster: Cluster):
        assert cluster.kuberay is not None  # a cluster file without its claim is refused
        self._cluster, self._kuberay = cluster, cluster.kuberay

    def submit(self, recipe: Recipe) -> Job:
        documents = self.render(recipe)
        name = kubernetes_name(recipe.name)
        self._check_secrets()
        self._kubectl("get", "persistentvolumeclaim", str(self._kuberay.claim), "--output=name")
        for job in self.jobs():
            if job.id == recipe.name:
                check_ended(job, self._where)
        self._kubectl("apply", "--dry-run=server", "--filename=-", text=documents)
        # a RayJob that has ended cannot be started again
        self._kubectl("delete", _JOBS, name, "--ignore-not-found", "--cascade=foreground", "--wait=true")
        self._kubectl("apply", "--filename=-", text=documents)
        return Job(recipe.name, "waiting", None, None)

    def render(self, recipe: Recipe) -> str:
        return manifest(self._cluster, for_cluster(recipe, self._cluster))

    def jobs(self) -> list[Job]:
        found = self._read("get", f"{_JOBS},{_RECIPES}", f"--selector={_selector()}")
        config_maps: dict[str, dict[str, Any]] = {}
        ray_jobs: dict[str, dict[str, Any]] = {}
        for each in found["items"]:
            of_kind = ray_jobs if each["kind"] == "RayJob" else config_maps
            of_kind[each["metadata"]["annotations"][RUN]] = each
        runs = sorted(config_maps, key=lambda run: _created(ray_jobs.get(run, config_maps[run])))
        return [_job(run, ray_jobs.get(run)) for run in reversed(runs)]

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """Yield the log of the pod that submitted the job to Ray; where there were several, of the newest."""
        last = ""
        while True:
            active = follow and self._job(job).state in ACTIVE
            pod = self._pod_with_log(job)
            if pod is not None:
                for stamp, line in self._lines(pod, active, last):
                    last = stamp
                    yield line
            elif not active:
                ranks = f"{self._cluster.runs}/{job}/logs"
                raise LaunchError(f"{self._where}: the pod with the log of {job} no longer exists; see {ranks}")
            if not active:
                return
            time.sleep(_LOG_POLL_S)

    def stop(self, job: str) -> None:
        check_active(self._job(job), self._where)
        # foreground: the RayJob exists, as stopping, until its last pod has ended
        self._kubectl("delete", _JOBS, kubernetes_name(job), "--cascade=foreground", "--wait=false")

    def recipe(self, job: str) -> Recipe:
        self._job(job)
        kept = self._read("get", _RECIPES, kubernetes_name(job))
        return recipes.parse(kept["data"]["recipe.yaml"], f"in the config map {kubernetes_name(job)}")

    @property
    def _where(self) -> str:
        context = f"context {self._kuberay.context}" if self._kuberay.context else "kubectl's context"
        return f"Kubernetes, {context}, namespace {self._kuberay.namespace}"

    def _job(self, name: str) -> Job:
        known = {job.id: job for job in self.jobs()}
        if name not in known:
            raise unknown(name, known, self._where)
        return known[name]

    def _check_secrets(self) -> None:
        """Check the names of the secrets, without reading their values. Skip the check where the user may not read
        secrets.

        Raises:
            LaunchError: the Kubernetes secret does not exist, or lacks some of them.
        """
        if not self._cluster.secrets:
            return
        names = '{{range $name, $value := .data}}{{$name}}{{"\\n"}}{{end}}'
        try:
            held = self._kubectl("get", "secret", str(self._kuberay.secret), f"--output=go-template={names}").split()
        except LaunchError as error:
            if "Forbidden" in str(error):
                return
            raise
        if missing := [name for name in self._cluster.secrets if name not in held]:
            secret = f"secret {self._kuberay.secret}"
            raise LaunchError(
                f"{self._where}: {secret} has no {', '.join(missing)}; it has {', '.join(held) or 'nothing'}"
            )

    def _pod_with_log(self, job: str) -> str | None:
        """Return the newest pod that submits the job to Ray, once it has started."""
        selector = f"--selector=job-name={kubernetes_name(job)}"
        pods = self._read("get", "pods", selector)["items"]
        begun = [pod for pod in pods if pod["status"]["phase"] != "Pending"]
        return max(begun, key=_created)["metadata"]["name"] if begun else None

    def _lines(self, pod: str, follow: bool, after: str) -> Iterator[tuple[str, str]]:
        """Yield (time, text) of each line later than `after`. A lost connection ends the lines early.

        Raises:
            LaunchError: there are no lines, and kubectl says why.
        """
        since = [f"--since-time={after}"] if after else []
        command = self._command("logs", pod, "--timestamps", f"--follow={str(follow).lower()}", *since)
        with (
            tempfile.TemporaryFile("w+", errors="replace") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace") as process,
        ):
            assert process.stdout is not None
            empty = True
            try:
                for line in process.stdout:
                    empty = False
                    stamp, _, text = line.rstrip("\n").partition(" ")
                    if stamp > after:  # --since-time is in whole seconds
                        yield stamp, text
                code = process.wait()
            finally:
                process.terminate()
            stderr.seek(0)
            why = stderr.read(2000).strip()
            if empty and code and "NotFound" not in why:  # the pod may disappear between two calls
                raise LaunchError(f"{self._where}: kubectl logs said: {why or f'exit code {code}'}")

    def _command(self, *arguments: str) -> list[str]:
        context = [f"--context={self._kuberay.context}"] if self._kuberay.context is not None else []
        return ["kubectl", *context, f"--namespace={self._kuberay.namespace}", *arguments]

    def _kubectl(self, *arguments: str, text: str | None = None) -> str:
        return run_tool(
            self._command(*arguments), self._where, "install it, or use another --on", text, f"kubectl {arguments[0]}"
        )

    def _read(self, *arguments: str) -> dict[str, Any]:
        answer = self._kubectl(*arguments, "--output=json")
        try:
            return json.loads(answer)
        except ValueError:
            raise LaunchError(f"{self._where}: cannot parse kubectl's answer: {answer[:200]!r}") from None


def _selector() -> str:
    return ",".join(f"{key}={value}" for key, value in OURS.items())


def _created(item: dict[str, Any]) -> str:
    return item["metadata"]["creationTimestamp"]


def _job(run: str, ray_job: dict[str, Any] | None) -> Job:
    if ray_job is None:
        return Job(run, "stopped", None, None)
    status = ray_job.get("status", {})
    state = _STATES.get(status.get("jobDeploymentStatus", ""), "waiting")
    if "deletionTimestamp" in ray_job["metadata"]:
        state = "stopping"
    elif status.get("jobStatus") == "STOPPED" and state == "finished":
        state = "stopped"
    message = status.get("message", "") or (status.get("jobDeploymentStatus", "") if state == "waiting" else "")
    return Job(run, state, _time(status.get("startTime")), _time(status.get("endTime")), message)


def _time(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()
