"""The layers of a Vision Mamba in plain torch: see modeling.py, which makes a model of them.

Axes: b images, l tokens (class tokens and registers included), d model width.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers import Attention, Mamba, Ssd, normalized
from .orders import Layer


class Norm(nn.Module):
    """RMSNorm or LayerNorm after a residual add: (x, residual) -> (normed in x's dtype, the sum in fp32)."""

    def __init__(self, config: dict[str, Any], d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if config["norm"] == "layer" else None
        self.eps = config["norm_eps"]

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.float() if residual is None else residual + x.float()
        return normalized(total, self.weight, self.bias, self.eps).to(x.dtype), total


class SwiGLU(nn.Module):
    """w3 (silu(w1 x) * w2 x)."""

    def __init__(self, d: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, d * 8 // 3), nn.Linear(d, d * 8 // 3), nn.Linear(d * 8 // 3, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Add, norm, mix; then the same with an MLP if the model has one. The next norm adds the output to the residual."""

    def __init__(self, config: dict[str, Any], layer: Layer, d: int, second: bool, drop: float):
        """`drop`: chance that the block contributes nothing to an image in training."""
        super().__init__()
        self.drop = drop
        self.norm = Norm(config, d)
        scans = Ssd if layer[0].startswith("ssd") else Mamba
        self.mixer = Attention(config, d) if layer[0] == "attn" else scans(config, layer, d, second)
        mlp = config["mlp"] == "swiglu"
        self.mlp_norm = Norm(config, d) if mlp else None
        self.mlp = SwiGLU(d) if mlp else None

    def forward(self, x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
        kept = None
        if self.training and self.drop:
            kept = (torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop) / (1 - self.drop)
        x, residual = self.norm(x, residual)
        x = self.mixer(x, *arguments)
        x = x if kept is None else x * kept.to(x.dtype)
        if self.mlp_norm is not None and self.mlp is not None:
            x, residual = self.mlp_norm(x, residual)
            x = self.mlp(x)
            x = x if kept is None else x * kept.to(x.dtype)
        return x, residual


class Merge(nn.Module):
    """Between stages: join factor x factor adjacent tokens, normalize them and project them to the next width."""

    def __init__(self, config: dict[str, Any], i: int, o: int, factor: int):
        super().__init__()
        self.factor = factor
        self.norm = Norm(config, i * factor**2)
        self.project = nn.Linear(i * factor**2, o, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        (rows, columns), f = grid, self.factor
        x = x.unflatten(1, (rows // f, f, columns // f, f)).transpose(2, 3).flatten(3).flatten(1, 2).flatten(2)
        return self.project(self.norm(x, None)[0])


class Coordinates(nn.Module):
    """Positions from the patches' coordinates: sines and cosines of the row, then of the column, times a factor per
    channel.
    """

    def __init__(self, config: dict[str, Any], d: int):
        super().__init__()
        self.patch, self.step = config["patch_size"], config["stride"] or config["patch_size"]
        self.scale = nn.Parameter(torch.empty(d))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return fp32 (1, rows x columns, d)."""
        d, device = self.scale.shape[0], self.scale.device
        frequencies = 10_000 ** -(torch.arange(d // 4, device=device, dtype=torch.float32) / (d // 4))
        sides = []
        for count in grid:
            at = (torch.arange(count, device=device, dtype=torch.float32) * self.step / self.patch)[:, None]
            sides.append(torch.cat([(at * frequencies).sin(), (at * frequencies).cos()], dim=-1))
        rows = sides[0][:, None].expand(-1, grid[1], -1)
        columns = sides[1][None].expand(grid[0], -1, -1)
        return (torch.cat([rows, columns], dim=-1) * self.scale.float()).flatten(0, 1)[None]


def patches(config: dict[str, Any], d: int) -> nn.Module:
    return nn.Conv2d(3, d, config["patch_size"], config["stride"] or config["patch_size"])


def conv_stem(config: dict[str, Any], d: int) -> nn.Module:
    """3 x 3 convolutions of stride 2 and doubling width down to one value per patch, then a 1 x 1 convolution."""
    halvings = config["patch_size"].bit_length() - 1
    widths = [3, *(max(d >> (halvings - i), 16) for i in range(1, halvings + 1))]
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.GroupNorm(1, o), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], d, 1))
