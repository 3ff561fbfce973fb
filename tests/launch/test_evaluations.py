"""Evaluations that do not stop the run: `evaluate.asynchronous`."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.shell import SMALL, Shell
from vimscale.errors import RecipeError
from vimscale.launch.processes.evaluator import Evaluated
from vimscale.launch.processes.signals import StopSignal
from vimscale.launch.supervise import evaluations as launched
from vimscale.launch.supervise.evaluations import Evaluations
from vimscale.launch.supervise.progress import Progress
from vimscale.recipe.recipe import Recipe, load
from vimscale.runtime import evaluations, manifest
from vimscale.runtime.run_folder import RunFolder, checkpoint_name, checkpoints
from vimscale.tracking.trackers import Trackers
from vimscale.training.metrics import Metrics

ASYNCHRONOUS = ("evaluate.asynchronous=true", "evaluate.every=10", "checkpoint.every=10")
PROCESSES = ("--workers", "2", "--no-ray")
RAY = ("--workers", "2")
FOUND = Evaluated({"images": 9, "top1": 0.5, "loss": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_figures_are_those_of_the_ranks_and_training_is_not_touched(shell: Shell, how: tuple[str, ...]) -> None:
    usual = ("steps=15", "evaluate.knn=digits:train", "checkpoint.keep=9")
    shell.run("launch", "small.yaml", "name=ranks", *usual, *ASYNCHRONOUS[1:], *PROCESSES)
    output = shell.run("launch", "small.yaml", "name=apart", *usual, *ASYNCHRONOUS, *how)
    assert "evaluation at step 10: top-1" in output
    assert shell.losses("apart") == shell.losses("ranks")
    theirs = {row["step"]: row for row in shell.rows("ranks", "eval")}
    ours = {row["step"]: row for row in shell.rows("apart", "eval")}
    assert list(theirs) == sorted(ours) == [10, 15]
    for step, row in ours.items():
        assert row.pop("asynchronous")
        assert row.pop("loss") == pytest.approx(theirs[step].pop("loss"), rel=1e-5)
        assert row == theirs[step]
    results = [json.loads((shell.folder / f"runs/{name}/result.json").read_text()) for name in ("apart", "ranks")]
    assert [result.pop("status") for result in results] == ["done", "done"]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    events = b"".join(path.read_bytes() for path in (shell.folder / "runs/apart/tensorboard").iterdir())
    assert events.count(b"eval/knn_top1") == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [PROCESSES, RAY], ids=["processes", "ray"])
def test_the_run_trains_on_and_keeps_its_checkpoints_while_an_evaluation_takes_long(
    shell: Shell, how: tuple[str, ...]
) -> None:
    shutil.copy(Path(__file__).parents[1] / "support/waiting.py", shell.folder)
    (shell.folder / "wait").touch()
    changes = ("steps=30", "checkpoint.keep=1", "objective={kind: waiting.py:Waiting}")
    process = shell.popen("launch", "small.yaml", *changes, *ASYNCHRONOUS, *how)
    shell.reaches(process, "small", 30)
    kept = shell.folder / "runs/small/checkpoints"
    while len(checkpoints(kept)) < 3 or not (shell.folder / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert [manifest.damage(path) for path in checkpoints(kept)] == [None] * 3
    assert shell.rows("small", "eval") == []
    os.kill(int((shell.folder / "begun").read_text()), signal.SIGKILL)
    (shell.folder / "wait").unlink()
    output = shell.finish(process)
    assert "trying once more" in output
    assert "training is done; evaluating step 10, 20, 30" in output
    assert [row["step"] for row in shell.rows("small", "eval")] == [10, 20, 30]
    assert json.loads((shell.folder / "runs/small/result.json").read_text())["images"] == 359
    assert [path.name for path in checkpoints(kept)] == ["step_00000030"]
    shell.nothing_is_left()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_evaluation_along_and_the_same_command_makes_up_for_it(shell: Shell) -> None:
    shutil.copy(Path(__file__).parents[1] / "support/waiting.py", shell.folder)
    (shell.folder / "wait").touch()
    command = ("launch", "small.yaml", "steps=20", "objective={kind: waiting.py:Waiting}", *ASYNCHRONOUS, *PROCESSES)
    process = shell.popen(*command)
    shell.reaches(process, "small", 20)
    while not (shell.folder / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    shell.nothing_is_left()
    (shell.folder / "wait").unlink()
    assert "finished: 20 steps" in shell.run(*command)
    assert [row["step"] for row in shell.rows("small", "eval")] == [10, 20]


def test_a_recipe_says_what_asynchronous_evaluations_lack(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"evaluate.every 30 is not a multiple of checkpoint.every 20.*every=40"):
        load(tmp_path / "small.yaml", ["evaluate={asynchronous: true, every: 30}"])
    with pytest.raises(RecipeError, match=r"evaluate.asynchronous: nothing to evaluate; set data.val"):
        load(tmp_path / "small.yaml", ["evaluate={asynchronous: true, every: 20}", "data.val=null"])


class Scripted:
    """An evaluator that ends as a script says."""

    def __init__(self, *script: Evaluated):
        self._script = list(script)
        self.started: list[str] = []
        self.killed = 0

    def start(self, checkpoint: Path, *, alone: bool) -> None:
        self.started.append(checkpoint.name)

    def poll(self) -> Evaluated | None:
        return self._script.pop(0) if self._script else None

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "small.yaml").write_text(SMALL)
    return load(tmp_path / "small.yaml", ASYNCHRONOUS)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(launched, "_POLL_S", 0.0)
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20, 25):
        path = folder.checkpoints / checkpoint_name(step)
        path.mkdir(parents=True)
        (path / "trainer.json").write_text(json.dumps({"step": step}))
        manifest.write(path, [manifest.seal(path / "trainer.json")])
    return folder


def _evaluations(recipe: Recipe, run: RunFolder, evaluator: Scripted) -> tuple[Evaluations, io.StringIO]:
    said = io.StringIO()
    return Evaluations(recipe, run, evaluator, Progress(Console(file=said, width=300))), said


DONE = {"status": "done", "step": 25, "steps": 25}


def test_an_evaluation_is_tried_twice_and_then_left_out(recipe: Recipe, run: RunFolder) -> None:
    died = Evaluated(None, "process 7 was killed by SIGKILL")
    evaluator = Scripted(died, died, died, FOUND, FOUND)
    chosen, said = _evaluations(recipe, run, evaluator)
    assert chosen.finish(DONE, StopSignal())
    assert evaluator.started == [checkpoint_name(step) for step in (10, 10, 20, 20, 25)]
    assert "step 10 is not evaluated: process 7 was killed by SIGKILL\n  training goes on" in said.getvalue()
    assert [row["step"] for row in run.rows()] == [20, 25]
    assert run.result() == DONE | FOUND.figures
    assert evaluations.waiting(run, 10, ["step_00000010", "step_00000020"]) == set()


def test_the_end_of_ray_is_no_try_and_a_full_disk_does_not_end_the_run(recipe: Recipe, run: RunFolder) -> None:
    gone = Evaluated(None, interrupted=True)
    evaluator = Scripted(gone, gone, gone, FOUND, FOUND)
    chosen, said = _evaluations(recipe, run, evaluator)
    run.evaluations.write_text("a file, so that no folder can be made")
    for _ in range(6):
        chosen.tend()
    assert evaluator.started == [checkpoint_name(step) for step in (10, 10, 10, 10, 20)]
    assert "evaluations could not be written: File exists" in said.getvalue()


def test_wrong_input_is_not_tried_again(recipe: Recipe, run: RunFolder) -> None:
    wrong = Evaluated(None, "other classes", curable=False)
    evaluator = Scripted(wrong, wrong, wrong)
    chosen, _ = _evaluations(recipe, run, evaluator)
    assert chosen.finish(DONE, StopSignal())
    assert len(evaluator.started) == 3
    assert run.result() == DONE


def test_a_rollback_forgets_the_evaluations_of_what_it_undoes(recipe: Recipe, run: RunFolder) -> None:
    evaluator = Scripted(FOUND)
    chosen, _ = _evaluations(recipe, run, evaluator)
    chosen.tend()
    chosen.tend()  # 10 is done, 20 runs
    evaluations.write(run, 25, FOUND.figures or {})
    chosen.heard({"kind": "guard", "action": "rollback", "to": 10})
    assert (evaluator.killed, evaluations.steps(run)) == (1, [10])
    chosen.heard({"kind": "checkpoint", "step": 20, "path": ""})
    chosen.tend()
    assert evaluator.started == [checkpoint_name(step) for step in (10, 20, 20)]


def test_a_later_launch_does_what_is_left_and_takes_over_rows_of_ranks(recipe: Recipe, run: RunFolder) -> None:
    metrics = Metrics(run, 25, Trackers(run, recipe, 25, "cpu"))
    metrics.write({"kind": "eval", "step": 10, **(FOUND.figures or {})})
    metrics.close()
    evaluator = Scripted(FOUND, FOUND)
    chosen, _ = _evaluations(recipe, run, evaluator)
    chosen.tend()
    chosen.close()
    assert evaluator.killed == 1
    stopped = StopSignal(after=0)
    assert not chosen.finish(DONE, stopped)
    again, _ = _evaluations(recipe, run, evaluator)
    assert again.finish(DONE, StopSignal())
    assert evaluator.started == [checkpoint_name(step) for step in (20, 20, 25)]
    assert [(row["step"], "asynchronous" in row) for row in run.rows()] == [(10, False), (20, True), (25, True)]


def test_rank_0_adds_rows_once_and_none_of_steps_to_come(recipe: Recipe, run: RunFolder) -> None:
    for step in (10, 20):
        evaluations.write(run, step, FOUND.figures or {})
    metrics = Metrics(run, 0, Trackers(run, recipe, 0, "cpu"))
    for step in (5, 12, 19):
        metrics.add_evaluations(step)
    metrics.close()
    assert [row["step"] for row in run.rows()] == [10]
    metrics = Metrics(run, 15, Trackers(run, recipe, 15, "cpu"))
    metrics.add_evaluations(22)
    metrics.close()
    assert [row["step"] for row in run.rows()] == [10, 20]


def test_many_waiting_checkpoints_are_said_once(recipe: Recipe, run: RunFolder) -> None:
    chosen, said = _evaluations(recipe, run, Scripted())
    for step in (30, 40, 50, 60):
        chosen.heard({"kind": "checkpoint", "step": step, "path": ""})
    assert said.getvalue().count("raise evaluate.every") == 1
