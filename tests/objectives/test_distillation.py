"""Self-distillation: views, what all images of a step share, the teacher, late parameters, runs on several ranks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import forks
from tests.support.shell import Shell
from vimscale.checkpoint.compare import Pair
from vimscale.checkpoint.load import Reader, read_train_state
from vimscale.data import stream
from vimscale.data.images.augment import normalised_views
from vimscale.data.training_set import TrainingSet
from vimscale.errors import RecipeError
from vimscale.estimate import activations
from vimscale.model import VisionMamba
from vimscale.objectives import crops
from vimscale.objectives import distillation_losses as losses
from vimscale.objectives.base import Inputs, Learner, Sample
from vimscale.objectives.build import build
from vimscale.objectives.distillation import Distillation
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
TINY = (
    "objective={kind: distillation, local_crops: 3, local_size: 16, flip: 0, jitter: 0.5, prototypes: 24, hidden: 16,"
    " bottleneck: 8}"
)
FULL = ("objective.ibot=0.5", "objective.koleo=0.1", "objective.targets=sinkhorn", "objective.mask_ratio=[0.2, 0.5]")
SMALL_MODEL = ("model.d_model=16", "model.depth=2", "model.drop_path=0.2")
PLAIN = ("augment.crop_min=0.7", "augment.flip=0", "optim.ema=null")


def _recipe(*changes: str) -> Recipe:
    return recipes.load("vim_digits_cpu", [TINY, *SMALL_MODEL, *PLAIN, *changes])


def _learner(*changes: str) -> Learner:
    chosen = _recipe(*changes)
    config = chosen.shape(10)
    torch.manual_seed(0)
    learner = Learner(build(chosen.objective, config), VisionMamba(config))
    with torch.no_grad():
        learner.objective.begin(learner, 0, 100)
        for p in learner.parameters():  # a student that differs from its teacher
            p += 0.05 * torch.randn_like(p)
    return learner


def _objective(learner: Learner) -> Distillation:
    assert isinstance(learner.objective, Distillation)
    return learner.objective


def _inputs(learner: Learner, b: int) -> Inputs:
    rng = np.random.default_rng(0)
    views = []
    for seed in range(b):
        image = torch.randint(256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        views.append(learner.objective.views(Sample(image, 0, "", {}, learner.encoder.config.size), rng))
    stacked = {name: torch.stack([each[name] for each in views]) for name in views[0]}
    ready = normalised_views(stacked, torch.full((3,), 0.5), torch.full((3,), 0.25))
    draws = torch.rand(b, len(learner.encoder.config.layers), generator=torch.Generator().manual_seed(1))
    return Inputs(torch.empty(b, 3, 0, 0), torch.zeros(b, dtype=torch.int64), ready, draws)


def _cut(inputs: Inputs, size: int) -> list[Inputs]:
    views = {name: view.split(size) for name, view in inputs.views.items()}
    assert inputs.draws is not None
    count = len(inputs.draws) // size
    return [
        replace(
            inputs,
            images=torch.empty(size, 3, 0, 0),
            views={name: parts[i] for name, parts in views.items()},
            draws=inputs.draws.split(size)[i],
        )
        for i in range(count)
    ]


def _stepped(learner: Learner, parts: list[Inputs]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and its gradients, as the loop and the engine compute them."""
    with torch.no_grad():
        shared = learner.objective.meet(learner, [learner.ask("ahead", part) for part in parts])
    learner.zero_grad()
    total = 0.0
    for part, own in zip(parts, shared, strict=True):
        loss, _ = learner.ask("loss", replace(part, shared=own))
        (loss / len(parts)).backward()
        total += float(loss.detach()) / len(parts)
    return total, {name: p.grad.clone() for name, p in learner.trained()}


# ---- the recipe


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["objective.local_size=48"], r"local_size 48: the small crops are larger than the global ones, 32 x 32"),
        (["objective.local_size=20"], r"local_size 20: patches of 8 pixels do not fill it; use 16 or 24"),
        (["objective.momentum=1"], r"momentum 1: the teacher needs a schedule .* or it never moves; use 0\.996"),
        (["objective.momentum=null"], r"momentum null: the teacher needs a schedule"),
        (["objective.prototypes=2000000"], r"objective\.prototypes: 2000000 must be at most 1,048,576"),
        (["objective.teacher_temperature=0.1"], r"teacher_temperature 0\.1 must be below student_temperature 0\.1"),
        (["objective.teacher_warmup=5"], r"teacher_warmup 5: there is nothing to warm up"),
        (["objective.global_area=[0.9, 0.4]"], r"global_area 0\.9 to 0\.4: the smallest is above the largest"),
        (["parallel.zero=3"], r"parallel\.zero 3: objective distillation can be .* stage 2 or lower; use zero=2"),
        (["augment.mixup=0.8"], r"augment: objective distillation makes its own views of images; leave out mixup"),
        (["parallel.context=2"], r"objective distillation needs whole images on every rank"),
        (["objective.ibot=1", "objective.mask_ratio=[0.01, 0.5]"], r"mask_ratio 0\.01 of 16 patches is less than one"),
        (["objective.ibot=1", "model.registers=3", "model.pool=registers"], r"use ibot_head: separate"),
    ],
)
def test_faults_name_the_value_the_rule_and_the_fix(changes: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _recipe(*changes)


def test_hierarchical_models_are_refused() -> None:
    stages = ("model.cls_token=none", "model.stages=[{depth: 1, d_model: 16}]")
    with pytest.raises(RecipeError, match=r"crops are packed into rows, .*; leave out model\.stages"):
        recipes.load("vim_digits_cpu", [TINY, *PLAIN, *stages])


def test_clipping_by_parameter_needs_gradients_by_parameter() -> None:
    with pytest.raises(RecipeError, match=r"optim\.clip_by parameter: .* use zero=2"):
        recipes.load("vim_digits_cpu", ["optim.clip_by=parameter", "parallel.zero=3"])


# ---- views


def test_views_are_crops_of_both_sizes_and_masks_of_at_most_half_the_patches() -> None:
    objective = _objective(_learner(*FULL, "objective.mask_chance=1"))
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    sample = Sample(image, 0, "", {}, (32, 48))
    made = [objective.views(sample, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert {name: (tuple(v.shape), v.dtype) for name, v in made[0].items()} == {
        "global": ((2, 3, 32, 48), torch.uint8),
        "local": ((3, 3, 16, 16), torch.uint8),
        "masked": ((2, 24), torch.bool),
    }
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["global"], made[2]["global"])
    counts = [
        int(n) for seed in range(50) for n in objective.views(sample, np.random.default_rng(seed))["masked"].sum(1)
    ]
    assert 4 <= min(counts) <= max(counts) <= crops.most_masked(24, objective.options) == 12
    assert len(set(counts)) > 4


def test_the_loader_makes_no_image_that_nobody_reads() -> None:
    chosen = _recipe("batch=8")
    config = chosen.shape(10)
    objective = build(chosen.objective, config)
    data = TrainingSet.open(chosen.data)

    def batch(**options: Any) -> stream.Batch:
        return next(
            stream.training(chosen, data, config, rank=0, world=1, start=0, steps=1, views=objective.views, **options)
        )

    without, usual = batch(augmented=objective.options.reads_images), batch()
    assert without.images.shape == (8, 3, 0, 0)  # type: ignore[union-attr]
    assert usual.images.shape == (8, 3, 32, 32)  # type: ignore[union-attr]
    assert torch.equal(without.views["local"], usual.views["local"])


# ---- losses


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_a_step_is_the_same_whatever_its_accumulation(targets: str) -> None:
    learner = _learner(*FULL, f"objective.targets={targets}", "objective.ibot_head=separate")
    inputs = _inputs(learner, 8)
    whole, grads = _stepped(learner, [inputs])
    means = [mean.clone() for mean in _objective(learner)._means]
    for size in (4, 2):
        loss, others = _stepped(learner, _cut(inputs, size))
        assert loss == pytest.approx(whole, rel=1e-5)
        for name, grad in others.items():
            torch.testing.assert_close(
                grad, grads[name], rtol=1e-4, atol=1e-5 * float(grads[name].abs().max()), msg=name
            )
        for ours, theirs in zip(_objective(learner)._means, means, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_is_made_of_the_published_parts() -> None:
    learner = _learner(*FULL)
    inputs, objective, options = _inputs(learner, 6), _objective(learner), _objective(learner).options
    with torch.no_grad():
        (shared,) = objective.meet(learner, [learner.ask("ahead", inputs)])
    loss, figures = learner.ask("loss", replace(inputs, shared=shared))
    own: Any = learner["teacher"]
    with torch.no_grad():
        seen = objective._teach(learner, inputs)
        logits = own.heads["head"].prototypes(seen["cls"]).flatten(0, 1)
        from vimscale.objectives.published import dinov2

        q = dinov2.sinkhorn_knopp_teacher(logits, options.teacher_temperature)
        features, tokens = objective._student(learner, inputs, local=True)
        head: Any = learner["head"]
        student = head(features).flatten(0, 1)
        dino = dinov2.class_token_loss(student[:12], student[12:], q.unflatten(0, (2, 6)).flip(0).flatten(0, 1))
        assert figures["loss_dino"] == pytest.approx(float(dino), rel=1e-5)
        _, weights = objective._order(inputs)
        real = weights.flatten() > 0
        patches = dinov2.sinkhorn_knopp_teacher(
            own.heads["head"].prototypes(seen["patches"][real]), options.teacher_temperature
        )
        assert tokens is not None
        masks = inputs.views["masked"].transpose(0, 1).flatten(0, 1)
        ibot = dinov2.ibot_loss(head(tokens[real]), patches, masks)
        assert real.sum() == masks.sum() > 0
        assert figures["loss_ibot"] == pytest.approx(0.5 * float(ibot), rel=1e-5)
        koleo = sum(dinov2.koleo_loss(view) for view in features[:2])
    assert figures["loss_koleo"] == pytest.approx(float(koleo), rel=1e-5)
    assert float(loss) == pytest.approx(float(dino) + 0.5 * float(ibot) + 0.1 * float(koleo), rel=1e-5)


def test_hidden_patches_reach_the_teacher_and_not_the_student() -> None:
    learner = _learner(*FULL, "objective.mask_chance=1")
    inputs = _inputs(learner, 4)
    large, masked = inputs.views["global"].clone(), inputs.views["masked"]
    hidden = masked.view(4, 2, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)[:, :, None]
    changed = replace(inputs, views=inputs.views | {"global": torch.where(hidden, large + 1, large)})
    with torch.no_grad():
        ours, theirs = (_objective(learner)._student(learner, each, local=False)[0] for each in (inputs, changed))
        assert torch.equal(ours, theirs)
        ours, theirs = (_objective(learner)._teach(learner, each)["cls"] for each in (inputs, changed))
        assert not torch.allclose(ours, theirs)


def test_crops_of_one_row_do_not_see_each_other() -> None:
    learner = _learner().eval()
    inputs = _inputs(learner, 3)
    with torch.no_grad():
        features, _ = _objective(learner)._student(learner, replace(inputs, draws=None), local=True)
        for i in range(2):
            torch.testing.assert_close(features[i], learner.encoder(inputs.views["global"][:, i], features=True))
        for i in range(3):
            alone = learner.encoder(inputs.views["local"][:, i], features=True)
            torch.testing.assert_close(features[2 + i], alone)


def test_an_evaluation_uses_the_center_and_its_loss_depends_on_no_other_image() -> None:
    learner = _learner(*FULL).eval()
    inputs = replace(_inputs(learner, 6), draws=None, weights=torch.ones(6))
    with torch.no_grad():
        whole = learner.ask("evaluation_sums", inputs)
        parts = [
            replace(inputs, views={name: view[i : i + 2] for name, view in inputs.views.items()}, weights=torch.ones(2))
            for i in (0, 2, 4)
        ]
        torch.testing.assert_close(sum(learner.ask("evaluation_sums", part) for part in parts), whole)


# ---- the teacher


def test_the_teacher_follows_by_its_schedule_and_keeps_still_where_an_update_is_left_out() -> None:
    learner = _learner(
        "objective.momentum=0.9", "objective.teacher_temperature_from=0.02", "objective.teacher_warmup=3"
    )
    objective, own = _objective(learner), learner["teacher"]
    assert all(p.requires_grad for p in learner.parameters())
    assert not list(own.parameters())
    _stepped(learner, [_inputs(learner, 4)])
    student = dict(learner.encoder.named_parameters())["blocks.0.mixer.A_log"]
    before = {name: b.clone() for name, b in own.named_buffers()}
    mean = objective._means[0].clone()
    objective._means[0].fill_(math.nan)
    objective.after_update(learner, 1, torch.zeros(()))
    after = dict(own.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in before.items() if name != "temperature")
    objective._means[0].copy_(mean)
    objective.after_update(learner, 51, torch.ones(()))
    kept = 1 - 0.1 * (math.cos(math.pi * 50 / 100) + 1) / 2
    assert kept == pytest.approx(0.95)
    old = before["encoder.blocks.0.mixer.A_log"]
    torch.testing.assert_close(after["encoder.blocks.0.mixer.A_log"], kept * old + (1 - kept) * student)
    torch.testing.assert_close(after["center"], 0.1 * mean)
    temperatures = [objective._temperature(step) for step in range(5)]
    assert temperatures == pytest.approx([0.02, 0.03, 0.04, 0.04, 0.04])


def test_the_teacher_begins_as_the_student_and_is_what_evaluations_use() -> None:
    learner = _learner()
    with torch.no_grad():
        learner.objective.begin(learner, 0, 10)
    encoder = learner.objective.evaluated(learner)
    assert encoder is not learner.encoder
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(image, features=True), learner.encoder(image, features=True))
    state = encoder.state_dict()
    assert state.keys() == learner.encoder.state_dict().keys()


def test_a_warning_says_what_to_change_only_when_training_is_under_way() -> None:
    objective = _objective(_learner("objective.prototypes_from=20"))
    fine = {"entropy": 0.7, "spread": 0.9}
    assert objective.warning(fine, 50) is None
    assert "uniform" in (objective.warning(fine | {"entropy": 0.995}, 50) or "")
    assert "teacher_temperature" in (objective.warning(fine | {"entropy": 0.995}, 50) or "")
    assert "collapsed" in (objective.warning(fine | {"spread": 0.001}, 50) or "")
    assert objective.warning(fine | {"entropy": 0.995}, 15) is None


def test_figures_tell_collapsed_teachers_from_others() -> None:
    learner = _learner()
    inputs, own = _inputs(learner, 8), learner["teacher"]

    def figures() -> dict[str, float]:
        with torch.no_grad():
            (shared,) = learner.objective.meet(learner, [learner.ask("ahead", inputs)])
        return {name.removeprefix("figure/"): float(v) for name, v in shared.items() if name.startswith("figure/")}

    usual = figures()
    assert 0 < usual["prototypes_used"] <= 1
    own.temperature.fill_(1e3)
    assert figures()["entropy"] > 0.999
    own.temperature.fill_(1e-3)
    assert figures()["entropy"] < usual["entropy"]
    own.center.copy_(-1e3 * torch.eye(24)[0])
    same = figures()
    assert same["spread"] < 1e-3
    assert same["prototypes_used"] == pytest.approx(1 / 16)


def test_plans_count_teacher_and_heads() -> None:
    chosen, plain = _recipe(*FULL), recipes.load("vim_digits_cpu", [*SMALL_MODEL])
    levels: Any = ["none"] * 2
    config = chosen.shape(10)
    ours = activations.passes(config, levels, 8, "fp32", "cpu", chosen.objective)
    theirs = activations.passes(plain.shape(10), levels, 8, "fp32", "cpu", plain.objective)
    assert ours.kept > 2 * theirs.kept


# ---- runs


def _run(folder: Path, world: int, fault: str, *changes: str) -> list[dict[str, Any]]:
    changes = (TINY, "optim.ema=null", *changes)
    done = forks.run_module("tests.support.injected", folder, world, fault, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


PUBLISHED = (
    "optim.clip_by=parameter",
    "optim.clip=0.3",
    "optim.weight_decay_end=0.4",
    "objective.prototypes_from=4",
    "optim.warmup=2",
    "optim.lr=1e-2",
    "objective.momentum=0.9",
    "log.every=1",
    "batch=16",
)


@pytest.mark.slow
def test_losses_and_figures_are_those_of_one_rank(tmp_path: Path) -> None:
    changes = (*PUBLISHED, *FULL, "steps=6", "checkpoint.every=6")
    one = _run(tmp_path / "one", 1, "", *changes)
    assert one[0]["loss"] != one[-1]["loss"]
    two = _run(tmp_path / "two", 2, "", *changes, "parallel.micro_batch=4")
    for name in ("loss", "loss_dino", "loss_ibot", "loss_koleo", "entropy", "spread", "prototypes_used", "feature_std"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", range(3))
def test_stopped_runs_continue_bit_by_bit_before_and_after_the_prototypes_thaw(tmp_path: Path, zero: int) -> None:
    options = (*PUBLISHED, *FULL, "steps=8", "checkpoint.every=2")
    changes = (*options, f"parallel.zero={zero}", "parallel.micro_batch=4")
    calm = _run(tmp_path / "calm", 2, "", *changes)
    one = _run(tmp_path / "one", 1, "", *options)
    assert [row["loss"] for row in calm] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    for fault in ("stopped_at_2", "stopped_at_5", ""):
        again = _run(tmp_path / "hit", 2, fault, *changes)
    assert [row["loss"] for row in again] == [row["loss"] for row in calm]
    folders = [tmp_path / name / "run/checkpoints/step_00000008" for name in ("calm", "hit")]
    pair = Pair(*folders)
    assert pair.only_in == [[], []]
    found = list(pair.differences())
    assert all(each.same_bits for each in found)
    names = {each.parameter for each in found}
    assert {"objective.teacher.center", "objective.teacher.encoder.cls_token"} <= names
    state = read_train_state(folders[0])
    assert (state.updates, state.late_updates) == (8, 5)


@pytest.mark.parametrize("zero", [1, *(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 2))])
def test_late_parameters_keep_their_values_and_have_no_moments_before_their_step(tmp_path: Path, zero: int) -> None:
    changes = (*PUBLISHED, f"parallel.zero={zero}", "checkpoint.every=1", "checkpoint.keep=9", "steps=4")
    _run(tmp_path, 1, "", *changes)
    readers = [Reader(tmp_path / f"run/checkpoints/step_{step:08d}") for step in range(1, 5)]
    late, usual = "objective.head.prototypes.weight_v", "objective.head.mlp.0.weight"
    values = [reader.read("weight", late, 0, 24 * 8) for reader in readers]
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[2], values[3])
    assert [late in reader.kinds["exp_avg"] for reader in readers] == [False, False, False, True]
    assert all(usual in reader.kinds["exp_avg"] for reader in readers)
    states = [read_train_state(tmp_path / f"run/checkpoints/step_{step:08d}") for step in range(1, 5)]
    assert [(state.updates, state.late_updates) for state in states] == [(1, 0), (2, 0), (3, 0), (4, 1)]
    # the first update of Adam is lr * sign(gradient), whatever the gradient, if its moments are corrected for one step
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lr = next(row["lr"] for row in rows if row["kind"] == "train" and row["step"] == 4)
    moved = (values[3] - values[2]).abs().max()
    assert 0.5 * lr < moved < 2 * lr


@pytest.mark.slow
def test_a_run_is_killed_resumed_evaluated_and_its_teacher_exported_through_the_command_line(shell: Shell) -> None:
    small = (TINY, *SMALL_MODEL, *PLAIN, "steps=24", "epochs=null", "optim.warmup=2", "log.every=1", "evaluate.every=0")
    ranks = ("--workers", "1", "--no-ray")
    arguments = ("launch", "vim_digits_cpu", "name=distilled", *small, "checkpoint.every=4", *ranks)
    process = shell.popen(*arguments)
    shell.reaches(process, "distilled", 8)
    process.kill()
    process.communicate()
    shell.nothing_is_left()
    before = shell.rows("distilled")
    assert "resumed from" in shell.run(*arguments)
    rows = shell.rows("distilled")
    assert [row["loss"] for row in rows[: len(before)]] == [row["loss"] for row in before]
    assert "loss" in shell.run("evaluate", "distilled")
    shell.run("export", "distilled", "--teacher", "--output", "teacher")
    shell.run("export", "distilled", "--objective", "--output", "student")
    from safetensors.torch import load_file

    from vimscale.export.safetensors import load

    added = load_file(shell.folder / "student/objective.safetensors")
    exported = load(shell.folder / "teacher").state_dict()
    assert torch.equal(exported["cls_token"], added["teacher.encoder.cls_token"])
    assert not torch.equal(exported["cls_token"], load(shell.folder / "student").state_dict()["cls_token"])


def test_entropies_are_fractions_of_the_largest() -> None:
    p = torch.stack([torch.full((8,), 1 / 8), torch.eye(8)[0]])
    assert losses.entropy(p).tolist() == pytest.approx([1, 0], abs=1e-6)
