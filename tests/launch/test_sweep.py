"""Sweeps and learning-rate range tests: their trials, their results, and a real sweep that is killed."""

import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.shell import Shell
from vimscale.engine import optim
from vimscale.errors import LaunchError, RecipeError, RunFailed, UserError
from vimscale.launch.commands import sweep
from vimscale.launch.display import search_results
from vimscale.launch.sweeps import trials
from vimscale.launch.sweeps.lr_range import analyze
from vimscale.recipe import recipe
from vimscale.recipe.sections import Optim
from vimscale.runtime import run_folder
from vimscale.runtime.run_folder import RunFolder


def _points(folder: Path, *overrides: str, samples: int | None = None) -> list[trials.Trial]:
    return trials.create("vim_digits_cpu", overrides, samples, folder)[1]


def test_values_are_split_at_commas_outside_brackets_and_quotes(tmp_path: Path) -> None:
    found = _points(
        tmp_path,
        "optim.lr=1e-3, 2e-3",
        "model.directions=(fwd bwd)*2,bi*4",
        "data.train=[{data: 'digits:train', weight: 1}, {data: 'digits:val', weight: 2}]",
        "data.val='digits:val'",
    )
    assert [trial.name for trial in found] == [
        "lr-1e-3_directions-fwd-bwd-2",
        "lr-1e-3_directions-bi-4",
        "lr-2e-3_directions-fwd-bwd-2",
        "lr-2e-3_directions-bi-4",
    ]
    assert found[1].recipe.model.directions == "bi*4"
    assert {len(trial.recipe.data.sources) for trial in found} == {2}
    assert found[0].folder.path == tmp_path / "vim_digits_cpu-sweep/lr-1e-3_directions-fwd-bwd-2"


def test_names_that_would_be_equal_get_different_suffixes(tmp_path: Path) -> None:
    names = [trial.name for trial in _points(tmp_path, "model.directions=bi*4,(bi)*4")]
    assert len(set(names)) == 2
    long = _points(tmp_path, f"name={'a' * 99}", "seed=0,1")
    assert {len(trial.recipe.name) for trial in long} == {100}
    assert len({trial.recipe.name for trial in long}) == 2


def test_more_samples_keep_the_earlier_ones(tmp_path: Path) -> None:
    key = "optim.lr=1e-4..1e-2"
    few, many = (_points(tmp_path, key, "optim.beta2=0.9..0.999", samples=n) for n in (3, 5))
    assert [trial.point for trial in few] == [trial.point for trial in many[:3]]
    rates = [trial.recipe.optim.lr for trial in many]
    assert all(1e-4 < rate < 1e-2 for rate in rates)
    assert len(set(rates)) == 5
    assert len(_points(tmp_path, key, "seed=0,1", samples=3)) == 6


def test_an_invalid_sweep_says_why(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="nothing to try: give some key several values"):
        _points(tmp_path, "optim.lr=1e-3")
    with pytest.raises(LaunchError, match="a range needs a number of values to draw from it"):
        _points(tmp_path, "optim.lr=1e-4..1e-2")
    with pytest.raises(LaunchError, match="with 0 < LOW < HIGH"):
        _points(tmp_path, "optim.lr=1e-2..1e-4", samples=2)
    with pytest.raises(LaunchError, match="the same value occurs twice"):
        _points(tmp_path, "optim.lr=1e-3,1e-3")
    with pytest.raises(RecipeError) as error:
        _points(tmp_path, "optim.lr=1e-3,-1,many", "seed=0")
    assert "optim.lr=-1: optim.lr: -1 must be above 0" in str(error.value)
    assert "optim.lr=many: optim.lr: 'many' is not a number" in str(error.value)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/recipe.yaml").touch()
    with pytest.raises(LaunchError, match="is a run, and the sweep's trials would be inside it"):
        _points(tmp_path, "name=taken", "seed=0,1")


def test_a_refused_command_leaves_nothing_behind(tmp_path: Path) -> None:
    for arguments, message in (
        ({"overrides": ["seed=0,1", "data.val=null"]}, "--by top1: the recipe has no data.val to evaluate on"),
        ({"overrides": ["seed=0,1"], "address": "127.0.0.1:9"}, "--address 127.0.0.1:9: nothing answers there"),
        ({"overrides": ["seed=0,1"], "workers": 3}, "batch 64 is not a multiple of 3 ranks; use batch=63"),
    ):
        with pytest.raises(UserError, match=message):
            sweep.sweep("vim_digits_cpu", runs=tmp_path / "runs", **arguments)
    with pytest.raises(LaunchError, match=r"--from 1 --to 0\.1: the rate rises, so write 0 < --from < --to"):
        sweep.lr_range("vim_digits_cpu", low=1.0, high=0.1, runs=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def _ended(trial: trials.Trial, losses: list[float], top1: float | None) -> None:
    trial.folder.path.mkdir(parents=True)
    rows = [{"kind": "train", "step": step + 1, "loss": loss, "lr": 0.1} for step, loss in enumerate(losses)]
    other = {"top5": 1.0, "loss": 0.0, "images": 1}
    for step in range(2, len(losses) + 1, 2):
        rows.append({"kind": "eval", "step": step, "top1": 1 - losses[step - 1], **other})
    trial.folder.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"half')
    if top1 is not None:
        trial.folder.finish({"step": len(losses), "steps": len(losses), "top1": top1, **other})
    else:
        trial.stop(len(losses))


def test_settings_rank_by_their_mean_over_seeds_and_incomplete_ones_come_later(
    tmp_path: Path,
) -> None:
    all_ = _points(tmp_path, "optim.lr=1e-3,2e-3,3e-3,4e-3", "seed=0,1")
    for trial, top1 in zip(all_, (0.5, 0.7, 0.9, 0.5, None, 0.95, None, None), strict=True):
        _ended(trial, [0.9, 0.8, 0.7, 0.6] if top1 else [0.1, 0.05], top1)
    groups = trials.ranked([trials.outcome(trial, "top1", 2) for trial in all_], "top1")
    # 3e-3 has the best seed, but its other one did not finish
    assert [dict(group.outcomes[0].trial.setting)["optim.lr"] for group in groups] == ["2e-3", "1e-3", "3e-3", "4e-3"]
    best, _, half, none = groups
    assert (best.mean, best.spread) == (pytest.approx(0.7), pytest.approx(0.2828, abs=1e-4))
    assert (half.finished, half.spread) == ([0.95], None)
    assert [one.status for one in half.outcomes] == ["stopped", "finished"]
    assert none.finished == []
    groups = trials.ranked([trials.outcome(trial, "loss", 2) for trial in all_], "loss")
    assert groups[0].mean == pytest.approx(0.65)
    assert trials.figures(all_[0].folder.rows(), "loss", 2) == [
        (2, pytest.approx(0.85)),
        (4, pytest.approx(0.65)),
    ]


def test_seeds_are_never_compared_and_a_setting_is_given_up_with_all_its_seeds(tmp_path: Path) -> None:
    from vimscale.launch.sweeps import on_tune

    all_ = _points(tmp_path, "optim.lr=1e-3,2e-3,3e-3", "seed=0,1")
    firsts = trials.firsts(all_)
    assert [firsts[one.name].name for one in all_] == [one.name for one in all_[::2] for _ in range(2)]
    jobs = {one.name: on_tune._Job(one, 80, "loss", 10, 1, 1, tmp_path, firsts[one.name]) for one in all_}
    judge = on_tune._Asha([], jobs, keep=3)
    running = {}
    for one in all_:
        running[one.name] = SimpleTrial(one.name, {"name": one.name})
        judge.on_trial_add(None, running[one.name])
    # the second seeds are far worse than the first, and reach the rung first
    losses = {1: 9.0, 3: 7.0, 5: 8.0, 0: 1.0, 2: 0.5, 4: 2.0}
    decisions = {
        all_[i].name: judge.on_trial_result(None, running[all_[i].name], {"at": 10, "figure": loss})
        for i, loss in losses.items()
    }
    assert [one.name for one in all_ if decisions[one.name] == "STOP"] == [all_[4].name]
    assert all_[4].stopped
    later = {"at": 20, "figure": 0.1}
    assert [judge.on_trial_result(None, running[all_[i].name], later) for i in (1, 3, 5)] == [
        "CONTINUE",
        "CONTINUE",
        "STOP",
    ]
    assert all_[5].stopped
    judge.on_trial_complete(None, running[all_[1].name], {"at": 80, "figure": 0.0})
    judge.on_trial_complete(None, running[all_[0].name], {"at": 80, "figure": 0.0})
    alone = _points(tmp_path, "name=alone", "seed=0,1,2,3")
    jobs = {one.name: on_tune._Job(one, 80, "loss", 10, 1, 1, tmp_path, alone[0]) for one in alone}
    judge = on_tune._Asha([], jobs, keep=3)
    for loss, one in enumerate(alone):
        trial = SimpleTrial(one.name, {"name": one.name})
        judge.on_trial_add(None, trial)
        assert judge.on_trial_result(None, trial, {"at": 10, "figure": float(loss)}) == "CONTINUE"


@dataclass(frozen=True)
class SimpleTrial:
    """The part of a Tune trial that a scheduler reads."""

    trial_id: str
    config: dict[str, str]


# ---- the range test


def test_the_rate_rises_by_equal_factors() -> None:
    rates = [optim.learning_rate(Optim(lr=1.0, min_lr=1e-6, schedule="rise"), step, 7) for step in range(7)]
    assert rates == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("end", [5.0, math.nan])
def test_the_range_test_finds_where_the_loss_falls_and_where_it_diverges(end: float) -> None:
    rates = [10 ** (-6 + 6 * i / 99) for i in range(100)]
    losses = [2.3 - 1.3 / (1 + (3e-3 / rate) ** 2) if rate < 0.1 else end for rate in rates]
    found = analyze(rates, losses)
    assert found.steepest == pytest.approx(3e-3, rel=0.3)
    assert found.diverges == pytest.approx(0.1, rel=0.5)
    assert found.suggested == pytest.approx(3e-3, rel=0.3)
    calm = analyze(rates, [2.3 - 1.3 / (1 + (3e-3 / rate) ** 2) for rate in rates])
    assert calm.diverges is None


RATES = [10 ** (-6 + 6 * i / 99) for i in range(100)]


def _noisy(curve: Callable[[float], float], seed: int, noise: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [curve(rate) + draw.gauss(0, noise) for rate in RATES]


def _fall(rate: float) -> float:
    return 2.3 - 1.3 / (1 + (3e-3 / rate) ** 2)


@pytest.mark.parametrize(
    "after",
    [
        lambda rate: 6.0,
        lambda rate: 1e9 * rate,
        lambda rate: 8.0 if rate < 0.4 else 0.2,  # falls fastest, and is lowest, after it has diverged
        lambda rate: 2.3 + math.sin(40 * rate),
        lambda rate: math.inf,
    ],
)
def test_losses_after_the_divergence_do_not_change_the_suggestion(
    after: Callable[[float], float],
) -> None:
    for seed in range(5):
        found = analyze(RATES, _noisy(lambda rate: _fall(rate) if rate < 0.08 else after(rate), seed))
        assert found.diverges is not None
        assert found.suggested is not None
        assert found.suggested <= found.steepest < found.lowest < found.diverges < 0.12
        assert found.diverges > 0.03
        assert found.steepest == pytest.approx(3e-3, rel=0.5)


def test_the_suggestion_is_below_the_rate_of_the_lowest_loss() -> None:
    for seed in range(5):
        found = analyze(RATES, _noisy(lambda rate: _fall(rate) + 0.2 * math.log10(max(rate, 1e-2) / 1e-2), seed))
        lowest = min(range(len(found.smooth)), key=found.smooth.__getitem__)
        assert found.suggested <= found.steepest < found.lowest == RATES[lowest]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_a_loss_that_does_not_fall_by_more_than_its_noise_suggests_nothing(noise: float) -> None:
    for seed in range(5):
        for curve in (lambda rate: 2.3, lambda rate: 2.3 + 5 * rate):
            found = analyze(RATES, _noisy(curve, seed, noise))
            assert (found.steepest, found.suggested) == (None, None)
            assert found.sentence.startswith("falls at none of these rates by more than its noise")
    assert analyze([1e-3, 1e-2, 1e-1], [2.0, 3.0, math.nan]).suggested is None
    assert analyze([1e-3, 1e-2], [math.nan, math.nan]).diverges == 1e-3


@pytest.mark.parametrize("losses", [_noisy(_fall, 0), _noisy(lambda rate: 2.3, 0), [2.3] * 100, [math.nan] * 100])
def test_every_curve_gets_a_plot_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: list[float]
) -> None:
    chosen, console = recipe.load("vim_digits_cpu"), Console(width=200)
    found = analyze(RATES, losses)
    if found.suggested is None:
        with pytest.raises(RunFailed, match=re.escape(found.sentence)):
            search_results.lr_range(RATES, losses, chosen, RunFolder(tmp_path), console)
    else:
        search_results.lr_range(RATES, losses, chosen, RunFolder(tmp_path), console)
        assert f"suggested: optim.lr={found.suggested:.1e}" in capsys.readouterr().out
    assert (tmp_path / "lr_range.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_range_test_ends_at_the_first_loss_that_is_not_finite_and_suggests_a_rate(shell: Shell) -> None:
    command = ("lr-range", "small.yaml", "--to", "1e20", "--from", "1e-4", "--steps", "40", "--workers", "1")
    output = shell.run(*command)
    assert "suggested: optim.lr=" in output
    assert "diverges from" in output
    assert (shell.folder / "runs/small-lr-range/lr_range.png").stat().st_size > 10_000


# ---- a real sweep

SWEEP = ("sweep", "small.yaml", "name=s", "steps=40", "checkpoint.every=5", "data.val=null", "--by", "loss")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rates", ["1e-2,2e-5", "1e-2,2e-3,5e-4,2e-5"], ids=["two", "four"])
def test_a_killed_sweep_resumes_its_trials(shell: Shell, rates: str) -> None:
    command = (*SWEEP, f"optim.lr={rates}", "--grace", "10", "--keep", "2")
    trials_ = [f"lr-{rate}" for rate in rates.split(",")]
    process = shell.popen(*command)
    shell.reaches(process, f"s/{trials_[-1]}", 10)
    process.kill()
    process.wait()
    output = shell.run(*command)
    ended = re.search(rf"{len(trials_)} trials, (\d) of them ended before", output)
    began = re.findall(r"(\S+): started", output)
    assert len(began) + (int(ended[1]) if ended else 0) == len(trials_)
    assert "best: optim.lr=1e-2, 1." in output
    for name in trials_:
        folder = shell.folder / "runs/s" / name
        steps = len(shell.losses(f"s/{name}"))
        finished = (folder / "result.json").exists()
        assert steps == 40 if finished else steps < 40
        assert finished or (folder / "stopped.json").exists()
        assert run_folder.checkpoints(folder / "checkpoints")[0].name == run_folder.checkpoint_name(steps)
        said = (folder / "logs/launch.txt").read_text()
        assert said.count("step 1/40") == 1, "it resumed, and did not start again"
    assert (shell.folder / "runs/s/sweep.png").stat().st_size > 10_000
    assert f"{len(trials_)} of them ended before" in shell.run(*command)
    while any("vimscale.launch" in command for command in shell.processes().values()):
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_saves_every_trial(shell: Shell) -> None:
    command = (*SWEEP, "steps=2000", "optim.lr=1e-2,2e-3", "--keep", "1")
    process = shell.popen(*command)
    shell.reaches(process, "s/lr-1e-2", 20)
    shell.reaches(process, "s/lr-2e-3", 20)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in shell.finish(process, expect=3)
    for name in ("lr-1e-2", "lr-2e-3"):
        folder = shell.folder / "runs/s" / name
        newest = run_folder.checkpoints(folder / "checkpoints")[0].name
        assert newest == run_folder.checkpoint_name(len(shell.losses(f"s/{name}")))
        assert not (folder / "stopped.json").exists()
    shell.nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [True, False], ids=["SIGTERM to all", "its head is killed"])
def test_a_sweep_whose_ray_ends_says_so_and_continues(shell: Shell, stopped: bool) -> None:
    command = (*SWEEP, "steps=2000", "optim.lr=1e-2,2e-3", "--keep", "1")
    process = shell.popen(*command)
    shell.reaches(process, "s/lr-1e-2", 20)
    shell.reaches(process, "s/lr-2e-3", 20)
    if stopped:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(next(pid for pid, name in shell.processes().items() if "gcs_server" in name), signal.SIGKILL)
    output = shell.finish(process, expect=3 if stopped else 1)
    assert "the same command continues" in output
    assert stopped == ("Ray's gcs_server on this machine died" not in output)
    assert "GCS" not in output, "Ray's C code must not be the one that ends it"
    shell.nothing_is_left()
    assert run_folder.checkpoints(shell.folder / "runs/s/lr-1e-2/checkpoints")


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_the_others_finish(shell: Shell) -> None:
    bad = "optim.lr=1e-2,1e30"
    output = shell.run(*SWEEP, bad, "guard.rollbacks=0", "guard.skips=0", "--keep", "1")
    assert "best: optim.lr=1e-2, 1." in output
    assert re.search(r"lr-1e30: failed: step \d+: .* is not finite", output)
    output = shell.run(*SWEEP, "name=worse", "optim.lr=1e29,1e30", "guard.rollbacks=0", "guard.skips=0", expect=1)
    assert "error: no trial finished; lr-1e29: step" in output
