"""A kind of layer of your own: a depthwise convolution over the tokens, with a gate.

    vimscale launch examples/own_layer.yaml

docs/own-code.md goes through this file. Axes: b images, l tokens, d model width.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vimscale.model import VimConfig
from vimscale.model.own import Mixer, Tokens
from vimscale.recipe.sections import LayerOptions


class GatedConv(Mixer):
    class Options(LayerOptions):
        """Keys of the kind in the recipe's section `model.kinds`, next to `kind`."""

        taps: Annotated[int, Field(ge=1, le=255)] = 5
        """Tokens that the convolution reads for each token."""

    options: Options

    def __init__(self, options: Options, d: int, config: VimConfig):
        super().__init__(options, d, config)
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv = nn.Conv1d(d, d, options.taps, padding="same", groups=d)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, u: Tensor, tokens: Tokens) -> Tensor:
        x, gate = self.in_proj(u).chunk(2, dim=-1)  # (b, l, d) each
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out_proj(x * F.silu(gate))

    def flops(self, tokens: int) -> int:
        d = self.out_proj.in_features
        return 2 * tokens * d * (2 * d + self.options.taps + d)
