"""Linear classifiers of frozen features: equal to independent implementations, and chosen without looking."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.evaluation import heads, lars, linear
from vimscale.evaluation.classifier import batches, figures
from vimscale.evaluation.embedded import Embedded
from vimscale.evaluation.heads import Head

CPU = torch.device("cpu")


def _set(count: int, seed: int, classes: int = 6, **wide: int) -> Embedded:
    """Clusters of points, with features of several widths by name."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    centers = torch.Generator().manual_seed(99)
    features = {
        name: 0.7 * torch.randn(classes, f, generator=centers)[labels] + torch.randn(count, f, generator=rng)
        for name, f in (wide or {"head": 8}).items()
    }
    return Embedded(features, labels, torch.arange(count))


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_logistic_regression_is_that_of_scikit_learn(l2: float) -> None:
    from sklearn.linear_model import LogisticRegression  # takes seconds

    some = _set(300, 0)
    x = some.head.double()
    weight, bias = linear.fitted(x, some.labels, 6, l2)
    theirs = LogisticRegression(C=1 / (len(x) * l2), tol=1e-10, max_iter=10_000).fit(x.numpy(), some.labels.numpy())
    np.testing.assert_allclose(weight.T.numpy(), theirs.coef_, rtol=0, atol=1e-4)
    shares = (x @ weight + bias).softmax(dim=1).numpy()
    np.testing.assert_allclose(shares, theirs.predict_proba(x.numpy()), rtol=0, atol=1e-5)


def test_logistic_regression_takes_the_factor_that_is_best_on_held_out_images() -> None:
    from sklearn.linear_model import LogisticRegression  # takes seconds

    train, tested = _set(250, 0), _set(200, 1)
    found = linear.logistic(train, tested, "head", 6, CPU)
    apart = np.arange(250) % 5 == 0
    x = (train.head.double() - train.head.double().mean(0)) / train.head.double().std(0, correction=0)
    y = ((tested.head.double() - train.head.double().mean(0)) / train.head.double().std(0, correction=0)).numpy()

    def theirs(rows: Any, l2: float) -> LogisticRegression:
        solver = LogisticRegression(C=1 / (int(rows.sum()) * l2), tol=1e-10, max_iter=10_000)
        return solver.fit(x.numpy()[rows], train.labels.numpy()[rows])

    scores = [theirs(~apart, l2).score(x.numpy()[apart], train.labels.numpy()[apart]) for l2 in linear.L2]
    chosen = linear.L2[int(np.argmax(scores))]
    assert found["linear_l2"] == chosen
    score = theirs(np.ones(250, bool), chosen).score(y, tested.labels.numpy())
    assert found["linear_top1"] == pytest.approx(score, abs=1e-12)


def test_the_published_choice_looks_at_the_validation_set() -> None:
    train, tested = _set(250, 0), _set(200, 1)
    every = {l2: linear.logistic(train, tested, "head", 6, CPU, factors=[l2]) for l2 in linear.L2}
    best = max(each["linear_top1"] for each in every.values())
    found = linear.logistic(train, tested, "head", 6, CPU, choose="published")
    assert found == every[found["linear_l2"]]
    assert found["linear_top1"] == best


# ---- SGD


def test_the_grid_trains_each_head_as_one_torch_optimizer_does() -> None:
    train = _set(90, 0, head=5, mean=3)
    grid = [Head(names, rate) for names in (("head",), ("head", "mean")) for rate in (1e-3, 0.1, 2.0)]
    steps, batch = 25, 32
    for head, (weight, bias) in zip(grid, heads.trained(train, grid, 6, CPU, steps=steps, batch=batch), strict=True):
        x = torch.cat([train.features[name] for name in head.names], dim=1)
        layer = nn.Linear(x.shape[1], 6)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(x.shape[1], 6).normal_(std=0.01, generator=_seeded(0)).T)
            layer.bias.zero_()
        solver = torch.optim.SGD(layer.parameters(), lr=head.rate * batch / 256, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps, eta_min=0)
        for rows in batches(90, batch, steps, seed=0):
            solver.zero_grad()
            F.cross_entropy(layer(x[rows]), train.labels[rows]).backward()
            solver.step()
            schedule.step()
        torch.testing.assert_close(weight, layer.weight.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias, layer.bias.data, rtol=1e-4, atol=1e-6)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_epoch_is_a_new_order_of_all_samples() -> None:
    seen = torch.cat(list(batches(10, 4, 5, seed=3)))
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert [len(rows) for rows in batches(3, 8, 2, seed=0)] == [3, 3]


GRID = [Head(("head",), rate) for rate in (1e-4, 1e-2, 1.0)]
SHORT: dict[str, Any] = {"steps": 60, "batch": 64}


def test_the_best_head_is_chosen_on_held_out_images_and_trained_again_on_all() -> None:
    train, tested = _set(250, 0), _set(200, 1)
    found, chosen = heads.best_of(train, tested, GRID, 6, CPU, **SHORT)
    others = Embedded(tested.features, tested.labels.flip(0), tested.numbers)
    assert heads.best_of(train, others, GRID, 6, CPU, **SHORT)[1] == chosen
    rest = Embedded({"head": train.head[train.numbers % 5 != 0]}, train.labels[train.numbers % 5 != 0], train.numbers)
    apart = train.numbers % 5 == 0
    scores = [
        figures(train.head[apart], train.labels[apart], *fit)["linear_top1"]
        for fit in heads.trained(rest, GRID, 6, CPU, **SHORT)
    ]
    assert scores.index(max(scores)) == GRID.index(chosen)
    (fit,) = heads.trained(train, [chosen], 6, CPU, **SHORT)
    assert found == {**figures(tested.head, tested.labels, *fit), "linear_lr": chosen.rate}


def test_published_takes_the_best_of_all_heads_on_the_validation_set() -> None:
    train, tested = _set(250, 0), _set(200, 1)
    every = [figures(tested.head, tested.labels, *fit) for fit in heads.trained(train, GRID, 6, CPU, **SHORT)]
    found, _ = heads.best_of(train, tested, GRID, 6, CPU, choose="published", **SHORT)
    assert found["linear_top1"] == max(each["linear_top1"] for each in every)


def test_figures_count_the_first_and_the_first_five() -> None:
    features = torch.eye(6)[[0, 1, 2]]
    weight = torch.tensor([[9.0, 5, 4, 3, 2, 1]] * 6)
    found = figures(features, torch.tensor([0, 4, 5]), weight, torch.zeros(6))
    assert found == {"linear_top1": 1 / 3, "linear_top5": 2 / 3}
    assert figures(features, torch.tensor([0, 0, 1]), weight[:, :2], torch.zeros(2)) == {"linear_top1": 2 / 3}


# ---- LARS


class PublishedLars(torch.optim.Optimizer):
    """LARS as its paper and MAE state it: g <- g * 0.001 |p| / |g| for matrices, m <- 0.9 m + g, p <- p - rate m."""

    def __init__(self, parameters: Any):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.numpy().copy()
            if parameter.ndim > 1:
                size, steep = np.linalg.norm(parameter.numpy()), np.linalg.norm(gradient)
                gradient *= 0.001 * size / steep if size > 0 and steep > 0 else 1.0
            state = self.state[parameter]
            state["m"] = 0.9 * state.get("m", np.zeros_like(gradient)) + gradient
            parameter.sub_(torch.from_numpy(self.param_groups[0]["lr"] * state["m"]).float())


@pytest.mark.parametrize("zero", ["nothing", "parameter", "gradient"])
def test_lars_updates_as_its_formula_says(zero: str) -> None:
    rng = _seeded(0)
    mine = [torch.randn(4, 3, generator=rng), torch.randn(3, generator=rng)]
    if zero == "parameter":
        mine[0].zero_()
    theirs = [nn.Parameter(copy.deepcopy(p)) for p in mine]
    solver, momenta = PublishedLars(theirs), [torch.zeros_like(p) for p in mine]
    for rate in (0.5, 3.0, 2.0):
        solver.param_groups[0]["lr"] = rate
        for mine_, theirs_, momentum in zip(mine, theirs, momenta, strict=True):
            gradient = torch.randn(mine_.shape, generator=rng) * (zero != "gradient")
            theirs_.grad = gradient.clone()
            lars.lars_step(mine_, gradient, momentum, rate)
        solver.step()
    for mine_, theirs_ in zip(mine, theirs, strict=True):
        torch.testing.assert_close(mine_, theirs_.data)


def test_the_lars_classifier_is_the_published_head_and_schedule() -> None:
    train, tested = _set(200, 0), _set(300, 1)
    epochs, batch = 100, 50
    steps = epochs * 4
    found = lars.linear(train, tested, "head", 6, CPU, steps=steps, batch=batch, rate=30.0)
    norm, layer = nn.BatchNorm1d(8, affine=False, eps=1e-6), nn.Linear(8, 6)
    with torch.no_grad():
        nn.init.trunc_normal_(layer.weight, std=0.01, generator=_seeded(0))
        layer.bias.zero_()
    solver = PublishedLars(layer.parameters())
    for step, rows in enumerate(batches(200, batch, steps, seed=0)):
        epoch, rate = step / 4, 30.0 * batch / 256
        warm = epochs / 9
        decay = (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm))) / 2
        solver.param_groups[0]["lr"] = rate * epoch / warm if epoch < warm else rate * decay
        solver.zero_grad()
        F.cross_entropy(layer(norm(train.head[rows])), train.labels[rows]).backward()
        solver.step()
    norm.eval()
    logits: Tensor = layer(norm(tested.head))
    right = float((logits.argmax(1) == tested.labels).double().mean())
    assert found["linear_top1"] == pytest.approx(right, abs=1e-12)
    assert right > 0.5
