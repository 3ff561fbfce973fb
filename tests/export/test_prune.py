"""Pruned directions: the smaller model computes what the gates let through."""

import dataclasses
from typing import Any

import pytest
import torch

from vimscale.errors import CheckpointError
from vimscale.export import expand, prune
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import Stage
from vimscale.model.ssd import Ssd

CONFIG = VimConfig(
    num_classes=5,
    image_size=16,
    patch_size=4,
    d_model=16,
    depth=6,
    d_state=4,
    directions="bi pair*2 bi@column fwd cross",
    backward_gate=True,
)


def _model(config: VimConfig, gates: dict[int, float]) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for i, gate in gates.items():
            model.blocks[i].mixer.backward_gate.fill_(gate)  # type: ignore[union-attr]
    return model.eval()


@pytest.mark.parametrize("fuse", ["mean", "sum"])
def test_closed_gates_lose_their_path_and_nothing_else(fuse: Any) -> None:
    config = dataclasses.replace(CONFIG, fuse=fuse)
    model = _model(config, {0: 0.0, 2: 0.0, 3: 0.9, 5: 0.0})
    layers = prune.closed(model, 0.5)
    assert layers == [0, 2], "a cross layer stays"
    smaller = prune.pruned(model, layers)
    assert (smaller.config.directions, smaller.config.depth) == ("fwd*2 bi@column fwd cross", 5)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(smaller(images), model(images))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("fuse", ["gate", "concat"])
def test_learned_fusions_are_pruned_too(fuse: Any) -> None:
    config = dataclasses.replace(CONFIG, depth=3, directions="bi*3", fuse=fuse)
    model = _model(config, {0: 0.0, 1: 1.0, 2: 0.0})
    smaller = prune.pruned(model, prune.closed(model, 1e-3))
    assert smaller.config.directions == "fwd bi fwd"
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(smaller(images), model(images))


def test_shared_layers_and_stages_are_pruned() -> None:
    stages = (Stage(depth=2, d_model=16, directions="shared*2"), Stage(depth=2, d_model=32, directions="pair*2"))
    model = _model(dataclasses.replace(CONFIG, stages=stages, cls_token="none"), {0: 0.0, 1: 1.0, 3: 0.0})
    smaller = prune.pruned(model, prune.closed(model, 0.1))
    assert [(s.depth, s.directions) for s in smaller.config.stages] == [(2, "fwd shared"), (1, "fwd")]
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(smaller(images), model(images))


@pytest.mark.parametrize("form", ["separate", "shared"])
@pytest.mark.parametrize("fuse", ["mean", "sum", "concat"])
def test_ssd_layers_keep_one_direction_and_grow_it_back(form: Any, fuse: Any) -> None:
    changes = {"depth": 3, "directions": "ssd ssd@column ssd", "d_head": 8, "ssd_state": 4, "norm_eps": 1e-12}
    model = _model(dataclasses.replace(CONFIG, ssd_form=form, fuse=fuse, **changes), {0: 0.0, 1: 0.9, 2: 0.0})
    smaller = prune.pruned(model, prune.closed(model, 0.5))
    assert smaller.config.directions == "ssd_fwd ssd@column ssd_fwd"
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-5)
    if fuse != "mean":
        return
    larger = expand.expanded(smaller, "ssd ssd@column ssd")
    for i in (0, 2):
        mixer, source = larger.blocks[i].mixer, model.blocks[i].mixer
        assert isinstance(mixer, Ssd)
        for name in mixer.path_parameters:
            assert torch.equal(getattr(mixer, name), getattr(source, name)[[0, 0]])
        assert mixer.backward_gate is not None
        mixer.backward_gate.data.zero_()
    torch.testing.assert_close(larger(images), model(images), rtol=1e-4, atol=1e-5)


def test_quasiseparable_layers_keep_both_directions_and_the_reason_is_known() -> None:
    changes = {"depth": 2, "directions": "ssd*2", "d_head": 8, "ssd_state": 4, "ssd_form": "quasiseparable"}
    model = _model(dataclasses.replace(CONFIG, **changes), {0: 0.0, 1: 0.0})
    assert prune.closed(model, 0.5) == []
    assert "quasiseparable" in str(prune.without_half(model.config))
    assert "cross" in str(prune.without_half(CONFIG))
    assert prune.without_half(dataclasses.replace(CONFIG, depth=2, directions="bi*2")) is None


def test_a_model_with_all_gates_closed_has_none_left() -> None:
    model = _model(dataclasses.replace(CONFIG, depth=2, directions="bi*2"), {0: 0.0, 1: 0.0})
    smaller = prune.pruned(model, prune.closed(model, 0.1))
    assert (smaller.config.directions, smaller.config.backward_gate) == ("fwd*2", False)


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(CheckpointError, match="train it with model"):
        prune.closed(VisionMamba(dataclasses.replace(CONFIG, backward_gate=False)), 0.1)
    model = _model(dataclasses.replace(CONFIG, depth=2, directions="bi*2", fuse="gate", ssm_norm=True), {0: 0.0})
    with pytest.raises(CheckpointError, match="ssm_norm"):
        prune.pruned(model, prune.closed(model, 0.1))
