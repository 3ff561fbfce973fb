"""Bad steps: detected on the device, left out on all ranks, rolled back, and reported."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import forks
from tests.support.injected import BAD
from tests.support.shell import Shell
from vimscale.data.order import Order
from vimscale.errors import RecipeError
from vimscale.guard.judge import Judge, pass_over
from vimscale.recipe import recipe as recipes
from vimscale.recipe.sections import Guard

NAN, INF = math.nan, math.inf


def _judged(judge: Judge, *steps: tuple[float, float]) -> list[list[float]]:
    return [judge(torch.tensor(step)).tolist() for step in steps]


def _ordinary(count: int) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    return [(2 + 0.1 * loss, 5 + 0.5 * norm) for loss, norm in torch.randn(count, 2, generator=generator).tolist()]


# ---- the judge


@pytest.mark.parametrize("step", [(NAN, 5.0), (INF, 5.0), (-INF, 5.0), (2.0, NAN), (2.0, INF)])
def test_a_step_that_is_not_finite_is_bad_from_the_first_step_on(step: tuple[float, float]) -> None:
    judge = Judge(Guard(spike=None, window=10), torch.device("cpu"))
    assert [bad for bad, *_ in _judged(judge, step, (2.0, 5.0), step)] == [1, 0, 1]


def test_a_z_score_is_the_distance_from_the_median_in_median_absolute_deviations() -> None:
    ordinary = _ordinary(20)
    judge = Judge(Guard(window=20), torch.device("cpu"))
    _judged(judge, *ordinary)
    ((_, _, _, _, *z, loss_median, norm_median),) = _judged(judge, (2.5, 9.0))
    values = torch.tensor(ordinary).T
    medians = values.median(dim=1).values
    deviations = 1.4826 * (values - medians[:, None]).abs().median(dim=1).values
    assert [loss_median, norm_median] == pytest.approx(medians.tolist())
    assert z == pytest.approx(((torch.tensor([2.5, 9.0]) - medians) / deviations).tolist(), rel=1e-5)


def test_spikes_are_detected_upwards_only_and_once_the_window_is_full() -> None:
    spike = (4.0, 5.0)
    judge = Judge(Guard(window=20), torch.device("cpu"))
    assert _judged(judge, *_ordinary(19), spike)[-1][0] == 0
    judge = Judge(Guard(window=20), torch.device("cpu"))
    seen = _judged(judge, *_ordinary(20), spike, (2.0, 50.0), (0.01, 0.01), spike)
    assert [bad for bad, *_ in seen[-4:]] == [1, 1, 0, 1]
    assert [row for _, row, *_ in seen[-4:]] == [1, 2, 0, 1]


def test_bad_steps_do_not_enter_the_window() -> None:
    judge = Judge(Guard(window=10), torch.device("cpu"))
    _judged(judge, *_ordinary(10))
    before = judge.state()
    _judged(judge, *[(9.0, 5.0)] * 30, (NAN, 5.0))
    assert judge.state() == before
    _judged(judge, (2.0, 5.0))
    assert judge.state() != before


def test_after_equal_losses_a_small_change_is_not_a_spike() -> None:
    judge = Judge(Guard(window=10), torch.device("cpu"))
    assert _judged(judge, *[(2.0, 5.0)] * 10, (2.1, 5.0), (2.3, 5.0))[-2:][0][0] == 0


def test_a_judge_continues_from_its_state() -> None:
    steps = [*_ordinary(15), (4.0, 5.0), *_ordinary(5)]
    one, other = (Judge(Guard(window=10), torch.device("cpu")) for _ in range(2))
    _judged(one, *steps[:15])
    other.restore(json.loads(json.dumps(one.state())))
    assert _judged(other, *steps[15:]) == _judged(one, *steps[15:])


# ---- skipped data


@pytest.mark.parametrize("lanes", [1, 2])
def test_data_of_bad_steps_never_return_and_nothing_else_is_missing(lanes: int) -> None:
    recipe = recipes.load("vim_digits_cpu", ["batch=32", f"data.lanes={lanes}"])
    counts = [torch.full((12,), 128).numpy()]

    def read(step: int, skipped: Sequence[tuple[int, int]]) -> list[tuple]:
        return [tuple(place)[1:] for place in Order(recipe, counts, skipped).at(step, range(32))]

    skipped: list[tuple[int, int]] = []
    dropped: set[tuple] = set()
    for first, last in [(24, 28), (24, 25), (26, 30), (20, 33), (21, 22)]:
        dropped |= {place for step in range(first, last) for place in read(step, skipped)}
        skipped = pass_over(recipe, skipped, first, last)
    kept = [place for step in range(40) for place in read(step, skipped)]
    undisturbed = [place for step in range(70) for place in read(step, [])]
    assert not dropped & set(kept)
    assert len(dropped) == 32 * (4 + 1 + 4 + 13 + 1)
    if lanes == 1:
        assert kept == [place for place in undisturbed if place not in dropped][: len(kept)]


# ---- the engine

LEFT_OUT = """
import json, sys
from multiprocessing import get_context
import torch
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

def rank(number, world, folder):
    changes = ["parallel.persist=0", "batch=8"]
    chosen = recipe.load("vim_digits_cpu", changes)
    spec = RankSpec(chosen, folder, number, world, "cpu", 1, f"file://{folder}/meet{world}", "lo")
    distributed.prepare(spec)
    distributed.join(spec)
    from vimscale.engine.deepspeed_engine import MOMENTS, Engine
    from vimscale.objectives.base import Inputs

    def state(engine):
        moments = [engine.moment(f, key) for f in engine.fragments for key in MOMENTS]
        return [f.weight.clone() for f in engine.fragments] + [m.clone() for m in moments if m is not None]

    def step(engine, verdict, poison=1.0):
        asked = []
        def judge(norm):
            asked.append(float(norm))
            return torch.tensor(verdict)
        images = torch.randn(8 // world, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        engine.backward(engine.loss(Inputs(images, torch.arange(8 // world)))[0] * poison)
        engine.step(1e-3, judge)
        assert len(asked) == 1
        return asked[0]

    found = {}
    for stage in range(4):
        torch.manual_seed(0)
        chosen = recipe.load("vim_digits_cpu", [*changes, f"parallel.zero={stage}", "optim.backward_lr=0.5"])
        engine = Engine(chosen.model.shape(10), chosen, torch.device("cpu"))
        nan = float("nan") if number == world - 1 else 1.0
        first = [w.clone() for w in state(engine)[:len(engine.fragments)]]
        step(engine, 1.0, nan)
        same = [all(map(torch.equal, first, state(engine)))]
        step(engine, 0.0)
        step(engine, 0.0)
        before = state(engine)
        norms = [step(engine, 1.0), step(engine, 1.0, nan)]
        named = engine.broken_gradients()
        same.append(len(before) == 3 * len(first) and all(map(torch.equal, before, state(engine))))
        updates = engine.updates
        step(engine, 0.0)
        moved = not any(map(torch.equal, before, state(engine)))
        whole = not engine.broken_weights()
        found[stage] = {"same": same, "updates": [updates, engine.updates], "moved": moved, "whole": whole,
                        "finite": [n < float("inf") for n in norms], "named": "head.weight" in named or world > 1}
    gathered = [None] * world
    torch.distributed.all_gather_object(gathered, found)
    if number == 0:
        print(json.dumps(gathered))
    distributed.leave()

if __name__ == "__main__":
    folder, world = sys.argv[1], int(sys.argv[2])
    ranks = [get_context("fork").Process(target=rank, args=(n, world, folder)) for n in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_skipped_update_changes_no_weight_moment_or_count_at_any_stage(tmp_path: Path, world: int) -> None:
    done = forks.run(LEFT_OUT, tmp_path, world)
    assert done.returncode == 0, done.stderr
    for rank in json.loads(done.stdout.splitlines()[-1]):
        for stage, found in rank.items():
            expected = {"same": [True, True], "updates": [2, 3], "moved": True, "whole": True}
            assert found == expected | {"finite": [True, False], "named": True}, stage


# ---- runs


def _run(folder: Path, fault: str, *changes: str, world: int = 2, expect: int = 0) -> dict[str, Any]:
    done = forks.run_module("tests.support.injected", folder, world, fault, *changes)
    assert done.returncode == expect, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, len(train) + 1)), "a step is missing or there twice"
    reports = {
        json.loads(path.read_text())["step"]: json.loads(path.read_text())
        for path in sorted(folder.glob("run/guard/*/report.json"))
    }
    return {
        "losses": [row["loss"] for row in train],
        "rates": [row["lr"] for row in train],
        "guard": [row for row in rows if row["kind"] == "guard"],
        "eval": [row for row in rows if row["kind"] == "eval"],
        "reports": reports,
        "output": done.stdout,
    }


SPIKES = ("guard.window=10", "guard.spike=30")


@pytest.mark.parametrize(
    ("fault", "changes", "cause"),
    [
        ("nan_in_batches", (), "activations are not finite from patch_embed on, on rank 1"),
        pytest.param(
            "nan_in_batches", ("parallel.zero=3", "parallel.persist=0"), "patch_embed", marks=pytest.mark.slow
        ),
        pytest.param("nan_in_batches", ("parallel.zero=0",), "patch_embed on, on rank 1", marks=pytest.mark.slow),
        pytest.param("spike_in_batches", SPIKES, "times as large as in step 24 from head on", marks=pytest.mark.slow),
    ],
)
def test_a_run_rolls_back_skips_bad_data_and_completes(
    tmp_path: Path, fault: str, changes: tuple[str, ...], cause: str
) -> None:
    run = _run(tmp_path, fault, "guard.lower_lr=0.5", "guard.lower_steps=8", *changes)
    assert len(run["losses"]) == 50
    assert all(map(math.isfinite, run["losses"]))
    assert max(run["losses"]) < 2.5
    (row,) = run["guard"]
    assert (row["action"], row["first"], row["step"], row["to"]) == ("rollback", BAD.start, BAD.stop - 1, 20)
    assert list(run["reports"]) == list(BAD)
    assert cause in run["reports"][25]["cause"]
    assert len(run["reports"][25]["samples"]) == 32
    steps = [after / before for before, after in pairwise(run["rates"])]
    assert steps[19] < 0.6
    assert steps[27] > 1.5
    assert sum(step < 0.6 or step > 1.5 for step in steps[5:45]) == 2


@pytest.mark.parametrize(
    ("fault", "zero", "action", "cause"),
    [
        pytest.param(
            "nan_in_a_gradient", 1, "skip", "gradients are not finite, of head.weight", marks=pytest.mark.slow
        ),
        pytest.param(
            "nan_in_a_gradient", 0, "skip", "gradients are not finite, of head.weight", marks=pytest.mark.slow
        ),
        pytest.param("nan_in_a_weight", 2, "rollback", "weights are not finite: head.weight", marks=pytest.mark.slow),
        pytest.param("nan_in_a_weight", 3, "rollback", "weights are not finite: head.weight", marks=pytest.mark.slow),
    ],
)
def test_a_bad_gradient_is_skipped_and_a_bad_weight_rolled_back(
    tmp_path: Path, fault: str, zero: int, action: str, cause: str
) -> None:
    run = _run(tmp_path, fault, f"parallel.zero={zero}", "parallel.persist=0")
    assert len(run["losses"]) == 50
    assert [(row["action"], row["step"]) for row in run["guard"]] == [(action, 25)]
    assert cause in run["reports"][25]["cause"]
    assert all(map(math.isfinite, run["losses"]))


@pytest.mark.slow
def test_without_the_guard_the_same_runs_fail_or_stop_learning(tmp_path: Path) -> None:
    off = ("guard.skips=0", "guard.rollbacks=0", "guard.spike=null")
    ended = _run(tmp_path / "nan", "nan_in_batches", *off, expect=1)
    assert len(ended["losses"]) == 25
    assert "step 25: loss nan is not finite" in ended["output"]
    assert "guard/step_00000025/report.txt" in ended["output"]
    guarded = _run(tmp_path / "guarded", "spike_in_batches", *SPIKES, "optim.clip=null")
    worse = _run(tmp_path / "worse", "spike_in_batches", *off, "optim.clip=null")
    assert max(worse["losses"]) > 40
    assert worse["eval"][-1]["loss"] > guarded["eval"][-1]["loss"] + 0.1


@pytest.mark.slow
def test_a_run_killed_after_a_rollback_resumes_bit_exactly(tmp_path: Path) -> None:
    changes = (*SPIKES, "guard.lower_lr=0.5", "guard.lower_steps=22")
    calm = _run(tmp_path / "calm", "spike_in_batches", *changes)
    for kill in ("killed_at_35", "killed_at_52"):  # steps taken, 28 of them before the rollback
        folder = tmp_path / kill
        _run(folder, f"spike_in_batches {kill}", *changes, expect=9)
        resumed = _run(folder, "spike_in_batches", *changes)
        assert [resumed[key] for key in ("losses", "rates", "eval")] == [
            calm[key] for key in ("losses", "rates", "eval")
        ]
        without_report = [{**row, "report": None} for row in resumed["guard"]]
        assert without_report == [{**row, "report": None} for row in calm["guard"]]


@pytest.mark.slow
def test_a_run_stopped_before_or_among_bad_steps_resumes_bit_exactly(tmp_path: Path) -> None:
    changes = ("checkpoint.keep=1", "guard.lower_lr=0.5", "guard.lower_steps=22")
    calm = _run(tmp_path / "calm", "nan_in_batches", *changes)
    (rollback,) = calm["guard"]
    assert (rollback["step"], rollback["to"]) == (28, 20)
    folder = tmp_path / "stopped"
    there = {21: ["step_00000020", "step_00000022"], 25: ["step_00000020", "step_00000024"]}
    for step, names in there.items():
        stopped = _run(folder, f"nan_in_batches stopped_at_{step}", *changes)
        assert len(stopped["losses"]) == step + 1
        assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == names
    resumed = _run(folder, "nan_in_batches", *changes)
    assert [resumed[key] for key in ("losses", "rates", "eval")] == [calm[key] for key in ("losses", "rates", "eval")]
    assert [{**row, "report": None} for row in resumed["guard"]] == [{**row, "report": None} for row in calm["guard"]]
    assert not (folder / "run/checkpoints/step_00000024").exists(), "the rollback abandoned it"


@pytest.mark.slow
def test_one_rank_decides_like_two(tmp_path: Path) -> None:
    one, two = (_run(tmp_path / str(world), "spike_in_batches", *SPIKES, world=world) for world in (1, 2))
    assert [row["step"] for row in one["guard"]] == [row["step"] for row in two["guard"]] == [28]
    assert one["losses"][:24] == pytest.approx(two["losses"][:24], abs=1e-5)
    assert one["losses"][24:] == pytest.approx(two["losses"][24:], abs=2e-3)


@pytest.mark.slow
def test_a_persistent_fault_ends_the_run_after_the_last_rollback(tmp_path: Path) -> None:
    run = _run(tmp_path, "nan_from_a_step_on", "guard.rollbacks=2", "guard.skips=1", expect=1)
    assert "after 2 rollbacks" in run["output"]
    names = {path.name for path in (tmp_path / "run/guard").iterdir()}
    assert names == {f"step_000000{step}{time}" for step in (25, 26) for time in ("", "_2", "_3")}
    assert "Lower optim.lr" in run["output"]


@pytest.mark.slow
def test_inspect_batch_shows_a_bad_batch(shell: Shell) -> None:
    _run(shell.folder, "nan_in_batches", "steps=26", "optim.warmup=2", "guard.skips=5")
    output = shell.run("inspect-batch", "run")
    assert "step 26: loss nan is not finite" in output
    report = json.loads((shell.folder / "run/guard/step_00000026/report.json").read_text())
    assert all(sample["key"] in output for sample in report["samples"])
    assert all(sample["class"] == str(sample["label"]) for sample in report["samples"]), "the data may be gone by then"
    assert (shell.folder / "run/guard/step_00000026/batch.png").stat().st_size > 10_000
    assert "step 25: " in shell.run("inspect-batch", "run", "25")
    assert "no report of step 7; there are: step_00000025, step_00000026" in shell.run(
        "inspect-batch", "run", "7", expect=2
    )
    assert (shell.folder / "run/checkpoints/step_00000026").is_dir(), "weights are sound: the last step is saved"


def test_guard_keys_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"guard\.window: 3 must be at least 10"):
        recipes.load("vim_digits_cpu", ["guard.window=3"])
