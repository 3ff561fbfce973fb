"""Real runs that lose ranks, their own Ray, or nodes: what the supervisor does, and what the launcher prints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support import nodes, processes
from tests.support.shell import Shell, relative_difference
from vimscale.runtime import run_folder

LONG = ("steps=200", "checkpoint.every=60", "log.every=10")
RAY = ("--workers", "2")
PROCESSES = ("--workers", "2", "--no-ray")


@pytest.mark.slow
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_a_stopped_rank_is_noticed_and_replaced(shell: Shell, how: tuple[str, ...]) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *how, "--hang-after", "6")
    shell.reaches(process, "small", 100)
    os.kill(shell.process_of("small", 1), signal.SIGSTOP)
    output = shell.finish(process)
    assert re.search(r"rank 1: no progress for \d+ s after step \d+ \(\w+\), and does not answer", output)
    assert "resumed after" in output
    assert len(shell.losses("small")) == 200
    waiting, stopped = ((shell.folder / f"runs/small/logs/stacks_{rank:05d}.txt").read_text() for rank in (0, 1))
    assert "vimscale/training/loop.py" in waiting, "where rank 0 waits for rank 1"
    assert "does not answer" in stopped
    assert "Thread" not in stopped
    (failure,) = json.loads((shell.folder / "runs/small/failures.json").read_text())
    assert (failure["cause"], failure["rank"]) == ("hung", 1)


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_killed_and_the_message_says_so(shell: Shell) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *PROCESSES, "--grace", "2")
    shell.reaches(process, "small", 100)
    os.kill(shell.process_of("small", 1), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    output = shell.finish(process, expect=1)
    assert "did not save and end within 2 s of the request to stop (--grace) and was killed" in output
    assert "the same command resumes from step_00000060" in output
    assert "resumed from" in shell.run("launch", "small.yaml", *LONG, *PROCESSES)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "rank"])
def test_slurms_warning_leads_to_a_checkpoint_and_a_stop(shell: Shell, to: str) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *PROCESSES)
    shell.reaches(process, "small", 20)
    os.kill(process.pid if to == "launcher" else shell.process_of("small", 1), signal.SIGUSR1)
    shell.finish(process, expect=3)
    done = len(shell.losses("small"))
    newest = run_folder.checkpoints(shell.folder / "runs/small/checkpoints")[0]
    assert 20 <= done < 200
    assert newest.name == run_folder.checkpoint_name(done)


@pytest.mark.slow
def test_memory_that_runs_out_repeatedly_ends_the_run_with_advice(shell: Shell) -> None:
    changes = ("model.d_model=4096", "model.depth=48", "batch=1000", "optim.ema=null")
    process = shell.popen(
        "launch", "small.yaml", *changes, "--workers", "1", "--no-ray", "--force", memory_limit=6_000_000
    )
    output = shell.finish(process, expect=1)
    assert "the same failure 3 times before the first step" in output
    assert "cause: memory, " in output
    assert "lower parallel.micro_batch" in output


@pytest.mark.slow
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_a_killed_launcher_leaves_nothing_behind(shell: Shell, how: tuple[str, ...]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))
    shell.env["TMPDIR"] = str(temporary)
    process = shell.popen("launch", "small.yaml", *LONG, *how)
    shell.reaches(process, "small", 100)
    (folder,) = temporary.glob("vimscale-*")
    started = list(processes.with_descendants(process.pid))
    process.kill()
    process.wait()
    while folder.exists() or any(str(folder) in processes.command(pid) for pid in started):
        time.sleep(0.01)
    shell.nothing_is_left(within=20)
    shutil.rmtree(temporary)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [["gcs_server"], ["raylet"], ["gcs_server", "raylet"]], ids="-".join)
def test_a_run_survives_the_death_of_its_own_ray(shell: Shell, victims: list[str]) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, "steps=400", *RAY)
    shell.reaches(process, "small", 100)
    named = {processes.program(pid): pid for pid in processes.with_descendants(process.pid)}
    for victim in victims:
        os.kill(named[victim], signal.SIGKILL)
    output = shell.finish(process)
    assert re.search(rf"Ray's ({'|'.join(victims)}) on this machine died.*restarting .*restart 1", output)
    assert "resumed from" in output
    assert len(shell.losses("small")) == 400
    shell.nothing_is_left(within=20)


@pytest.mark.slow
def test_a_run_whose_ray_was_replaced_stops_on_sigterm(shell: Shell) -> None:
    """Ray handles SIGTERM in its own way whenever it starts."""
    process = shell.popen("launch", "small.yaml", *LONG, "steps=100000", *RAY)
    shell.reaches(process, "small", 70)
    named = {processes.program(pid): pid for pid in processes.with_descendants(process.pid)}
    os.kill(named["gcs_server"], signal.SIGKILL)
    shell.reaches(process, "small", len(shell.rows("small")) + 100)
    process.terminate()
    output = shell.finish(process, expect=3)
    assert "restart 1" in output
    assert "stopped on request; the same command resumes from step_" in output
    shell.nothing_is_left(within=20)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
@pytest.mark.parametrize("when", ["before it is asked for room", "while ranks come up"])
def test_a_ray_that_dies_while_a_group_starts_is_a_death_of_the_group(shell: Shell, victim: str, when: str) -> None:
    code = f"""
import json, os, pathlib, signal
from tests.support import processes
from vimscale.recipe import recipe
from vimscale.launch.processes import on_ray, ray_connection

own = ray_connection.Ray(None)
group = on_ray.RayGroup(own, recipe.load("small.yaml"), pathlib.Path("run"), [2], gpu=False, patience_s=300)
import ray
owner, name = {"(group, '_find_room')" if when.startswith("before") else "(ray, 'wait')"}
original = getattr(owner, name)

def killed(*arguments, **options):
    if own.died() is None:
        (pid,) = [pid for pid in processes.with_descendants(os.getpid()) if processes.program(pid) == "{victim}"]
        os.kill(pid, signal.SIGKILL)
        while own.died() is None:  # a call to the head at the very moment of its death ends the process
            pass
    return original(*arguments, **options)

setattr(owner, name, killed)
group.start()
print(json.dumps([(ending.rank, ending.cause, ending.message) for ending in group.poll(0.0)]))
group.kill()
own.close()
"""
    root = str(Path(__file__).parents[2])
    env = shell.env | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], cwd=shell.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message = f"Ray's {victim} on this machine died, and the ranks with it"
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]  # Ray adds the raylet's log
    assert json.loads(found) == [[0, "died", message], [1, "died", message]]


# ---- nodes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_shrinks_and_grows_with_its_nodes(shell: Shell) -> None:
    options = ("steps=400", "checkpoint.every=20", "checkpoint.keep=100", "log.every=10")
    shell.run("launch", "small.yaml", "name=calm", *options, *PROCESSES)
    with nodes.one_address() as cluster:
        node = cluster.add_node(num_cpus=1)
        process = shell.popen("launch", "small.yaml", *options, "--address", cluster.address, "--workers", "1:2")
        shell.reaches(process, "small", 50)
        cluster.remove_node(node, allow_graceful=False)
        shell.reaches(process, "small", 60)
        cluster.add_node(num_cpus=1)
        output = shell.finish(process)
    assert "small: 2 ranks on the Ray" in output
    assert re.search(r"rank \d: process \d+ died", output)
    assert "there is room for 2 ranks now" in output
    assert shell.world_sizes("small") == [2, 1, 2]
    assert relative_difference(shell.losses("small"), shell.losses("calm")) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_ranks_share_images_shrinks_to_complete_groups(shell: Shell) -> None:
    options = ("steps=200", "checkpoint.every=20", "log.every=10", "parallel.context=2")
    shell.run("launch", "small.yaml", "name=calm", *options, *PROCESSES)
    with nodes.one_address() as cluster:
        node, _ = (cluster.add_node(num_cpus=cpus) for cpus in (1, 2))
        process = shell.popen("launch", "small.yaml", *options, "--address", cluster.address, "--workers", "1:4")
        shell.reaches(process, "small", 30)
        cluster.remove_node(node, allow_graceful=False)
        shell.finish(process)
    assert shell.world_sizes("small") == [4, 2], "three devices are left"
    assert relative_difference(shell.losses("small"), shell.losses("calm")) < 1e-5


@pytest.mark.slow
def test_rays_notice_of_preemption_leads_to_a_checkpoint_and_a_stop(shell: Shell) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    drain = ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    with nodes.one_address() as cluster:
        node = cluster.add_node(num_cpus=1)
        process = shell.popen("launch", "small.yaml", "steps=2000", "--address", cluster.address, *RAY)
        shell.reaches(process, "small", 50)
        where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "60"]
        subprocess.run([ray, *drain, *where], check=True, env=shell.env, capture_output=True)
        output = shell.finish(process, expect=3)
    assert f"Ray takes away node {node.node_id}: finishing the step and saving a checkpoint" in output
    done = len(shell.losses("small"))
    newest = run_folder.checkpoints(shell.folder / "runs/small/checkpoints")[0]
    assert newest.name == run_folder.checkpoint_name(done)
