"""Patch embeddings; a residual block: add, norm, mix; what is between stages, and the head.

Axes: b images, l tokens, d model width.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from vimscale.model.mixer import Attention, Factor, Mamba, OutProj, Probe
from vimscale.model.own import OwnMixer
from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer
from vimscale.model.ssd import Ssd
from vimscale.model.tokens import Tokens
from vimscale.ops import add_norm, gated

Recompute = Literal["none", "scan", "block"]
"""What a block keeps for the backward pass. none: all it needs; scan: all but convolution, dt and scan; block: only its
input.
"""


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


def new_stem(config: VimConfig, d: int) -> nn.Module:
    """Return what embeds the patches of images, of width d."""
    return ConvStem(config, d) if config.stem == "conv" else PatchEmbed(config, d)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, fused with the residual add before it; the residual stream is always fp32."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if config.norm == "layer" else None
        self.config = config

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.weight, self.bias, kind=self.config.norm, eps=self.config.norm_eps)


class NoNorm(nn.Module):
    """In place of a norm that was removed: adds only."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else residual + x
        return total, total


class SwiGLU(nn.Module):
    """w3 (silu(w1 x) * w2 x), with hidden width 8/3 d (arXiv:2002.05202)."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        hidden = d * 8 // 3
        self.w1 = nn.Linear(d, hidden)
        self.w2 = nn.Linear(d, hidden)
        self.w3 = OutProj(hidden, d, summands=len(config.layers), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(gated(self.w2(x), self.w1(x)))


class Block(nn.Module):
    """Add, norm, mix; then the same with an MLP if the model has one. The block does not add its output to the
    residual: the next norm does.
    """

    def __init__(self, config: VimConfig, layer: Layer, d: int, *, paired: bool = False):
        super().__init__()
        self.norm = Norm(config, d)
        self.mixer: nn.Module
        if layer.is_own:
            self.mixer = OwnMixer(config, config.own_kind(layer), d)
        elif layer.kind == "attn":
            self.mixer = Attention(config, d)
        else:
            self.mixer = Ssd(config, layer, d) if layer.is_ssd else Mamba(config, layer, d, paired=paired)
        self.mlp_norm = Norm(config, d) if config.mlp == "swiglu" else None
        self.mlp = SwiGLU(config, d) if config.mlp == "swiglu" else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        tokens: Tokens,
        scale: Tensor | None = None,
        backward: Factor = 1.0,
        recompute: bool = False,
        probe: Probe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (output, residual). `scale` (b or b l, broadcast over d): drop-path's factor on the contributions, 0
        or 1 / (1 - rate).
        """
        x, residual = self.norm(x, residual)
        if probe is not None:
            probe["rms"] = tokens.mean_square(residual.detach()).sqrt()
        x = _scaled(self.mixer(x, tokens, backward, recompute, probe), scale)
        if self.mlp is not None and self.mlp_norm is not None:
            x, residual = self.mlp_norm(x, residual)
            x = _scaled(self.mlp(x), scale)
        return x, residual


def no_decay(module: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: vectors, embeddings, the scan's A, D and biases."""
    not_decayed = {"pos_embed", "cls_token", "registers", "A_log", "D", "conv_bias", "dt_bias", "fuse_logits"}
    vectors = {name for name, p in module.named_parameters() if p.ndim <= 1 and not name.endswith("backward_gate")}
    return vectors | {name for name, _ in module.named_parameters() if name.rpartition(".")[2] in not_decayed}


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)


class Merge(nn.Module):
    """Between stages: concatenates adjacent tokens, normalizes them and projects them to the next width."""

    def __init__(self, config: VimConfig, i: int, o: int, factor: int):
        super().__init__()
        self.norm = Norm(config, i * factor**2)
        self.project = nn.Linear(i * factor**2, o, bias=False)
        self.factor = factor

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (b, l, d) -> (b, l / factor^2, o)."""
        b, _, d = x.shape
        rows, columns, f = grid[0] // self.factor, grid[1] // self.factor, self.factor
        x = x.view(b, rows, f, columns, f, d).transpose(2, 3).reshape(b, rows * columns, f * f * d)
        normed, _ = self.norm(x, None)
        return self.project(normed)


class Head(nn.Linear):
    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
