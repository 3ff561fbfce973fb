"""The heads of self-distillation: a small network to a bottleneck of unit length, compared with prototypes.

Axes: n rows of features, f features, w width of the bottleneck, k prototypes.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(nn.Linear):
    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Prototypes(nn.Module):
    """Compares rows (n, w) with k directions: a weight-normalized linear layer."""

    def __init__(self, width: int, count: int, *, scaled: bool):
        """`scaled`: learn the length of each prototype, too; else it is 1."""
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width))
        self.weight_g = nn.Parameter(torch.empty(count, 1)) if scaled else None

    def init_weights(self) -> None:
        """The default of a linear layer, as published: the heads' other layers have a standard deviation of 0.02."""
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        if self.weight_g is not None:
            nn.init.ones_(self.weight_g)

    @property
    def directions(self) -> Tensor:
        """What rows are compared with, (k, w)."""
        lengths = self.weight_v.norm(dim=1, keepdim=True)
        return self.weight_v * ((1 if self.weight_g is None else self.weight_g) / lengths)

    def forward(self, x: Tensor) -> Tensor:
        """(n, w) -> logits (n, k)."""
        return F.linear(x, self.directions)


class ProjectionHead(nn.Module):
    """DINO's head (arXiv:2104.14294): features (..., f) -> logits (..., k). Its parts' `init_weights` set it up."""

    def __init__(
        self,
        features: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        bias: bool = True,
        scaled: bool = False,
    ):
        """`layers`: linear ones before the prototypes. `scaled`: see `Prototypes`."""
        super().__init__()
        widths = [features, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [_Linear(before, after, bias=bias), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.prototypes = Prototypes(bottleneck, prototypes, scaled=scaled)

    def embed(self, x: Tensor) -> Tensor:
        """(..., f) -> the bottleneck (..., w), of unit length."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.prototypes(self.embed(x))
