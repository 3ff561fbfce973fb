"""Jobs on an existing Ray cluster: submitted to its dashboard, which runs `vimscale launch --address auto` on the head.

Secrets are never sent: everyone who may open the dashboard can read what a job is submitted with, its environment
included. They must be in the environment that Ray was started in; a job without them ends at once.

To stop a job, Ray sends SIGTERM to the launcher, which saves. Ray's job supervisor then waits before it kills: 3 s by
default, which is far too short, or as long as a variable in the job's environment says. So a job sets what it needs.
"""

import contextlib
import http.client
import logging
import os
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import vimscale
from vimscale.errors import LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

from .. import cluster as clusters
from ..processes import num_ranks
from .backend import (
    Job,
    State,
    check_active,
    check_ended,
    environment,
    follow_text,
    for_cluster,
    launch_arguments,
    newest_first,
    reason,
    unknown,
)

log = logging.getLogger(__name__)

_ANSWER_S = 5
"""Time limit for the dashboard's first answer."""
_STALE_S = 8
"""How old Ray's count of free resources may be: it counts every 5 s."""
_BEGIN_S = 60
"""Time limit for a job that needs secrets to begin and look for them."""
_MONITORED_S = 3
"""Wait before deleting a job: Ray checks its jobs every second. If one is deleted before, Ray re-creates its record,
without its name.
"""
_KILL_AFTER_S = 60
"""Seconds on top of the grace that the launcher gives its ranks."""
_FOUND = "secrets are set"
"""What the job prints once it has found its secrets."""
_CODE = ("*.py", "*.sh", "*.yaml", "*.csv.gz", "py.typed", ".source-tree")
"""Files of the package that a job needs."""
_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
}


class RayJobs:
    def __init__(self, cluster: clusters.Cluster):
        self._cluster = cluster
        self._address = (cluster.ray or clusters.Ray()).address
        self._where = f"the Ray at {self._address}"

    def submit(self, recipe: Recipe) -> Job:
        recipe = for_cluster(recipe, self._cluster)
        attempts = self._attempts().get(recipe.name, [])
        if attempts:
            check_ended(self._job(attempts[-1]), self._where)
        self._check_room(num_ranks.bounds(self._cluster.ranks)[0])
        with tempfile.TemporaryDirectory(prefix="vimscale-job-") as folder, self._connected() as client:
            self._pack(Path(folder), recipe)
            existing = [each.submission_id or "" for each in client.list_jobs()]
            number = 1 + max((_attempt(id_) for id_ in existing if id_.startswith(f"{recipe.name}@")), default=0)
            id_ = client.submit_job(
                entrypoint=self._entrypoint(recipe),
                submission_id=f"{recipe.name}@{number}",
                runtime_env={"working_dir": folder, "env_vars": self._environment()},
                metadata={"vimscale": recipe.name, "recipe": recipe.model_dump_json()},
            )
        if self._cluster.secrets:
            self._wait_for_secrets(id_)
        with self._connected() as client:
            return self._job(client.get_job_info(id_))

    def render(self, recipe: Recipe) -> str:
        recipe = for_cluster(recipe, self._cluster)
        with tempfile.TemporaryDirectory(prefix="vimscale-job-") as folder:
            self._pack(Path(folder), recipe)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
        lines = [f"# to {self._where}, with {len(files)} files, {size / 1e6:.1f} MB in total; environment:"]
        lines += [f"#   {name}={shlex.quote(value)}" for name, value in self._environment().items()]
        return "\n".join([*lines, "# recipe.yaml", recipe.to_yaml(), "# entrypoint", self._entrypoint(recipe)])

    def jobs(self) -> list[Job]:
        return newest_first(self._job(attempts[-1]) for attempts in self._attempts().values())

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        id_ = self._newest(job).submission_id

        def text() -> str:
            with self._connected() as client:
                return client.get_job_logs(id_)

        def ended() -> bool:
            with self._connected() as client:
                return not follow or client.get_job_status(id_).is_terminal()

        return follow_text(text, ended)

    def stop(self, job: str) -> None:
        newest = self._newest(job)
        check_active(self._job(newest), self._where)
        with self._connected() as client:
            client.stop_job(newest.submission_id)

    def recipe(self, job: str) -> Recipe:
        return recipes.parse(self._newest(job).metadata["recipe"], f"of job {job} on {self._where}")

    # ---- what is submitted

    def _pack(self, folder: Path, recipe: Recipe) -> None:
        """Fill the job's working folder: the recipe, and the code unless the nodes' image has it."""
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        if self._cluster.image is not None:
            return
        package = Path(vimscale.__file__).parent
        siblings = [package.parent / name for name in ("kernels", "launch", "recipes", "cluster")]
        for folder_of_code in (package, *(siblings if len(vimscale.__path__) > 1 else ())):
            for path in (found for pattern in _CODE for found in folder_of_code.rglob(pattern)):
                copy = folder / path.relative_to(package.parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

    def _entrypoint(self, recipe: Recipe) -> str:
        """Return a line for sh. It ends with exec, so that signals reach the launcher."""
        arguments = launch_arguments(self._cluster, "recipe.yaml", self._cluster.runs)
        launch = shlex.join(["exec", "python", "-m", "vimscale.launch.cli", *arguments])
        checks = [
            f'[ -n "${name}" ] || {{ echo "error: secret {name} is not set in the environment that Ray was started in;'
            f' set it there on every node"; exit 2; }}'
            for name in self._cluster.secrets
        ]
        return "; ".join([*checks, *([f"echo '{_FOUND}'"] if checks else []), launch])

    def _environment(self) -> dict[str, str]:
        return environment(self._cluster) | {"RAY_JOB_STOP_WAIT_TIME_S": str(self._cluster.grace + _KILL_AFTER_S)}

    # ---- requests to the cluster

    @cached_property
    def _client(self) -> Any:
        self._check_answers()
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)
        return JobSubmissionClient(self._address)

    def _check_answers(self) -> None:
        """Check that the dashboard answers: Ray's client would wait forever, and its messages say little.

        Raises:
            LaunchError: the address is malformed, nothing answers, or what answers is not a dashboard.
        """
        remedy = "start it, open a tunnel to it, or give another with --with ray.address=http://HOST:PORT"
        parts = urlsplit(self._address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise LaunchError("ray.address: write http://HOST:PORT, the address of Ray's dashboard")
        try:
            with urllib.request.urlopen(f"{self._address.rstrip('/')}/api/version", timeout=_ANSWER_S) as answer:
                if b"ray_version" not in answer.read(10_000):
                    raise LaunchError(f"what answers at {self._address} is not a Ray dashboard; {remedy}")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise LaunchError(f"what answers at {self._address} is not a Ray dashboard; {remedy}") from None
            os.environ["RAY_AUTH_MODE"] = "token"
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise LaunchError(f"nothing answers at {self._address} ({why}); {remedy}") from None
        if parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            log.warning(
                "%s takes jobs from anyone who can connect to it; start it with RAY_AUTH_MODE=token", self._where
            )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Provide Ray's client, and turn what it raises into a message for the user."""
        try:
            yield self._client
        except (OSError, RuntimeError) as error:
            # the last line of the server's traceback, where there is one
            last = [line for line in str(error).splitlines() if line.strip(" .")][-1].strip(" .")
            raise LaunchError(f"{self._where} refused the request: {last}") from None
        except Exception as error:
            if (
                type(error).__name__ != "AuthenticationError"
            ):  # Ray's own, which may only be imported once the address is known
                raise
            raise LaunchError(
                f"{self._where} requires its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it"
            ) from None

    def _attempts(self) -> dict[str, list[Any]]:
        """Return all submissions, from this machine or another, by run, with the newest attempt last."""
        with self._connected() as client:
            ours = [each for each in client.list_jobs() if "vimscale" in (each.metadata or {})]
        runs: dict[str, list[Any]] = {}
        for each in sorted(ours, key=lambda each: _attempt(each.submission_id)):
            runs.setdefault(each.metadata["vimscale"], []).append(each)
        return runs

    def _newest(self, job: str) -> Any:
        attempts = self._attempts()
        if job not in attempts:
            raise unknown(job, attempts, self._where)
        return attempts[job][-1]

    def _job(self, details: Any) -> Job:
        state, message = _STATES[details.status.value], ""
        if state == "failed" and details.driver_exit_code == 3:  # it saved, at its time limit or on a signal
            state = "stopped"
        if state in ("waiting", "failed"):
            message = reason(details.message or "")
        began, ended = ((at / 1000 if at else None) for at in (details.start_time, details.end_time))
        return Job(details.metadata["vimscale"], state, began, ended, message)

    def _check_room(self, ranks: int) -> None:
        """Check that the ranks have room now: the launcher would wait half a minute and then fail with the same error
        in a log. A cluster that does not report its resources is left to the launcher.

        Raises:
            LaunchError: there is no room for `ranks` ranks.
        """
        kind = "GPU" if self._cluster.gpus else "CPU"
        deadline = time.monotonic() + _STALE_S
        while (room := self._room(kind)) is not None and room[0] < ranks:
            free, total = room
            if total < ranks or time.monotonic() > deadline:
                rule = f"{ranks} ranks take one {kind} each, and {self._where} has {total}, {free} of them free"
                raise LaunchError(
                    f"{rule}; change workers, gpus or nodes in the cluster file, or wait for other jobs to end"
                )
            time.sleep(1)

    def _room(self, kind: str) -> tuple[int, int] | None:
        """Return (free, total) CPUs, or GPUs that have a CPU each; None if the cluster does not report them."""
        with self._connected() as client:
            answer = client._do_request("GET", "/api/cluster_status", timeout=_ANSWER_S).json()
        nodes = ((answer["data"]["clusterStatus"] or {}).get("loadMetricsReport") or {}).get("usageByNode") or {}
        if not nodes:
            return None
        amounts = [[node.get(name, (0, 0)) for name in ("CPU", kind)] for node in nodes.values()]
        free = sum(min(int(total - used) for used, total in node) for node in amounts)
        return free, sum(min(int(total) for _, total in node) for node in amounts)

    def _wait_for_secrets(self, id_: str) -> None:
        """Return once the job has found its secrets, or after _BEGIN_S.

        Raises:
            LaunchError: the job ended without them; it is deleted.
        """
        deadline = time.monotonic() + _BEGIN_S
        while time.monotonic() < deadline:
            with self._connected() as client:
                details, text = client.get_job_info(id_), client.get_job_logs(id_)
                if _FOUND in text.splitlines():
                    return
                if details.status.is_terminal():
                    time.sleep(_MONITORED_S)
                    client.delete_job(id_)
                    raise LaunchError(reason(text))
            time.sleep(0.3)


def _attempt(id_: str) -> int:
    return int(id_.rpartition("@")[2])
