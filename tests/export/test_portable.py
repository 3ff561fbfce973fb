"""The plain-torch model that exports carry, against ours: every kind of layer and option."""

import dataclasses
from typing import Any

import pytest
import torch

from vimscale.export.portable import modeling
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import Stage

BASE = VimConfig(
    num_classes=5, image_size=24, patch_size=4, d_model=32, depth=2, d_state=4, directions="bi*2", d_head=8
)
STAGES = (
    Stage(depth=2, d_model=16, directions="fwd bi@snake"),
    Stage(depth=2, d_model=32, directions="pair*2"),
    Stage(depth=1, d_model=48),
)
CASES: dict[str, dict[str, Any]] = {
    "fwd": {"directions": "fwd*2"},
    "bwd": {"directions": "bwd fwd"},
    "bi": {},
    "shared": {"directions": "shared*2"},
    "shared, sum": {"directions": "shared@snake*2", "fuse": "sum"},
    "cross": {"directions": "cross*2"},
    "cross, gate": {"directions": "cross*2", "fuse": "gate"},
    "cross, concat": {"directions": "cross*2", "fuse": "concat", "backward_gate": True},
    "pair": {"directions": "pair*4", "depth": 4},
    "pair, sum": {"directions": "pair*2 fwd pair@window*2", "depth": 5, "fuse": "sum", "backward_gate": True},
    "attn": {"directions": "attn bi"},
    "orders": {"directions": "bi@column bi@snake bwd@window fwd@column", "depth": 4, "window": 4},
    "sum": {"fuse": "sum"},
    "gate": {"fuse": "gate"},
    "concat": {"fuse": "concat"},
    "backward gate": {"backward_gate": True},
    "registers": {"registers": 5},
    "registers, read": {"registers": 4, "pool": "registers", "cls_token": "none"},
    "registers, reduced": {"registers": 4, "pool": "registers", "register_reduce": 2, "norm": "layer"},
    "registers, orders": {"registers": 7, "directions": "bi@window cross", "cls_token": "both"},
    "class token first": {"cls_token": "first"},
    "class tokens at both ends": {"cls_token": "both", "registers": 3},
    "no class token": {"cls_token": "none"},
    "pool max": {"pool": "max"},
    "pool mean": {"pool": "mean", "registers": 2},
    "pool last": {"pool": "last"},
    "stages": {"stages": STAGES, "cls_token": "none", "image_size": 32},
    "swiglu": {"mlp": "swiglu", "norm": "layer", "directions": "cross attn", "expand": 1},
    "rms norm of the scans": {"ssm_norm": True, "fuse": "concat"},
    "layer norm of the scans": {"ssm_norm": "layer", "norm": "layer"},
    "layer norm of concatenated scans": {"ssm_norm": "layer", "fuse": "concat", "directions": "cross bi"},
    "layer scale": {"layer_scale": 0.1, "directions": "bi attn"},
    "sincos": {"pos_embed": "sincos", "registers": 3},
    "no positions": {"pos_embed": False},
    "coordinates": {"pos_embed": "coordinates"},
    "conv stem": {"stem": "conv"},
    "overlapping patches": {"stride": 2},
    "oblong": {"image_size": (16, 28), "directions": "bi@column bi@snake"},
    "no head": {"num_classes": 0},
    "five taps, eps": {"d_conv": 5, "norm_eps": 1e-3, "d_model": 40},
}

QUICK = ("bi", "registers, orders")


def _pair(changes: dict[str, Any], backward: float = 1.0) -> tuple[VisionMamba, modeling.Encoder]:
    """Our model, with random values in parameters that start as constants, and the portable one with its weights."""
    torch.manual_seed(0)
    model = VisionMamba(dataclasses.replace(BASE, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.backward = backward
    encoder = modeling.Encoder(model.config.to_dict(), backward=backward).eval()
    encoder.load_state_dict(model.state_dict())
    return model, encoder


@torch.no_grad()
def _assert_equal(model: VisionMamba, encoder: modeling.Encoder, images: torch.Tensor) -> None:
    out = encoder(images)
    features = model(images, features=True)
    _assert_near(out["features"], features)
    assert out["features"].dtype == torch.float32
    if model.head is None:
        assert "logits" not in out
    else:
        _assert_near(out["logits"], model(images))
    _assert_near(encoder.tokens(images), model._encoded(images, None, None)[0])


def _assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_it_computes_what_our_model_does(name: str) -> None:
    model, encoder = _pair(CASES[name])
    _assert_equal(model, encoder, torch.randn(2, 3, *model.config.size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bi", "registers", "class tokens at both ends", "sincos", "coordinates", "orders"])
def test_it_takes_images_of_other_sizes(name: str) -> None:
    model, encoder = _pair(CASES[name])
    _assert_equal(model, encoder, torch.randn(2, 3, 36, 20))


@pytest.mark.slow
@pytest.mark.parametrize("backward", [0.0, 0.3])
@pytest.mark.parametrize("name", ["bi", "shared", "pair", "bwd", "gate", "concat", "backward gate", "cross"])
def test_it_has_the_factor_on_backward_paths(name: str, backward: float) -> None:
    model, encoder = _pair(CASES[name], backward)
    _assert_equal(model, encoder, torch.randn(2, 3, 24, 24))
