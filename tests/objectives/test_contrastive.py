"""Contrastive runs: the same for any number of ranks and micro-batches, at any ZeRO stage, and after a restart."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import forks
from vimscale.checkpoint.load import Reader
from vimscale.data.dataset import Dataset
from vimscale.evaluation.figures import evaluate
from vimscale.model import VisionMamba
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes

ROOT = Path(__file__).parents[2]
TOWER = ("features=16", "width=16", "depth=1", "heads=2", "context=16", "tokenizer=bytes", "caption=class")
SMALL = ("objective.kind=contrastive", *(f"objective.{change}" for change in TOWER))
SMALL += ("objective.class_captions=['a {}', 'the {}']", "objective.templates=['a {}', 'the {}']")
SHORT = ("steps=4", "log.every=1", "optim.warmup=2", "optim.lr=1e-2", "checkpoint.every=2")


def _run(folder: Path, world: int, *changes: str, fault: str = "") -> dict[str, list[dict[str, Any]]]:
    """Train on `world` ranks; return the rows of metrics.jsonl by kind."""
    done = forks.run_module("tests.support.injected", folder, world, fault, *SMALL, *SHORT, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}


def _same(ours: dict[str, list[dict[str, Any]]], theirs: dict[str, list[dict[str, Any]]]) -> None:
    for key in ("loss", "scale", "grad_norm"):
        pair = [[row[key] for row in rows["train"]] for rows in (ours, theirs)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-5), key
    for key in ("images", "top1", "top5", "loss"):
        assert ours["eval"][-1][key] == pytest.approx(theirs["eval"][-1][key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "zero"), [("siglip", 1), ("clip", 3)])
def test_ranks_and_micro_batches_do_not_change_losses_gradients_or_evaluations(
    tmp_path: Path, loss: str, zero: int
) -> None:
    whole = _run(tmp_path / "whole", 1, f"objective.loss={loss}")
    assert len({row["loss"] for row in whole["train"]}) == 4
    changes = (f"objective.loss={loss}", f"parallel.zero={zero}", "parallel.persist=0", "parallel.micro_batch=4")
    _same(_run(tmp_path / "cut", 2, *changes), whole)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_groups_of_two_ranks_that_share_images_change_nothing(tmp_path: Path, loss: str) -> None:
    whole = _run(tmp_path / "whole", 1, f"objective.loss={loss}")
    changes = (f"objective.loss={loss}", "parallel.context=2", "parallel.micro_batch=8")
    _same(_run(tmp_path / "cut", 4, *changes), whole)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_every_update_clamps_the_scale_on_all_ranks(tmp_path: Path, zero: int) -> None:
    """At first all cosines are alike and positive. A large bias makes every other pair match too well, which pushes the
    scale down; a small one makes every pair match too badly, which pushes it up.
    """
    changes = (f"parallel.zero={zero}", "parallel.persist=0", "optim.warmup=0")
    for scale, bias in ((1.0, 10), (100.0, -100)):
        folder = tmp_path / f"{scale:g}"
        rows = _run(folder, 2, *changes, f"objective.scale={scale:g}", f"objective.bias={bias}")["train"]
        assert [row["scale"] for row in rows[:2]] == pytest.approx([scale] * 2, rel=1e-6)
        assert all(1 <= row["scale"] * (1 + 1e-6) <= 100 * (1 + 2e-6) for row in rows)
        assert 0 <= _parameter(folder, "temperature.log_scale") <= math.log(100) * (1 + 1e-7)
        assert abs(rows[1]["bias"] - bias) == pytest.approx(1e-2, rel=1e-2)  # an update of AdamW: lr


def _parameter(folder: Path, name: str) -> float:
    reader = Reader(folder / "run/checkpoints/step_00000004")
    return reader.read("weight", f"objective.{name}", 0, 1).item()


# ---- evaluations


def _learner(*changes: str) -> Learner:
    chosen = recipes.load("vim_digits_cpu", [*SMALL, "model.depth=2", "model.d_model=32", *changes])
    torch.manual_seed(0)
    config = chosen.shape(10)
    return Learner(build(chosen.objective, config), VisionMamba(config)).eval()


def _evaluated(learner: Learner, batch: int) -> dict[str, float]:
    dataset = Dataset.open("digits:val")
    return evaluate(
        partial(learner.ask, "evaluation_sums"),
        learner.objective,
        dataset,
        dataset.manifest,
        size=(32, 32),
        choice=None,
        batch=batch,
        device=torch.device("cpu"),
        shared_of=partial(learner.ask, "evaluation_shared"),
    )


def _features(learner: Learner) -> tuple[Tensor, Tensor, Tensor]:
    """(images, texts, labels) of the validation set, by means of the objective's training views."""
    from vimscale.data.images.augment import normalised
    from vimscale.data.stream import evaluation

    dataset = Dataset.open("digits:val")
    mean, std = torch.tensor(dataset.manifest.mean), torch.tensor(dataset.manifest.std)
    parts = evaluation(dataset, rank=0, world=1, batch=359, size=(32, 32), views=learner.objective.views)
    (batch,) = parts
    images = normalised(batch.images, mean, std)
    with torch.no_grad():
        found = learner.ask("ahead", Inputs(images, batch.labels, batch.views))
    return found["images"], found["texts"], batch.labels


def test_zero_shot_figures_follow_from_the_means_of_the_templates() -> None:
    learner = _learner()
    found = _evaluated(learner, 64)
    again = _evaluated(learner, 50)
    assert found == pytest.approx(again, rel=1e-6)
    images, _, labels = _features(learner)
    objective: Any = learner.objective
    with torch.no_grad():
        classes = []
        for name in "0123456789":
            rows = torch.stack([objective._row(text.format(name)).tokens for text in ("a {}", "the {}")])
            classes.append(F.normalize(F.normalize(learner["text"](rows), dim=1).mean(dim=0), dim=0))
        logits = 10 * images @ torch.stack(classes).T
    assert found["images"] == 359
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert objective.options.headline == "top1"
    assert found["top1"] == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))


def test_retrieval_figures_count_images_whose_own_caption_is_among_the_first() -> None:
    learner = _learner("objective.evaluation=retrieval", "objective.class_captions=['a {}']", "objective.loss=clip")
    found = _evaluated(learner, 64)
    assert found == pytest.approx(_evaluated(learner, 50), rel=1e-6)
    images, texts, labels = _features(learner)
    cosines = images @ texts.T  # equal captions have equal columns
    one_each = torch.stack([cosines[:, int((labels == digit).nonzero()[0])] for digit in range(10)], dim=1)
    own = one_each[torch.arange(359), labels]
    times = torch.bincount(labels, minlength=10)
    better = ((one_each > own[:, None] + 1e-6) * times).sum(dim=1)
    assert learner.objective.options.headline == "recall1"
    assert found["recall1"] == pytest.approx(float((better < 1).double().mean()))
    assert found["recall5"] == pytest.approx(float((better < 5).double().mean()))
    nll = (cosines / 0.07).logsumexp(dim=1) - own / 0.07
    assert found["loss"] == pytest.approx(float(nll.mean()), rel=1e-4)


def test_the_loss_of_each_pair_averages_to_the_loss_of_a_micro_batch() -> None:
    learner = _learner()
    views = {"tokens": torch.randint(1, 250, (6, 16), dtype=torch.int32), "cut": torch.zeros(6)}
    views["tokens"][:, -1] = 257
    inputs = Inputs(torch.randn(6, 3, 32, 32), torch.zeros(6, dtype=torch.int64), views)
    with torch.no_grad():
        each = learner.ask("loss_per_sample", inputs)
        (shared,) = learner.objective.meet(learner, [learner.ask("ahead", inputs)])
        loss, figures = learner.ask("loss", Inputs(inputs.images, inputs.targets, views, shared=shared))
    assert each.shape == (6,)
    assert float(each.mean()) == pytest.approx(float(loss), rel=1e-5)
    assert figures.keys() == {"scale", "bias", "cut"}
