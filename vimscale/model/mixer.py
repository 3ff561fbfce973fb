"""Token mixers: selective scans in one, two or four directions at once, without flipped tensors; attention for hybrids.

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
from vimscale.ops import (
    Context,
    add_norm,
    bidirectional_scan,
    bimamba_inner,
    causal_conv1d,
    conv_over,
    scan_over,
    selective_scan,
    selective_scan_with_state,
)

Probe = dict[str, Tensor]
"""Statistics that a mixer reports on logging steps, by name; scalars on the device."""


Factor = float | Tensor
"""A tensor () is on the model's device and never read on the host: a CUDA graph can be replayed with other values."""

PATH_PARAMETERS = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
"""Parameters of a `Mamba` that have a leading axis of paths, unless both directions use one set."""


def init_steps(dt_bias: Tensor) -> None:
    """Make softplus(dt_bias) log-uniform in [1e-3, 1e-1] (arXiv:2312.00752, appendix E)."""
    step = torch.exp(torch.rand_like(dt_bias) * math.log(100) + math.log(1e-3))
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


class OutProj(nn.Linear):
    """A projection into the residual stream, one of `summands`: its initial weights are divided by sqrt(summands), so
    that the variance of their sum does not depend on how many there are.
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


def new_layer_scale(config: VimConfig, d: int) -> nn.Parameter | None:
    """Return an empty factor per channel (d) on a mixer's output, if the config has one."""
    return nn.Parameter(torch.empty(d)) if config.layer_scale is not None else None


def init_layer_scale(layer_scale: nn.Parameter | None, config: VimConfig) -> None:
    if layer_scale is not None:
        assert config.layer_scale is not None
        nn.init.constant_(layer_scale, config.layer_scale)


def layer_scaled(out: Tensor, layer_scale: nn.Parameter | None) -> Tensor:
    return out if layer_scale is None else out * layer_scale.to(out.dtype)


class Scans(nn.Module):
    """u (b, l, d) -> (b, l, d). Each path scans one input projection, with parameters that are slices of tensors with a
    leading axis k, forward first. All paths have the gate silu(z) in common. What a scan is, a subclass defines.

    A_log, D, the biases and the states are fp32 whatever the dtype of the activations.
    """

    optional: Tensor
    in_proj: nn.Linear
    path_parameters: tuple[str, ...]
    """Parameters with a leading axis of paths."""
    always_normed = False
    """Whether the gated sum of the paths has a norm whatever `ssm_norm` says."""

    def __init__(self, config: VimConfig, layer: Layer, d: int, *, paired: bool = False):
        """`paired`: this is the second layer of a pair, which scans backward."""
        super().__init__()
        self.config = config
        self.paths = tuple((order, reverse or paired) for order, reverse in layer.paths)
        self.order = self.paths[0][0]
        """Order of the layer's tokens; a path of another order permutes them for itself."""
        self.backward_paths = tuple(
            i for i, (_, reverse) in enumerate(self.paths) if reverse and (paired or len(self.paths) > 1)
        )
        """Paths that can be dropped: backward_gate, backward_ramp and backward_drop apply to them."""
        optional = torch.tensor([i in self.backward_paths for i in range(len(self.paths))])
        self.register_buffer("optional", optional, persistent=False)  # on the device, so that no step waits for a copy
        self._add_parameters(layer, d)
        e = config.expand * d
        self.fuse = config.fuse if len(self.paths) > 1 else "sum"
        width = e * (len(self.paths) if self.fuse == "concat" else 1)
        self.fuse_logits = nn.Parameter(torch.empty(len(self.paths), e)) if self.fuse == "gate" else None
        self.backward_gate = nn.Parameter(torch.empty(1)) if config.backward_gate and self.backward_paths else None
        self.ssm_norm = nn.Parameter(torch.empty(width)) if config.ssm_norm or self.always_normed else None
        self.ssm_norm_bias = nn.Parameter(torch.empty(width)) if config.ssm_norm == "layer" else None
        self.out_proj = OutProj(width, d, summands=len(config.layers))
        self.layer_scale = new_layer_scale(config, d)

    def _add_parameters(self, layer: Layer, d: int) -> None:
        """Add in_proj and the parameters of the paths."""
        raise NotImplementedError

    def _scan(
        self,
        xz: Tensor,
        own: tuple[Tensor, ...],
        group: list[int],
        factors: Tensor | None,
        groups: int,
        tokens: Tokens,
        recompute: bool,
    ) -> Tensor:
        """Scan the paths `group`, which are adjacent and have one order, with their parameters `own`, and return their
        gated sum or mean (b, l, e). The factors on paths multiply C and D, which costs nothing, instead of y: y = C h +
        D x is linear in both.
        """
        raise NotImplementedError

    def _gate(self, xz: Tensor) -> Tensor:
        """Return z (b, l, e), a slice of the input projection."""
        raise NotImplementedError

    def _probed(self, xz: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Return the steps of the first path and its final states, for one row."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_shared(self) -> None:
        """Initialize what does not depend on the scan."""
        for ones in (self.ssm_norm, self.backward_gate):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.ssm_norm_bias, self.fuse_logits):
            if zeros is not None:
                nn.init.zeros_(zeros)
        init_layer_scale(self.layer_scale, self.config)

    def forward(
        self, u: Tensor, tokens: Tokens, backward: Factor = 1.0, recompute: bool = False, probe: Probe | None = None
    ) -> Tensor:
        """`backward`: factor on the backward paths; at a number 0 their scans are not computed. With `recompute`, the
        backward pass recomputes convolution, dt and scan instead of keeping them.
        """
        every = range(len(self.paths))
        off = not isinstance(backward, Tensor) and not backward
        active = [i for i in every if not off or i not in self.backward_paths]
        # The second layer of a pair has only a backward path, and computes it even at a factor of 0: ZeRO-3 keeps the
        # last gradient of a parameter that a step does not use.
        active = active or list(every)
        factors = self._path_factors(active, backward)
        permute, restore = tokens.permuted(self.order)
        xz = self.in_proj(permute(u))
        if probe is not None:
            self._record(probe, xz.detach()[:1], tokens.context)
        y = self._mixed(xz, active, factors, tokens, recompute)
        return layer_scaled(restore(self.out_proj(y)), self.layer_scale)

    def _mixed(self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool) -> Tensor:
        """Scan, fuse and normalize the active paths: what out_proj reads."""
        return self._normalized(self._scan_paths(xz, active, factors, tokens, recompute), xz)

    @property
    def _gated(self) -> bool:
        """Whether the gate silu(z) is a factor on the scans, and not on what a norm makes of them."""
        return self.ssm_norm_bias is None

    def _normalized(self, y: Tensor, xz: Tensor) -> Tensor:
        """Normalize the output of the paths (b, l, e or k e) as `config.ssm_norm` says; LayerNorm precedes the gate."""
        if self.ssm_norm is None:
            return y
        if self.ssm_norm_bias is None:
            return add_norm(y, None, self.ssm_norm, eps=self.config.norm_eps)[0]
        wide, shape, eps = y if y.dtype == torch.float64 else y.float(), y.shape[-1:], self.config.norm_eps
        gate = F.silu(self._gate(xz))
        normed = F.layer_norm(wide, shape, self.ssm_norm, self.ssm_norm_bias, eps).to(y.dtype)
        return (normed.unflatten(-1, (-1, gate.shape[-1])) * gate.unsqueeze(-2)).flatten(-2)

    def _path_factors(self, active: list[int], backward: Factor) -> Tensor | None:
        """Return the factor on each active path (len(active)), with the 1/k of a mean; None if `fuse` alone says it."""
        full = not isinstance(backward, Tensor) and backward == 1
        if len(active) == len(self.paths) and full and self.backward_gate is None:
            return None
        mean = 1 / len(self.paths) if self.fuse == "mean" else 1.0
        factors = torch.full((len(active),), mean, device=self.optional.device)
        gate = backward if self.backward_gate is None else backward * self.backward_gate
        if len(active) < len(self.paths):  # the gate of a dropped path still gets a gradient, of zero: see `forward`
            return factors + 0 * gate
        return torch.where(self.optional, factors * gate, factors)

    def _scan_paths(
        self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool
    ) -> Tensor:
        """Scan and fuse the active paths: (b, l, e or k e)."""
        fused = self._fuse_paths if self.fuse in ("gate", "concat") else self._add_paths
        return fused(xz, active, factors, tokens, recompute)

    def _fuse_paths(
        self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool
    ) -> Tensor:
        """Concatenate the paths (b, l, k e), with zeros for a dropped one; or form a convex combination, learned per
        channel and initially the mean (b, l, e).
        """
        ys = {
            i: self._add_paths(xz, [i], None if factors is None else factors[at : at + 1], tokens, recompute)
            for at, i in enumerate(active)
        }
        if self.fuse_logits is None:
            zeros = torch.zeros_like(ys[active[0]])
            return torch.cat([ys.get(i, zeros) for i in range(len(self.paths))], dim=-1)
        weights = self.fuse_logits.softmax(dim=0).to(xz.dtype)
        return torch.stack([weights[i] * y for i, y in ys.items()]).sum(dim=0)

    def _add_paths(
        self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool
    ) -> Tensor:
        """Return the sum or mean of the active paths (b, l, e); paths of one order run in one launch."""
        total: Tensor | None = None
        groups = [list(group) for _, group in groupby(active, key=lambda i: self.paths[i][0])]
        for group, own in zip(groups, self._parameters_of(groups), strict=True):
            order = self.paths[group[0]][0]
            permute, restore = tokens.permuted(order if order != self.order else "row")
            part = None if factors is None else factors[active.index(group[0]) : active.index(group[-1]) + 1]
            y = restore(self._scan(permute(xz), own, group, part, len(groups), tokens, recompute))
            total = y if total is None else total + y
        assert total is not None
        return total

    def _parameters_of(self, groups: list[list[int]]) -> list[tuple[Tensor, ...]]:
        """Return the path parameters for each group of adjacent paths. If the groups have all paths, they are parts of
        one split, whose gradient is one concatenation; that of a slice is copied into zeros.
        """
        every: list[Tensor] = [getattr(self, name) for name in self.path_parameters]
        sizes = [len(group) for group in groups]
        if sizes == [len(self.paths)]:
            return [tuple(every)]
        if sum(sizes) == len(self.paths):
            return list(zip(*(t.split(sizes) for t in every), strict=True))
        return [tuple(t[group[0] : group[-1] + 1] for t in every) for group in groups]

    @torch.no_grad()
    def _record(self, probe: Probe, xz: Tensor, context: Context | None) -> None:
        """Record the steps and final states of the first path in `probe`, for one row xz (1, l, ...)."""
        step, state = self._probed(xz, context)
        least, most = step.min(), step.max()
        if context is not None:
            of_all = context.gather(torch.stack([least, most]))
            least, most = of_all[:, 0].min(), of_all[:, 1].max()
        probe["dt_min"], probe["dt_max"], probe["state"] = least, most, state.abs().max()
        if self.backward_gate is not None:
            probe["gate"] = self.backward_gate.float()[0].clone()


class Mamba(Scans):
    """Each path convolves and scans the same input projection with its own parameters (Mamba-1). A layer of kind
    `shared` has one set of parameters for both directions, except for A.
    """

    def _add_parameters(self, layer: Layer, d: int) -> None:
        config = self.config
        e, n, r = config.expand * d, config.d_state, config.dt_rank(d)
        self.one_set = layer.kind == "shared"
        """Whether both directions use one set of parameters."""
        self.path_parameters = ("A_log",) if self.one_set else PATH_PARAMETERS
        k = 1 if self.one_set else len(self.paths)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(k, e, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(k, e))
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, e))  # to dt, B and C
        self.dt_proj = nn.Parameter(torch.empty(k, e, r))
        self.dt_bias = nn.Parameter(torch.empty(k, e))
        self.A_log = nn.Parameter(torch.empty(len(self.paths), e, n))
        self.D = nn.Parameter(torch.empty(k, e))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as published. init "fixed" does not repeat the published bug, in which backward steps start at
        softplus(0) instead of in [1e-3, 1e-1].
        """
        for weight, fan_in in (
            (self.conv_weight, self.conv_weight.shape[-1]),
            (self.conv_bias, self.conv_weight.shape[-1]),
            (self.x_proj, self.x_proj.shape[-1]),
            (self.dt_proj, self.dt_proj.shape[-1]),
        ):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
        init_steps(self.dt_bias)
        if self.config.init == "published" and not self.one_set:
            self.dt_bias[list(self.backward_paths)] = 0
        self.A_log.copy_(torch.arange(1, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        self._init_shared()

    def _scan_paths(
        self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool
    ) -> Tensor:
        if not self.one_set:
            return super()._scan_paths(xz, active, factors, tokens, recompute)
        inner = partial(self._scan_one_set, active=active, factors=factors, tokens=tokens)
        return checkpoint(inner, xz, use_reentrant=False, preserve_rng_state=False) if recompute else inner(xz)

    def _gate(self, xz: Tensor) -> Tensor:
        return xz.chunk(2, dim=-1)[1]

    def _scan(
        self,
        xz: Tensor,
        own: tuple[Tensor, ...],
        group: list[int],
        factors: Tensor | None,
        groups: int,
        tokens: Tokens,
        recompute: bool,
    ) -> Tensor:
        fuse: Literal["mean", "sum"] = "mean" if self.fuse == "mean" and factors is None else "sum"
        if fuse == "mean" and groups > 1:  # the kernel's mean is over this group alone
            fuse, factors = "sum", torch.full((len(group),), 1 / len(self.paths), device=self.D.device)
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = own
        if factors is not None:
            n = A_log.shape[-1]
            rest, of_C = x_proj.split([x_proj.shape[1] - n, n], dim=1)
            x_proj, D = torch.cat([rest, of_C * factors[:, None, None]], dim=1), D * factors[:, None]
        return bimamba_inner(
            xz,
            conv_weight,
            conv_bias,
            x_proj,
            dt_proj,
            dt_bias,
            A_log,
            D,
            reverse=[self.paths[i][1] for i in group],
            fuse=fuse,
            gated=self._gated,
            reset=tokens.reset,
            recompute=recompute,
            context=tokens.context,
        )

    def _scan_inputs(
        self, xz: Tensor, context: Context | None, reset: Tensor | None = None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (convolved x, z, dt, B, C) of the first set of parameters, dt without its projection, bias and
        softplus.
        """
        x, z = xz.chunk(2, dim=-1)
        if context is None:
            weight, bias = self.conv_weight[0], self.conv_bias[0]
            x = causal_conv1d(x, weight, bias, reverse=reverse, activation="silu", reset=reset)
        else:
            x = conv_over(context, x, self.conv_weight[:1], self.conv_bias[:1], [reverse])[0]
        x_proj, r, n = self.x_proj[0].to(x.dtype), self.dt_proj.shape[-1], self.A_log.shape[-1]
        low_dt, B, C = F.linear(x, x_proj).split([r, n, n], dim=-1)
        return x, z, low_dt, B, C

    def _wide_dt(self, low_dt: Tensor) -> Tensor:
        return F.linear(low_dt, self.dt_proj[0].to(low_dt.dtype))

    def _scan_one_set(self, xz: Tensor, *, active: list[int], factors: Tensor | None, tokens: Tokens) -> Tensor:
        """Scan both directions over one convolution and one set of projections (Vim's v1): only A differs."""
        reset, context = tokens.reset, tokens.context
        x, z, low_dt, B, C = self._scan_inputs(xz, context, reset)

        def each(t: Tensor) -> Tensor:
            return t.expand(len(active), *t.shape)

        C, D, bias = each(C), self.D.expand(len(active), -1), self.dt_bias.expand(len(active), -1)
        if factors is not None:
            C, D = C * factors[:, None, None, None].to(C.dtype), D * factors[:, None]
        mean = self.fuse == "mean" and factors is None
        if context is not None:
            reverse = [self.paths[i][1] for i in active]
            dt_proj, A_log = self.dt_proj.expand(len(active), -1, -1), self.A_log[: len(active)]
            s, _ = scan_over(context, each(x), each(low_dt), dt_proj, A_log, each(B), C, D, bias, reverse)
            y = s.sum(dim=0) * F.silu(z) if self._gated else s.sum(dim=0)
            return y / len(active) if mean else y
        A, dt = -torch.exp(self.A_log.float()), self._wide_dt(low_dt)
        gate = z if self._gated else None
        if len(active) == 1:
            return selective_scan(x, dt, A[0], B, C[0], D[0], gate, self.dt_bias[0], reset=reset)
        fuse: Literal["mean", "sum"] = "mean" if mean else "sum"
        y = bidirectional_scan(each(x), each(dt), A, each(B), C, D, gate, bias, fuse=fuse, reset=reset)
        assert isinstance(y, Tensor)
        return y

    def _probed(self, xz: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        reverse = self.paths[0][1]
        x, _, low_dt, B, C = self._scan_inputs(xz, context, reverse=reverse and not self.one_set)
        dt = self._wide_dt(low_dt)
        if context is None:
            A, bias = -torch.exp(self.A_log[0].float()), self.dt_bias[0]
            _, state = selective_scan_with_state(x, dt, A, B, C, self.D[0], dt_bias=bias, reverse=reverse)
        else:
            dt_proj, A_log, D, bias = (t[:1] for t in (self.dt_proj, self.A_log, self.D, self.dt_bias))
            x, low_dt, B, C = (t[None] for t in (x, low_dt, B, C))
            _, state = scan_over(context, x, low_dt, dt_proj, A_log, B, C, D, bias, [reverse])
        return F.softplus(dt.float() + self.dt_bias[0]), state


class Attention(nn.Module):
    """Multi-head softmax attention (arXiv:1706.03762), unmasked; tokens of packed images attend within their image."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = OutProj(d, d, summands=len(config.layers))
        self.layer_scale = new_layer_scale(config, d)

    def init_weights(self) -> None:
        init_layer_scale(self.layer_scale, self.config)

    def forward(
        self, u: Tensor, tokens: Tokens, backward: Factor = 1.0, recompute: bool = False, probe: Probe | None = None
    ) -> Tensor:
        """Takes the arguments of `Mamba.forward`; attention has no backward path and no scan to apply them to."""
        b, length, d = u.shape
        heads = self.qkv(u).view(b, length, 3, d // self.config.d_head, self.config.d_head)
        if tokens.stretch is not None:
            everywhere = tokens.stretch.everywhere(heads[:, :, 1:].flatten(2)).unflatten(2, (2, *heads.shape[3:]))
            q, (k, v) = heads[:, :, 0].transpose(1, 2), everywhere.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=tokens.mask())
        out = self.out_proj(y.transpose(1, 2).reshape(b, length, d))
        return layer_scaled(out, self.layer_scale)
