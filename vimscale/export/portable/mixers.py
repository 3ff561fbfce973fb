"""The token mixers of a Vision Mamba in plain torch: scans and attention.

Axes: k paths of a layer, b images, l tokens (class tokens and registers included), d model width, e inner width, n
states of a channel; h heads, p channels of a head, c chunks of q tokens.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .orders import Layer, Orders, paths_of

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""y (b, l, e) of u and dt (b, l, e), A (e, n), B and C (b, l, n), and whether it runs from the last token to the first:
h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t. Everything is fp32, and dt is positive.
"""


class Kernels(NamedTuple):
    """vimscale's functions of these names, for those who have it."""

    bimamba_inner: Callable[..., Tensor]
    ssd_scan: Callable[..., Tensor]
    bidirectional_ssd: Callable[..., Tensor]


def kernels() -> Kernels | None:
    """Return vimscale's kernels if it is installed: they are several times faster than plain torch, in both directions.
    Set `inner` of an `Encoder` to None to do without.
    """
    try:
        from vimscale.ops import bidirectional_ssd, bimamba_inner, ssd_scan
    except ImportError:
        return None
    return Kernels(bimamba_inner, ssd_scan, bidirectional_ssd)


_CHUNK, _DENSE = 64, 256
"""Tokens that a scan takes at a time; a longest sequence of `ssd` that is one chunk."""


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """The selective scan (arXiv:2312.00752) as a loop over tokens: see `Scan`."""
    starts = range(0, u.shape[1], _CHUNK)
    h = u.new_zeros(u.shape[0], *A.shape)
    outs = []
    for start in reversed(starts) if reverse else starts:
        at = slice(start, start + _CHUNK)
        decay = (dt[:, at, :, None] * A).exp()  # (b, chunk, e, n)
        enters = (dt[:, at] * u[:, at])[..., None] * B[:, at, None]
        steps = list(zip(decay.unbind(1), enters.unbind(1), strict=True))
        states = []
        for by, new in reversed(steps) if reverse else steps:
            h = torch.addcmul(new, by, h)  # (b, e, n)
            states.append(h)
        outs.append((torch.stack(states[::-1] if reverse else states, 1) @ C[:, at, :, None]).squeeze(-1))
    return torch.cat(outs[::-1] if reverse else outs, 1)


def ssd(x: Tensor, B: Tensor, C: Tensor, ways: list[tuple[Tensor, Tensor, bool]]) -> Tensor:
    """The scans of Mamba-2 (arXiv:2405.21060) as products: h_t = exp(log_t) h_{t-1} + step_t x_t B_t^T, y_t = h_t C_t.

    x (b, l, h, p), B and C (b, l, n), and for each scan its steps and logarithms of decays (b, l, h), and whether it
    runs from the last token to the first. Returns the sum of the scans' y (b, l, h, p). Everything is fp32.
    """
    length = x.shape[1]
    is_open = type(length) is not int
    dense = not is_open and length <= _DENSE
    q = length if dense else _CHUNK
    # tracers that leave the length open take a size of 1 for a constant: three chunks at least, for some are cut off
    more = (length // q + 3) * q - length if is_open else -length % q

    def chunks(t: Tensor) -> Tensor:
        """(b, l, m, ...) as (b, m, c, q, ...)."""
        if not dense:  # tokens without a step change nothing
            t = torch.cat([t, t.new_zeros(t.shape[0], more, *t.shape[2:])], 1)
        return t.unflatten(1, (-1, q)).movedim(3, 1)

    x, B, C = chunks(x), chunks(B.unsqueeze(2)), chunks(C.unsqueeze(2))
    weights: Tensor | float = 0.0
    passed: Tensor | float = 0.0
    for step, log, reverse in ways:
        step, log = chunks(step), chunks(log)
        decay = _decays(log, reverse)  # (b, h, c, q, q)
        weights = weights + decay * step.unsqueeze(-2)
        if not dense:
            first, last = (q - 1, 0) if reverse else (0, q - 1)
            entering = decay[..., first] * log[..., first, None].exp()  # (b, h, c, q)
            leaving = decay[..., last, :] * step
            own = (x * leaving.unsqueeze(-1)).mT @ B  # (b, h, c, p, n)
            across = _decays(log.sum(-1), reverse)  # (b, h, c, c)
            across = F.pad(across[..., 1:, :], (0, 0, 0, 1)) if reverse else F.pad(across[..., :-1, :], (0, 0, 1, 0))
            before = (across @ own.flatten(3)).unflatten(-1, own.shape[3:])
            passed = passed + (C @ before.mT) * entering.unsqueeze(-1)
    y = ((C @ B.mT) * weights) @ x + passed  # (b, h, c, q, p)
    return y.movedim(1, 3).flatten(1, 2)[:, :length]


def _decays(log: Tensor, reverse: bool) -> Tensor:
    """From logarithms (..., l) the decay from each token s to each token t that a scan visits later (..., t, s), and 1
    on the diagonal: the exponential of a sum of the tokens between them, never of a difference of sums.
    """
    if reverse:
        log = F.pad(log[..., :-1], (1, 0))
    later = log.unsqueeze(-1).expand(*log.shape, log.shape[-1]).tril(-1)
    decay = later.cumsum(-2).exp().tril()
    return decay.mT if reverse else decay


# ---- layers


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x (..., d) if there is a bias, else RMSNorm, in fp32."""
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return normed if bias is None else normed + bias.float()


class Scans(nn.Module):
    """u (b, l, d) -> (b, l, d). Each path scans one input projection with its own parameters, slices of tensors with a
    leading axis k; the gate silu(z) is common to all. What a scan is, a subclass defines.
    """

    conv_weight: nn.Parameter
    conv_bias: nn.Parameter
    always_normed = False

    def __init__(self, config: dict[str, Any], layer: Layer, d: int, second: bool):
        super().__init__()
        self.config = config
        self.paths = paths_of(layer, second)
        self.order = self.paths[0][0]
        kept = layer[0] in ("bwd", "ssd_bwd")  # its only path cannot be dropped
        self.optional = [reverse and not kept for _, reverse in self.paths]
        """Whether the factor on backward paths applies to each path."""
        self.in_proj = nn.Linear(d, self._add_parameters(layer, d), bias=False)
        e = config["expand"] * d
        self.fuse = config["fuse"] if len(self.paths) > 1 else "sum"
        width = e * (len(self.paths) if self.fuse == "concat" else 1)
        self.fuse_logits = nn.Parameter(torch.empty(len(self.paths), e)) if self.fuse == "gate" else None
        gate = config["backward_gate"] and any(self.optional)
        self.backward_gate = nn.Parameter(torch.empty(1)) if gate else None
        normed = config["ssm_norm"] or self.always_normed
        self.ssm_norm = nn.Parameter(torch.empty(width)) if normed else None
        self.ssm_norm_bias = nn.Parameter(torch.empty(width)) if config["ssm_norm"] == "layer" else None
        self.out_proj = nn.Linear(width, d, bias=False)
        self.layer_scale = _layer_scale(config, d)

    def _add_parameters(self, layer: Layer, d: int) -> int:
        """Add the parameters of the paths, and return the width of the input projection."""
        raise NotImplementedError

    def _mixed(
        self, xz: Tensor, active: list[int], orders: Orders, backward: float, scan: Scan, inner: Kernels | None
    ) -> Tensor:
        """Scan the active paths, and combine, gate and normalize them (b, l, e), or (b, l, k e)."""
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the parameters of the paths as vimscale does, and those that paths have in common."""
        for ones in (self.ssm_norm, self.backward_gate):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.ssm_norm_bias, self.fuse_logits):
            if zeros is not None:
                nn.init.zeros_(zeros)

    def forward(self, u: Tensor, orders: Orders, backward: float, scan: Scan, inner: Kernels | None) -> Tensor:
        """`backward`: factor on the backward paths; at 0 they are not computed."""
        permute, restore = orders.of(self.order)
        xz = self.in_proj(permute(u))
        active = [i for i, optional in enumerate(self.optional) if backward or not optional]
        active = active or list(range(len(self.paths)))
        y = self._mixed(xz, active, orders, backward, scan, inner)
        return _layer_scaled(restore(self.out_proj(y)), self.layer_scale)

    def _convolved(self, x: Tensor, own: int, reverse: bool) -> Tensor:
        """Convolve x (b, l, e) causally, or anti-causally, per channel; then SiLU. In x's dtype."""
        return F.silu(self._summed(x, own, reverse)).to(x.dtype)

    def _summed(self, x: Tensor, own: int, reverse: bool) -> Tensor:
        """The convolution alone, in fp32."""
        weight, taps = self.conv_weight[own].float(), self.conv_weight.shape[-1]
        padded = F.pad(x.float(), (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
        y = self.conv_bias[own].float()
        for j in range(taps):
            start = taps - 1 - j if reverse else j
            y = y + weight[:, j] * padded[:, start : start + x.shape[1]]
        return y

    def _factor(self, i: int, backward: float) -> Tensor | float:
        factor: Tensor | float = 1 / len(self.paths) if self.fuse == "mean" else 1.0
        if self.optional[i]:
            factor = factor * backward
            if self.backward_gate is not None:
                factor = factor * self.backward_gate.float()
        return factor

    def _combined(self, ys: dict[int, Tensor]) -> Tensor:
        """Combine the outputs (b, l, e) of the active paths to (b, l, e), or (b, l, k e) if they are concatenated."""
        if self.fuse == "concat":
            zeros = torch.zeros_like(next(iter(ys.values())))
            return torch.cat([ys.get(i, zeros) for i in range(len(self.paths))], dim=-1)
        if self.fuse_logits is not None:
            weights = self.fuse_logits.float().softmax(dim=0)
            ys = {i: weights[i] * y for i, y in ys.items()}
        first, *others = ys.values()
        for y in others:
            first = first + y
        return first

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate y (b, l, e or k e) by z (b, l, e). An RMSNorm follows the gate, a LayerNorm precedes it."""
        if self.ssm_norm_bias is not None:
            y = self._ssm_normalized(y)
        y = (y.unflatten(-1, (-1, z.shape[-1])) * F.silu(z.float()).unsqueeze(-2)).flatten(-2)
        if self.ssm_norm_bias is None:
            y = self._ssm_normalized(y)
        return y.to(z.dtype)

    def _ssm_normalized(self, y: Tensor) -> Tensor:
        eps = self.config["norm_eps"]
        return y if self.ssm_norm is None else normalized(y, self.ssm_norm, self.ssm_norm_bias, eps)


class Mamba(Scans):
    """Each path convolves and scans (Mamba-1). A layer of kind `shared` has one set of parameters and one convolution,
    forward, for both directions; only A differs.
    """

    def _add_parameters(self, layer: Layer, d: int) -> int:
        config = self.config
        e, n, r = config["expand"] * d, config["d_state"], -(-d // 16)
        self.shared = layer[0] == "shared"
        k = 1 if self.shared else len(self.paths)
        self.conv_weight = nn.Parameter(torch.empty(k, e, config["d_conv"]))
        self.conv_bias = nn.Parameter(torch.empty(k, e))
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, e))  # to dt, B and C
        self.dt_proj = nn.Parameter(torch.empty(k, e, r))
        self.dt_bias = nn.Parameter(torch.empty(k, e))
        self.A_log = nn.Parameter(torch.empty(len(self.paths), e, n))
        self.D = nn.Parameter(torch.empty(k, e))
        return 2 * e

    @torch.no_grad()
    def init_weights(self) -> None:
        taps = self.conv_weight.shape[-1]
        fans = ((self.conv_weight, taps), (self.conv_bias, taps))
        for weight, fan_in in (*fans, (self.x_proj, self.x_proj.shape[-1]), (self.dt_proj, self.dt_proj.shape[-1])):
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
        _init_steps(self.dt_bias)
        if self.config["init"] == "published" and not self.shared:
            self.dt_bias[[i for i, optional in enumerate(self.optional) if optional]] = 0
        self.A_log.copy_(torch.arange(1, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        super().init_weights()

    def _mixed(
        self, xz: Tensor, active: list[int], orders: Orders, backward: float, scan: Scan, inner: Kernels | None
    ) -> Tensor:
        if inner is not None and not self.shared:
            return self._fused(xz, active, orders, backward, inner)
        return self._composed(xz, active, orders, backward, scan)

    def _composed(self, xz: Tensor, active: list[int], orders: Orders, backward: float, scan: Scan) -> Tensor:
        x, z = xz.chunk(2, dim=-1)
        ys: dict[int, Tensor] = {}
        for i in active:
            order, reverse = self.paths[i]
            permute, restore = orders.of("row" if order == self.order else order)
            ys[i] = restore(self._path(permute(x), i, reverse, scan)) * self._factor(i, backward)  # (b, l, e)
        return self._gated(self._combined(ys), z)

    def _path(self, x: Tensor, i: int, reverse: bool, scan: Scan) -> Tensor:
        """Convolve and scan x (b, l, e) by path i; fp32."""
        own = 0 if self.shared else i
        x = self._convolved(x, own, reverse and not self.shared)
        n = self.A_log.shape[-1]
        projected = F.linear(x, self.x_proj[own].to(x.dtype))
        low_dt, B, C = projected.split([projected.shape[-1] - 2 * n, n, n], dim=-1)
        dt = F.linear(low_dt, self.dt_proj[own].to(x.dtype)).float() + self.dt_bias[own].float()
        u = x.float()
        A = -self.A_log[i].float().exp()
        return scan(u, F.softplus(dt), A, B.float(), C.float(), reverse) + self.D[own].float() * u

    def _fused(self, xz: Tensor, active: list[int], orders: Orders, backward: float, inner: Kernels) -> Tensor:
        """As `_composed`, with an op for adjacent paths of one order: those that are added with equal factors are one
        call.
        """
        z = xz.chunk(2, dim=-1)[1]
        added = self.fuse in ("mean", "sum") and self.backward_gate is None and (backward == 1 or len(active) == 1)
        one = [[i] for i in active]
        groups = [list(group) for _, group in groupby(active, key=lambda i: self.paths[i][0])] if added else one
        ys: dict[int, Tensor] = {}
        for some in groups:
            order = self.paths[some[0]][0]
            permute, restore = orders.of("row" if order == self.order else order)
            own = (getattr(self, name)[some[0] : some[-1] + 1] for name in _OF_PATHS)
            reverse = [self.paths[i][1] for i in some]
            y = inner.bimamba_inner(permute(xz), *own, reverse=reverse, fuse="sum", gated=False, recompute=False)
            ys[some[0]] = restore(y).float() * self._factor(some[0], backward)
        return self._gated(self._combined(ys), z)


_OF_PATHS = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
"""Parameters of a `Mamba` that have a leading axis of paths."""


class Ssd(Scans):
    """Mamba-2's scan: z, x, B, C and dt come from the input projection. `ssd_form` says what directions share:
    separate, the projection; shared, also convolution, x, B and C; quasiseparable (arXiv:2407.09941), also A, with a
    convolution that looks both ways, outputs moved on by one token, and a projection of x on the diagonal.
    """

    always_normed = True

    def _add_parameters(self, layer: Layer, d: int) -> int:
        config, k = self.config, len(self.paths)
        e, n = config["expand"] * d, config["ssd_state"]
        h = e // config["d_head"]
        self.form, self.heads, self.states = config["ssd_form"], h, n
        two = 2 if self.form == "quasiseparable" else 1
        self.widths = [e, e + 2 * n * two, h * two]
        sets = 1 if self.form == "shared" else k
        scans = 1 if self.form == "quasiseparable" else k
        self.conv_weight = nn.Parameter(torch.empty(sets, self.widths[1], config["d_conv"]))
        self.conv_bias = nn.Parameter(torch.empty(sets, self.widths[1]))
        self.dt_bias = nn.Parameter(torch.empty(scans, h))
        self.A_log = nn.Parameter(torch.empty(scans, h))
        self.D = nn.Parameter(torch.empty(scans, h))
        self.D_proj = nn.Linear(e, h, bias=False) if self.form == "quasiseparable" else None
        return sum(self.widths)

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = self.conv_weight.shape[-1] ** -0.5
        for weight in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(weight, -bound, bound)
        _init_steps(self.dt_bias)
        self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        super().init_weights()

    def _mixed(
        self, xz: Tensor, active: list[int], orders: Orders, backward: float, scan: Scan, inner: Kernels | None
    ) -> Tensor:
        z, xbc, dt = xz.split(self.widths, dim=-1)
        factors = [self._factor(i, backward) for i in active]
        if self.form == "quasiseparable":
            return self._gated(self._quasiseparable(xbc, dt, active, factors, inner), z)
        sizes = [self.widths[0], self.states, self.states]
        if self.form == "shared":
            one = self._convolved(xbc, 0, False).split(sizes, dim=-1)
            if self.fuse in ("mean", "sum"):
                return self._gated(self._scanned(one, dt, active, factors, inner), z)
            read = [one] * len(active)
        else:
            read = [self._convolved(xbc, i, self.paths[i][1]).split(sizes, dim=-1) for i in active]
        each = zip(active, factors, read, strict=True)
        return self._gated(self._combined({i: self._scanned(xBC, dt, [i], [f], inner) for i, f, xBC in each}), z)

    def _scanned(
        self,
        xBC: Sequence[Tensor],
        dt: Tensor,
        active: list[int],
        factors: list[Tensor | float],
        inner: Kernels | None,
    ) -> Tensor:
        """Return the sum of adjacent paths that scan one (x, B, C), each times its factor: fp32 (b, l, e)."""
        one_set = self.form == "quasiseparable"  # with its own diagonal
        at = slice(1) if one_set else slice(active[0], active[-1] + 1)
        dt_bias, A_log, D = self.dt_bias[at], self.A_log[at], self.D[at]
        D = torch.zeros_like(D) if one_set else D
        x, B, C = xBC
        x, reverse = x.unflatten(-1, (self.heads, -1)), [self.paths[i][1] for i in active]
        ys: list[Tensor] = []
        if inner is None:
            x = x.float()
            steps = [F.softplus(dt.float() + bias.float()) for bias in dt_bias]
            logs = [step * -a.float().exp() for step, a in zip(steps, A_log, strict=True)]
            ways = [(step * f, log, r) for step, f, log, r in zip(steps, factors, logs, reverse, strict=True)]
            skips = [skip.float() * f for skip, f in zip(D, factors, strict=True)]
            ys = [ssd(x, B.float(), C.float(), ways), *(skip.unsqueeze(-1) * x for skip in skips)]
        elif len(active) == 2 and self.backward_gate is None and factors[0] == factors[1]:
            both = dt.expand(2, *dt.shape)
            ys = [inner.bidirectional_ssd(x, both, A_log, B, C, D, None, dt_bias).float() * factors[0]]
        else:
            for a, skip, bias, f, r in zip(A_log, D, dt_bias, factors, reverse, strict=True):
                ys.append(inner.ssd_scan(x, dt, a, B, C, skip, None, bias, reverse=r).float() * f)
        first, *others = ys
        for y in others:
            first = first + y
        return first.flatten(2)

    def _quasiseparable(
        self, xbc: Tensor, dt: Tensor, active: list[int], factors: list[Tensor | float], inner: Kernels | None
    ) -> Tensor:
        e, n, h = self.widths[0], self.states, self.heads
        both = F.silu(self._summed(xbc, 0, False) + self._summed(xbc, 1, True)).to(xbc.dtype)
        x, *BC = both.split([e, n, n, n, n], dim=-1)
        assert self.D_proj is not None
        skip = self.D_proj(x).float() + self.D[0].float()
        y = (x.float().unflatten(-1, (h, -1)) * skip.unsqueeze(-1)).flatten(2)
        for i, factor in zip(active, factors, strict=True):
            own = self._scanned([x, *BC[2 * i : 2 * i + 2]], dt[..., i * h : (i + 1) * h], [i], [factor], inner)
            # outputs move on by one token in scan order
            y = y + (F.pad(own[:, 1:], (0, 0, 0, 1)) if self.paths[i][1] else F.pad(own[:, :-1], (0, 0, 1, 0)))
        return y


def _init_steps(dt_bias: Tensor) -> None:
    """Make softplus(dt_bias) log-uniform in [1e-3, 1e-1] (arXiv:2312.00752, appendix E)."""
    step = torch.exp(torch.rand_like(dt_bias) * math.log(100) + math.log(1e-3))
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


class Attention(nn.Module):
    """Multi-head softmax attention, unmasked."""

    def __init__(self, config: dict[str, Any], d: int):
        super().__init__()
        self.width = config["d_head"]
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        self.layer_scale = _layer_scale(config, d)

    def forward(self, u: Tensor, *_: Any) -> Tensor:
        q, k, v = self.qkv(u).unflatten(-1, (3, -1, self.width)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return _layer_scaled(self.out_proj(y.transpose(1, 2).flatten(2)), self.layer_scale)


def _layer_scale(config: dict[str, Any], d: int) -> nn.Parameter | None:
    return None if config["layer_scale"] is None else nn.Parameter(torch.empty(d))


def _layer_scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor.to(x.dtype)
