"""The published Vision Mambas as plain functions of their own state dicts and constructor arguments (hustvl/Vim,
wangf3014/Mamba-Reg, OliverRensu/ARM fine-tuned). Uses nothing from vimscale: our models are tested against it, and
benchmarks run it as "the original architecture".

Axes, channels first inside a mixer as published: b images, l tokens, d model width, e inner width, n state, r dt rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Scan = Callable[..., Tensor]
"""(u, dt (b, e, l), A (e, n), B, C (b, n, l), D (e), z=, delta_bias=, delta_softplus=True) -> (b, e, l): the signature
of mamba-ssm's selective_scan_fn and selective_scan_ref.
"""


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, z: Tensor, delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:  # fmt: skip
    """The scan, token by token."""
    assert delta_softplus
    step = F.softplus(dt + delta_bias[:, None])
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[-1]):
        decay = torch.exp(step[:, :, t, None] * A)
        h = decay * h + (step[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, dim=-1) * F.silu(z)


def forward(
    state: State,
    arguments: dict[str, Any],
    images: Tensor,
    *,
    scan: Scan = scan,
    cls_position: int | None = None,
    token_order: Tensor | None = None,
    flipped: bool = False,
) -> Tensor:
    """The output of the published model for images (b, c, h, w) in evaluation mode. `arguments` are all arguments of
    its constructor. `cls_position` is where if_random_cls_token_position put the class token, `token_order` (l) what
    if_random_token_rank drew, and `flipped` whether flip_img_sequences_ratio made it flip the sequence.
    """
    if "num_cls_tokens" in arguments:
        return _mambar(state, arguments, images, scan)
    if arguments["bimamba_type"] == "v3":
        return _arm(state, arguments, images, scan)
    return _vim(state, arguments, images, scan, cls_position, token_order, flipped)


# ---- the three models


def _vim(
    state: State,
    arguments: dict[str, Any],
    images: Tensor,
    scan: Scan,
    cls_position: int | None,
    token_order: Tensor | None,
    flipped: bool,
) -> Tensor:
    x = _patches(state, images, arguments["stride"])
    m = x.shape[1]
    positions: list[int] = []
    if arguments["if_cls_token"] and arguments["use_double_cls_token"]:
        head, tail = (state[f"cls_token_{end}"].expand(len(x), -1, -1) for end in ("head", "tail"))
        x, positions = torch.cat([head, x, tail], dim=1), [0, m + 1]
    elif arguments["if_cls_token"]:
        positions = [m // 2 if arguments["use_middle_cls_token"] else cls_position or 0]
        x = _inserted(x, state["cls_token"], positions[0])
    if arguments["if_abs_pos_embed"]:
        x = x + state["pos_embed"]
    if token_order is not None:
        x = x[:, token_order]
        positions = [token_order.tolist().index(position) for position in positions]
    if flipped:
        x = x.flip(1)
    kind = "v1" if arguments["if_bimamba"] else arguments["bimamba_type"]
    mixer = _Mixer(state, kind, bool(arguments["if_divide_out"]), arguments["ssm_cfg"] or {}, scan)

    def block(i: int, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + hidden
        return mixer(i, _norm(state, f"layers.{i}.norm", residual, arguments)), residual

    def rotated(hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if arguments["if_rope"]:
            hidden = _rope(state, hidden)
            if residual is not None and arguments["if_rope_residual"]:
                residual = _rope(state, residual)
        return hidden, residual

    hidden, residual = x, None
    if not arguments["if_bidirectional"]:
        for i in range(arguments["depth"]):
            if flipped and arguments["if_rope"]:
                hidden, residual = rotated(hidden.flip(1), None if residual is None else residual.flip(1))
                hidden, residual = hidden.flip(1), None if residual is None else residual.flip(1)
            else:
                hidden, residual = rotated(hidden, residual)
            hidden, residual = block(i, hidden, residual)
    else:
        half = 2 if arguments["if_bidirectional"] == "halved" else 1
        for i in range(0, arguments["depth"] - 1, 2):
            hidden, residual = rotated(hidden, residual)
            one, one_residual = block(i, hidden, residual)
            two, two_residual = block(i + 1, hidden.flip(1), None if residual is None else residual.flip(1))
            hidden, residual = (one + two.flip(1)) / half, (one_residual + two_residual.flip(1)) / half
    x = _norm(state, "norm_f", hidden if residual is None else residual + hidden, arguments)

    if positions:
        x = sum(x[:, position] for position in positions) / len(positions)
    elif arguments["final_pool_type"] == "none":
        x = x[:, -1]
    elif arguments["final_pool_type"] == "mean":
        x = x.mean(dim=1)
    logits = _head(state, x, arguments)
    return logits.max(dim=1).values if arguments["final_pool_type"] == "max" else logits


def _mambar(state: State, arguments: dict[str, Any], images: Tensor, scan: Scan) -> Tensor:
    x = _patches(state, images, arguments["patch_size"]) + state["pos_embed"]
    registers = (state["cls_token"] + state["pos_embed_cls"]).expand(len(x), -1, -1)
    m = registers.shape[1]
    gap = x.shape[1] // (m + 1)
    pieces = []
    for i in range(m):
        pieces += [x[:, i * gap : (i + 1) * gap], registers[:, i : i + 1]]
    hidden = torch.cat([*pieces, x[:, m * gap :]], dim=1)
    positions = [(i + 1) * gap + i for i in range(m)]
    mixer = _Mixer(state, "v2", True, arguments["ssm_cfg"] or {}, scan)
    residual = torch.zeros_like(hidden)
    for i in range(arguments["depth"]):
        residual = residual + hidden
        hidden = mixer(i, _norm(state, f"layers.{i}.norm", residual, arguments))
    x = _norm(state, "norm_f", residual + hidden, arguments)[:, positions]
    if arguments["cls_reduce"] > 1:
        x = _norm(state, "norm_neck", F.linear(x, state["neck.weight"]).flatten(1), arguments)
    return _head(state, x.flatten(1), arguments)


def _arm(state: State, arguments: dict[str, Any], images: Tensor, scan: Scan) -> Tensor:
    x = _patches(state, images, arguments["stride"])
    middle = x.shape[1] // 2
    x = _inserted(x, state["cls_token"], middle) + state["pos_embed"]
    mixer = _Mixer(state, "v3", True, arguments["ssm_cfg"] or {}, scan)
    layer_norm = {"rms_norm": False, "norm_epsilon": 1e-5}
    for i in range(arguments["depth"]):
        x = x + mixer(i, _norm(state, f"layers.{i}.norm1", x, layer_norm))
        u = _norm(state, f"layers.{i}.norm2", x, layer_norm)
        w = {n: (state[f"layers.{i}.mlp.w{n}.weight"], state[f"layers.{i}.mlp.w{n}.bias"]) for n in (1, 2, 3)}
        x = x + F.linear(F.silu(F.linear(u, *w[1])) * F.linear(u, *w[2]), *w[3])
    x = _norm(state, "norm_f", x, layer_norm)
    if arguments["global_pool"]:
        return _head(state, (x[:, :middle].mean(dim=1) + x[:, middle + 1 :].mean(dim=1)) / 2, arguments)
    return _head(state, x[:, middle], arguments)


# ---- their parts


class _Mixer:
    """Layer i's mixer: u (b, l, d) -> (b, l, d)."""

    def __init__(self, state: State, kind: str, divided: bool, ssm: dict[str, Any], scan: Scan):
        self.state, self.kind, self.divided, self.scan = state, kind, divided, scan
        self.slow = not ssm.get("use_fast_path", True)

    def __call__(self, i: int, u: Tensor) -> Tensor:
        at = f"layers.{i}.mixer."
        xz = F.linear(u, self.state[at + "in_proj.weight"]).transpose(1, 2)  # (b, 2e, l)
        if self.kind == "none" or self.slow:
            y = self._path(at, "", xz)
        elif self.kind == "v1":
            y = self._both_of_v1(at, xz)
        elif self.kind == "v2":
            y = self._path(at, "", xz) + self._path(at, "_b", xz.flip(-1)).flip(-1)
            y = y / 2 if self.divided else y
        else:
            down = _columns(xz)
            y = self._path(at, "", xz) + self._path(at, "_b", xz.flip(-1)).flip(-1)
            over = self._path(at, "_c", down) + self._path(at, "_c_b", down.flip(-1)).flip(-1)
            y = (y + _columns(over)) / 4
        out = F.linear(y.transpose(1, 2), self.state[at + "out_proj.weight"])
        return out * self.state[at + "gamma"] if at + "gamma" in self.state else out

    def _projected(self, at: str, suffix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x after convolution, dt, B, C), all (b, ., l)."""
        state = self.state
        weight = state[f"{at}conv1d{suffix}.weight"]
        taps = weight.shape[-1]
        x = F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight, state[f"{at}conv1d{suffix}.bias"], groups=len(weight)))
        low = torch.einsum("pe,bel->bpl", state[f"{at}x_proj{suffix}.weight"], x)
        to_dt = state[f"{at}dt_proj{suffix}.weight"]
        n = state[f"{at}A_log"].shape[1]
        dt, B, C = low.split([to_dt.shape[1], n, n], dim=1)
        return x, torch.einsum("er,brl->bel", to_dt, dt), B, C

    def _path(self, at: str, suffix: str, xz: Tensor) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        x, dt, B, C = self._projected(at, suffix, x)
        A = -torch.exp(self.state[f"{at}A{suffix}_log"])
        D, bias = self.state[f"{at}D{suffix}"], self.state[f"{at}dt_proj{suffix}.bias"]
        return self.scan(x, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    def _both_of_v1(self, at: str, xz: Tensor) -> Tensor:
        before, z = xz.chunk(2, dim=1)
        inputs = self._projected(at, "", before)
        D, bias = self.state[f"{at}D"], self.state[f"{at}dt_proj.bias"]
        y = 0.0
        for name, back in (("A_log", False), ("A_b_log", True)):
            x, dt, B, C, gate = (t.flip(-1) if back else t for t in (*inputs, z))
            A = -torch.exp(self.state[at + name])
            s = self.scan(x, dt, A, B, C, D, z=gate, delta_bias=bias, delta_softplus=True)
            y = y + (s.flip(-1) if back else s)
        return y


def _columns(x: Tensor) -> Tensor:
    """Transpose the square in x (b, c, l): rows become columns; the class token stays in the middle."""
    middle = x.shape[-1] // 2
    image = torch.cat([x[..., :middle], x[..., middle + 1 :]], dim=-1)
    side = int(image.shape[-1] ** 0.5)
    image = image.unflatten(-1, (side, side)).transpose(-1, -2).flatten(-2)
    return torch.cat([image[..., :middle], x[..., middle : middle + 1], image[..., middle:]], dim=-1)


def _patches(state: State, images: Tensor, stride: int) -> Tensor:
    weight = state["patch_embed.proj.weight"]
    return F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=stride).flatten(2).transpose(1, 2)


def _inserted(x: Tensor, token: Tensor, at: int) -> Tensor:
    return torch.cat([x[:, :at], token.expand(len(x), -1, -1), x[:, at:]], dim=1)


def _norm(state: State, key: str, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    weight, eps = state[f"{key}.weight"], arguments["norm_epsilon"]
    if arguments["rms_norm"]:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
    return F.layer_norm(x, x.shape[-1:], weight, state[f"{key}.bias"], eps)


def _rope(state: State, x: Tensor) -> Tensor:
    if x.shape[1] % 2:
        return torch.cat([x[:, :1], _rope(state, x[:, 1:])], dim=1)
    pairs = x.unflatten(-1, (-1, 2))
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * state["rope.freqs_cos"] + quarter * state["rope.freqs_sin"]


def _head(state: State, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    return F.linear(x, state["head.weight"], state["head.bias"]) if arguments["num_classes"] > 0 else x
