"""The bidirectional selective state-space mixer (Vim's "v2"): both directions at once, no flipped tensors.

Axes: k directions, b images, l tokens, d model width, e inner width, n state, r dt rank, w convolution taps.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vimscale.model.schedule import Direction
from vimscale.ops import bimamba_inner


class BiMamba(nn.Module):
    """u (b, l, d) -> (b, l, d). Each direction convolves and scans the same input projection with its own parameters,
    which lie in one tensor with a leading axis k, forward first; the gate silu(z) is common to both.
    """

    def __init__(
        self,
        d: int,
        *,
        e: int,
        n: int,
        r: int,
        w: int,
        direction: Direction,
        fuse: Literal["mean", "sum"],
        init: Literal["fixed", "published"],
    ):
        super().__init__()
        self.reverse = {"bi": (False, True), "fwd": (False,), "bwd": (True,)}[direction]
        self.fuse = fuse
        k = len(self.reverse)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(k, e, w))
        self.conv_bias = nn.Parameter(torch.empty(k, e))
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, e))  # to dt, B and C
        self.dt_proj = nn.Parameter(torch.empty(k, e, r))
        self.dt_bias = nn.Parameter(torch.empty(k, e))
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(k, e, 1))
        self.D = nn.Parameter(torch.ones(k, e))
        self.out_proj = nn.Linear(e, d, bias=False)
        self._init_scan(init)

    @torch.no_grad()
    def _init_scan(self, init: Literal["fixed", "published"]) -> None:
        """As published; "fixed" leaves out its slip: a backward step of softplus(0) at first, not in [1e-3, 1e-1]."""
        for weight, fan_in in (
            (self.conv_weight, self.conv_weight.shape[-1]),
            (self.conv_bias, self.conv_weight.shape[-1]),
            (self.x_proj, self.x_proj.shape[-1]),
            (self.dt_proj, self.dt_proj.shape[-1]),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
        # softplus(bias) is log-uniform in [1e-3, 1e-1] (arXiv:2312.00752, appendix E); this is its inverse
        step = torch.exp(torch.rand_like(self.dt_bias) * math.log(100) + math.log(1e-3))
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        if init == "published":
            self.dt_bias[torch.tensor(self.reverse, device=self.dt_bias.device)] = 0

    def forward(self, u: Tensor) -> Tensor:
        y = bimamba_inner(
            self.in_proj(u),
            self.conv_weight,
            self.conv_bias,
            self.x_proj,
            self.dt_proj,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self.D,
            reverse=self.reverse,
            fuse=self.fuse,
            recompute=False,
        )
        return self.out_proj(y)
