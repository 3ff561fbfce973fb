"""Jobs on Slurm: a batch script that starts Ray over its nodes and `vimscale launch` on that, and asks to be requeued.

What is known of a job is in RUNS/NAME/job, which nodes and submitters share: `script` and `id` from the submitter,
`stop` if it was asked to stop, `ended` with the exit code from the script itself. Slurm is asked for the rest.
"""

import contextlib
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from vimscale.errors import ClusterError, LaunchError
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.storage import files

from ..cluster import Cluster, Slurm, seconds
from .backend import Job, State, ask, completed, environment, job_files, launch_arguments, unknown

_LOOK_S = 1.0
"""How often a log that is followed is looked at."""
_AFTER_S = 30
"""What the script needs once the ranks have saved and ended."""
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")
_RECIPE = ("<< 'END_OF_RECIPE'\n", "END_OF_RECIPE\n")


class SlurmJobs:
    def __init__(self, cluster: Cluster):
        faults = []
        if re.search(r'["\\%\n]', cluster.runs):
            faults.append(
                f"runs {cluster.runs!r}: Slurm cannot be told a path with a quote, backslash or per cent sign"
            )
        if any(line.strip() in ("END_OF_SETUP", "") for line in (cluster.slurm or Slurm()).setup):
            faults.append("slurm.setup: a line is empty, or END_OF_SETUP, which ends the list in the script")
        if faults:
            raise ClusterError("cluster slurm", faults)
        self._cluster = cluster
        self._runs = Path(cluster.runs)

    def submit(self, recipe: Recipe) -> Job:
        script = self.render(recipe)
        if missing := [name for name in self._cluster.secrets if name not in os.environ]:
            raise LaunchError(f"Slurm: secrets {', '.join(missing)}: not set in this environment; export them first")
        if self._queued([recipe.name]):
            raise LaunchError(f"Slurm: a job named {recipe.name} is in the queue; stop it, or choose another name=")
        folder = self._folder(recipe.name)
        made = [path for path in (folder, folder.parent) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(
                f"Slurm: {folder} cannot be made: {error.strerror}; `runs` must be reached from here"
            ) from None
        try:
            answer = _ask("sbatch", "--parsable", text=script).strip()
            if not (number := answer.partition(";")[0]).isdecimal():
                raise LaunchError(f"Slurm: sbatch's answer is not understood: {answer[:200]!r}")
        except LaunchError:
            for path in made:
                path.rmdir()
            raise
        try:
            for name in ("stop", "ended"):
                (folder / name).unlink(missing_ok=True)
            files.write(folder / "script", script)
            files.write(folder / "id", number + "\n")
        except OSError:  # a job that nothing is known of could not be stopped
            _ask("scancel", number)
            raise
        return Job(recipe.name, "waiting", None, None, f"Slurm job {number}")

    def render(self, recipe: Recipe) -> str:
        cluster, slurm = self._cluster, self._cluster.slurm or Slurm()
        folder = self._folder(recipe.name)
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
        launch += ["--address", "auto", "--workers", cluster.ranks]
        return _SCRIPT.format(
            options="\n".join(f"#SBATCH {line}" for line in [*lines, *[f"--{flag}" for flag in flags]]),
            name=recipe.name,
            folder=shlex.quote(str(folder)),
            grace=cluster.grace,
            environment="".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment(cluster).items()),
            recipe=completed(recipe, cluster).to_yaml(),
            setup="".join(line + "\n" for line in slurm.setup),
            step=shlex.join(step),
            here='"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head"' if slurm.container is not None else "",
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
        path = self._folder(job) / f"slurm-{self._number(job)}.log"
        begun = 0
        while True:
            active = follow and self._job(job, self._queued([job])).state in ("waiting", "running", "stopping")
            if path.exists():
                with path.open("rb") as file:
                    file.seek(begun)
                    for line in file:
                        if active and not line.endswith(b"\n"):  # it is still being written
                            break
                        begun += len(line)
                        yield line.decode(errors="replace").rstrip("\n")
            if not active:
                return
            time.sleep(_LOOK_S)

    def stop(self, job: str) -> None:
        number = self._number(job)
        state = self._job(job, self._queued([job])).state
        if state not in ("waiting", "running", "stopping"):
            raise LaunchError(f"Slurm: {job} has {state} already; there is nothing to stop")
        # before the signal: the script looks whether it is to be queued again
        (self._folder(job) / "stop").touch()
        _ask("scancel", *(["--batch", "--signal=USR1"] if state != "waiting" else []), number)

    def recipe(self, job: str) -> Recipe:
        self._number(job)
        text = (self._folder(job) / "script").read_text()
        return recipes.parse(text.partition(_RECIPE[0])[2].partition(_RECIPE[1])[0], f"in {self._folder(job)}/script")

    def _folder(self, name: str) -> Path:
        return self._runs / name / "job"

    def _number(self, job: str) -> str:
        known = self._known()
        if job not in known:
            raise unknown(job, known, f"Slurm, by {self._runs}")
        return (self._folder(job) / "id").read_text().strip()

    def _known(self) -> list[str]:
        """Runs that were submitted here."""
        return [path.parts[-3] for path in job_files(self._runs, "id")]

    def _queued(self, names: list[str]) -> dict[str, tuple[str, str]]:
        """(state, reason) of each job in the queue, by its number. Slurm is asked even if no job is known: whether it
        answers is news too.
        """
        named = ",".join(names) or "vimscale"
        answer = _ask("squeue", "--noheader", f"--name={named}", "--format=%i|%T|%r")
        parts = [line.strip().split("|", 2) for line in answer.splitlines() if line.strip()]
        if any(len(part) != 3 for part in parts):
            raise LaunchError(f"Slurm: squeue's answer is not understood: {answer[:200]!r}")
        return {number: (state, reason) for number, state, reason in parts}

    def _job(self, name: str, queued: dict[str, tuple[str, str]]) -> Job:
        folder, number = self._folder(name), self._number(name)
        began = self._time(name, "began") or None
        if (folder / "ended").exists():
            code = (folder / "ended").read_text().strip()
            state: State = "finished" if code == "0" else "stopped" if code == "3" else "failed"
            message = f"exit code {code}" if state == "failed" else ""
            return Job(name, state, began, self._time(name, "ended"), message)
        asked = (folder / "stop").exists()
        if number in queued:
            slurms, reason = queued[number]
            if slurms in _WAITING:
                return Job(name, "waiting", began, None, f"Slurm job {number}: {reason}")
            return Job(name, "stopping" if asked else "running", began, None, f"Slurm job {number}")
        if asked:
            return Job(name, "stopped", began, self._time(name, "stop"))
        return Job(
            name, "failed", began, None, f"Slurm ended job {number} without its last word; see sacct -j {number}"
        )

    def _time(self, name: str, what: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder(name) / what).stat().st_mtime
        return 0.0


def _slurm_time(limit: str | None) -> str | None:
    """Minutes, rounded up."""
    return None if limit is None else str(-(-(seconds(limit) or 0) // 60))


def _ask(program: str, *arguments: str, text: str | None = None) -> str:
    return ask([program, *arguments], "Slurm", "log in to a node that submits jobs", text)


_SCRIPT = """\
#!/bin/bash
{options}
#
# The run {name}: Ray over the nodes of this job, and vimscale launch on it (docs/clusters.md).

job={folder}
touch "$job/began"
cat > "$job/recipe.yaml" << 'END_OF_RECIPE'
{recipe}END_OF_RECIPE

# srun would hand on no more than sbatch's --export named
export SLURM_EXPORT_ENV=ALL
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
export RAY_USAGE_STATS_ENABLED=0
# a node whose Ray gets a SIGTERM counts as taken away: the run saves, and then that Ray ends
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={grace}
{environment}
# two jobs may share a node: ports below those that the system hands out, and folders of their own
port=$((20000 + SLURM_JOB_ID % 1200 * 10))
export temporary="/tmp/vimscale-$SLURM_JOB_ID"

read -r -d '' on_node << 'END_OF_SETUP'
{setup}exec "$@"
END_OF_SETUP
# Ray leaves its folder behind, and opens it to every user of the node: it lies in one that is ours alone
read -r -d '' ray_on_node << 'END_OF_NODE'
if ! mkdir -m 700 "$temporary" 2> /dev/null && [ ! -O "$temporary" ]; then
    echo "$temporary cannot be made, or belongs to another user" >&2
    exit 1
fi
trap 'kill "$!"' TERM
"$@" > /dev/null &
wait "$!"
wait "$!"
rm -rf "$temporary"
END_OF_NODE
step=({step})
ray() {{
    local where=("${{@:1:3}}")
    "${{step[@]}}" "${{where[@]}}" bash -c "$on_node" node bash -c "$ray_on_node" ray ray start "${{@:4}}" {ray} &
    steps+=("$!")
}}

# Slurm's notice before the time limit, a preemption, or `vimscale stop`
asked=
launcher=
ask() {{
    asked=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher"
}}
trap ask USR1 TERM

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$({address})"
steps=()
agent=$((port + 2))
ray --nodes=1 --ntasks=1 --nodelist="$head" --head --node-ip-address="$address" --port="$port" \\
    --ray-client-server-port=$((port + 1)) --dashboard-agent-listen-port="$agent" --include-dashboard=false \\
    --temp-dir="$temporary/r"
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    ray --nodes="$others" --ntasks="$others" --exclude="$head" --address="$address:$port" \\
        --dashboard-agent-listen-port="$agent"
fi

here=({here})
export RAY_ADDRESS="$address:$port"
wait_for="from vimscale.launch.processes import ray_connection
ray_connection.wait_for_nodes('$RAY_ADDRESS', $SLURM_JOB_NUM_NODES)"
"${{here[@]}}" bash -c "$on_node" node python3 -c "$wait_for"
code=$?
if [ -n "$asked" ]; then
    code=3
elif [ "$code" = 0 ]; then
    "${{here[@]}}" bash -c "$on_node" node {launch} &
    launcher=$!
    # a signal ends `wait` early
    while wait "$launcher"; kill -0 "$launcher" 2> /dev/null; do :; done
    wait "$launcher"
    code=$?
    launcher=
fi
kill "${{steps[@]}}"
wait

# 3: stopped with a checkpoint. Of a run that was asked to stop anything else but its end or a wrong recipe means that
# there was no time left to save; it goes on from the checkpoint before.
if [ -n "$asked" ] && [ "$code" != 0 ] && [ "$code" != 2 ]; then code=3; fi
if [ "$code" = 3 ] && [ ! -e "$job/stop" ] && scontrol requeue "$SLURM_JOB_ID"; then exit 3; fi
echo "$code" > "$job/ended"
exit "$code"
"""
