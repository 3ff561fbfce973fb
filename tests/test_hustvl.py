"""Published Vision Mambas come in and go out: every mode of their code, bit by bit, and nothing unsafe is read."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vimscale.errors import CheckpointError
from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.hustvl import PUBLISHED, from_published, guess, published_config, to_published
from vimscale.model.published import complete, config_of
from vimscale.model.quirks import PublishedVim, build

VIM = {"img_size": 16, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 16, "d_state": 3, "num_classes": 5}
MAMBAR = {"img_size": 20, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_classes": 5, "num_cls_tokens": 4}
ARM = {
    **{name: value for name, value in VIM.items() if name != "d_state"},
    "bimamba_type": "v3",
    "if_cls_token": True,
    "if_abs_pos_embed": True,
}
PAIRS = {"if_bidirectional": True, "depth": 4}
ROPE = {"if_rope": True, "if_rope_residual": True}
CASES: dict[str, dict[str, Any]] = {
    "v2": {},
    "v2 summed": {"if_devide_out": False},
    "v1": {"bimamba_type": "v1"},
    "v1 by if_bimamba": {"if_bimamba": True},
    "none": {"bimamba_type": "none"},
    "pairs": {**PAIRS, "bimamba_type": "none"},
    "pairs, an odd layer": {**PAIRS, "bimamba_type": "none", "depth": 5},
    "pairs of v2": PAIRS,
    "pairs of v1": {**PAIRS, "bimamba_type": "v1"},
    "pairs, halved": {**PAIRS, "if_bidirectional": "halved"},
    "one layer in pairs": {**PAIRS, "depth": 1},
    "first class token": {"use_middle_cls_token": False},
    "two class tokens": {"use_double_cls_token": True},
    "moved class token": {"use_middle_cls_token": False, "cls_position": 11},
    "last token": {"if_cls_token": False, "final_pool_type": "none"},
    "mean": {"if_cls_token": False, "final_pool_type": "mean"},
    "max of logits": {"if_cls_token": False, "final_pool_type": "max"},
    "max of logits of the class token": {"final_pool_type": "max"},
    "all logits": {"if_cls_token": False, "final_pool_type": "all"},
    "no head": {"num_classes": 0},
    "no position": {"if_abs_pos_embed": False},
    "rope": {"if_rope": True},
    "rope of residual": ROPE,
    "rope of residual without class token": {**ROPE, "if_cls_token": False, "if_abs_pos_embed": False},
    "rope made larger": {**ROPE, "pt_hw_seq_len": 3},
    "rope in pairs": {**ROPE, **PAIRS},
    "flipped": {"flip_img_sequences_ratio": 2.0},
    "flipped, first class token": {"flip_img_sequences_ratio": 2.0, "use_middle_cls_token": False},
    "flipped rope": {**ROPE, "flip_img_sequences_ratio": 2.0},
    "flipped rope in pairs": {**ROPE, **PAIRS, "flip_img_sequences_ratio": 2.0},
    "layer norm": {"rms_norm": False, "norm_epsilon": 1e-3},
    "gamma": {"init_layer_scale": 0.1},
    "stride": {"stride": 2, "img_size": 10},
    "not square": {"img_size": (12, 20)},
    "odd number of patches": {"img_size": 12},
    "one channel": {"channels": 1},
    "ssm_cfg": {"ssm_cfg": {"d_conv": 3, "expand": 1}},
    "slow path": {"ssm_cfg": {"use_fast_path": False}},
    "Mamba-R": {**MAMBAR},
    "Mamba-R with a neck": {**MAMBAR, "rms_norm": True, "cls_reduce": 2, "ssm_cfg": {"d_state": 3}},
    "ARM": {**ARM},
    "ARM, mean": {**ARM, "global_pool": True, "ssm_cfg": {"d_state": 3}, "init_layer_scale": 0.1},
}


def _peer() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "published.py"
    spec = importlib.util.spec_from_file_location("benchmarks_published", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _arguments(case: str) -> tuple[dict[str, Any], int | None]:
    own = dict(CASES[case])
    position = own.pop("cls_position", None)
    family = {} if "num_cls_tokens" in own or own.get("bimamba_type") == "v3" else VIM
    return complete({**family, **own}), position


def _state(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter off its initial value, so that each matters."""
    torch.manual_seed(0)
    model = build(arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return to_published(model)


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert off < bound, f"{what} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("case", CASES)
def test_every_mode_gives_the_logits_and_gradients_of_the_published_code(case: str) -> None:
    arguments, position = _arguments(case)
    state = _state(arguments)
    size = arguments["img_size"]
    images = torch.randn(2, arguments["channels"], *(size if isinstance(size, tuple) else (size, size)))
    model = from_published(arguments, state, cls_position=position)
    logits = model(images)
    theirs = {key: value.clone().requires_grad_() for key, value in state.items()}
    flipped = arguments.get("flip_img_sequences_ratio", -1) > 1
    expected = _peer().forward(theirs, arguments, images, cls_position=position, flipped=flipped)
    # fp32 sums in another order: 1e-5 of the largest value, 1e-4 for gradients, which sum over more
    _close(logits.detach(), expected.detach(), 1e-5, "logits")

    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = _gradients(model)
    for key, value in theirs.items():
        if not key.startswith("rope."):
            _close(gradients[key], torch.zeros_like(value) if value.grad is None else value.grad, 1e-4, key)


def _gradients(model: VisionMamba) -> dict[str, Tensor]:
    """The gradients of a model, under published names."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_published(model)


@pytest.mark.parametrize("case", CASES)
def test_every_mode_goes_in_and_out_bit_by_bit(case: str) -> None:
    arguments, _ = _arguments(case)
    state = {key: torch.randn_like(value) for key, value in _state(arguments).items()}  # rotations too
    model = from_published(arguments, state)
    again = to_published(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    other = from_published(published_config(model), again)
    assert type(other) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
