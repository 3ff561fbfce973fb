"""Token mixers: selective scans in one, two or four directions at once, no flipped tensors; and attention for hybrids.

Axes: k paths of a layer, b images, l tokens, d model width, e inner width, n state, r dt rank, w convolution taps.
"""

import math
from functools import partial
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer
from vimscale.model.tokens import Tokens
from vimscale.ops import bidirectional_scan, bimamba_inner, causal_conv1d, selective_scan, selective_scan_with_state

Probe = dict[str, Tensor]
"""What a mixer tells about itself on logging steps, by name; scalars on the device."""


PATH_PARAMETERS = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
"""Of a `Mamba`, with a leading axis of paths."""


class OutProj(nn.Linear):
    """A projection into the residual stream, which sums `summands` of them: its initial weights are that much smaller
    that the sum keeps its size.
    """

    def __init__(self, i: int, o: int, *, summands: int, bias: bool = False):
        super().__init__(i, o, bias=bias)
        self.summands = summands

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.weight /= math.sqrt(self.summands)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Mamba(nn.Module):
    """u (b, l, d) -> (b, l, d). Each path convolves and scans the same input projection with its own parameters, which
    lie in one tensor with a leading axis k, forward first; the gate silu(z) is common to all. A `shared` layer has one
    set for both ways, but for A.

    A_log, D, the biases and the states are fp32 whatever the activations are.
    """

    optional: Tensor

    def __init__(self, config: VimConfig, layer: Layer, d: int, *, paired: bool = False):
        """`paired`: the second layer of a pair, which walks backwards."""
        super().__init__()
        e, n, r = config.expand * d, config.d_state, config.dt_rank(d)
        self.config = config
        self.shared = layer.kind == "shared"
        self.paths = tuple((order, reverse or paired) for order, reverse in layer.paths)
        self.order = self.paths[0][0]
        """Of the layer's tokens; paths of another order are permuted for themselves."""
        self.backward_paths = tuple(
            i for i, (_, reverse) in enumerate(self.paths) if reverse and (paired or layer.kind != "bwd")
        )
        """Paths that the layer can do without: those that gate, ramp and drop are about."""
        optional = torch.tensor([i in self.backward_paths for i in range(len(self.paths))])
        self.register_buffer("optional", optional, persistent=False)  # on the device, so that no step waits to put it
        k = 1 if self.shared else len(self.paths)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(k, e, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(k, e))
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, e))  # to dt, B and C
        self.dt_proj = nn.Parameter(torch.empty(k, e, r))
        self.dt_bias = nn.Parameter(torch.empty(k, e))
        self.A_log = nn.Parameter(torch.empty(len(self.paths), e, n))
        self.D = nn.Parameter(torch.empty(k, e))
        self.fuse = config.fuse if len(self.paths) > 1 else "sum"
        width = e * (len(self.paths) if self.fuse == "concat" else 1)
        self.fuse_logits = nn.Parameter(torch.empty(len(self.paths), e)) if self.fuse == "gate" else None
        self.backward_gate = nn.Parameter(torch.empty(1)) if config.backward_gate and self.backward_paths else None
        self.ssm_norm = nn.Parameter(torch.empty(width)) if config.ssm_norm else None
        self.out_proj = OutProj(width, d, summands=len(config.layers))
        self.layer_scale = nn.Parameter(torch.empty(d)) if config.layer_scale is not None else None

    @torch.no_grad()
    def init_weights(self) -> None:
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
        if self.config.init == "published" and not self.shared:
            self.dt_bias[list(self.backward_paths)] = 0
        self.A_log.copy_(torch.arange(1, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        for one in (self.ssm_norm, self.backward_gate):
            if one is not None:
                nn.init.ones_(one)
        if self.fuse_logits is not None:
            nn.init.zeros_(self.fuse_logits)
        if self.layer_scale is not None:
            assert self.config.layer_scale is not None
            nn.init.constant_(self.layer_scale, self.config.layer_scale)

    def forward(
        self, u: Tensor, tokens: Tokens, backward: float = 1.0, recompute: bool = False, probe: Probe | None = None
    ) -> Tensor:
        """`backward`: how much of the backward path is in (1: all); at 0 its scan is not computed. With `recompute`
        the backward pass rebuilds convolution, dt and scan instead of finding them kept.
        """
        every = range(len(self.paths))
        live = [i for i in every if backward or i not in self.backward_paths]
        # the second layer of a pair is nothing but a backward path, and computes in vain: ZeRO-3 keeps the last
        # gradient of a parameter that a step does without
        live = live or list(every)
        share = self._shares(live, backward)
        into, back = tokens.permuted(self.order)
        xz = self.in_proj(into(u))
        if probe is not None:
            self._examine(probe, xz.detach()[:1])
        if self.shared:
            inner = partial(self._shared, live=live, share=share, reset=tokens.reset)
            y = checkpoint(inner, xz, use_reentrant=False, preserve_rng_state=False) if recompute else inner(xz)
        elif self.fuse in ("gate", "concat"):
            y = self._apart(xz, live, share, tokens, recompute)
        else:
            y = self._paths(xz, live, share, tokens, recompute)
        if self.ssm_norm is not None:
            y = F.rms_norm(y.float(), y.shape[-1:], self.ssm_norm, self.config.norm_eps).to(y.dtype)
        out = back(self.out_proj(y))
        return out if self.layer_scale is None else out * self.layer_scale.to(out.dtype)

    def _shares(self, live: list[int], backward: float) -> Tensor | None:
        """Factor of each live path (len(live)), None where there is none but what `fuse` says: 1/k in a mean."""
        if len(live) == len(self.paths) and backward == 1 and self.backward_gate is None:
            return None
        mean = 1 / len(self.paths) if self.fuse == "mean" else 1.0
        factors = torch.full((len(live),), mean, device=self.D.device)
        gate = backward if self.backward_gate is None else backward * self.backward_gate
        if len(live) < len(self.paths):  # a gate whose path is out still gets a gradient, of zero: see `forward`
            return factors + 0 * gate
        return torch.where(self.optional, factors * gate, factors)

    def _apart(self, xz: Tensor, live: list[int], share: Tensor | None, tokens: Tokens, recompute: bool) -> Tensor:
        """The paths side by side (b, l, k e), zeros where one is left out; or a convex combination learned a channel
        (b, l, e), equal parts at first.
        """
        ys = {
            i: self._paths(xz, [i], None if share is None else share[at : at + 1], tokens, recompute)
            for at, i in enumerate(live)
        }
        if self.fuse_logits is None:
            nothing = torch.zeros_like(ys[live[0]])
            return torch.cat([ys.get(i, nothing) for i in range(len(self.paths))], dim=-1)
        weights = self.fuse_logits.softmax(dim=0).to(xz.dtype)
        return torch.stack([weights[i] * y for i, y in ys.items()]).sum(dim=0)

    def _paths(self, xz: Tensor, live: list[int], share: Tensor | None, tokens: Tokens, recompute: bool) -> Tensor:
        """The sum or mean of the live paths (b, l, e); paths of one order in one launch."""
        total: Tensor | None = None
        orders = [list(group) for _, group in groupby(live, key=lambda i: self.paths[i][0])]
        for group in orders:
            order = self.paths[group[0]][0]
            into, back = tokens.permuted(order if order != self.order else "row")
            y = back(self._scan(into(xz), group, self._part(share, live, group), len(orders), tokens, recompute))
            total = y if total is None else total + y
        assert total is not None
        return total

    @staticmethod
    def _part(share: Tensor | None, live: list[int], group: list[int]) -> Tensor | None:
        return None if share is None else share[live.index(group[0]) : live.index(group[-1]) + 1]

    def _scan(
        self, xz: Tensor, group: list[int], share: Tensor | None, orders: int, tokens: Tokens, recompute: bool
    ) -> Tensor:
        """The paths `group`, neighbours of one order. A factor a path is put on C and D, which cost nothing, instead
        of on y: y = C h + D x is linear in both.
        """
        some = slice(group[0], group[-1] + 1)
        x_proj, D = self.x_proj[some], self.D[some]
        fuse: Literal["mean", "sum"] = "mean" if self.fuse == "mean" and share is None else "sum"
        if fuse == "mean" and orders > 1:  # the kernel's mean is over this group alone
            fuse, share = "sum", torch.full((len(group),), 1 / len(self.paths), device=D.device)
        if share is not None:
            n = self.A_log.shape[-1]
            x_proj = torch.cat([x_proj[:, :-n], x_proj[:, -n:] * share[:, None, None]], dim=1)
            D = D * share[:, None]
        return bimamba_inner(
            xz,
            self.conv_weight[some],
            self.conv_bias[some],
            x_proj,
            self.dt_proj[some],
            self.dt_bias[some],
            -torch.exp(self.A_log[some].float()),
            D,
            reverse=[self.paths[i][1] for i in group],
            fuse=fuse,
            reset=tokens.reset,
            recompute=recompute,
        )

    def _shared(self, xz: Tensor, *, live: list[int], share: Tensor | None, reset: Tensor | None) -> Tensor:
        """Both ways over one convolution and one set of projections (Vim's v1): only A differs."""
        x, z = xz.chunk(2, dim=-1)
        x = causal_conv1d(x, self.conv_weight[0], self.conv_bias[0], activation="silu", reset=reset)
        x_proj, dt_proj, n = self.x_proj[0].to(x.dtype), self.dt_proj[0].to(x.dtype), self.A_log.shape[-1]
        low_dt, B, C = F.linear(x, x_proj).split([dt_proj.shape[-1], n, n], dim=-1)
        dt = F.linear(low_dt, dt_proj)
        A = -torch.exp(self.A_log.float())
        if len(live) == 1:
            factor = 1.0 if share is None else share[0]
            return selective_scan(x, dt, A[0], B, C * factor, self.D[0] * factor, z, self.dt_bias[0], reset=reset)

        def both(t: Tensor) -> Tensor:
            return t.expand(2, *t.shape)

        C, D, bias = both(C), self.D.expand(2, -1), self.dt_bias.expand(2, -1)
        if share is not None:
            C, D = C * share[:, None, None, None].to(C.dtype), D * share[:, None]
        fuse: Literal["mean", "sum"] = "mean" if self.fuse == "mean" and share is None else "sum"
        y = bidirectional_scan(both(x), both(dt), A, both(B), C, D, z, bias, fuse=fuse, reset=reset)
        assert isinstance(y, Tensor)
        return y

    @torch.no_grad()
    def _examine(self, probe: Probe, xz: Tensor) -> None:
        """Steps and final states of the first path, for the row xz (1, l, 2e)."""
        x, _ = xz.chunk(2, dim=-1)
        x = causal_conv1d(x, self.conv_weight[0], self.conv_bias[0], activation="silu")
        n = self.A_log.shape[-1]
        low_dt, B, C = F.linear(x, self.x_proj[0].to(x.dtype)).split([self.dt_proj.shape[-1], n, n], dim=-1)
        dt = F.linear(low_dt, self.dt_proj[0].to(x.dtype))
        _, state = selective_scan_with_state(
            x,
            dt,
            -torch.exp(self.A_log[0].float()),
            B,
            C,
            self.D[0],
            dt_bias=self.dt_bias[0],
            reverse=self.paths[0][1],
        )
        step = F.softplus(dt.float() + self.dt_bias[0])
        probe["dt_min"], probe["dt_max"], probe["state"] = step.min(), step.max(), state.abs().max()
        if self.backward_gate is not None:
            probe["gate"] = self.backward_gate.float()[0].clone()


class Attention(nn.Module):
    """Multi-head softmax attention (arXiv:1706.03762), unmasked; with packed images, inside each."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = OutProj(d, d, summands=len(config.layers))
        self.layer_scale = nn.Parameter(torch.empty(d)) if config.layer_scale is not None else None

    def init_weights(self) -> None:
        if self.layer_scale is not None:
            assert self.config.layer_scale is not None
            nn.init.constant_(self.layer_scale, self.config.layer_scale)

    def forward(
        self, u: Tensor, tokens: Tokens, backward: float = 1.0, recompute: bool = False, probe: Probe | None = None
    ) -> Tensor:
        """The arguments of `Mamba.forward`; there is no backward path here, nor a scan."""
        b, length, d = u.shape
        heads = self.qkv(u).view(b, length, 3, d // self.config.d_head, self.config.d_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens.mask())
        out = self.out_proj(y.transpose(1, 2).reshape(b, length, d))
        return out if self.layer_scale is None else out * self.layer_scale.to(out.dtype)
