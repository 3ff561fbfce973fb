"""When a run goes on and when it ends: the policy with scripted ranks, hangs and nodes with real ones."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import nodes
from tests.support.shell import Shell
from vimscale.errors import LaunchError, RecipeError, RunFailed
from vimscale.launch.processes.num_ranks import sizes
from vimscale.launch.processes.rank import Ending, Event
from vimscale.launch.processes.signals import StopSignal
from vimscale.launch.supervise import failures, supervisor
from vimscale.launch.supervise.progress import Progress
from vimscale.launch.supervise.supervisor import Policy, supervise
from vimscale.launch.supervise.watchdog import Watchdog
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.run_folder import RunFolder

Script = list[Event | Ending | Callable[[], Event]]

USUAL = Policy()


class Scripted:
    """A group whose ranks do what is written down: reports in their order, `stopped` once they are asked to stop."""

    def __init__(self, script: Script, size: int = 1, room: int | None = None, leaving: str | None = None):
        self.size, self._script = size, list(script)
        self._room, self._leaving = size if room is None else room, leaving
        self.asked = False

    def start(self) -> None: ...

    def poll(self, timeout: float) -> list[Event | Ending]:
        if self._script:
            report = self._script.pop(0)
            return [report() if callable(report) else report]
        if self.asked:
            return [Ending(rank, "stopped") for rank in range(self.size)]
        return []

    def request_stop(self) -> None:
        self.asked = True

    def dump_stacks(self) -> None: ...

    def leaving(self) -> str | None:
        return self._leaving

    def room(self) -> int:
        return self._room

    def kill(self) -> None: ...


@pytest.fixture
def runs(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    return RunFolder(tmp_path)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_PAUSES_S", (0.0,))
    monkeypatch.setattr(supervisor, "_HEAR_S", 0.0)
    monkeypatch.setattr(supervisor, "_HEAR_DEATH_S", 0.0)


def _supervise(runs: RunFolder, *groups: Scripted, policy: Policy = USUAL) -> tuple[int, str, list[Scripted]]:
    """(exit code, what was said, groups that were not needed)."""
    said = io.StringIO()
    left = list(groups)
    code = supervise(lambda: left.pop(0), runs, StopSignal(), Progress(Console(file=said, width=300)), policy)
    return code, said.getvalue(), left


def _pulse(step: int, rank: int = 0, beats: int = 1) -> Event:
    return {
        "kind": "heartbeat",
        "rank": rank,
        "beats": beats,
        "doing": "step",
        "step": step,
        "step_s": 0.1,
        "host": "a",
    }


def _died(rank: int = 0, pid: int = 1) -> Ending:
    return Ending(rank, "failed", cause="died", message=f"process {pid} was killed by SIGKILL", host="a")


def _checkpoint(runs: RunFolder, step: int) -> Callable[[], Event]:
    def write() -> Event:
        folder = runs.checkpoints / run_folder.checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step}))
        manifest.write(folder, [manifest.seal(folder / "trainer.json")])
        return {"kind": "checkpoint", "step": step, "path": str(folder)}

    return write


DONE = Ending(0, "done")


def test_a_run_that_comes_further_is_started_again_as_often_as_it_takes(runs: RunFolder) -> None:
    died = [Scripted([_pulse(100 * n), _died(pid=n)]) for n in range(1, 11)]
    code, said, left = _supervise(runs, *died, Scripted([DONE]))
    assert (code, left) == (0, [])
    assert (
        "rank 0: process 3 was killed by SIGKILL; starting again from the last checkpoint (restart 3, at most" in said
    )
    recorded = json.loads((runs.path / "failures.json").read_text())
    assert [row["step"] for row in recorded] == [100 * n for n in range(1, 11)]
    assert recorded[0] | {"time": ""} == {
        "time": "",
        "step": 100,
        "saved": 0,
        "world": 1,
        "cause": "died",
        "rank": 0,
        "host": "a",
        "exception": "",
        "message": "process 1 was killed by SIGKILL",
        "others": [],
    }


def test_too_many_restarts_in_too_few_steps_end_the_run(runs: RunFolder) -> None:
    died = [Scripted([_pulse(100 * n), _died(pid=n)]) for n in range(1, 9)]
    with pytest.raises(RunFailed, match="3 restarts did not bring the run 50 steps further"):
        _supervise(runs, *died, policy=Policy(restarts=3, within=50))


def test_checkpoints_in_between_are_what_counts_as_coming_further(runs: RunFolder) -> None:
    died = [Scripted([_pulse(100 * n), _checkpoint(runs, 100 * n), _died(pid=n)]) for n in range(1, 9)]
    _, said, left = _supervise(runs, *died, Scripted([DONE]), policy=Policy(restarts=3, within=50))
    assert left == []
    assert "restart 1, at most 3 in 50 steps" in said


def test_the_same_failure_at_the_same_step_ends_the_run_with_what_is_common(runs: RunFolder) -> None:
    died = [Scripted([_pulse(46 + n), _died(pid=1000 + n)]) for n in range(4)]
    with pytest.raises(RunFailed) as error:
        _supervise(runs, *died)
    report = str(error.value)
    assert "the same failure 3 times at step 46 to 48; in common are" in report
    assert "cause: died" in report
    assert "rank: 0 each time" in report
    assert "host: a each time" in report
    assert f"all are in {runs.path}/failures.json" in report


def test_deaths_near_each_other_are_not_the_same_where_the_run_came_past_in_between(runs: RunFolder) -> None:
    saved = [Scripted([_pulse(46), _died()]), Scripted([_pulse(48), _checkpoint(runs, 47), _died()])]
    further = [Scripted([_pulse(49), _died()]), Scripted([_pulse(52), _died()]), Scripted([_pulse(49), _died()])]
    at_the_start = [Scripted([_died()]), Scripted([_died()]), Scripted([_pulse(70), _died()]), Scripted([_died()])]
    assert _supervise(runs, *saved, *further, *at_the_start, Scripted([DONE]))[0] == 0


def test_a_start_that_fails_three_times_ends_the_run(runs: RunFolder) -> None:
    with pytest.raises(RunFailed, match="the same failure 3 times before the first step"):
        _supervise(runs, *(Scripted([_died(pid=n)]) for n in range(3)))


@pytest.mark.parametrize(
    "other",
    [
        Ending(0, "failed", cause="lost", exception="DistNetworkError", message="1"),
        Ending(0, "failed", cause="memory", exception="OutOfMemoryError", message="tried to allocate 3.2 GiB"),
    ],
)
def test_failures_of_different_kinds_at_one_step_are_not_the_same(runs: RunFolder, other: Ending) -> None:
    groups = [Scripted([_pulse(46), ending]) for ending in (_died(), other, _died(), other)]
    assert _supervise(runs, *groups, Scripted([DONE]))[0] == 0


def test_a_launch_starts_counting_anew_and_keeps_the_record(runs: RunFolder) -> None:
    for _ in range(2):
        _supervise(runs, Scripted([_pulse(5), _died()]), Scripted([_pulse(5), _died()]), Scripted([DONE]))
    assert len(json.loads((runs.path / "failures.json").read_text())) == 4


@pytest.mark.parametrize("damaged", [b"", b"[{]", b'[{"time": 1}', b"\xff\0", b'{"a": 1}', b"3"])
def test_a_damaged_record_of_failures_is_set_aside(
    runs: RunFolder, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (runs.path / "failures.json").write_bytes(damaged)
    assert _supervise(runs, Scripted([_pulse(5), _died()]), Scripted([DONE]))[0] == 0
    assert len(json.loads((runs.path / "failures.json").read_text())) == 1
    assert (runs.path / "damaged_failures.json").read_bytes() == damaged
    assert "is damaged and set aside as damaged_failures.json" in caplog.text


def test_what_cannot_be_written_about_a_failure_hides_none(
    runs: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders in the places of files, which even root cannot write to."""
    for name in (f".failures.json.partial-{os.getpid()}", "errors.txt", "logs/stacks_00000.txt"):
        (runs.path / name).mkdir()
    assert _supervise(runs, Scripted([_pulse(5), _died()]), Scripted([DONE]))[0] == 0
    assert f"{runs.path}/failures.json could not be written: Is a directory" in caplog.text
    bug = Ending(0, "failed", cause="error", message="ValueError: 3", traceback="Traceback: here")
    with pytest.raises(
        RunFailed, match=r"rank 0: ValueError: 3\n  .*errors.txt could not be written: .*\nTraceback: h"
    ):
        _supervise(runs, Scripted([bug]))
    monkeypatch.setattr(supervisor, "_DUMP_S", 0.0)
    monkeypatch.setattr(Watchdog, "hung", lambda self, now: [Ending(0, "failed", cause="hung", message="no progress")])
    monkeypatch.setattr(Watchdog, "describe", lambda self, rank: "no progress")
    with pytest.raises(RunFailed, match="0 restarts"):
        _supervise(runs, Scripted([]), policy=Policy(restarts=0))


def test_a_bug_is_not_tried_again(runs: RunFolder) -> None:
    bug = Ending(0, "failed", cause="error", message="ValueError: 3", traceback="Traceback: here")
    with pytest.raises(RunFailed, match="rank 0: ValueError: 3\n  traceback: "):
        _supervise(runs, Scripted([bug]))
    assert "Traceback: here" in runs.errors.read_text()


def test_a_run_grows_at_a_checkpoint_and_not_before(runs: RunFolder) -> None:
    small = Scripted([_pulse(5), _pulse(6), _checkpoint(runs, 6)], room=2)
    code, said, left = _supervise(runs, small, Scripted([DONE, Ending(1, "done")], size=2))
    assert (code, left) == (0, [])
    assert said.index("checkpoint ") < said.index("there is room for 2 ranks by now") < said.index("going on with 2")


def test_nodes_that_are_taken_away_are_left_with_a_checkpoint(runs: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.0)
    leaving = {"size": 2, "leaving": "Ray takes away node a"}
    code, said, left = _supervise(runs, Scripted([], room=1, **leaving), Scripted([DONE]))
    assert (code, left) == (0, [])
    assert "going on with 1 instead of 2 ranks" in said
    assert _supervise(runs, Scripted([], room=0, **leaving))[0] == 3


def test_a_warning_says_that_an_earlier_checkpoint_replaces_a_damaged_one(
    runs: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        _checkpoint(runs, step)()
    damaged = runs.checkpoints / run_folder.checkpoint_name(20) / "manifest.json"
    damaged.write_text("{")
    assert runs.newest_checkpoint().name == run_folder.checkpoint_name(10)
    assert "using step_00000010, because a newer checkpoint is damaged: step_00000020" in caplog.text


# ---- the watchdog


def _time_to_notice(watchdog: Watchdog, heartbeats: Callable[[int], list[Event]]) -> tuple[int, list[Ending]]:
    """The second in which it barks, and at whom; `heartbeats`: what is heard in each second."""
    for second in range(1, 2000):
        for heartbeat in heartbeats(second):
            watchdog.heard(heartbeat["rank"], heartbeat)
        if found := watchdog.hung(float(second)):
            return second, found
    return 0, []


def test_a_hang_is_judged_by_the_time_of_the_runs_own_steps() -> None:
    def stands(step_s: float) -> Callable[[int], list[Event]]:
        return lambda second: [_pulse(7, beats=9) | {"step_s": step_s}]

    assert _time_to_notice(Watchdog(1, None, 0.0), stands(0.1))[0] == 61
    assert _time_to_notice(Watchdog(1, None, 0.0), stands(10.0))[0] == 201
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), stands(10.0))[0] == 6
    saving = lambda second: [_pulse(7, beats=9) | {"doing": "save"}]  # noqa: E731
    assert _time_to_notice(Watchdog(1, None, 0.0), saving)[0] == 301
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), lambda second: [])[0] == 301, "it has not begun to step"
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), lambda second: [_pulse(second, beats=second)])[0] == 0


def test_a_hang_names_the_rank_that_the_others_wait_for() -> None:
    silent = lambda second: [_pulse(7), *([_pulse(7, rank=1)] if second < 3 else [])]  # noqa: E731
    _, (found,) = _time_to_notice(Watchdog(2, 5.0, 0.0), silent)
    assert found.rank == 1
    assert "does not answer" in found.message

    behind = lambda second: [_pulse(7), _pulse(6, rank=1)]  # noqa: E731
    _, (found,) = _time_to_notice(Watchdog(2, 5.0, 0.0), behind)
    assert (found.rank, found.step, found.host) == (1, 6, "a")
    assert "does not answer" not in found.message


def test_no_rank_is_blamed_for_the_time_that_the_launcher_was_stopped() -> None:
    watchdog = Watchdog(1, 5.0, 0.0)
    watchdog.heard(0, _pulse(7))
    assert watchdog.hung(1.0) == []
    assert watchdog.hung(1000.0) == []
    assert watchdog.hung(1002.0) == []
    assert watchdog.hung(1004.0)


# ---- how many ranks


def test_workers_are_a_number_or_a_range_that_divides_the_batch() -> None:
    recipe = Recipe(name="a", steps=9, batch=24, data={"train": "digits:train"}, augment={"flip": 0.0})
    assert sizes("1:6", recipe, 4, 0, "here") == [6, 4, 3, 2, 1]
    assert sizes("2:5", recipe, 4, 0, "here") == [4, 3, 2]
    assert sizes("3", recipe, 4, 0, "here") == [3]
    assert sizes(None, recipe, 4, 0, "here") == [2]
    for wrong in ("0", "2:1", "a", "1:", ":2", "-1", "1:1000000000", "9" * 5000):
        with pytest.raises(LaunchError, match="write a number from 1 to 65,536, or MIN:MAX"):
            sizes(wrong, recipe, 4, 0, "here")
    with pytest.raises(LaunchError, match="--workers 5:6: a worker takes one CPU and here has 4; use 1 to 4"):
        sizes("5:6", recipe, 4, 0, "here")
    with pytest.raises(RecipeError, match="batch 24 is not a multiple of 5 ranks"):
        sizes("5", recipe, 8, 0, "here")
    with pytest.raises(RecipeError, match="batch 24 is not a multiple of 7 ranks"):
        sizes("7", recipe, 8, 0, "here")


# ---- real ranks

LONG = ("steps=200", "checkpoint.every=60", "log.every=10")
RAY = ("--workers", "2")
PROCESSES = ("--workers", "2", "--no-ray")


@pytest.mark.parametrize("how", [PROCESSES, pytest.param(RAY, marks=pytest.mark.slow)], ids=["processes", "ray"])
def test_a_rank_that_is_stopped_is_noticed_and_replaced(shell: Shell, how: tuple[str, ...]) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *how, "--hang-after", "3")
    shell.reaches(process, "small", 100)
    os.kill(shell.process_of("small", 1), signal.SIGSTOP)
    output = shell.finish(process)
    assert re.search(r"rank 1: no progress for \d+ s after step \d+ \(\w+\), and does not answer", output)
    assert "going on after" in output
    assert len(shell.losses("small")) == 200
    waiting, stopped = ((shell.folder / f"runs/small/logs/stacks_{rank:05d}.txt").read_text() for rank in (0, 1))
    assert "vimscale/train/loop.py" in waiting, "where rank 0 waits for rank 1"
    assert "does not answer" in stopped
    assert "Thread" not in stopped
    (failure,) = json.loads((shell.folder / "runs/small/failures.json").read_text())
    assert (failure["cause"], failure["rank"]) == ("hung", 1)


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_ended_and_the_message_says_so(shell: Shell) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *PROCESSES, "--grace", "2")
    shell.reaches(process, "small", 100)
    os.kill(shell.process_of("small", 1), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    output = shell.finish(process, expect=1)
    assert "had not saved and ended 2 s after the request to stop (--grace) and was ended" in output
    assert "the same command goes on from step_00000060" in output
    assert "resumed from" in shell.run("launch", "small.yaml", *LONG, *PROCESSES)


@pytest.mark.parametrize("to", ["launcher", pytest.param("rank", marks=pytest.mark.slow)])
def test_slurms_warning_leads_to_a_checkpoint_and_an_end(shell: Shell, to: str) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, *PROCESSES)
    shell.reaches(process, "small", 100)
    os.kill(process.pid if to == "launcher" else shell.process_of("small", 1), signal.SIGUSR1)
    shell.finish(process, expect=3)
    done = len(shell.losses("small"))
    newest = run_folder.checkpoints(shell.folder / "runs/small/checkpoints")[0]
    assert 100 <= done < 200
    assert newest.name == run_folder.checkpoint_name(done)


@pytest.mark.slow
def test_memory_that_runs_out_again_and_again_ends_the_run_with_advice(shell: Shell) -> None:
    changes = ("model.d_model=4096", "model.depth=48", "batch=1000", "optim.ema=null")
    process = shell.popen(
        "launch", "small.yaml", *changes, "--workers", "1", "--no-ray", "--force", memory_limit=6_000_000
    )
    output = shell.finish(process, expect=1)
    assert "the same failure 3 times before the first step" in output
    assert "cause: memory, " in output
    assert "lower parallel.micro_batch" in output


def _below(pid: int) -> Iterator[int]:
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            yield from _below(int(child))


@pytest.mark.slow
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_a_killed_launcher_leaves_nothing_behind(shell: Shell, how: tuple[str, ...]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))
    shell.env["TMPDIR"] = str(temporary)
    process = shell.popen("launch", "small.yaml", *LONG, *how)
    shell.reaches(process, "small", 100)
    (folder,) = temporary.glob("vimscale-*")
    started = list(_below(process.pid))
    process.kill()
    process.wait()
    while folder.exists() or any(_command(pid).count(str(folder)) for pid in started):
        time.sleep(0.01)
    shell.nothing_is_left(within=20)
    shutil.rmtree(temporary)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [["gcs_server"], ["raylet"], ["gcs_server", "raylet"]], ids="-".join)
def test_a_run_outlives_its_own_ray(shell: Shell, victims: list[str]) -> None:
    process = shell.popen("launch", "small.yaml", *LONG, "steps=400", *RAY)
    shell.reaches(process, "small", 100)
    named = {_command(pid).split("\0")[0].rsplit("/")[-1]: pid for pid in _below(process.pid)}
    for victim in victims:
        os.kill(named[victim], signal.SIGKILL)
    output = shell.finish(process)
    assert re.search(rf"Ray's ({'|'.join(victims)}) on this machine died.*starting again .*restart 1", output)
    assert "resumed from" in output
    assert len(shell.losses("small")) == 400
    shell.nothing_is_left(within=20)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
@pytest.mark.parametrize("when", ["before it is asked for room", "while ranks come up"])
def test_a_ray_that_dies_while_a_group_starts_is_a_death_of_the_group(shell: Shell, victim: str, when: str) -> None:
    code = f"""
import json, os, pathlib, signal
from tests.launch.test_supervisor import _below, _command
from vimscale.recipe import recipe
from vimscale.launch.processes import on_ray, ray_connection

own = ray_connection.Ray(None)
group = on_ray.RayGroup(own, recipe.load("small.yaml"), pathlib.Path("run"), [2], gpu=False, patience_s=300)
import ray
owner, name = {"(group, '_find_room')" if when.startswith("before") else "(ray, 'wait')"}
original = getattr(owner, name)

def killed(*arguments, **options):
    if own.died() is None:
        (pid,) = [pid for pid in _below(os.getpid()) if _command(pid).split("\\0")[0].endswith("/{victim}")]
        os.kill(pid, signal.SIGKILL)
        while own.died() is None:  # a head that is asked in the very moment of its death ends the process
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
    message = f"Ray's {victim} on this machine died, and takes the ranks along"
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("[[")]  # Ray adds the raylet's log
    assert json.loads(found) == [[0, "died", message], [1, "died", message]]


def _command(pid: int) -> str:
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text() if file.exists() else ""


# ---- nodes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_shrinks_with_the_nodes_and_grows_with_them(shell: Shell) -> None:
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
    assert "there is room for 2 ranks by now" in output
    logs = shell.folder / "runs/small/logs"
    assert re.findall(r"rank 0 of (\d)", (logs / "rank_00000.txt").read_text()) == ["2", "1", "2"]
    ours, theirs = shell.losses("small"), shell.losses("calm")
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


@pytest.mark.slow
def test_rays_notice_of_preemption_leads_to_a_checkpoint_and_an_end(shell: Shell) -> None:
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
