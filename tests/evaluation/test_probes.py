"""Nearest neighbors and linear classifiers: equal to independent computations, and the same for any number of ranks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vimscale.data.dataset import Dataset
from vimscale.errors import DataError, RecipeError
from vimscale.evaluation import embedded as features_of
from vimscale.evaluation import linear as linear_probe
from vimscale.evaluation import neighbors
from vimscale.objectives.base import Inputs
from vimscale.recipe import recipe as recipes


def _clusters(count: int, seed: int, classes: int = 4, features: int = 6) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=rng)
    return centers[labels] + torch.randn(count, features, generator=rng), labels


def _by_hand(queries: Tensor, bank: Tensor, labels: Tensor, k: int, classes: int) -> list[int]:
    predicted = []
    known = bank.double().numpy()
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    for query in queries.double().numpy():
        similarity = known @ (query / np.linalg.norm(query))
        votes = [0.0] * classes
        for i in np.argsort(-similarity, kind="stable")[:k]:
            votes[int(labels[i])] += math.exp(similarity[i] / 0.07)
        predicted.append(int(np.argmax(votes)))
    return predicted


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_neighbors_vote_as_computed_by_hand(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_AT_ONCE", 2000)
    bank, labels = _clusters(211, 0)
    queries, _ = _clusters(57, 1)
    found = neighbors.nearest(queries, bank, labels, torch.arange(211), k=k, classes=4)
    assert found.tolist() == _by_hand(queries, bank, labels, min(k, 211), 4)


def test_of_equal_neighbors_the_first_in_the_set_votes() -> None:
    bank = torch.tensor([[1.0, 0.0]] * 3)
    found = neighbors.nearest(bank[:1], bank, torch.tensor([2, 1, 0]), torch.tensor([7, 3, 5]), k=1, classes=3)
    assert found.tolist() == [1]


def test_a_linear_classifier_is_at_the_minimum_of_its_loss() -> None:
    features, labels = _clusters(300, 0)
    x = ((features - features.mean(0)) / features.std(0)).double()
    for l2 in (1.0, 1e-3):
        weight, bias = linear_probe.fitted(x, labels, 4, l2)
        logits = x.numpy() @ weight.numpy() + bias.numpy()
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        error = share - np.eye(4)[labels.numpy()]
        assert np.abs(x.numpy().T @ error / len(x) + l2 * weight.numpy()).max() < 1e-6
        assert np.abs(error.mean(axis=0)).max() < 1e-6


# ---- on data


def _mean_color(inputs: Inputs) -> Tensor:
    """An encoder that needs no training: the image at a quarter of its size."""
    assert isinstance(inputs.images, Tensor)
    return torch.nn.functional.avg_pool2d(inputs.images, 4).flatten(1)


READING: Any = {"size": (32, 32), "choice": None, "batch": 50, "workers": 0, "device": torch.device("cpu")}


def _rank(rank: int, world: int, context: int, digits: str, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    bank, val = (Dataset.open(f"{digits}/{split}") for split in ("train", "val"))
    here = {"rank": rank, "world": world, "context": context}
    found = neighbors.knn(_mean_color, bank, val, bank.manifest, k=20, **here, **READING)
    (Path(place) / str(rank)).write_text(repr(found["knn_top1"]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_pixels_of_digits_are_classified_the_same_on_any_number_of_ranks(tmp_path: Path, digits: Path) -> None:
    bank, val = (Dataset.open(str(digits / split)) for split in ("train", "val"))
    alone = neighbors.knn(_mean_color, bank, val, bank.manifest, k=20, **READING)
    assert alone["knn_top1"] > 0.9
    features, labels, _ = features_of.embedded(_mean_color, bank, bank.manifest, **READING)
    queries, truth, numbers = features_of.embedded(_mean_color, val, bank.manifest, **READING)
    assert numbers.tolist() == list(range(val.manifest.samples))
    predicted = torch.tensor(_by_hand(queries, features, labels, 20, 10))
    assert alone["knn_top1"] == pytest.approx(float((predicted == truth).double().mean()), abs=1e-12)
    for world, context in ((2, 1), (4, 2)):
        place = tmp_path / f"{world}-{context}"
        place.mkdir()
        mp.spawn(_rank, (world, context, str(digits), str(place)), nprocs=world)
        assert [float((place / str(rank)).read_text()) for rank in range(world)] == [alone["knn_top1"]] * world
    assert not dist.is_initialized()
    linear = linear_probe.linear(_mean_color, bank, val, bank.manifest, factors=(1e-2, 1e-3), **READING)
    assert linear["linear_top1"] > 0.9
    assert linear == linear_probe.linear(_mean_color, bank, val, bank.manifest, factors=(1e-2, 1e-3), **READING)


def test_a_bank_without_labels_or_with_others_is_refused(digits: Path) -> None:
    bank, val = (Dataset.open(str(digits / split)) for split in ("train", "val"))
    for classes, fault in (((), "has no labels"), (("a",) * 10, "has other classes than")):
        bank.manifest = replace(bank.manifest, classes=classes, labels=())
        with pytest.raises(DataError, match=fault):
            neighbors.knn(_mean_color, bank, val, val.manifest, k=20, **READING)
    with pytest.raises(RecipeError, match=r"evaluate\.knn digits:train: nothing to classify; set data\.val"):
        recipes.load("vim_digits_cpu", ["data.val=null", "evaluate.knn=digits:train"])
