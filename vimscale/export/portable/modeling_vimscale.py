"""An exported Vision Mamba as transformers' models.

Axes: b images, l tokens, d model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_vimscale import VimscaleConfig
from .layers import Block
from .mixers import kernels
from .modeling import Encoder
from .orders import Orders  # noqa: F401 - transformers 5.0 copies only the files that this one names

if int(transformers.__version__.partition(".")[0]) < 5:
    # whether those leave loaded parameters alone when a head is new was never shown
    raise ImportError(f"this model needs transformers 5 or newer, and here is {transformers.__version__}")

_WIDE = {
    *("A_log", "D", "dt_bias", "conv_weight", "conv_bias", "fuse_logits", "backward_gate", "layer_scale", "norm"),
    *("mlp_norm", "neck_norm", "ssm_norm", "ssm_norm_bias", "cls_token", "registers", "pos_embed", "coordinates"),
}
"""Parameters that stay fp32 whatever the dtype of the model: those that do not only enter products."""


class VimscalePreTrainedModel(PreTrainedModel):
    """Both models hold an `Encoder` as `model`."""

    config_class = VimscaleConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [Block.__name__]  # noqa: RUF012 - transformers' name and type

    def __init__(self, config: VimscaleConfig, num_classes: int):
        super().__init__(config)
        if config.model is None:
            raise ValueError("the config has no `model`: load the config.json of an export")
        shape = {**config.model, "num_classes": num_classes}
        self.model = Encoder(shape, inner=kernels(), backward=config.backward)
        names = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = names & _WIDE
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the module's parameters, but keep those that were loaded: some transformers (5.0) call this for all."""
        own = [p for m in (module, *module.children()) for p in m.parameters(recurse=False)]
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        self.model.init_weights(module)
        for parameter, values in loaded:
            parameter.copy_(values)

    def _encode(
        self, pixel_values: Tensor, output_hidden_states: bool | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """Return the tokens (b, l, d), what a head reads (b, features), and the residual streams if they are wanted."""
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x, orders, kept = self.model.encode(pixel_values, keep=bool(keep))
        return x, self.model.pooled(x, orders.slots), tuple(kept) if keep else None

    def _returns_tuple(self, return_dict: bool | None) -> bool:
        return not (self.config.return_dict if return_dict is None else return_dict)


class VimscaleModel(VimscalePreTrainedModel):
    """The encoder without a head."""

    _keys_to_ignore_on_load_unexpected = [r"model\.head\."]  # noqa: RUF012

    def __init__(self, config: VimscaleConfig):
        super().__init__(config, num_classes=0)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Encode normalized images (b, 3, h, w).

        Returns:
            last_hidden_state: the normalized tokens (b, l, d) in the order of the sequence, in which class tokens and
                registers may be anywhere: `model.model.encode` also returns their positions.
            pooler_output: what a head reads (b, features), fp32.
            hidden_states: with `output_hidden_states`, the embedded tokens and the residual stream (b, l, d) after each
                layer, or pair of layers. None of them is normalized.
        """
        x, read, kept = self._encode(pixel_values, output_hidden_states)
        out = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=read.float(), hidden_states=kept)
        return out.to_tuple() if self._returns_tuple(return_dict) else out


class VimscaleForImageClassification(VimscalePreTrainedModel):
    """The encoder with a linear head."""

    def __init__(self, config: VimscaleConfig):
        super().__init__(config, num_classes=config.num_labels or 0)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Classify normalized images (b, 3, h, w): fp32 logits (b, num_labels), and the loss if there are labels (b),
        or (b, num_labels) for several labels per image.
        """
        read, kept = self._encode(pixel_values, output_hidden_states)[1:]
        assert self.model.head is not None
        logits = self.model.head(read).float()
        out = ImageClassifierOutput(logits=logits, hidden_states=kept)
        if labels is not None:
            out["loss"] = self._loss(logits, labels.to(logits.device))
        return out.to_tuple() if self._returns_tuple(return_dict) else out

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind: str | None = self.config.problem_type
        if kind is None:
            whole = labels.dtype in (torch.int32, torch.int64)
            one = "single_label_classification" if whole else "multi_label_classification"
            kind = "regression" if self.config.num_labels == 1 else one
        if kind == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(logits.squeeze(-1).shape))
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.long().view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
