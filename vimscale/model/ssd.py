"""Layers of kind `ssd`: Mamba-2's scan in both directions, with one decay per head (arXiv:2405.21060).

Axes: k paths of a layer, b images, l tokens, d model width, e inner width, h heads, p channels of a head, n states per
channel, w convolution taps.
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.model.mixer import Scans, init_steps
from vimscale.model.schedule import Layer
from vimscale.model.tokens import Tokens
from vimscale.ops import (
    Context,
    bidirectional_conv1d,
    bidirectional_ssd,
    bissd_inner,
    causal_conv1d,
    conv_over,
    ssd_over,
    ssd_scan,
    ssd_scan_with_state,
)

PATH_PARAMETERS_OF: dict[str, tuple[str, ...]] = {
    "separate": ("conv_weight", "conv_bias", "dt_bias", "A_log", "D"),
    "shared": ("dt_bias", "A_log", "D"),
    "quasiseparable": (),
}
"""Parameters that have a leading axis of paths, by `ssd_form`."""


class Ssd(Scans):
    """in_proj gives the gate z, x, B, C and dt. Each path convolves (x, B, C) and scans, as `config.ssd_form` says; an
    RMSNorm follows the gate (or `ssm_norm: layer` precedes it).
    """

    always_normed = True

    def _add_parameters(self, layer: Layer, d: int) -> None:
        config, k = self.config, len(self.paths)
        e, n = config.expand * d, config.ssd_state
        h = e // config.d_head
        self.form = config.ssd_form
        two = 2 if self.form == "quasiseparable" else 1  # sets of B, C and dt
        self.widths = e, e + 2 * n * two, h * two
        """Of z, of x, B and C together, and of dt."""
        self.states, self.heads = n, h
        sets = 1 if self.form == "shared" else k
        scans = 1 if self.form == "quasiseparable" else k
        self.in_proj = nn.Linear(d, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sets, self.widths[1], config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sets, self.widths[1]))
        self.dt_bias = nn.Parameter(torch.empty(scans, h))
        self.A_log = nn.Parameter(torch.empty(scans, h))
        self.D = nn.Parameter(torch.empty(scans, h))
        self.D_proj = nn.Linear(e, h, bias=False) if self.form == "quasiseparable" else None
        self.path_parameters = PATH_PARAMETERS_OF[self.form]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as mamba-ssm's Mamba2: A uniform in [-16, -1], steps log-uniform in [1e-3, 1e-1], D of 1."""
        bound = self.conv_weight.shape[-1] ** -0.5
        for weight in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(weight, -bound, bound)
        init_steps(self.dt_bias)
        self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        self._init_shared()

    def _gate(self, xz: Tensor) -> Tensor:
        return xz[..., : self.widths[0]]

    def _mixed(self, xz: Tensor, active: list[int], factors: Tensor | None, tokens: Tokens, recompute: bool) -> Tensor:
        """As one op, unless paths have factors or orders, are fused otherwise, or ranks share the tokens."""
        plain = self.form != "quasiseparable" and self._gated and self.fuse in ("sum", "mean")
        alike = factors is None and all(order == self.order for order, _ in self.paths)
        if not (plain and alike) or tokens.context is not None:
            return super()._mixed(xz, active, factors, tokens, recompute)
        assert self.ssm_norm is not None, "always_normed"
        reverse = [backwards for _, backwards in self.paths]
        return bissd_inner(
            xz,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.ssm_norm,
            reverse=reverse,
            conv_reverse=reverse if self.form == "separate" else [False],
            fuse="mean" if self.fuse == "mean" else "sum",
            eps=self.config.norm_eps,
            reset=tokens.reset,
            recompute=recompute,
        )

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
        inner = self._quasiseparable if self.form == "quasiseparable" else self._directions
        inner = partial(inner, own=own, group=group, factors=factors, tokens=tokens)
        return checkpoint(inner, xz, use_reentrant=False, preserve_rng_state=False) if recompute else inner(xz)

    def _directions(
        self, zxbcdt: Tensor, *, own: tuple[Tensor, ...], group: list[int], factors: Tensor | None, tokens: Tokens
    ) -> Tensor:
        """Scan each direction with its own convolution, dt bias, A and D, or with one convolution for both."""
        z, xbc, dt = zxbcdt.split(self.widths, dim=-1)
        *conv, dt_bias, A_log, D = own
        weight, bias = conv or (self.conv_weight, self.conv_bias)
        reverse = [self.paths[i][1] for i in group]
        x, B, C = self._split(self._convolved(xbc, weight, bias, reverse if conv else [False], tokens))
        dt = dt.expand(len(group), *dt.shape)
        if factors is not None:
            x, B = (t.expand(len(group), *t.shape[1:]) for t in (x, B))
            C, D = C * factors[:, None, None, None].to(C.dtype), D * factors[:, None]
        fuse: Literal["mean", "sum"] = "mean" if self.fuse == "mean" and factors is None else "sum"
        gate = self._heads(z) if self._gated and tokens.context is None else None
        if tokens.context is not None:
            y, _ = ssd_over(tokens.context, x, dt, A_log, B, C, D, dt_bias, reverse)
            y = y / len(group) if fuse == "mean" else y
            y = y * F.silu(self._heads(z)) if self._gated else y
        elif len(group) == 1:
            x, dt, A_log, B, C, D = (t[0] for t in (x, dt, A_log, B, C, D))
            y = ssd_scan(x, dt, A_log, B, C, D, gate, dt_bias[0], reverse=reverse[0], reset=tokens.reset)
        else:
            if len(x) == 1:
                x, B, C = x[0], B[0], C[0]
            y = bidirectional_ssd(x, dt, A_log, B, C, D, gate, dt_bias, fuse=fuse, reset=tokens.reset)
        return y.flatten(2)

    def _convolved(self, xbc: Tensor, weight: Tensor, bias: Tensor, reverse: list[bool], tokens: Tokens) -> Tensor:
        """Convolve (x, B, C) once for each direction, and apply SiLU: (k, b, l, e + 2n)."""
        if tokens.context is not None:
            return conv_over(tokens.context, xbc, weight, bias, reverse)
        if len(reverse) == 2:
            return bidirectional_conv1d(xbc, weight, bias, activation="silu", reset=tokens.reset)
        one = causal_conv1d(xbc, weight[0], bias[0], reverse=reverse[0], activation="silu", reset=tokens.reset)
        return one.unsqueeze(0)

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (..., e + 2n) into x (..., h, p), B and C (..., n)."""
        x, B, C = xbc.split([self.widths[0], self.states, self.states], dim=-1)
        return self._heads(x), B, C

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1))

    def _quasiseparable(
        self, zxbcdt: Tensor, *, own: tuple[Tensor, ...], group: list[int], factors: Tensor | None, tokens: Tokens
    ) -> Tensor:
        """Hydra (arXiv:2407.09941): both directions scan one x with one A, each with its own B, C and dt. The matrix
        that mixes the tokens is lower triangular plus upper triangular plus diagonal: outputs move on by one token, and
        a projection of x gives the diagonal. The convolution looks w - 1 tokens ahead and back.
        """
        z, xbc, dt = zxbcdt.split(self.widths, dim=-1)
        ways = bidirectional_conv1d(xbc, self.conv_weight, self.conv_bias, activation=None, reset=tokens.reset)
        e, n, h = self.widths[0], self.states, self.heads
        x, *BC = F.silu(ways.sum(dim=0)).split([e, n, n, n, n], dim=-1)
        heads, zero = self._heads(x), torch.zeros_like(self.D[0])
        every = 1 / len(self.paths) if self.fuse == "mean" and factors is None else 1.0
        total: Tensor | float = 0.0
        for at, i in enumerate(group):
            B, C = BC[2 * i : 2 * i + 2]
            reverse, factor = self.paths[i][1], every if factors is None else factors[at].to(C.dtype)
            dt_bias, A_log = self.dt_bias[0], self.A_log[0]
            step = dt[..., i * h : (i + 1) * h]
            y = ssd_scan(heads, step, A_log, B, C * factor, zero, None, dt_bias, reverse=reverse, reset=tokens.reset)
            total = total + _moved_on(y, tokens.reset, reverse)
        assert self.D_proj is not None
        y = total + heads * (self.D_proj(x) + self.D[0].to(x.dtype)).unsqueeze(-1)
        return (y * F.silu(self._heads(z)) if self._gated else y).flatten(2)

    def _probed(self, xz: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        _, xbc, dt = xz.split(self.widths, dim=-1)
        reverse, parameters = self.paths[0][1], [t[:1] for t in (self.dt_bias, self.A_log, self.D)]
        dt_bias, A_log, D = parameters
        if self.form == "quasiseparable":
            ways = bidirectional_conv1d(xbc, self.conv_weight, self.conv_bias, activation=None)
            x, B, C = self._split(F.silu(ways.sum(dim=0))[..., : self.widths[0] + 2 * self.states])
            dt = dt[..., : self.heads]
        else:
            weight, bias = self.conv_weight[:1], self.conv_bias[:1]
            if context is None:
                convolved = causal_conv1d(xbc, weight[0], bias[0], reverse=reverse, activation="silu")
            else:
                convolved = conv_over(context, xbc, weight, bias, [reverse])[0]
            x, B, C = self._split(convolved)
        if context is None:
            _, state = ssd_scan_with_state(x, dt, A_log[0], B, C, D[0], dt_bias=dt_bias[0], reverse=reverse)
        else:
            _, state = ssd_over(context, x[None], dt[None], A_log, B[None], C[None], D, dt_bias, [reverse])
        return F.softplus(dt.float() + dt_bias[0]), state


def _moved_on(y: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    """Outputs (b, l, h, p) moved by one token in scan order, with zeros where an image begins."""
    if reverse:
        moved = F.pad(y[:, 1:], (0, 0, 0, 0, 0, 1))
        first = None if reset is None else F.pad(reset[:, 1:], (0, 1))
    else:
        moved, first = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0)), reset
    return moved if first is None else moved.masked_fill(first[..., None, None], 0)
