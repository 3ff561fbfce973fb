"""Nearest neighbors and linear classifiers: equal to independent computations, and the same for any number of ranks."""

import json
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
from vimscale.evaluation import neighbors
from vimscale.evaluation.probes import Probes, probed
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


def test_neighbors_vote_as_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_AT_ONCE", 2000)
    bank, labels = _clusters(211, 0)
    queries, _ = _clusters(57, 1)
    ks = [1, 5, 20, 500]
    found = neighbors.nearest(queries, bank, labels, torch.arange(211), ks=ks, classes=4)
    for k, ranked in zip(ks, found, strict=True):
        assert ranked[:, 0].tolist() == _by_hand(queries, bank, labels, min(k, 211), 4)


def test_neighbors_vote_as_in_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier  # takes seconds

    bank, labels = _clusters(400, 0, classes=8)
    queries, truth = _clusters(90, 1, classes=8)
    ks = [1, 10, 20, 200]
    ranked = neighbors.nearest(queries, bank, labels, torch.arange(400), ks=ks, classes=8)
    found = neighbors.figures(ranked, truth, ks, 8)
    for k, mine in zip(ks, ranked, strict=True):
        theirs = KNeighborsClassifier(k, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine")
        shares = theirs.fit(bank.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
        order = np.argsort(-shares, axis=1, kind="stable")[:, :5]
        assert mine.tolist() == order.tolist()
        assert found[f"knn{k}_top1"] == pytest.approx((order[:, 0] == truth.numpy()).mean(), abs=1e-12)
        assert found[f"knn{k}_top5"] == pytest.approx((order == truth.numpy()[:, None]).any(axis=1).mean(), abs=1e-12)
    assert found["knn_top1"] == found["knn20_top1"]


def test_one_k_has_one_figure_and_few_classes_no_top5() -> None:
    ranked = torch.tensor([[[1, 0], [0, 1]]])
    assert neighbors.figures(ranked, torch.tensor([1, 1]), [7], 2) == {"knn_top1": 0.5}
    both = neighbors.figures(ranked.repeat(2, 1, 1), torch.tensor([1, 1]), [7, 9], 2)
    assert both == {"knn_top1": 0.5, "knn7_top1": 0.5, "knn9_top1": 0.5}


def test_of_equal_neighbors_the_first_in_the_set_votes() -> None:
    bank = torch.tensor([[1.0, 0.0]] * 3)
    found = neighbors.nearest(bank[:1], bank, torch.tensor([2, 1, 0]), torch.tensor([7, 3, 5]), ks=[1], classes=3)
    assert found[0, 0, 0] == 1


# ---- on data


def _mean_color(inputs: Inputs) -> Tensor:
    """An encoder that needs no training: the image at a quarter of its size."""
    assert isinstance(inputs.images, Tensor)
    return torch.nn.functional.avg_pool2d(inputs.images, 4).flatten(1)


READING: Any = {"size": (32, 32), "choice": None, "batch": 50, "workers": 0, "device": torch.device("cpu")}


LINEAR: dict[str, dict[str, Any]] = {
    "lbfgs": {"method": "lbfgs"},
    "sgd": {"method": "sgd", "steps": 60, "batch": 128},
    "sgd, published": {"method": "sgd", "steps": 60, "batch": 128, "choose": "published"},
    "lars": {"method": "lars", "steps": 200},
}


def _all_probes(digits: str, **ranks: Any) -> dict[str, dict[str, float]]:
    """Figures of kNN during training, then of each linear classifier with kNN."""
    bank, val = (Dataset.open(f"{digits}/{split}") for split in ("val", "train"))  # the smaller set is learned from
    found = {"training": neighbors.knn(_mean_color, bank, val, bank.manifest, k=20, **ranks, **READING)}
    for name, options in LINEAR.items():
        wanted = Probes(knn=f"{digits}/val", linear=f"{digits}/val", k=(5, 20), **options)
        found[name] = probed(_mean_color, val, bank.manifest, wanted, **ranks, **READING)
    return found


def _rank(rank: int, world: int, context: int, digits: str, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    found = _all_probes(digits, rank=rank, world=world, context=context)
    (Path(place) / str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_pixels_of_digits_are_classified_the_same_on_any_number_of_ranks(tmp_path: Path, digits: Path) -> None:
    bank, val = (Dataset.open(str(digits / split)) for split in ("val", "train"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = _all_probes(str(digits))
    torch.set_num_threads(threads)
    assert all(each["knn_top1"] == alone["training"]["knn_top1"] > 0.9 for each in alone.values())
    assert all(alone[name]["linear_top1"] > 0.9 for name in LINEAR if name != "lars")
    assert alone["sgd, published"]["linear_top1"] >= alone["sgd"]["linear_top1"] - 0.01
    known = features_of.embedded(_mean_color, bank, bank.manifest, **READING)
    queries = features_of.embedded(_mean_color, val, bank.manifest, **READING)
    assert queries.numbers.tolist() == list(range(val.manifest.samples))
    predicted = torch.tensor(_by_hand(queries.head, known.head, known.labels, 20, 10))
    share = float((predicted == queries.labels).double().mean())
    assert alone["training"]["knn_top1"] == pytest.approx(share, abs=1e-12)
    for world, context in ((2, 1), (4, 2)):
        place = tmp_path / f"{world}-{context}"
        place.mkdir()
        mp.spawn(_rank, (world, context, str(digits), str(place)), nprocs=world)
        assert [json.loads((place / str(rank)).read_text()) for rank in range(world)] == [alone] * world
    assert not dist.is_initialized()


def test_a_bank_without_labels_or_with_others_is_refused(digits: Path) -> None:
    bank, val = (Dataset.open(str(digits / split)) for split in ("train", "val"))
    for classes, fault in (((), "has no labels"), (("a",) * 10, "has other classes than")):
        bank.manifest = replace(bank.manifest, classes=classes, labels=())
        with pytest.raises(DataError, match=fault):
            neighbors.knn(_mean_color, bank, val, val.manifest, k=20, **READING)
    with pytest.raises(RecipeError, match=r"evaluate\.knn digits:train: nothing to classify; set data\.val"):
        recipes.load("vim_digits_cpu", ["data.val=null", "evaluate.knn=digits:train"])


def test_a_set_that_lacks_classes_classifies_the_images_of_the_others(digits: Path) -> None:
    bank, val = (Dataset.open(str(digits / split)) for split in ("val", "train"))
    names = (*reversed(val.manifest.classes[1:]), "another")
    val.manifest = replace(val.manifest, classes=names)  # of label i the name is 9 - i, and 9 has no counterpart
    found = probed(_mean_color, val, bank.manifest, Probes(knn=str(digits / "val"), k=[20]), **READING)
    known = features_of.embedded(_mean_color, bank, bank.manifest, **READING)
    queries = features_of.embedded(_mean_color, val, bank.manifest, **READING)
    there = queries.labels < 9
    predicted = torch.tensor(_by_hand(queries.head[there], known.head, known.labels, 20, 10))
    assert found["knn_top1"] == pytest.approx(
        float((predicted == 9 - queries.labels[there]).double().mean()), abs=1e-12
    )
