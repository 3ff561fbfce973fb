"""Our model gives what the original Vision Mamba code gave, logits and every gradient, on its own random weights.

The outputs were recorded from hustvl/Vim and live beside the checkout, not in it.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from vimscale.model import PRESETS, VimConfig, VisionMamba

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
CASES = {"v2_midcls_div2": {}, "v2_headcls_sum": {}, "v2_meanpool": {}, "none_midcls": {}}


def _config(published: dict) -> VimConfig:
    kind = {"v2": "bi", "none": "fwd"}[published["bimamba_type"]]
    cls_token = "none"
    if published["if_cls_token"]:
        cls_token = "middle" if published["use_middle_cls_token"] else "first"
    return VimConfig(
        num_classes=published["num_classes"],
        image_size=published["img_size"],
        patch_size=published["patch_size"],
        d_model=published["embed_dim"],
        depth=published["depth"],
        d_state=published["d_state"],
        directions=f"{kind}*{published['depth']}",
        cls_token=cls_token,
        fuse="mean" if published["if_divide_out"] else "sum",
    )


def _place(key: str) -> tuple[str, int | None]:
    """Where a published tensor belongs: our parameter, and which direction of it, None where it has no such axis."""
    key = key.replace("patch_embed.proj", "patch_embed").replace("norm_f", "norm").replace("layers.", "blocks.")
    inside = {
        "A_log": "A_log",
        "D": "D",
        "conv1d.weight": "conv_weight",
        "conv1d.bias": "conv_bias",
        "x_proj.weight": "x_proj",
        "dt_proj.weight": "dt_proj",
        "dt_proj.bias": "dt_bias",
    }
    block, mixer, name = key.partition(".mixer.")
    for theirs, ours in inside.items():
        stem, dot, kind = theirs.partition(".")
        backward = "A_b_log" if theirs == "A_log" else f"{stem}_b{dot}{kind}"
        if name in (theirs, backward):
            return block + mixer + ours, int(name == backward)
    return key, None


def _ours(published: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Published tensors under our names and in our shapes: directions are joined."""
    found = {}
    for key, value in published.items():
        name, direction = _place(key)
        ours = found.setdefault(name, torch.full(shapes[name], torch.nan))
        part = ours if direction is None else ours[direction]
        part.copy_(value.reshape(part.shape))
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_original_code(case: str) -> None:
    path = GOLDEN / f"{case}.safetensors"
    if not path.exists():
        pytest.skip(f"recorded outputs of the original code are not at {GOLDEN}")
    with safe_open(path, "pt") as golden:
        published = json.loads(golden.metadata()["config"])
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118  safe_open is no dict
    model = VisionMamba(_config(published))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    model.load_state_dict(_ours(state, shapes))

    logits = model(tensors["image"])
    F.cross_entropy(logits, tensors["target"]).backward()

    # fp32 sums in another order over four layers: 1e-4 of the largest value
    def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
        off = (ours - theirs.reshape(ours.shape)).abs().max() / theirs.abs().max().clamp_min(1e-6)
        assert off < 1e-4, f"{what} is off by {off:.1e} of its largest value"

    close(logits.detach(), tensors["logits"], "logits")
    gradients = _ours({k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}, shapes)
    assert gradients.keys() == shapes.keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, gradients[name], name)


@pytest.mark.parametrize("preset", ["vim_tiny", "vim_small", "vim_base"])
def test_every_published_parameter_has_its_place(preset: str) -> None:
    path = GOLDEN / "published_state_dicts.json"
    if not path.exists():
        pytest.skip(f"the published shapes are not at {GOLDEN}")
    published = next(v for k, v in json.loads(path.read_text()).items() if k.startswith(f"{preset}_patch16_224"))
    with torch.device("meta"):
        ours = {name: p.numel() for name, p in VisionMamba(PRESETS[preset]).named_parameters()}
    theirs = dict.fromkeys(ours, 0)
    for key, shape in published["state_dict"].items():
        theirs[_place(key)[0]] += torch.Size(shape).numel()
    assert ours == theirs
