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


def _our_name(key: str) -> str:
    for theirs, ours in {
        "patch_embed.proj": "patch_embed",
        "norm_f": "norm",
        "layers.": "blocks.",
        "A_b_log": "backward_path.A_log",
        "D_b": "backward_path.D",
        "conv1d_b.": "backward_path.conv_",
        "x_proj_b.": "backward_path.x_proj.",
        "dt_proj_b.": "backward_path.dt_proj.",
        "mixer.A_log": "mixer.forward_path.A_log",
        "mixer.D": "mixer.forward_path.D",
        "mixer.conv1d.": "mixer.forward_path.conv_",
        "mixer.x_proj.": "mixer.forward_path.x_proj.",
        "mixer.dt_proj.": "mixer.forward_path.dt_proj.",
    }.items():
        if theirs in key and "backward_path" not in key:
            key = key.replace(theirs, ours)
    return key


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
    state = {_our_name(k.removeprefix("state/")): v for k, v in tensors.items() if k.startswith("state/")}
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})

    logits = model(tensors["image"])
    F.cross_entropy(logits, tensors["target"]).backward()

    # fp32 sums in another order over four layers: 1e-4 of the largest value
    def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
        off = (ours - theirs.reshape(ours.shape)).abs().max() / theirs.abs().max().clamp_min(1e-6)
        assert off < 1e-4, f"{what} is off by {off:.1e} of its largest value"

    close(logits.detach(), tensors["logits"], "logits")
    gradients = {_our_name(k.removeprefix("grad/")): v for k, v in tensors.items() if k.startswith("grad/")}
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
    theirs = {_our_name(key): torch.Size(shape).numel() for key, shape in published["state_dict"].items()}
    assert ours == theirs
