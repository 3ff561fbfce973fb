"""Published Vision Mambas for tests: arguments for every mode of their code, and random weights."""

from typing import Any

import torch
from torch import Tensor

from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import build
from vimscale.model.published.weights import to_published

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
    "moved class token, mixed up": {"use_middle_cls_token": False, "cls_position": 11, "mixed": True},
    "two class tokens, mixed up": {"use_double_cls_token": True, "mixed": True},
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


def arguments_of(case: str) -> tuple[dict[str, Any], int | None]:
    """(arguments, cls_position) of a case."""
    own = dict(CASES[case])
    position = own.pop("cls_position", None)
    own.pop("mixed", None)
    family = {} if "num_cls_tokens" in own or own.get("bimamba_type") == "v3" else VIM
    return complete({**family, **own}), position


def random_state(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that all differ from their initial values, so that each matters."""
    torch.manual_seed(0)
    model = build(arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return to_published(model)
