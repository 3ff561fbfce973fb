"""A pyramid of maps for detection and segmentation, from a model whose maps have one resolution or several.

Axes: b images, d width of a map, c channels of the pyramid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (b, c, rows, columns)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """Maps of equal width at several strides: ViTDet's simple feature pyramid (arXiv:2203.16527, section 3). A plain
    model's last map is enlarged 4 and 2 times by deconvolutions, kept, and halved by max-pooling; a hierarchical model
    has maps of several strides, which are taken as they are. A 1 x 1 and a 3 x 3 convolution, each with a LayerNorm,
    follow on each. Gradients reach the encoder, unless it is frozen.

        pyramid = FeaturePyramid(model.feature_info)
        maps = model.forward_intermediates(images, pyramid.indices, norm=True, intermediates_only=True)
        levels = pyramid(maps)
    """

    def __init__(self, feature_info: Sequence[Mapping[str, Any]], channels: int = 256):
        """`feature_info`: the model's. `channels`: c of every level."""
        super().__init__()
        self.channels = channels
        plain = len({info["reduction"] for info in feature_info}) == 1
        self.indices: int | None = 1 if plain else None
        """Of `forward_intermediates`: the maps that the pyramid takes."""
        if plain:
            d, stride = feature_info[-1]["num_chs"], feature_info[-1]["reduction"]
            self.strides = [stride / 4, stride / 2, float(stride), stride * 2.0]
            """Pixels from one cell to the next, of every level: 4, 8, 16, 32 for patches of 16 pixels."""
            half, quarter = max(d // 2, 1), max(d // 4, 1)
            steps: list[list[nn.Module]] = [
                [_doubled(d, half), ChannelNorm(half), nn.GELU(), _doubled(half, quarter)],
                [_doubled(d, half)],
                [],
                [nn.MaxPool2d(2, ceil_mode=True)],
            ]
            widths = [quarter, half, d, d]
        else:
            self.strides = [float(info["reduction"]) for info in feature_info]
            steps = [[] for _ in feature_info]
            widths = [info["num_chs"] for info in feature_info]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *before,
                nn.Conv2d(width, channels, 1, bias=False),
                ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels),
            )
            for before, width in zip(steps, widths, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return (b, c, rows, columns) for every stride, finest first, from the maps (b, d, rows, columns) that
        `indices` ask for.

        Raises:
            ValueError: there are more or fewer maps.
        """
        expected = len(self.levels) if self.indices is None else 1
        if len(maps) != expected:
            raise ValueError(f"the pyramid takes {expected} maps, not {len(maps)}: get those of indices={self.indices}")
        sources = maps if self.indices is None else [*maps] * len(self.levels)
        return [level(map_) for level, map_ in zip(self.levels, sources, strict=True)]


class Segmenter(nn.Module):
    """The least that makes masks of a pyramid: its levels, enlarged to the finest, are summed and classified by a 1 x 1
    convolution.
    """

    def __init__(self, pyramid: FeaturePyramid, classes: int):
        super().__init__()
        self.pyramid = pyramid
        self.classify = nn.Conv2d(pyramid.channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits (b, classes, *size) from the maps that the pyramid takes."""
        finest, *others = self.pyramid(maps)
        total = finest
        for level in others:
            total = total + F.interpolate(level, finest.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.classify(total), size, mode="bilinear", align_corners=False)


def _doubled(i: int, o: int) -> nn.Module:
    return nn.ConvTranspose2d(i, o, 2, stride=2)
