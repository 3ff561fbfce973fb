"""The layers of a Vision Mamba in plain torch: see modeling.py, which makes a model of them.

Axes: k paths of a layer, b images, l tokens (class tokens and registers included), d model width, e inner width, n
states of a channel.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""y (b, l, e) of u and dt (b, l, e), A (e, n), B and C (b, l, n), and whether it runs from the last token to the first:
h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t. Everything is fp32, and dt is positive.
"""
Inner = Callable[..., Tensor]
"""All paths of a mixer that visit the tokens in one order: vimscale's `bimamba_inner`, for those who have it."""
_CHUNK = 64
"""Tokens whose decays and inputs `scan` holds at a time."""


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


# ---- what a config says


Layer = tuple[str, str]
"""Kind and scan order."""


def parse(directions: str) -> list[Layer]:
    """Return the layers that a text such as "(bi bi@column)*12" names."""
    tokens = re.findall(r"[A-Za-z_]\w*|\d+|[()*@]", directions)[::-1]

    def take() -> list[Layer]:
        layers: list[Layer] = []
        while tokens and tokens[-1] != ")":
            token = tokens.pop()
            if token == "(":
                item = take()
                tokens.pop()
            else:
                item = [(token, _after("@") or "row")]
            layers += item * int(_after("*") or 1)
        return layers

    def _after(mark: str) -> str | None:
        if tokens and tokens[-1] == mark:
            tokens.pop()
            return tokens.pop()
        return None

    return take()


def paths_of(layer: Layer, second: bool) -> list[tuple[str, bool]]:
    """List (order, reverse) of each scan of a layer; `second`: it is the second layer of a pair."""
    kind, order = layer
    if kind == "cross":
        return [("row", False), ("row", True), ("column", False), ("column", True)]
    directions = {"fwd": [False], "bwd": [True], "pair": [second], "bi": [False, True], "shared": [False, True]}
    if kind not in directions:
        raise ValueError(f"this file has no layers of the kind {kind!r}")
    return [(order, reverse) for reverse in directions[kind]]


def seconds_of_pairs(layers: list[Layer]) -> set[int]:
    """Return the indices of the second layers of pairs: every second one of a run of layers of this kind."""
    seconds: set[int] = set()
    for i, (kind, _) in enumerate(layers):
        if kind == "pair" and i and layers[i - 1][0] == "pair" and i - 1 not in seconds:
            seconds.add(i)
    return seconds


# ---- positions of tokens, computed in every forward pass: nothing here is kept on a device or in a state dict


class Slots(NamedTuple):
    """Positions in an image's sequence: class tokens, registers and, in row order, the image's tokens."""

    cls: Tensor
    registers: Tensor
    image: Tensor
    visits: Tensor
    """Which token of (class tokens, registers, image) is at each position (l)."""


def slots_of(config: dict[str, Any], length: int, device: torch.device) -> Slots:
    """Lay out a sequence: the class token is in the middle of the `length` tokens of the image or at an end, and one of
    m registers follows each length // (m + 1) of them; a class token precedes a register.
    """
    m = config["registers"]
    cls = {"none": [], "first": [0], "middle": [length // 2], "both": [0, length]}[config["cls_token"]]
    gap = length // (m + 1)
    keys = [torch.full((1,), 3 * at, device=device) for at in cls]
    keys += [(torch.arange(m, device=device) + 1) * (3 * gap) + 1, torch.arange(length, device=device) * 3 + 2]
    visits = torch.cat(keys).argsort(stable=True)
    positions = visits.argsort()
    prefix = len(cls) + m
    return Slots(positions[: len(cls)], positions[len(cls) : prefix], positions[prefix:], visits)


def scan_order(order: str, window: int, grid: tuple[int, int], slots: Slots) -> Tensor:
    """Return the position of the token that a scan visits as its i-th (l). Extra tokens keep their positions."""
    rows, columns = grid
    cells = torch.arange(rows * columns, device=slots.image.device)
    row, column = cells // columns, cells % columns
    if order == "column":
        key = column * rows + row
    elif order == "snake":
        key = row * columns + torch.where(row % 2 == 1, columns - 1 - column, column)
    else:  # windows, row by row within each
        tile = (row // window) * ((columns + window - 1) // window) + column // window
        key = (tile * window + row % window) * window + column % window
    return torch.arange(slots.visits.shape[0], device=cells.device).scatter(0, slots.image, slots.image[key.argsort()])


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Return sines and cosines of each cell's column and row: fp32 (rows x columns, width)."""
    rows, columns = grid
    cells = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    angles = [at.double()[:, None] * frequencies for at in (cells % columns, cells // columns)]
    return torch.cat([wave for each in angles for wave in (each.sin(), each.cos())], 1).float()


# ---- layers


class Norm(nn.Module):
    """RMSNorm or LayerNorm after a residual add: (x, residual) -> (normed in x's dtype, the sum in fp32)."""

    def __init__(self, config: dict[str, Any], d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if config["norm"] == "layer" else None
        self.eps = config["norm_eps"]

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x.float() if residual is None else residual + x.float()
        return _normalized(total, self.weight, self.bias, self.eps).to(x.dtype), total


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x (..., d) if there is a bias, else RMSNorm, in fp32."""
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return normed if bias is None else normed + bias.float()


class Mamba(nn.Module):
    """u (b, l, d) -> (b, l, d). Each path convolves and scans one input projection with its own parameters, slices of
    tensors with a leading axis k; the gate silu(z) is common to all. A layer of kind `shared` has one set of parameters
    and one convolution, forward, for both directions; only A differs.
    """

    def __init__(self, config: dict[str, Any], layer: Layer, d: int, second: bool):
        super().__init__()
        e, n, r = config["expand"] * d, config["d_state"], -(-d // 16)
        self.config = config
        self.shared = layer[0] == "shared"
        self.paths = paths_of(layer, second)
        self.order = self.paths[0][0]
        kept = layer[0] == "bwd"  # its only path cannot be dropped
        self.optional = [reverse and not kept for _, reverse in self.paths]
        """Whether the factor on backward paths applies to each path."""
        k = 1 if self.shared else len(self.paths)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(k, e, config["d_conv"]))
        self.conv_bias = nn.Parameter(torch.empty(k, e))
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, e))  # to dt, B and C
        self.dt_proj = nn.Parameter(torch.empty(k, e, r))
        self.dt_bias = nn.Parameter(torch.empty(k, e))
        self.A_log = nn.Parameter(torch.empty(len(self.paths), e, n))
        self.D = nn.Parameter(torch.empty(k, e))
        self.fuse = config["fuse"] if len(self.paths) > 1 else "sum"
        width = e * (len(self.paths) if self.fuse == "concat" else 1)
        self.fuse_logits = nn.Parameter(torch.empty(len(self.paths), e)) if self.fuse == "gate" else None
        gate = config["backward_gate"] and any(self.optional)
        self.backward_gate = nn.Parameter(torch.empty(1)) if gate else None
        self.ssm_norm = nn.Parameter(torch.empty(width)) if config["ssm_norm"] else None
        self.ssm_norm_bias = nn.Parameter(torch.empty(width)) if config["ssm_norm"] == "layer" else None
        self.out_proj = nn.Linear(width, d, bias=False)
        self.layer_scale = _layer_scale(config, d)

    def forward(self, u: Tensor, orders: "Orders", backward: float, scan: Scan, inner: Inner | None) -> Tensor:
        """`backward`: factor on the backward paths; at 0 they are not computed."""
        permute, restore = orders.of(self.order)
        xz = self.in_proj(permute(u))
        active = [i for i, optional in enumerate(self.optional) if backward or not optional]
        active = active or list(range(len(self.paths)))
        if inner is not None and not self.shared:
            y = self._fused(xz, active, orders, backward, inner)
        else:
            y = self._composed(xz, active, orders, backward, scan)
        return _layer_scaled(restore(self.out_proj(y)), self.layer_scale)

    def _composed(self, xz: Tensor, active: list[int], orders: "Orders", backward: float, scan: Scan) -> Tensor:
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

    def _convolved(self, x: Tensor, own: int, reverse: bool) -> Tensor:
        """Convolve x (b, l, e) causally, or anti-causally, per channel; then SiLU. In x's dtype."""
        weight, taps = self.conv_weight[own].float(), self.conv_weight.shape[-1]
        padded = F.pad(x.float(), (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
        y = self.conv_bias[own].float()
        for j in range(taps):
            start = taps - 1 - j if reverse else j
            y = y + weight[:, j] * padded[:, start : start + x.shape[1]]
        return F.silu(y).to(x.dtype)

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
        return y if self.ssm_norm is None else _normalized(y, self.ssm_norm, self.ssm_norm_bias, eps)

    def _fused(self, xz: Tensor, active: list[int], orders: "Orders", backward: float, inner: Inner) -> Tensor:
        """As `_composed`, with an op that does all but permute, weigh and join the paths. Its gate is silu(z) too."""
        ys: dict[int, Tensor] = {}
        for i in active:
            order, reverse = self.paths[i]
            permute, restore = orders.of("row" if order == self.order else order)
            own = (getattr(self, name)[i : i + 1] for name in _OF_PATHS)
            y = inner(permute(xz), *own, reverse=[reverse], fuse="sum", gated=False, recompute=False)
            ys[i] = restore(y).float() * self._factor(i, backward)
        return self._gated(self._combined(ys), xz.chunk(2, dim=-1)[1])


_OF_PATHS = ("conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
"""Parameters of a `Mamba` that have a leading axis of paths."""


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
        self.mixer = Attention(config, d) if layer[0] == "attn" else Mamba(config, layer, d, second)
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


class Orders:
    """Permutations of an image's tokens into scan orders, and back."""

    def __init__(self, config: dict[str, Any], grid: tuple[int, int], device: torch.device):
        self.grid = grid
        self.window = config["window"]
        self.slots = slots_of(config, grid[0] * grid[1], device)
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, order: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return (a function that permutes tokens (b, l, d) into `order`, its inverse)."""
        if order == "row":
            return (lambda x: x), (lambda x: x)
        if order not in self._made:
            index = scan_order(order, self.window, self.grid, self.slots)
            self._made[order] = index, index.argsort()
        index, inverse = self._made[order]
        return (lambda x: x.index_select(1, index)), (lambda x: x.index_select(1, inverse))


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
