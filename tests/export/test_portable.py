"""The plain-torch model that exports carry, against ours: every kind of layer and option."""

import dataclasses
from typing import Any

import pytest
import torch

from vimscale.export.portable import mixers, modeling
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import Stage

BASE = VimConfig(
    num_classes=5,
    image_size=24,
    patch_size=4,
    d_model=32,
    depth=2,
    d_state=4,
    directions="bi*2",
    d_head=8,
    ssd_state=4,
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
    "ssd": {"directions": "ssd*2"},
    "ssd, shared": {"directions": "ssd*2", "ssd_form": "shared"},
    "ssd, quasiseparable": {"directions": "ssd ssd@column", "ssd_form": "quasiseparable", "fuse": "sum"},
    "ssd, one direction": {"directions": "ssd_fwd ssd_bwd@snake"},
    "ssd, orders": {"directions": "ssd@column bi ssd@window attn", "depth": 4, "window": 4, "registers": 2},
    "ssd, gate": {"directions": "ssd*2", "fuse": "gate", "backward_gate": True},
    "ssd, shared, gate": {"directions": "ssd*2", "ssd_form": "shared", "fuse": "gate"},
    "ssd, concat": {"directions": "ssd*2", "fuse": "concat", "ssm_norm": "layer"},
    "ssd, shared, backward gate": {"directions": "ssd*2", "ssd_form": "shared", "backward_gate": True},
    "ssd, quasiseparable, backward gate": {
        "directions": "ssd*2",
        "ssd_form": "quasiseparable",
        "backward_gate": True,
        "mlp": "swiglu",
    },
    "five taps, eps": {"d_conv": 5, "norm_eps": 1e-3, "d_model": 40},
}

SSD = [name for name in CASES if name.startswith("ssd")]
QUICK = ("bi", "registers, orders", "ssd", "ssd, shared", "ssd, quasiseparable")


def new(changes: dict[str, Any], backward: float = 1.0) -> VisionMamba:
    """Our model, with random values in parameters that start as constants."""
    torch.manual_seed(0)
    model = VisionMamba(dataclasses.replace(BASE, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.backward = backward
    return model


def _pair(changes: dict[str, Any], backward: float = 1.0) -> tuple[VisionMamba, modeling.Encoder]:
    """Our model, and the portable one with its weights."""
    model = new(changes, backward)
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
@pytest.mark.parametrize(
    "name",
    [
        "bi",
        "shared",
        "pair",
        "bwd",
        "gate",
        "concat",
        "backward gate",
        "cross",
        *(each for each in CASES if each.startswith("ssd")),
    ],
)
def test_it_has_the_factor_on_backward_paths(name: str, backward: float) -> None:
    model, encoder = _pair(CASES[name], backward)
    _assert_equal(model, encoder, torch.randn(2, 3, 24, 24))


@pytest.mark.parametrize("length", [1, 64, 257, 300])
@pytest.mark.parametrize("name", ["ssd", "ssd, shared", "ssd, quasiseparable", "ssd, shared, backward gate"])
def test_long_sequences_are_scanned_in_chunks(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = _pair(CASES[name] | {"cls_token": "none", "pos_embed": "sincos"}, backward=0.3)
    monkeypatch.setattr(mixers, "_DENSE", 200)
    _assert_equal(model, encoder, torch.randn(2, 3, 4, 4 * length))


@pytest.mark.parametrize("name", SSD)
def test_kernels_compute_the_same_ssd_layers(name: str) -> None:
    model, encoder = _pair(CASES[name], backward=0.3)
    encoder.inner = mixers.kernels()
    assert encoder.inner is not None
    _assert_equal(model, encoder, torch.randn(2, 3, 24, 24))


def test_strong_decays_underflow_to_zero_and_nothing_is_nan() -> None:
    """A difference of sums of these logarithms would be of numbers near 1e6, and its exponential anything."""
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 300, 2, 4), torch.randn(1, 300, 3), torch.randn(1, 300, 3)
    step = torch.rand(1, 300, 2)
    log = -step * torch.tensor([1e4, 1e-3])
    for parameter in (x, step, log):
        parameter.requires_grad_()
    y = mixers.ssd(x, B, C, [(step, log, False), (step, log, True)])
    wanted = sum(_recurrence(x, B, C, step, log, order) for order in (range(300), range(299, -1, -1)))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.square().sum(), (x, step, log)))


def _recurrence(
    x: torch.Tensor, B: torch.Tensor, C: torch.Tensor, step: torch.Tensor, log: torch.Tensor, order: range
) -> torch.Tensor:
    x, B, C, step, log = (t.detach().double() for t in (x, B, C, step, log))
    h, ys = torch.zeros(1, 2, 4, 3, dtype=torch.float64), torch.zeros_like(x)
    for t in order:
        h = log[:, t].exp()[..., None, None] * h + torch.einsum("bh,bhp,bn->bhpn", step[:, t], x[:, t], B[:, t])
        ys[:, t] = torch.einsum("bhpn,bn->bhp", h, C[:, t])
    return ys.float()
