"""The configuration of an exported Vision Mamba, for transformers."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class VimscaleConfig(PretrainedConfig):
    """What an encoder is made from."""

    model_type = "vimscale"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        backward: float = 1.0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        about: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Keep the values of an export's config.json.

        Args:
            model: the shape of the model, with all fields of vimscale's VimConfig. `num_labels` overrules its
                num_classes.
            backward: factor on the backward paths of every layer.
            mean: of each channel, of the images that the model was trained on; in [0, 1].
            std: likewise.
            about: where the weights come from, for human readers.
            **kwargs: those of every configuration.
        """
        self.model = model
        self.backward = backward
        self.mean = list(mean)
        self.std = list(std)
        self.about = about
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        shape = self.model or {}
        return (shape.get("stages") or [shape])[-1]["d_model"]
