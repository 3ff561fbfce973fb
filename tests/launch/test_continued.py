"""Runs that continue others: `launch --extend` and `launch --fork`."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import checkpoints
from tests.support.shell import Shell, new_shell
from vimscale.data.order import Order
from vimscale.errors import CheckpointError, LaunchError, RecipeError
from vimscale.launch.supervise import continued
from vimscale.launch.supervise.continued import Fork
from vimscale.recipe.recipe import Recipe, load
from vimscale.runtime import run_folder
from vimscale.runtime.run_folder import RunFolder

ONE = ("--workers", "1", "--no-ray")
BOTH = pytest.mark.parametrize("how", [ONE, ("--workers", "1")], ids=["processes", "ray"])
USUAL = ("checkpoint.every=10", "checkpoint.keep=9", "optim.schedule=constant", "data.val=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Shell:
    """Return a finished run of 40 steps, called parent."""
    shell = new_shell(tmp_path_factory.mktemp("trained"), cache)
    shell.run("launch", "small.yaml", "name=parent", "steps=40", *USUAL, *ONE)
    return shell


@pytest.fixture
def parent(shell: Shell, trained: Shell) -> Shell:
    """Return a folder of the test's own with that run in it."""
    shutil.copytree(trained.folder / "runs/parent", shell.folder / "runs/parent")
    return shell


def _same(shell: Shell, name: str, other: str) -> bool:
    every = ("weight", "ema", "exp_avg", "exp_avg_sq")
    ours, theirs = (checkpoints.tensors(shell, each, *every) for each in (name, other))
    return checkpoints.equal(ours, theirs) and shell.losses(name) == shell.losses(other)


@pytest.mark.slow
@BOTH
def test_an_extended_run_has_the_bits_of_one_that_was_that_long_from_the_start(
    parent: Shell, tmp_path: Path, how: tuple[str, ...]
) -> None:
    longer = ("name=parent", "steps=60", *USUAL, *how)
    refused = parent.run("launch", "small.yaml", *longer, expect=2)
    assert "steps: 40 -> 60\nadd --extend to train this run to the new length" in refused
    assert json.loads((tmp_path / "runs/parent/result.json").read_text())["steps"] == 40

    output = parent.run("launch", "small.yaml", *longer, "--extend")
    assert "extending runs/parent from 40 to 60 steps; it has finished 40" in output
    assert "learning rate: 0.001 in step 40, 0.001 in step 41; optim.schedule constant does not depend" in output
    assert json.loads((tmp_path / "runs/parent/result.json").read_text()) == {"status": "done", "step": 60, "steps": 60}
    assert "runs/parent is finished: 60 steps" in parent.run("launch", "small.yaml", *longer, "--extend")
    parent.run("launch", "small.yaml", "name=calm", "steps=60", *USUAL, *ONE)
    assert _same(parent, "parent", "calm")


@pytest.mark.slow
@BOTH
def test_a_fork_that_changes_nothing_has_the_bits_of_its_parent(
    parent: Shell, tmp_path: Path, how: tuple[str, ...]
) -> None:
    fork = ("launch", "small.yaml", "name=fork", "steps=40", *USUAL, *how, "--fork", "parent@20")
    output = parent.run(*fork)
    assert (
        "forked runs/parent at step 20 into runs/fork: weights, their moving average, the optimizer's state" in output
    )
    assert "640 images into the data" in output
    assert _same(parent, "fork", "parent")
    origin = json.loads((tmp_path / "runs/fork/fork.json").read_text())
    assert (origin["run"], origin["step"], origin["changed"]) == (str(tmp_path / "runs/parent"), 20, {})
    assert "runs/fork is finished: 40 steps" in parent.run(*fork)
    other = parent.run(*fork[:-1], "parent@30", expect=2)
    assert f"holds a fork of {tmp_path}/runs/parent@20" in other


def test_a_fork_changes_settings_and_the_batch_from_its_step_on_and_keeps_the_order_of_the_data(parent: Shell) -> None:
    changes = ("optim.lr=5e-4", "optim.ema=null", "augment.jitter=0.1", "phases=[{step: 20, batch: 64}]")
    fork = ("launch", "small.yaml", "name=fork", "steps=30", *USUAL, *changes, *ONE, "--fork", "parent@20")
    output = parent.run(*fork)
    assert "changed: optim.lr: 0.001 -> 0.0005" in output
    assert "learning rate: 0.001 in step 20, 0.0005 in step 21" in output
    losses, parents = parent.losses("fork"), parent.losses("parent")
    assert losses[:20] == parents[:20]
    assert losses[20:] != parents[20:30]
    state = json.loads((parent.folder / "runs/fork/checkpoints/step_00000030/trainer.json").read_text())
    assert state["stream"]["samples"] == 20 * 32 + 10 * 64
    counts = [np.array([700, 738])]
    ours, theirs = (Order(load(parent.folder / f"runs/{name}/recipe.yaml"), counts) for name in ("fork", "parent"))
    assert list(ours.at(20, range(64))) == [*theirs.at(20, range(32)), *theirs.at(21, range(32))]


@pytest.mark.slow
def test_a_fork_may_begin_to_keep_a_moving_average(shell: Shell) -> None:
    shell.run("launch", "small.yaml", "name=plain", "steps=10", "optim.ema=null", *USUAL, *ONE)
    fork = ("name=fork", "steps=11", "optim.ema=0.9999", *USUAL, *ONE, "--fork", "plain@10")
    output = shell.run("launch", "small.yaml", *fork)
    assert "that run keeps no moving average (optim.ema): it starts at the weights" in output
    before, after = checkpoints.tensors(shell, "plain", "weight"), checkpoints.tensors(shell, "fork")
    for name, value in before.items():
        average = torch.lerp(value, after[name], 1 - 11 / 20)
        torch.testing.assert_close(after[name.replace("weight/", "ema/", 1)], average)


@pytest.mark.slow
def test_a_fork_killed_at_any_point_of_its_start_leaves_no_run(parent: Shell, tmp_path: Path) -> None:
    """`into` ends after each of its writes in turn; what is left must be nothing, or all of it."""
    old = RunFolder(tmp_path / "runs/parent")
    recipe = load(tmp_path / "runs/parent/recipe.yaml", ["name=fork", "steps=50"])
    whole = []
    for number in range(40):
        child = os.fork()
        if child == 0:
            _die_after(number)
            fork = Fork(old, 20, recipe)
            folder = RunFolder(tmp_path / "runs/fork")
            folder.claim(recipe)
            fork.into(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        folder = RunFolder(tmp_path / "runs/fork")
        whole.append([path.name for path in run_folder.checkpoints(folder.checkpoints)] == ["step_00000020"])
        assert not folder.trained
        if whole[-1]:
            assert run_folder.damage(folder.checkpoints / "step_00000020") is None
            assert sum(row["kind"] == "train" for row in folder.rows()) == 20
            assert folder.origin() is not None
        if not os.WIFSIGNALED(status):
            break
    assert (whole[0], whole[-1]) == (False, True)
    output = parent.run("launch", "small.yaml", "name=fork", "steps=50", *USUAL, *ONE, "--fork", "parent@20")
    assert "forked runs/parent at step 20" in output
    assert parent.losses("fork")[:40] == parent.losses("parent")


def _die_after(number: int) -> None:
    """Kill this process at its system call number `number` of those that change files."""
    import sys

    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "shutil.copyfile"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_what_a_fork_cannot_change_is_named_with_the_fix(parent: Shell, tmp_path: Path) -> None:
    def changed(*changes: str) -> Recipe:
        return load(tmp_path / "runs/parent/recipe.yaml", ["name=fork", *changes])

    runs = tmp_path / "runs"
    with pytest.raises(RecipeError) as error:
        Fork.of("parent@20", changed("batch=64", "seed=3", "model.depth=3", "data.train=digits:val"), runs)
    lines = error.value.faults
    assert len(lines) == 4
    assert "batch: 32 -> 64: keep 32 and change it from step 20 on: phases=[{step: 20, batch: 64}]" in lines
    assert any(line.startswith("seed: 0 -> 3: it decides the order") for line in lines)
    assert any(line.startswith("model.depth: 2 -> 3: leave it as it is, or start from the weights") for line in lines)
    with pytest.raises(RecipeError, match="phases: what begins before step 20 must stay"):
        Fork.of("parent@20", changed("phases=[{step: 19, batch: 64}]"), runs)
    Fork.of("parent@20", changed("phases=[{step: 20, batch: 64}]", "optim.lr=1", "parallel.zero=3"), runs)
    with pytest.raises(CheckpointError, match=r"write RUN@STEP; .* has these steps: 10, 20, 30, 40"):
        Fork.of("parent", changed(), runs)
    missing = Fork.of("parent@25", changed(), runs)
    folder = RunFolder(runs / "fork")
    folder.claim(changed())
    with pytest.raises(CheckpointError, match="no checkpoint of step 25; there are: step_00000040, step_00000030"):
        missing.into(folder)
    folder.withdraw()
    assert not folder.path.exists()
    with pytest.raises(LaunchError, match="would start from itself"):
        Fork.of("parent@20", changed(), runs).check(RunFolder(runs / "parent"))


def test_what_cannot_be_extended_is_refused_and_a_cosine_shows_its_jump(parent: Shell, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs/parent")

    def changed(*changes: str) -> Recipe:
        return load(tmp_path / "runs/parent/recipe.yaml", changes)

    with pytest.raises(LaunchError, match="a run of 40 steps, and --extend makes it longer, not 30"):
        continued.extension(folder, changed("steps=30"))
    with pytest.raises(LaunchError, match=r"a run of 40 steps, and --extend makes it longer, not 22"):
        continued.extension(folder, changed("epochs=0.5"))
    with pytest.raises(LaunchError, match="--extend changes the length only; --fork starts another run"):
        folder.finished(changed("steps=80", "optim.lr=2e-3"), extend=True)
    assert continued.extension(folder, changed()) == []
    text = (tmp_path / "runs/parent/recipe.yaml").read_text()
    (tmp_path / "runs/parent/recipe.yaml").write_text(text.replace("schedule: constant", "schedule: cosine"))
    _, rates = continued.extension(folder, changed("steps=80"))
    assert rates.startswith("learning rate: 1.2e-05 in step 40, 0.000557 in step 41; optim.schedule cosine runs over")


def test_an_extension_that_trains_nothing_leaves_the_finished_run(parent: Shell, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs/parent")
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    longer = load(tmp_path / "runs/parent/recipe.yaml", ["steps=80"])
    assert folder.finished(longer, extend=True) is None
    folder.claim(longer, extend=True)
    assert folder.result() is None
    assert folder.withdraw()
    folder.release()
    after = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    assert after == before
