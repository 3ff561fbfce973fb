"""The bidirectional selective state-space mixer (Vim's "v2"), one module a direction, no flipped tensors.

Axes: b images, l tokens, d model width, e = expand * d inner width, n state, r dt rank, k convolution taps.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.model.schedule import Direction
from vimscale.ops import causal_conv1d, selective_scan


class ScanPath(nn.Module):
    """One direction: causal convolution, then a selective scan whose dt, B and C come from the convolved tokens."""

    def __init__(self, e: int, n: int, r: int, k: int, *, reverse: bool, dt_bias: Literal["log_uniform", "zero"]):
        super().__init__()
        self.reverse = reverse
        self.conv_weight = nn.Parameter(torch.empty(e, k).uniform_(-(k**-0.5), k**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(e).uniform_(-(k**-0.5), k**-0.5))
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        self._split = [r, n, n]

        nn.init.uniform_(self.dt_proj.weight, -(r**-0.5), r**-0.5)
        if dt_bias == "zero":
            nn.init.zeros_(self.dt_proj.bias)
        else:
            # softplus(bias) is log-uniform in [1e-3, 1e-1] (arXiv:2312.00752, appendix E); this is its inverse
            step = torch.exp(torch.rand(e) * math.log(100) + math.log(1e-3))
            with torch.no_grad():
                self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        x = causal_conv1d(x, self.conv_weight, self.conv_bias, reverse=self.reverse, activation="silu")
        dt, B, C = self.x_proj(x).split(self._split, dim=-1)  # (b, l, r), (b, l, n), (b, l, n)
        dt = F.linear(dt, self.dt_proj.weight)  # (b, l, e)
        A = -torch.exp(self.A_log.float())
        return selective_scan(x, dt, A, B, C, self.D, dt_bias=self.dt_proj.bias, reverse=self.reverse)


class BiMamba(nn.Module):
    """u (b, l, d) -> (b, l, d). Each direction scans the same input projection; the gate silu(z) is common to both
    and multiplies their mean or sum, which is what gating each of them would give.
    """

    def __init__(
        self,
        d: int,
        *,
        e: int,
        n: int,
        r: int,
        k: int,
        direction: Direction,
        fuse: Literal["mean", "sum"],
        init: Literal["fixed", "published"],
    ):
        super().__init__()
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.forward_path = None
        if direction in ("bi", "fwd"):
            self.forward_path = ScanPath(e, n, r, k, reverse=False, dt_bias="log_uniform")
        self.backward_path = None
        if direction in ("bi", "bwd"):
            dt_bias: Literal["log_uniform", "zero"] = "zero" if init == "published" else "log_uniform"
            self.backward_path = ScanPath(e, n, r, k, reverse=True, dt_bias=dt_bias)
        self.out_proj = nn.Linear(e, d, bias=False)
        self._scale = 0.5 if direction == "bi" and fuse == "mean" else 1.0

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (b, l, e) each
        paths = [path(x) for path in (self.forward_path, self.backward_path) if path is not None]
        y = paths[0] if len(paths) == 1 else paths[0] + paths[1]
        return self.out_proj(y * F.silu(z) * self._scale)
