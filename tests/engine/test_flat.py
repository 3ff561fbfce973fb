"""Flat parameters and CUDA graphs give the losses and gradients of the model itself, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vimscale.engine import flat
from vimscale.engine.flat import FlatLearner, layout
from vimscale.engine.graphs import FORMS, Graphs
from vimscale.model import VimConfig, VisionMamba
from vimscale.objectives.base import Inputs, Learner, parts_of
from vimscale.objectives.build import build
from vimscale.recipe import recipe

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def _config(**changes: Any) -> VimConfig:
    chosen = recipe.load("vim_digits_cpu").model.shape(10)
    return replace(chosen, **{"depth": 2, "directions": "bi*2", "drop_path": 0.2} | changes)


def _learner(config: VimConfig, device: str = "cpu") -> Learner:
    torch.manual_seed(0)
    objective = build(recipe.load("vim_digits_cpu").objective, config)
    return Learner(objective, VisionMamba(config)).to(device)


def _flat(config: VimConfig, device: str = "cpu", *, bf16: bool = False, zero: int = 0, world: int = 1) -> FlatLearner:
    learner = _learner(config, device)
    return FlatLearner(learner, layout(learner, recipe.load("vim_digits_cpu").optim, zero, world, bf16=bf16))


def _inputs(config: VimConfig, seed: int = 0, device: str = "cpu", b: int = 4, size: int = 32) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    images, draws = torch.randn(b, 3, size, size, generator=g), torch.rand(b, len(config.layers), generator=g)
    return Inputs(images.to(device), torch.arange(b, device=device), {}, draws.to(device))


def _step(model: Any, inputs: Inputs, bf16: bool) -> Tensor:
    """Run a micro-step, and return its loss."""
    device = inputs.targets.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss, _ = model("loss", *parts_of(inputs))
    loss.backward()
    if isinstance(model, FlatLearner):
        model.release()
    return loss.detach()


def _gradients(model: FlatLearner) -> dict[str, Tensor]:
    return {name: g.clone() for name, g in model.gradients()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", ["none", "scan", "block"])
def test_flat_parameters_give_the_same_gradients(bf16: bool, recompute: Any) -> None:
    config = _config()
    plain, flattened = _learner(config), _flat(config, bf16=bf16)
    for model in (plain, flattened.learner):
        model.encoder.recompute = [recompute] * 2
    for seed in range(2):  # the second one is added to the first
        assert torch.equal(_step(plain, _inputs(config, seed), bf16), _step(flattened, _inputs(config, seed), bf16))
    found = _gradients(flattened)
    for name, p in plain.trained():
        assert torch.equal(p.grad.view(-1), found[name]), name


def test_an_update_of_flat_parameters_is_one_of_the_models() -> None:
    model = _flat(_config())
    before = {name: p.detach().clone() for name, p in model.learner.trained()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for name, p in model.learner.trained():
        assert isinstance(p, torch.nn.Parameter)
        assert torch.equal(p, before[name] + 1), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_pieces_end_where_shards_and_segments_do(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(flat, "SEGMENT", 20_000)
    monkeypatch.setattr(flat, "SHARD", 1_000)
    config = _config()
    plain, model = _learner(config), _flat(config, zero=2, world=world)
    names = [name for group in model.groups for segment in group.segments for name in segment.names]
    assert sorted(names) == sorted(name for name, _ in plain.trained())
    for group in model.groups:
        shard = flat.shard_size(group.numel, world)
        ends = torch.tensor([n for segment in group.segments for n in segment.pieces]).cumsum(0).tolist()
        assert {*range(shard, group.numel, shard)} <= {*ends} or shard < 1_000
        assert ends[-1] == group.numel
    _step(plain, _inputs(config), False)
    _step(model, _inputs(config), False)
    for number, group in enumerate(model.groups):
        pieces = torch.cat([p.grad for p in model.pieces[number].parameters()])
        parameters = dict(plain.trained())
        whole = torch.cat([parameters[name].grad.view(-1) for segment in group.segments for name in segment.names])
        assert torch.equal(pieces, whole)


def test_only_weights_of_products_are_bf16() -> None:
    groups = layout(_learner(_config()), recipe.load("vim_digits_cpu").optim, 0, 1, bf16=True)
    narrow = {name for group in groups for segment in group.segments if segment.narrow for name in segment.names}
    assert {"blocks.0.mixer.in_proj.weight", "blocks.1.mixer.dt_proj", "head.weight"} <= narrow
    assert not {name for name in narrow if name.endswith(("A_log", "D", "bias", "conv_weight", "norm.weight"))}
    groups = layout(_learner(_config()), recipe.load("vim_digits_cpu").optim, 0, 1, bf16=False)
    assert not any(segment.narrow for group in groups for segment in group.segments)


# ---- graphs: on a CPU, something that runs the same work again with the same tensors stands in for CUDA's


def _rerun(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    results = work()

    @torch.enable_grad()
    def again() -> None:
        for kept, new in zip(tree_leaves(results), tree_leaves(work()), strict=True):
            if kept is not None:
                kept.copy_(new)

    return results, again


def _with_graphs(config: VimConfig, device: str = "cpu", *, bf16: bool = False) -> FlatLearner:
    model = _flat(config, device, bf16=bf16)
    model.graphs = Graphs(model.micro_step, list(model.parameters()), _rerun if device == "cpu" else None)
    return model


def _captured(model: FlatLearner) -> int:
    assert model.graphs is not None
    return len(model.graphs._captured)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_graphs_give_the_bits_of_eager_micro_steps(device: str, bf16: bool, recompute: Any) -> None:
    config = _config(directions="bi fwd")
    models = [_flat(config, device, bf16=bf16), _with_graphs(config, device, bf16=bf16)]
    seen = []
    for model in models:
        model.learner.encoder.recompute = [recompute] * 2
        losses = [_step(model, _inputs(config, seed, device), bf16) for seed in (0, 1, 0)]  # gradients add up
        seen.append((losses, _gradients(model)))
    assert _captured(models[1]) == 1
    (losses, gradients), (ours, others) = seen
    assert [a.item() for a in losses] == [a.item() for a in ours]
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_factors_of_backward_paths_change_between_replays(device: str) -> None:
    config = _config()
    plain, model = _flat(config, device), _with_graphs(config, device)
    factors = [[0.25, 0.25], [0.5, 0.5], [1.0, 1.0], [1.0, 1.0], [0.0, 1.25], [0.0, 1.5], [0.75, 0.75]]
    for seed, each in enumerate(factors):
        inputs = replace(_inputs(config, seed, device), backward=each)
        assert _step(plain, inputs, False).item() == _step(model, inputs, False).item(), each
    # factors that are tensors, ones, and those without the first path when they come for the second time
    assert _captured(model) == 3
    found = _gradients(model)
    for name, gradient in _gradients(plain).items():
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_probes_and_figures_outlive_the_next_replay(device: str) -> None:
    config = _config()
    plain, model = _flat(config, device), _with_graphs(config, device)
    found: list[Any] = []
    for seed in range(3):
        found = []
        for each in (plain, model):
            each.learner.encoder.probes = {}
            _step(each, _inputs(config, seed, device), False)
            probes = each.learner.encoder.probes
            found.append({(i, name): t for i, probe in probes.items() for name, t in probe.items()})
        assert {key: float(t) for key, t in found[0].items()} == {key: float(t) for key, t in found[1].items()}
        assert len(found[0]) > 2
    _step(model, _inputs(config, 0, device), False)
    assert float(found[1][0, "rms"]) == float(found[0][0, "rms"])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_other_images_are_captured_anew_and_lists_of_images_run_eagerly(device: str) -> None:
    config = _config(drop_path=0.0)
    plain, model = _flat(config, device), _with_graphs(config, device)
    for seed, size in enumerate([32, 32, 16, 16]):
        inputs = replace(_inputs(config, seed, device, size=size), draws=None)
        assert _step(plain, inputs, False).item() == _step(model, inputs, False).item()
        assert _captured(model) == 1
    several = [torch.randn(3, 32, 32, device=device), torch.randn(3, 16, 32, device=device)]
    inputs = Inputs(several, torch.arange(2, device=device))
    assert _step(plain, inputs, False).item() == _step(model, inputs, False).item()
    assert _captured(model) == 1


def test_no_more_than_so_many_forms_are_captured() -> None:
    config = _config(depth=4, directions="bi*4")
    model = _with_graphs(config)
    for _ in range(2):
        for number in range(2 * FORMS):
            dropped = [float(number >> bit & 1) for bit in range(4)]
            _step(model, replace(_inputs(config, b=1), backward=dropped), False)
    assert _captured(model) == FORMS


def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuses(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")

    config = _config()
    plain, model = _flat(config), _flat(config)
    model.graphs = Graphs(model.micro_step, list(model.parameters()), refuses)
    for seed in range(3):
        assert _step(plain, _inputs(config, seed), False).item() == _step(model, _inputs(config, seed), False).item()
    (said,) = caplog.messages
    assert "cannot be captured" in said
    assert "not permitted" in said
    assert "long" not in said


def test_a_backward_pass_that_comes_too_late_is_an_error() -> None:
    config = _config()
    model = _with_graphs(config)
    first, _ = model("loss", *parts_of(_inputs(config)))
    model("loss", *parts_of(_inputs(config, 1)))
    with pytest.raises(RuntimeError, match="replayed before the backward pass"):
        first.backward()
