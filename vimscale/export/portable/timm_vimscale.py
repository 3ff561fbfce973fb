"""An exported Vision Mamba as a model of timm: importing this registers `vimscale`.

Axes: b images, n tokens with class tokens first, then registers, then the image's in row order; d model width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn

from .mixers import kernels
from .modeling import Encoder
from .orders import slots_of

_POOLS = {"avg": "mean", "token": "cls", "mean": "mean", "cls": "cls", "max": "max", "last": "last"}


class VisionMamba(Encoder):
    """An `Encoder` with the methods of timm's models."""

    def __init__(
        self,
        model: dict[str, Any],
        backward: float = 1.0,
        num_classes: int | None = None,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        global_pool: str | None = None,
    ):
        """Build the shape `model`, the `model_args` of an export's config.json; the others overrule it.

        Raises:
            ValueError: `in_chans` is not 3, or the pool is unknown.
        """
        if in_chans != 3:
            raise ValueError(f"in_chans is {in_chans}; the model takes images of 3 channels")
        shape = dict(model)
        if num_classes is not None:
            shape["num_classes"] = num_classes
        if drop_path_rate is not None:
            shape["drop_path"] = drop_path_rate
        if global_pool is not None:
            shape |= _pooled_by(global_pool)
        super().__init__(shape, inner=kernels(), backward=backward)
        self.num_classes = shape["num_classes"]
        self.head_hidden_size = self.num_features
        self.num_features = self.norm.weight.shape[0]
        """Width of the tokens; that of what the head reads is `head_hidden_size`."""
        self.num_prefix_tokens = sum(len(t) for t in (self.cls_token, self.registers) if t is not None)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits (b, num_classes), fp32; without a head what it would read."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized tokens (b, n, d) of images (b, 3, h, w)."""
        tokens, orders, _ = self.encode(x)
        return tokens.index_select(1, torch.cat(orders.slots[:3])) if self.num_prefix_tokens else tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits from what `forward_features` returns, or with `pre_logits` what the head reads."""
        slots = slots_of(self.config, x.shape[1] - self.num_prefix_tokens, x.device)
        sequence = x.index_select(1, slots.visits) if self.num_prefix_tokens else x
        read = self.pooled(sequence, slots)
        return read.float() if pre_logits or self.head is None else self.head(read).float()

    def get_classifier(self) -> nn.Module:
        return nn.Identity() if self.head is None else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place of the old one; 0: none. `global_pool`: what it reads; default: as before.

        Raises:
            ValueError: the pool is unknown.
        """
        if global_pool is not None:
            shape = {**self.config, **_pooled_by(global_pool)}
            if shape["pool"] == "cls" and self.cls_token is None:
                raise ValueError(f"global_pool {global_pool!r} needs a class token, and the model has none")
            self.config, self.pool = shape, shape["pool"]
            self.neck = self.neck_norm = None
            self.head_hidden_size = self.num_features
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else None
        if self.head is not None:
            self.init_weights(self.head)
            self.head.to(self.norm.weight.device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass, or none."""
        self.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: vectors, embeddings, the scan's A, D and biases."""
        few = {"pos_embed", "cls_token", "registers", "A_log", "D", "conv_bias", "dt_bias", "fuse_logits"}
        return {
            name
            for name, p in self.named_parameters()
            if name.rpartition(".")[2] in few or (p.ndim <= 1 and not name.endswith("backward_gate"))
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of timm's layer-wise rates: the stem, then every layer; `coarse` makes no difference."""
        return {
            "stem": r"^cls_token|^registers|^pos_embed|^coordinates|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)\.", None), (r"^merges\.(\d+)\.", None)],
        }


def _pooled_by(name: str) -> dict[str, Any]:
    if name not in _POOLS:
        raise ValueError(f"global_pool {name!r} is unknown; known: {', '.join(_POOLS)}")
    return {"pool": _POOLS[name], "register_reduce": 1}


@register_model
def vimscale(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Build the model that the config.json next to this package describes, or the one that `local-dir:` names."""
    tree: dict[str, Any] = {}
    if "model" not in kwargs:
        tree = json.loads(Path(__file__).resolve().parents[1].joinpath("config.json").read_text())
        kwargs = {**tree["model_args"], **kwargs}
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = tree.get("pretrained_cfg")
    if kwargs.pop("features_only", False):
        raise ValueError("features_only is not supported: use forward_features")
    return build_model_with_cfg(VisionMamba, "vimscale", pretrained, **kwargs)
