"""Patch embeddings: images (b, 3, h, w) -> patches (b, d, rows, columns).

Axes: b images, d model width.
"""

from itertools import pairwise

from torch import nn

from vimscale.model.presets import VimConfig


class PatchEmbed(nn.Conv2d):
    """Images (b, 3, h, w) -> patches (b, d, rows, columns)."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__(3, d, config.patch_size, config.step)

    def init_weights(self) -> None:
        """Draw from a LeCun normal truncated at two sigmas, as published; the truncation shrinks the standard deviation
        by 0.8796.
        """
        std = self.weight[0].numel() ** -0.5 / 0.8796
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ConvStem(nn.Sequential):
    """3 x 3 convolutions of stride 2 and doubling width down to one value per patch, then a 1 x 1 convolution
    (arXiv:2106.14881). Group norm replaces batch norm, which would make images depend on each other.
    """

    def __init__(self, config: VimConfig, d: int):
        layers: list[nn.Module] = []
        for i, o in pairwise(config.stem_widths):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.GroupNorm(1, o), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(config.stem_widths[-1], d, 1))


def new(config: VimConfig, d: int) -> nn.Module:
    """Return what embeds the patches of images, of width d."""
    return ConvStem(config, d) if config.stem == "conv" else PatchEmbed(config, d)
