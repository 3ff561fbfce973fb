"""Our model computes the same logits and gradients as the original Vision Mamba code, on random weights of that code.

The outputs were recorded from hustvl/Vim. They are next to the checkout, not in it.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from vimscale.model import PRESETS, VisionMamba
from vimscale.model.published.arguments import complete, config_of
from vimscale.model.published.weights import PUBLISHED, from_published, guess, published_config, to_published

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = ("v2_midcls_div2", "v2_headcls_sum", "v2_meanpool", "none_midcls", "v2_stride4")
PARAMETERS = {"vim_tiny": 7_148_008, "vim_small": 25_796_584, "vim_base": 97_598_440}


def recorded(case: str) -> tuple[dict, dict[str, Tensor]]:
    """(the constructor's arguments, what was recorded); skips the test where there is nothing."""
    path = GOLDEN / f"{case}.safetensors"
    if not path.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(path, "pt") as golden:
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118  safe_open is not a dict
        return json.loads(golden.metadata()["config"]), tensors


def _below(tensors: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {key.removeprefix(folder): value for key, value in tensors.items() if key.startswith(folder)}


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert off < bound, f"{what}: error {off:.1e} relative to the largest value"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_original_code(case: str) -> None:
    published, tensors = recorded(case)
    model = from_published(published, _below(tensors, "state/"))
    assert type(model) is VisionMamba

    logits = model(tensors["image"])
    features = model(tensors["image"], features=True)
    F.cross_entropy(logits, tensors["target"]).backward()

    # fp32 sums run in another order over four layers; gradients also sum over tokens and images
    _close(logits.detach(), tensors["logits"], 1e-5, "logits")
    _close(features.detach(), tensors["features"], 1e-5, "features")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            parameter.copy_(parameter.grad)
    gradients = to_published(model)
    expected = _below(tensors, "grad/")
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        _close(gradients[key], value, 1e-4, key)


@pytest.mark.parametrize("case", CASES)
def test_recorded_states_convert_to_ours_and_back_bit_for_bit(case: str) -> None:
    published, tensors = recorded(case)
    state = _below(tensors, "state/")
    model = from_published(published, state)
    converted = to_published(model)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    arguments = published_config(model)
    without_effect = {"final_pool_type"} | ({"use_middle_cls_token"} if not published["if_cls_token"] else set())
    assert {k: arguments[k] for k in published.keys() - without_effect} == {
        k: v for k, v in published.items() if k not in without_effect
    }


def _published_shapes() -> dict[str, dict]:
    path = GOLDEN / "published_state_dicts.json"
    if not path.exists():
        pytest.skip(f"there are no published shapes at {GOLDEN}")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "small_patch16_stride8" not in name and "vim" in name])
def test_converted_keys_and_shapes_equal_the_published_ones(name: str) -> None:
    theirs = _published_shapes()[name]
    with torch.device("meta"):
        ours = to_published(VisionMamba(config_of(complete(PUBLISHED[name]))))
    assert {key: list(value.shape) for key, value in ours.items()} == theirs["state_dict"]
    assert sum(value.numel() for value in ours.values()) == theirs["parameters"]
    guessed, assumed = guess(ours)
    assert guessed == complete(PUBLISHED[name])
    assert "if_divide_out True" in assumed


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        ours = to_published(VisionMamba(PRESETS[preset]))
    assert sum(value.numel() for value in ours.values()) == PARAMETERS[preset]
