"""The objective seam: recipes name a user's own class; its modules are built, trained, saved, planned, not exported."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import forks
from tests.support.shell import Shell
from vimscale.checkpoint.compare import Pair
from vimscale.checkpoint.load import Reader
from vimscale.data.stream import training
from vimscale.data.training_set import TrainingSet
from vimscale.engine import zero_layout
from vimscale.errors import LaunchError, RecipeError
from vimscale.estimate import activations
from vimscale.model import VisionMamba
from vimscale.objectives.base import Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
OWN = Path(__file__).parent / "own.py"


def _recipe(*changes: str, name: str = "Counting") -> Recipe:
    return recipes.load("vim_digits_cpu", [f"objective.kind={OWN}:{name}", *changes])


def _learner(chosen: Recipe) -> Learner:
    config = chosen.model.shape(10)
    return Learner(build(chosen.objective, config), VisionMamba(config))


# ---- the recipe


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["objective.kind=elsewhere.py:Counting"], "elsewhere.py cannot be read on .*: No such file"),
        ([f"objective.kind={OWN}:Count"], r"own\.py has no class Count; it has Head, Counter, Counting"),
        ([f"objective.kind={OWN}:Head"], r"Head is not an objective: derive it from vimscale\.objectives\.base"),
        (["objective.kind=classificaton"], "'classificaton' is not classification .*nor a class in a file such as"),
        ([f"objective.kind={OWN}:Counting", "objective.scal=2"], r"objective\.scal: no such key; did you mean scale\?"),
        ([f"objective.kind={OWN}:Counting", "objective.scale=a"], r"objective\.scale: 'a' is not a number"),
        (["objective.label_smothing=0"], r"objective\.label_smothing: no such key; did you mean label_smoothing\?"),
    ],
)
def test_faults_of_the_section_name_the_value_the_rule_and_the_fix(changes: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        recipes.load("vim_digits_cpu", changes)


def test_a_file_that_cannot_be_imported_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import torch\n\n1 / 0\n")
    with pytest.raises(RecipeError, match=r"bad\.py cannot be imported, line 3: ZeroDivisionError: division by zero"):
        recipes.load("vim_digits_cpu", [f"objective.kind={tmp_path}/bad.py:Loss"])


def test_the_file_is_found_relative_to_the_recipe_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    shutil.copy(OWN, tmp_path / "there")
    text = "base: vim_digits_cpu\nobjective: {kind: 'own.py:Counting', scale: 2}\n"
    (tmp_path / "there" / "mine.yaml").write_text(text)
    (tmp_path / "over.yaml").write_text("base: there/mine\nobjective: {scale: 3}\n")
    monkeypatch.chdir(tmp_path)
    for source, scale in (("there/mine.yaml", 2), ("over.yaml", 3)):
        chosen = recipes.load(source)
        assert chosen.objective.model_dump() == {"kind": f"{tmp_path}/there/own.py:Counting", "scale": scale}
        assert recipes.parse(chosen.to_yaml(), "again") == chosen
    monkeypatch.chdir(tmp_path / "there")
    assert recipes.load("vim_digits_cpu", ["objective.kind=own.py:Counting"]).objective.scale == 1  # type: ignore[attr-defined]


def test_recipes_and_objectives_reach_other_processes() -> None:
    chosen = _recipe("objective.scale=2")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).options.scale)"
    objective = build(chosen.objective, chosen.model.shape(10))
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(objective), capture_output=True, check=False)
    assert done.stdout == b"2.0\n", done.stderr


def test_a_run_keeps_a_copy_of_the_file_and_notices_another_one(tmp_path: Path) -> None:
    mine = Path(shutil.copy(OWN, tmp_path / "mine.py"))
    changes = [f"objective.kind={mine}:Counting"]
    run = RunFolder(tmp_path / "run")
    claimed = run.claim(recipes.load("vim_digits_cpu", changes))
    assert claimed.objective.kind == f"{run.path}/mine.py:Counting"
    assert "kind: mine.py:Counting" in (run.path / "recipe.yaml").read_text()
    assert run.recipe() == claimed
    run.metrics.write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0, "lr": 1.0}) + "\n")
    assert RunFolder(run.path).finished(recipes.load("vim_digits_cpu", changes)) is None
    mine.write_text(mine.read_text() + "\n# changed\n")
    with pytest.raises(LaunchError, match=r"objective\.kind: mine\.py:Counting \(sha256 \w+\) -> mine\.py:Counting"):
        RunFolder(run.path).finished(recipes.load("vim_digits_cpu", changes))


# ---- what it adds


def test_what_could_be_neither_trained_nor_saved_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"parameter objective\.head\.weight does not require a gradient"):
        _learner(_recipe(name="Frozen"))
    with pytest.raises(RecipeError, match=r"buffer objective\.norm\.num_batches_tracked is int64"):
        _learner(_recipe(name="Integer"))


def test_the_encoder_starts_from_the_same_weights_whatever_is_trained_beside_it() -> None:
    torch.manual_seed(0)
    plain = VisionMamba(_recipe().model.shape(10)).state_dict()
    torch.manual_seed(0)
    learner = _learner(_recipe())
    assert all(torch.equal(plain[name], value) for name, value in learner.encoder.state_dict().items())
    assert learner["head"].bias.tolist() == [0.25] * 4
    assert [name for name, _ in learner.trained()][-2:] == ["objective.head.weight", "objective.head.bias"]
    assert "objective.head.bias" in learner.no_decay()
    assert "objective.head.weight" not in learner.no_decay()


def test_plans_count_the_parameters_and_the_pass_of_an_objective() -> None:
    chosen, plain = _recipe(), recipes.load("vim_digits_cpu")
    config = chosen.model.shape(10)
    ours, theirs = (zero_layout.parameters(config, one, 3, 1) for one in (chosen, plain))
    assert {p.name for p in ours} - {p.name for p in theirs} == {"objective.head.weight", "objective.head.bias"}
    levels: Any = ["none"] * len(config.layers)
    passes = [
        activations.passes(config, levels, 8, "fp32", "cpu", one.objective).with_gradients for one in (chosen, plain)
    ]
    assert all(size > 0 for size in passes)
    assert passes[0] != passes[1]


def test_views_depend_on_seed_and_position_alone() -> None:
    chosen = _recipe("batch=32", "augment.repeats=2")
    data = TrainingSet.open(chosen.data)
    config = chosen.model.shape(10)
    views = build(chosen.objective, config).views

    def targets(world: int, *changes: str) -> torch.Tensor:
        one = _recipe("batch=32", "augment.repeats=2", *changes)
        streams = [
            training(one, data, config, rank=rank, world=world, start=2, steps=3, views=views) for rank in range(world)
        ]
        return torch.cat([batch.views["target"] for stream in streams for batch in stream])

    whole = targets(1)
    assert whole.shape == (32, 4)
    assert len(whole.unique(dim=0)) == 32
    assert torch.equal(targets(4), whole)
    assert torch.equal(targets(2, "parallel.micro_batch=4"), whole)
    assert torch.equal(targets(1, "data.workers=1"), whole)
    assert not torch.equal(targets(1, "seed=1"), whole)


# ---- runs


def _run(folder: Path, fault: str, *changes: str) -> list[dict[str, Any]]:
    done = forks.run_module("tests.support.injected", folder, 2, fault, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_own_modules_and_buffers_are_trained_saved_and_restored_at_any_stage(tmp_path: Path, zero: int) -> None:
    changes = (
        f"objective.kind={OWN}:Counting",
        f"parallel.zero={zero}",
        "parallel.persist=0",
        "parallel.micro_batch=8",
    )
    changes += ("steps=8", "checkpoint.every=4", "log.every=1", "optim.warmup=2", "optim.lr=3e-2")
    calm = _run(tmp_path / "calm", "", *changes)
    assert len(calm) == 8
    assert calm[-1]["loss"] < calm[0]["loss"]
    assert [row["updates"] for row in calm] == list(range(8))
    _run(tmp_path / "hit", "stopped_at_5", *changes)
    again = _run(tmp_path / "hit", "", *changes)
    assert [row["loss"] for row in again] == [row["loss"] for row in calm]
    readers = [Reader(tmp_path / name / "run/checkpoints/step_00000008") for name in ("calm", "hit")]
    assert readers[0].read("buffer", "objective.counter.updates", 0, 1).item() == 8
    pair = Pair(*(tmp_path / name / "run/checkpoints/step_00000008" for name in ("calm", "hit")))
    assert pair.only_in == [[], []]
    assert all(found.same_bits for found in pair.differences())
    assert "objective.counter.updates" in {found.parameter for found in pair.differences()}
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        features = RunFolder(tmp_path / "calm/run").recipe().model.shape(10).features
        ours, theirs = (reader.read(kind, "objective.head.weight", 0, 4 * features) for reader in readers)
        assert torch.equal(ours, theirs), kind
        assert ours.abs().sum() > 0
    if zero == 3:  # the same training at every stage, but for the order of sums
        plain = _run(tmp_path / "plain", "", *changes, "parallel.zero=0", "steps=4")
        assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in calm[:4]], rel=1e-5)


@pytest.mark.slow
def test_the_example_trains_resumes_evaluates_and_exports_through_the_command_line(shell: Shell) -> None:
    for name in ("own_objective.py", "own_objective.yaml"):
        shutil.copy(ROOT / "examples" / name, shell.folder)
    ranks = ("--workers", "2", "--no-ray")
    smaller = ("model.d_model=32", "model.depth=2", "steps=30", "epochs=null", "optim.warmup=5", "log.every=1")
    smaller += ("checkpoint.every=5", "objective.width=16", "evaluate.every=0")
    process = shell.popen("launch", "own_objective.yaml", *smaller, *ranks)
    shell.reaches(process, "own_objective", 8)
    process.kill()
    process.communicate()
    shell.nothing_is_left()
    before = shell.rows("own_objective")
    (shell.folder / "own_objective.py").unlink()  # the run has a copy
    told = shell.run("launch", "runs/own_objective/recipe.yaml", *ranks)
    assert "resumed from" in told
    assert "explained" in told
    assert "off_by" in told
    rows = shell.rows("own_objective")
    assert len(rows) == 30
    assert [row["loss"] for row in rows[: len(before)]] == [row["loss"] for row in before]
    assert rows[-1]["off_by"] < rows[0]["off_by"]
    (row,) = shell.rows("own_objective", "eval")
    assert f"explained {row['explained']:.4f}" in shell.run("evaluate", "own_objective")
    shell.run("export", "own_objective", "--objective")
    config = json.loads((shell.folder / "runs/own_objective/export/config.json").read_text())
    assert config["about"]["run"] == "own_objective"
    added = load_file(shell.folder / "runs/own_objective/export/objective.safetensors")
    assert added["head.0.weight"].shape == (16, 32)
    assert b"objective" not in (shell.folder / "runs/own_objective/export/model.safetensors").read_bytes()[:20_000]
