"""Autoregressive pretraining computes what ARM's code does, on recorded runs of it, and sees nothing that it predicts.

The recordings are next to the checkout, not in it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vimscale.objectives.autoregressive import Autoregressive
from vimscale.objectives.base import Inputs
from vimscale.objectives.patches import patchify
from vimscale.objectives.published import arm

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "objectives" / "arm.safetensors"


def _recorded() -> tuple[dict, dict[str, Tensor]]:
    if not GOLDEN.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is not a dict
        return json.loads(file.metadata()["config"]), tensors


def _below(tensors: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {key.removeprefix(folder): value for key, value in tensors.items() if key.startswith(folder)}


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max()
    assert off < bound, f"{what}: error {off:.1e} relative to the largest value"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
def test_outputs_losses_and_gradients_equal_the_original_code(dtype: torch.dtype, bound: float) -> None:
    config, tensors = _recorded()
    state = _below(tensors, "state/")
    model = arm.learner(
        config["constructor"], state, taps=tuple(config["taps"]), decoder_heads=config["decoder_heads"]
    ).to(dtype)
    objective = model.objective
    assert isinstance(objective, Autoregressive)
    seen: dict[str, Tensor] = {}
    decoder = model["decoder"]
    for i, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"dec_block.{i}": out}))
    decoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(queries=given[0]))
    inputs = Inputs(tensors["input/image"].to(dtype), torch.zeros(2, dtype=torch.int64))
    seen["pred"] = objective.predict(model, inputs)
    seen["loss_per_image"] = model.ask("loss_per_sample", inputs)
    seen["loss"], _ = model.ask("loss", inputs)
    seen["loss_elements"] = (seen["pred"] - objective.targets(inputs.images)).square()
    seen["patches"] = patchify(inputs.images, 4)
    for name, value in seen.items():
        _close(value.detach(), tensors[f"output/{name}"], bound, name)

    seen["loss"].backward()
    parameters = dict(model.trained())
    assert all(parameter.grad is not None for parameter in parameters.values())
    gradients = arm.to_published(model, {name: p.grad for name, p in parameters.items()})
    expected = _below(tensors, "grad/")
    assert gradients.keys() == expected.keys() - {"input/image"}
    for key, value in gradients.items():
        _close(value, expected[key], bound, key)


def test_states_convert_to_ours_and_back_bit_for_bit() -> None:
    config, tensors = _recorded()
    state = _below(tensors, "state/")
    model = arm.learner(config["constructor"], state, taps=(1, 2, 3, 4), decoder_heads=2)
    converted = arm.to_published(model)
    assert converted.keys() == state.keys()
    for key, value in state.items():
        if "pos_embed" in key:
            torch.testing.assert_close(converted[key], value, rtol=0, atol=2e-6)
        else:
            assert torch.equal(converted[key], value), key
