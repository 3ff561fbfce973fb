"""Classes matched by name, and counts per class: equal to counting by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.objectives.test_contrastive import SMALL
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.evaluation.matching import LACKING, NoMatch, match
from vimscale.evaluation.tally import BINS, Tally
from vimscale.inference import job as jobs
from vimscale.model import VisionMamba
from vimscale.objectives.base import Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes


def _set(*classes: str, labels: tuple[int, ...] = ()) -> Manifest:
    return Manifest(name="some", classes=classes, shards=(), mean=(0.5,) * 3, std=(0.5,) * 3, labels=labels)


def test_classes_match_by_name_and_what_does_not_is_said() -> None:
    assert match(("a", "b"), _set("a", "b")).classes == (0, 1)
    assert match(("a", "b"), _set("a", "b")).notes == ()
    found = match(("a", "b", "c"), _set("c", "x", "a", "y", labels=(3, 4, 0, 5)))
    assert found.classes == (2, LACKING, 0, LACKING)
    assert found.notes == (
        "the model lacks 2 of the set's 4 classes, so their 9 images are left out: x, y",
        "2 of the model's 3 classes have no images in the set, and remain possible: a, b",
    )
    many = match(("a",), _set("a", *map(str, range(9))))
    assert "9 of the set's 10 classes, so their images are left out: 0, 1, 2, 3, 4 and 4 more" in many.notes[0]


def test_unnamed_classes_match_by_position_if_there_are_as_many() -> None:
    found = match(("0", "1"), _set("cat", "dog"), named=False)
    assert found.classes == (0, 1)
    assert "matched by position, class 0 to cat, class 1 to dog" in found.notes[0]
    with pytest.raises(NoMatch, match="has 3 classes, and the model has 2 whose names are unknown"):
        match(("0", "1"), _set("cat", "dog", "0"), named=False)


def test_names_that_are_not_unique_match_only_in_the_same_list() -> None:
    names = ("crane", "crane", "dog")
    assert match(names, _set(*names)).classes == (0, 1, 2)
    with pytest.raises(DataError, match=r"the model gives several classes one name, .*: crane;"):
        match(names, _set("crane", "dog"))
    with pytest.raises(DataError, match="data some gives several classes one name"):
        match(("crane", "dog"), _set(*names))
    with pytest.raises(NoMatch, match="no class in common: the set has a; the model has b"):
        match(("b",), _set("a"))
    with pytest.raises(DataError, match="has no labels"):
        match(("b",), _set())


def test_a_tally_counts_classes_confusion_and_calibration() -> None:
    rng = np.random.default_rng(0)
    labels, chosen = rng.integers(0, 4, (2, 300))
    weights = rng.integers(0, 2, 300)
    probability = rng.random(300).astype(np.float32)
    probability[:3] = 1.0, 1 / BINS, 0.0
    tally = Tally()
    tally.begin(("a", "b", "c", "d", "e"), torch.device("cpu"))
    for part in np.array_split(np.arange(300), 7):
        rows: Any = [torch.from_numpy(values[part]) for values in (labels, weights, chosen, probability)]
        tally.add(*rows)
    tally.total()
    there = weights > 0
    labels, chosen, probability = labels[there], chosen[there], probability[there]
    confusion = np.zeros((5, 5), int)
    for true, taken in zip(labels, chosen, strict=True):
        confusion[true, taken] += 1
    assert tally.confusion is not None
    assert tally.confusion.tolist() == confusion.tolist()
    assert [(one.name, one.images) for one in tally.per_class()] == [
        (name, int(confusion[i].sum())) for i, name in enumerate("abcd")
    ]
    for i, one in enumerate(tally.per_class()):
        assert one.top1 == pytest.approx(confusion[i, i] / confusion[i].sum(), abs=1e-12)
    worst = tally.worst(2)
    assert worst == sorted(tally.per_class(), key=lambda one: one.top1)[:2]
    error = 0.0
    for k in range(BINS):
        inside = (probability.astype(float) > k / BINS) & (probability.astype(float) <= (k + 1) / BINS)
        inside |= (probability == 0) & (k == 0)
        if inside.any():
            gap = abs((labels == chosen)[inside].mean() - probability[inside].astype(float).mean())
            error += inside.mean() * gap
    assert tally.calibration_error == pytest.approx(error, abs=1e-12)
    most = tally.confused(1)[0]
    off = confusion - np.diag(np.diag(confusion))
    assert most[2] == off.max() == off["abcde".index(most[0]), "abcde".index(most[1])]


def test_zero_shot_chooses_among_the_classes_of_any_labelled_set(tmp_path: Any, digits: Any) -> None:
    chosen = recipes.load("vim_digits_cpu", [*SMALL, "model.depth=2", "model.d_model=32", "data.val=digits:val"])
    torch.manual_seed(0)
    config = chosen.shape(10)
    learner = Learner(build(chosen.objective, config), VisionMamba(config)).eval()
    before = Dataset.open(str(digits / "val")).manifest
    names = tuple(f"number {i}" for i in range(10))
    (tmp_path / "manifest.json").write_text(replace(before, classes=names, base=str(digits / "val")).to_json())
    job = jobs.EvaluationJob(chosen.data.model_copy(update={"val": str(tmp_path)}))
    tally = Tally()
    assert jobs.check(job, learner, before) is None
    found = jobs.run(job, learner, before, torch.device("cpu"), tally=tally)
    assert tally.classes == names
    assert sum(one.images for one in tally.per_class()) == found["images"] == before.samples
    hits = sum(one.images * one.top1 for one in tally.per_class())
    assert hits / before.samples == pytest.approx(found["top1"], abs=1e-12)
    objective = chosen.objective.model_copy(update={"evaluation": "retrieval"})
    retrieved = jobs.run(
        jobs.EvaluationJob(job.data, objective=objective),
        learner,
        before,
        torch.device("cpu"),
        tally=(empty := Tally()),
    )
    assert retrieved.keys() == {"images", "recall1", "recall5", "loss"}
    assert not empty.counted
