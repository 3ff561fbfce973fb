"""When the supervisor restarts a run and when it ends it, with scripted ranks; and how many ranks a run may have."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.group import StubGroup
from vimscale.errors import LaunchError, RecipeError, RunFailed, UserError
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


class Scripted(StubGroup):
    """A group whose ranks follow a script: it reports the entries in order, then `stopped` once asked to stop."""

    def __init__(self, script: Script, size: int = 1, room: int | None = None, leaving: str | None = None):
        super().__init__()
        self.size, self._script = size, list(script)
        self._room, self._leaving = size if room is None else room, leaving

    def poll(self, timeout: float) -> list[Event | Ending]:
        if self._script:
            report = self._script.pop(0)
            return [report() if callable(report) else report]
        return [Ending(rank, "stopped") for rank in range(self.size)] if self.stop_requested else []

    def leaving(self) -> str | None:
        return self._leaving

    def room(self) -> int:
        return self._room


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
    """Return (exit code, what was printed, groups that were not started)."""
    said = io.StringIO()
    left = list(groups)
    code = supervise(lambda: left.pop(0), runs, StopSignal(), Progress(Console(file=said, width=300)), policy)
    return code, said.getvalue(), left


def _heartbeat(step: int, rank: int = 0, beats: int = 1) -> Event:
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


def test_a_run_that_makes_progress_is_restarted_as_often_as_it_takes(runs: RunFolder) -> None:
    died = [Scripted([_heartbeat(100 * n), _died(pid=n)]) for n in range(1, 11)]
    code, said, left = _supervise(runs, *died, Scripted([DONE]))
    assert (code, left) == (0, [])
    assert "rank 0: process 3 was killed by SIGKILL; restarting from the last checkpoint (restart 3, at most" in said
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
    died = [Scripted([_heartbeat(100 * n), _died(pid=n)]) for n in range(1, 9)]
    with pytest.raises(RunFailed, match="3 restarts did not bring the run 50 steps further"):
        _supervise(runs, *died, policy=Policy(restarts=3, within=50))


def test_only_new_checkpoints_count_as_progress(runs: RunFolder) -> None:
    died = [Scripted([_heartbeat(100 * n), _checkpoint(runs, 100 * n), _died(pid=n)]) for n in range(1, 9)]
    _, said, left = _supervise(runs, *died, Scripted([DONE]), policy=Policy(restarts=3, within=50))
    assert left == []
    assert "restart 1, at most 3 in 50 steps" in said


def test_the_same_failure_at_the_same_step_ends_the_run_and_says_what_the_failures_share(runs: RunFolder) -> None:
    died = [Scripted([_heartbeat(46 + n), _died(pid=1000 + n)]) for n in range(4)]
    with pytest.raises(RunFailed) as error:
        _supervise(runs, *died)
    report = str(error.value)
    assert "the same failure 3 times at step 46 to 48; they share" in report
    assert "cause: died" in report
    assert "rank: 0 each time" in report
    assert "host: a each time" in report
    assert f"all failures are in {runs.path}/failures.json" in report


def test_deaths_at_nearby_steps_are_not_the_same_if_the_run_came_past_in_between(runs: RunFolder) -> None:
    saved = [Scripted([_heartbeat(46), _died()]), Scripted([_heartbeat(48), _checkpoint(runs, 47), _died()])]
    further = [Scripted([_heartbeat(step), _died()]) for step in (49, 52, 49)]
    at_the_start = [Scripted([_died()]), Scripted([_died()]), Scripted([_heartbeat(70), _died()]), Scripted([_died()])]
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
    groups = [Scripted([_heartbeat(46), ending]) for ending in (_died(), other, _died(), other)]
    assert _supervise(runs, *groups, Scripted([DONE]))[0] == 0


def test_why_a_launch_failed_stays_in_the_folder(runs: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (runs.path / "environment.json").write_text('{"host": "a"}')
    _supervise(runs, Scripted([_heartbeat(5), _died()]), Scripted([DONE]))
    assert json.loads((runs.path / "environment.json").read_text()) == {"host": "a"}, "it recovered"
    for cause, code, kind in (("run", 1, RunFailed), ("user", 2, UserError)):
        with pytest.raises(kind):
            _supervise(runs, Scripted([Ending(0, "failed", cause=cause, message="no step is good\n  use less lr")]))
        found = json.loads((runs.path / "environment.json").read_text())
        assert (found["host"], found["failed"]["message"]) == ("a", "no step is good; use less lr")
        assert found["failed"]["exit_code"] == code
    with pytest.raises(RunFailed):
        _supervise(runs, Scripted([Ending(0, "failed", cause="error", message="ValueError: 3")]))
    message = json.loads((runs.path / "environment.json").read_text())["failed"]["message"]
    assert message == f"rank 0: ValueError: 3; traceback: {runs.errors}"
    (runs.path / "environment.json").write_text("{")
    with pytest.raises(RunFailed, match="ValueError: 3"):
        _supervise(runs, Scripted([Ending(0, "failed", cause="error", message="ValueError: 3")]))
    assert "does not say why" in caplog.text


def test_a_launch_starts_its_own_count_and_keeps_the_record(runs: RunFolder) -> None:
    for _ in range(2):
        _supervise(runs, Scripted([_heartbeat(5), _died()]), Scripted([_heartbeat(5), _died()]), Scripted([DONE]))
    assert len(json.loads((runs.path / "failures.json").read_text())) == 4


@pytest.mark.parametrize("damaged", [b"", b"[{]", b'[{"time": 1}', b"\xff\0", b'{"a": 1}', b"3"])
def test_a_damaged_record_of_failures_is_set_aside(
    runs: RunFolder, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (runs.path / "failures.json").write_bytes(damaged)
    assert _supervise(runs, Scripted([_heartbeat(5), _died()]), Scripted([DONE]))[0] == 0
    assert len(json.loads((runs.path / "failures.json").read_text())) == 1
    assert (runs.path / "damaged_failures.json").read_bytes() == damaged
    assert "is damaged and set aside as damaged_failures.json" in caplog.text


def test_a_failure_is_reported_even_if_its_record_cannot_be_written(
    runs: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Put folders where files should be: even root cannot write to those."""
    for name in (f".failures.json.partial-{os.getpid()}", "errors.txt", "logs/stacks_00000.txt"):
        (runs.path / name).mkdir()
    assert _supervise(runs, Scripted([_heartbeat(5), _died()]), Scripted([DONE]))[0] == 0
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


def test_a_bug_is_not_retried(runs: RunFolder) -> None:
    bug = Ending(0, "failed", cause="error", message="ValueError: 3", traceback="Traceback: here")
    with pytest.raises(RunFailed, match="rank 0: ValueError: 3\n  traceback: "):
        _supervise(runs, Scripted([bug]))
    assert "Traceback: here" in runs.errors.read_text()


def test_a_run_grows_at_a_checkpoint_and_not_before(runs: RunFolder) -> None:
    small = Scripted([_heartbeat(5), _heartbeat(6), _checkpoint(runs, 6)], room=2)
    code, said, left = _supervise(runs, small, Scripted([DONE, Ending(1, "done")], size=2))
    assert (code, left) == (0, [])
    assert said.index("checkpoint ") < said.index("there is room for 2 ranks now") < said.index("continuing with 2")


def test_a_run_saves_and_leaves_nodes_that_are_taken_away(runs: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LEAVING_S", 0.0)
    leaving = {"size": 2, "leaving": "Ray takes away node a"}
    code, said, left = _supervise(runs, Scripted([], room=1, **leaving), Scripted([DONE]))
    assert (code, left) == (0, [])
    assert "continuing with 1 instead of 2 ranks" in said
    assert _supervise(runs, Scripted([], room=0, **leaving))[0] == 3


def test_taking_an_earlier_checkpoint_than_a_damaged_one_is_logged(
    runs: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        _checkpoint(runs, step)()
    damaged = runs.checkpoints / run_folder.checkpoint_name(20) / "manifest.json"
    damaged.write_text("{")
    assert runs.newest_checkpoint().name == run_folder.checkpoint_name(10)
    assert "using step_00000010, because a newer checkpoint is damaged: step_00000020" in caplog.text


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
    with pytest.raises(LaunchError, match="--workers 5:6: each rank takes one CPU and here has 4; use 1 to 4"):
        sizes("5:6", recipe, 4, 0, "here")
    with pytest.raises(RecipeError, match="batch 24 is not a multiple of 5 ranks"):
        sizes("5", recipe, 8, 0, "here")
    with pytest.raises(RecipeError, match="batch 24 is not a multiple of 7 ranks"):
        sizes("7", recipe, 8, 0, "here")
