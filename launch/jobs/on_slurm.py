"""Jobs on Slurm: a batch script (slurm.sh) starts Ray on its nodes, runs `vimscale launch` there, and requeues itself.

What is known of a job is in RUNS/NAME/job, which nodes and submitters share: `script` and `id` from the submitter,
`stop` if a stop was requested, `ended` with the exit code from the script itself. squeue answers the rest.
"""

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from vimscale.errors import ClusterError, LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.storage import files

from ..cluster import Cluster, Slurm, seconds
from .backend import (
    ACTIVE,
    Job,
    check_active,
    check_secrets,
    environment,
    follow_file,
    for_cluster,
    job_files,
    job_folder,
    launch_arguments,
    run_tool,
    state_of,
    unknown,
)

_LOG_POLL_S = 1.0
"""Pause between two reads of a log that is followed; each also asks squeue."""
_AFTER_S = 30
"""Seconds that the script needs after the ranks have saved and ended."""
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")
_RECIPE = ("<< 'END_OF_RECIPE'\n", "END_OF_RECIPE\n")
"""What stands before and after the recipe in a script."""


class SlurmJobs:
    def __init__(self, cluster: Cluster):
        faults = []
        if re.search(r'["\\%\n]', cluster.runs):
            faults.append(f"runs {cluster.runs!r}: Slurm does not take a path with a quote, backslash or percent sign")
        if any(line.strip() in ("END_OF_SETUP", "") for line in (cluster.slurm or Slurm()).setup):
            faults.append("slurm.setup: a line is empty, or is END_OF_SETUP, which ends the setup in the script")
        if faults:
            raise ClusterError("cluster slurm", faults)
        self._cluster = cluster
        self._runs = Path(cluster.runs)
        self._where = f"Slurm, with runs in {self._runs}"

    def submit(self, recipe: Recipe) -> Job:
        script = self.render(recipe)
        check_secrets(self._cluster)
        if self._queued([recipe.name]):
            raise LaunchError(
                f"Slurm: a job named {recipe.name} is in the queue; stop it first, or choose another name="
            )
        folder = job_folder(self._runs, recipe.name)
        made = [path for path in (folder, folder.parent) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(
                f"Slurm: {folder} cannot be made: {error.strerror}; `runs` must be a folder that this machine shares"
            ) from None
        try:
            answer = _run("sbatch", "--parsable", text=script).strip()
            if not (number := answer.partition(";")[0]).isdecimal():
                raise LaunchError(f"Slurm: cannot parse sbatch's answer: {answer[:200]!r}")
        except LaunchError:
            for path in made:
                path.rmdir()
            raise
        try:
            for name in ("stop", "ended"):
                (folder / name).unlink(missing_ok=True)
            files.write(folder / "script", script)
            files.write(folder / "id", number + "\n")
        except OSError:  # without its files, the job could not be stopped
            _run("scancel", number)
            raise
        return Job(recipe.name, "waiting", None, None, f"Slurm job {number}")

    def render(self, recipe: Recipe) -> str:
        cluster, slurm = self._cluster, self._cluster.slurm or Slurm()
        folder = job_folder(self._runs, recipe.name)
        nodes = f"{cluster.least_nodes}-{cluster.nodes}" if cluster.least_nodes < cluster.nodes else str(cluster.nodes)
        options = {
            "job-name": recipe.name,
            "nodes": nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": cluster.cpus,
            "gpus-per-node": cluster.gpus or None,
            "mem": f"{int(cluster.memory * 1e9 / 2**20)}M",
            "time": _slurm_time(cluster.time_limit),
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "signal": f"B:USR1@{cluster.grace + _AFTER_S}",
            "open-mode": "append",
            "output": f'"{folder}/slurm-%j.log"',
            "export": ",".join(cluster.secrets) or "NONE",
        }
        flags = ["requeue", *["exclusive"] * slurm.exclusive, *["no-kill"] * (cluster.least_nodes < cluster.nodes)]
        lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
        step = ["srun", "--overlap", "--mem=0", f"--cpus-per-task={cluster.cpus}"]
        if slurm.container is not None:
            step += [f"--container-image={slurm.container}", f"--container-mounts={cluster.runs}:{cluster.runs}"]
        ray = ["--block", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
        ray += [f"--num-cpus={cluster.cpus}", f"--num-gpus={cluster.gpus}", "--object-store-memory=200000000"]
        address = "hostname -I | cut -d' ' -f1"
        if cluster.interface is not None:
            address = f"ip -4 -o addr show dev {cluster.interface} | awk '{{print $4}}' | cut -d/ -f1"
        launch = ["vimscale", *launch_arguments(cluster, f"{folder}/recipe.yaml", cluster.runs)]
        return _filled(
            Path(__file__).with_name("slurm.sh").read_text(),
            options="\n#SBATCH ".join([*lines, *[f"--{flag}" for flag in flags]]),
            name=recipe.name,
            folder=shlex.quote(str(folder)),
            grace=str(cluster.grace),
            environment="".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment(cluster).items()),
            recipe=for_cluster(recipe, cluster).to_yaml(),
            setup="".join(line + "\n" for line in slurm.setup),
            step=shlex.join(step),
            on_head='"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head"' if slurm.container is not None else "",
            address=address,
            ray=shlex.join(ray),
            launch=shlex.join(launch),
        )

    def jobs(self) -> list[Job]:
        names = self._known()
        queued = self._queued(names)
        jobs = [self._job(name, queued) for name in names]
        return sorted(jobs, key=lambda job: -self._time(job.id, "id"))

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        def ended() -> bool:
            return not follow or self._job(job, self._queued([job])).state not in ACTIVE

        return follow_file(job_folder(self._runs, job) / f"slurm-{self._number(job)}.log", 0, ended, _LOG_POLL_S)

    def stop(self, job: str) -> None:
        number = self._number(job)
        found = self._job(job, self._queued([job]))
        check_active(found, self._where)
        # write this before the signal: the script reads it to decide whether to be requeued
        (job_folder(self._runs, job) / "stop").touch()
        _run("scancel", *(["--batch", "--signal=USR1"] if found.state != "waiting" else []), number)

    def recipe(self, job: str) -> Recipe:
        self._number(job)
        script = job_folder(self._runs, job) / "script"
        before, after = _RECIPE
        return recipes.parse(script.read_text().partition(before)[2].partition(after)[0], f"in {script}")

    def _number(self, job: str) -> str:
        known = self._known()
        if job not in known:
            raise unknown(job, known, self._where)
        return (job_folder(self._runs, job) / "id").read_text().strip()

    def _known(self) -> list[str]:
        """Return the runs that were submitted with this folder of runs."""
        return [path.parts[-3] for path in job_files(self._runs, "id")]

    def _queued(self, names: list[str]) -> dict[str, tuple[str, str]]:
        """Return (state, reason) of each job in the queue, by its number. Ask squeue even if no job is known, so that a
        Slurm that does not answer is reported.
        """
        named = ",".join(names) or "vimscale"
        answer = _run("squeue", "--noheader", f"--name={named}", "--format=%i|%T|%r")
        parts = [line.strip().split("|", 2) for line in answer.splitlines() if line.strip()]
        if any(len(part) != 3 for part in parts):
            raise LaunchError(f"Slurm: cannot parse squeue's answer: {answer[:200]!r}")
        return {number: (state, reason) for number, state, reason in parts}

    def _job(self, name: str, queued: dict[str, tuple[str, str]]) -> Job:
        folder, number = job_folder(self._runs, name), self._number(name)
        began = self._time(name, "began") or None
        if (folder / "ended").exists():
            code = (folder / "ended").read_text().strip()
            state = state_of(int(code)) if code.isdecimal() else "failed"
            message = f"exit code {code}" if state == "failed" else ""
            return Job(name, state, began, self._time(name, "ended"), message)
        stop_requested = (folder / "stop").exists()
        if number in queued:
            slurm_state, reason = queued[number]
            if slurm_state in _WAITING:
                return Job(name, "waiting", began, None, f"Slurm job {number}: {reason}")
            return Job(name, "stopping" if stop_requested else "running", began, None, f"Slurm job {number}")
        if stop_requested:
            return Job(name, "stopped", began, self._time(name, "stop"))
        return Job(
            name,
            "failed",
            began,
            None,
            f"job {number} is gone without a record of how it ended; see sacct -j {number}",
        )

    def _time(self, name: str, file: str) -> float:
        """Return when a file of the job's folder was written, in seconds since the epoch; 0 if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return (job_folder(self._runs, name) / file).stat().st_mtime
        return 0.0


def _slurm_time(limit: str | None) -> str | None:
    """Return a time limit in minutes, rounded up."""
    return None if limit is None else str(-(-(seconds(limit) or 0) // 60))


def _run(program: str, *arguments: str, text: str | None = None) -> str:
    return run_tool([program, *arguments], "Slurm", "log in to a node that submits jobs", text)


def _filled(template: str, **values: str) -> str:
    """Replace each @name@. A name alone on its line stands for any number of lines, none included. The values are not
    searched for names.
    """
    return re.sub(r"^@(\w+)@\n|@(\w+)@", lambda found: values[found[1] or found[2]], template, flags=re.MULTILINE)
