"""Jobs outlive the shell that submitted them: on this machine, and on a real Ray head that has a token."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ray_head import RayHead, ray_head
from tests.support.shell import Shell
from vimscale.errors import ClusterError, RecipeError
from vimscale.launch import cluster as clusters
from vimscale.launch.jobs import backend as jobs
from vimscale.launch.jobs.on_ray import RayJobs
from vimscale.recipe import recipe as recipes
from vimscale.runtime import run_folder

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a value that is in no file"


@dataclass
class Head:
    """A Ray head for one test, with a token and a secret in its environment."""

    shell: Shell
    """A folder whose commands know the token."""
    ray: RayHead

    @property
    def on(self) -> tuple[str, ...]:
        changes = (f"ray.address=http://127.0.0.1:{self.ray.dashboard}", f"runs={self.shell.folder}/runs")
        return ("--on", "ray", *(part for change in changes for part in ("--with", change)))

    def jobs(self) -> dict[str, dict]:
        return {job["id"]: job for job in json.loads(self.shell.run("jobs", *self.on, "--json"))}

    def visible(self) -> str:
        """Return what Ray reports about its jobs to those with the token, and what every user of the machine sees."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ray.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {self.ray.token}"}
        )
        with urllib.request.urlopen(request) as answer:
            return answer.read().decode() + str(self.shell.processes())


@pytest.fixture
def head(shell: Shell) -> Iterator[Head]:
    shell.env |= {"no_proxy": "127.0.0.1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "PYTHONPATH": str(ROOT), "TEST_SECRET": SECRET}
    with ray_head(shell, "--dashboard-host=127.0.0.1", env=env) as ray:
        while not _answers(ray.dashboard):
            assert ray.process.poll() is None, (shell.folder / "head.txt").read_text()
            time.sleep(0.1)
        yield Head(shell, ray)
        shell.end()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status == 401
    except OSError:
        return False
    finally:
        connection.close()


def _wait_for_rows(head: Head, name: str, after: int = 0) -> None:
    """Wait until the job has logged more steps than that; ask for its state rarely, which takes a process."""
    while len(head.shell.rows(name)) <= after:
        assert head.jobs()[name]["state"] in ("waiting", "running")
        time.sleep(2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_ray_outlives_its_shell_and_is_stopped_and_resumed_from_other_shells(head: Head) -> None:
    shell = head.shell
    on = (*head.on, "--with", "image=has-the-code", "--with", "secrets=[TEST_SECRET]")
    submitter = shell.popen("submit", "small.yaml", "steps=100000", *on, "--follow")
    assert submitter.stdout is not None
    assert any(line.startswith("small: 2 ranks on the Ray") for line in submitter.stdout)
    submitter.kill()
    submitter.communicate()
    _wait_for_rows(head, "small")
    shell.run("stop", "small", *on)
    assert "stopped on request; the same command resumes from step_" in shell.run(
        "logs", "small", *on, "--follow", expect=3
    )
    done = len(shell.rows("small"))
    assert run_folder.checkpoints(shell.folder / "runs/small/checkpoints")[0].name == f"step_{done:08d}"
    assert head.jobs()["small"]["state"] == "stopped"
    shell.run("resume", "small", *on)
    _wait_for_rows(head, "small", done)
    shell.run("stop", "small", *on)
    shell.run("logs", "small", *on, "--follow", expect=3)
    assert [row["step"] for row in shell.rows("small")] == list(range(1, len(shell.rows("small")) + 1))
    visible = head.visible()
    assert "small@2" in visible
    assert SECRET not in visible
    assert head.ray.token not in visible


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_a_ray_cannot_take_is_refused_and_leaves_nothing_behind(head: Head) -> None:
    shell, on = head.shell, (*head.on, "--with", "image=has-the-code")
    missing = shell.run("submit", "small.yaml", *on, "--with", "secrets=[NOT_THERE]", expect=2)
    assert "secret NOT_THERE is not set" in missing
    assert head.jobs() == {}
    assert "small@" not in head.visible(), "Ray itself has deleted it too"
    shell.run("submit", "small.yaml", "steps=100000", *on)
    _wait_for_rows(head, "small")
    assert "small is running" in shell.run("submit", "small.yaml", *on, expect=2)
    for workers in ("1", "16", "'3:4'"):
        refused = shell.run("submit", "small.yaml", "name=other", *on, "--with", f"workers={workers}", expect=2)
        assert "has 2, 0 of them free" in refused
    shell.run("stop", "small", *on)
    shell.run("logs", "small", *on, "--follow", expect=3)
    assert "has already stopped; there is nothing to stop" in shell.run("stop", "small", *on, expect=2)
    assert "did you mean small?" in shell.run("stop", "smal", *on, expect=2)
    assert set(head.jobs()) == {"small"}
    shell.env.pop("RAY_AUTH_TOKEN")
    assert "requires its token" in shell.run("jobs", *on, expect=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_code_is_sent_and_the_run_folder_next_to_it_is_not(head: Head) -> None:
    shell = head.shell
    (shell.folder / "runs/old").mkdir(parents=True)
    with (shell.folder / "runs/old/weights").open("w") as sparse:
        sparse.truncate(5 << 30)
    began = time.monotonic()
    follower = shell.popen("submit", "small.yaml", "steps=600", "checkpoint.every=5", *head.on, "--follow")
    assert follower.stdout is not None
    assert any(line.startswith("small: 2 ranks on the Ray") for line in follower.stdout)
    print(f"submit to the launcher's first line: {time.monotonic() - began:.1f} s")
    while len(shell.rows("small")) < 10:
        assert follower.poll() is None
    shell.run("stop", "small", *head.on)
    shell.finish(follower, expect=3)
    sent = list(head.ray.temporary.glob("session_2*/runtime_resources/**/*"))
    assert any(path.name == "digits.csv.gz" for path in sent)
    assert sum(path.stat().st_size for path in sent) < 5e6
    shell.run("resume", "small", *head.on, "--follow")
    shell.run("launch", "small.yaml", "steps=600", "name=plain", "--no-ray", "--workers", "2")
    assert shell.losses("small") == shell.losses("plain")
    assert "is finished" in shell.run("resume", "small", *head.on, expect=2)


@pytest.mark.slow
def test_a_job_of_this_machine_outlives_its_shell_and_is_stopped_and_resumed(shell: Shell) -> None:
    on = ("--on", "local", "--with", "workers=2")
    shell.run("submit", "small.yaml", "steps=600", *on)
    assert "small is running" in shell.run("submit", "small.yaml", *on, expect=2)
    while len(shell.rows("small")) < 3:
        assert json.loads(shell.run("jobs", *on, "--json"))[0]["state"] == "running"
    shell.run("stop", "small", *on)
    assert "stopped on request; the same command resumes from step_" in shell.run(
        "logs", "small", *on, "--follow", expect=3
    )
    assert json.loads(shell.run("jobs", *on, "--json"))[0]["state"] == "stopped"
    shell.run("resume", "small", *on, "--follow")
    shell.run("launch", "small.yaml", "steps=600", "name=plain", "--no-ray", "--workers", "2")
    assert shell.losses("small") == shell.losses("plain")
    shell.run("submit", "small.yaml", "steps=600", "name=killed", *on)
    (pid,) = (pid for pid, command in shell.processes().items() if "local_child" in command)
    os.kill(pid, signal.SIGKILL)
    assert "failed" in shell.run("jobs", *on)
    shell.nothing_is_left()


@pytest.mark.slow
def test_a_time_limit_ends_a_run_with_a_checkpoint(shell: Shell) -> None:
    endless = ("launch", "small.yaml", "steps=100000", "--no-ray", "--workers", "1")
    for limit in ("10s", "40s", "160s"):  # a machine too slow for one step in that time leaves no run behind
        said = shell.run(*endless, "--time-limit", limit, expect=3)
        if "before the first step" not in said:
            break
    assert "stopped on request; the same command resumes from step_" in said
    assert run_folder.checkpoints(shell.folder / "runs/small/checkpoints")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("submit", "small.yaml", "name=a; rm -rf ~", "--on", "local"), "cannot name a folder"),
        (("stop", "a; rm -rf ~", "--on", "local"), "cannot name a folder"),
        (("logs", "../../etc", "--on", "local"), "cannot name a folder"),
        (("stop", "small", "--on", "local"), "there is no job small on this machine"),
        (("submit", "small.yaml", "--on", "loca"), "did you mean local?"),
        (("submit", "small.yaml", "--on", "local", "--with", "secrets=[NOT_THERE]"), "secret NOT_THERE is not set"),
        (("submit", "small.yaml", "--on", "local", "--with", "workers=1000"), "--workers 1000: each rank takes one"),
        (("jobs", "--on", "ray", "--with", "ray.address=http://127.0.0.1:1"), "nothing answers at http://127.0.0.1:1"),
        (("submit", "small.yaml", "--on", "ray", "--with", "ray.address=http://127.0.0.1:1"), "nothing answers"),
        (("jobs", "--on", "ray", "--with", "ray.address=127.0.0.1"), "write http://HOST:PORT"),
    ],
)
def test_an_impossible_request_ends_in_one_message(shell: Shell, command: tuple[str, ...], said: str) -> None:
    output = shell.run(*command, expect=2)
    assert said in output
    assert "Traceback" not in output
    assert output.count("error:") == 1
    assert not (shell.folder / "runs").exists(), "nothing is left behind"


def test_a_server_that_is_not_a_ray_is_reported(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = shell.popen("jobs", "--on", "ray", "--with", f"ray.address=http://127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")
            assert "nothing answers" in shell.finish(asked, expect=2)


def _ray(**changes: object) -> clusters.Cluster:
    return clusters.load("ray", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def test_paths_with_special_characters_reach_the_launcher_intact() -> None:
    runs = "/a b/it's; touch /tmp/x $(id)`id`"
    small = recipes.load("vim_digits_cpu")
    entrypoint = RayJobs(_ray(runs=runs))._entrypoint(small)
    echo = entrypoint.replace("exec python -m vimscale.launch.cli", "printf '%s\\n'")
    assert runs in subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_code_is_sent_and_runs_from_the_jobs_folder(tmp_path: Path) -> None:
    small = recipes.load("vim_digits_cpu")
    RayJobs(_ray())._pack(tmp_path, small)
    assert recipes.load(tmp_path / "recipe.yaml") == small
    code = "import vimscale, vimscale.kernels, vimscale.launch.commands.app as c, vimscale.recipe.recipe as r;"
    code += "print(vimscale.__file__, c.__file__, *r.shipped())"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    package, command, *shipped = done.stdout.split()
    assert package.startswith(f"{tmp_path}/vimscale/")
    assert command.startswith(f"{tmp_path}/launch/")
    assert "vim_digits_cpu" in shipped
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.suffix not in (".pyc", "")}
    assert "vimscale/data/digits.csv.gz" in files
    assert sum((tmp_path / name).stat().st_size for name in files) < 5e6


def test_paths_that_mean_nothing_on_a_cluster_and_secrets_that_jobs_do_not_get_are_refused() -> None:
    small = recipes.load("vim_digits_cpu", ["data.train=data/x", "data.val=https://me:${PASSWORD}@host/val"])
    with pytest.raises(RecipeError) as refused:
        jobs.for_cluster(small, _ray())
    assert "data.train data/x: a job starts in its own folder" in str(refused.value)
    assert "data.val: takes PASSWORD from the environment" in str(refused.value)
    with pytest.raises(RecipeError) as refused:
        jobs.for_cluster(small, _ray(secrets=["PASSWORD"]))
    assert "PASSWORD" not in str(refused.value)
    assert jobs.for_cluster(small, clusters.load("local")) == small
    with pytest.raises(ClusterError, match="give the full path"):
        _ray(runs="runs")


@pytest.mark.parametrize("backend", ["ray", "kuberay_h100", "slurm"])
def test_ranks_that_the_recipe_cannot_use_are_refused_before_anything_is_submitted(backend: str) -> None:
    small = recipes.load("vim_digits_cpu", ["data.train=/data", "data.val=/data", "parallel.context=4"])
    assert jobs.for_cluster(small, clusters.load(backend, ["workers=8"])).parallel == small.parallel
    assert jobs.for_cluster(small, clusters.load(backend, ["workers='3:9'"])).parallel == small.parallel
    with pytest.raises(RecipeError, match=r"6 ranks cannot be divided into groups of parallel\.context 4"):
        jobs.for_cluster(small, clusters.load(backend, ["workers=6"]))
    with pytest.raises(RecipeError, match="batch 64 is not a multiple of 3 groups of 4 ranks"):
        jobs.for_cluster(small, clusters.load(backend, ["workers=12"]))


def test_the_mirror_comes_from_the_cluster_where_the_recipe_names_none() -> None:
    small = recipes.load("vim_digits_cpu")
    assert jobs.for_cluster(small, _ray(mirror="s3://b/runs")).checkpoint.mirror == "s3://b/runs"
    named = recipes.load("vim_digits_cpu", ["checkpoint.mirror=/mine"])
    assert jobs.for_cluster(named, _ray(mirror="s3://b/runs")).checkpoint.mirror == "/mine"


def test_a_failed_job_is_explained_by_its_last_error() -> None:
    assert jobs.reason("start\nerror: first\nerror: data x: not there\n  see docs\n") == "data x: not there"
    assert jobs.reason("only\nthis\n\n") == "this"
