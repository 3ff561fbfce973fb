"""The original Vim (hustvl/Vim, bimamba v2) on mamba-ssm's and causal-conv1d's kernels, with its fused add and norm.

`benchmarks.published` is the architecture; here its convolution, scan and norm are those that it uses on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import published
from vimscale.model import VisionMamba
from vimscale.model.published.weights import published_config, to_published


class Kernels(NamedTuple):
    scan: published.Scan
    convolution: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (b, e, l), taps (e, w), bias (e)) -> (b, e, l), with SiLU."""
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual, weight, epsilon) -> (RMSNorm of their sum, the sum in fp32)."""


def on_cuda() -> Kernels:
    """Raises:
    ImportError: mamba-ssm or causal-conv1d is not installed.
    """
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return rms_norm_fn(x, weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=epsilon)

    return Kernels(selective_scan_fn, partial(causal_conv1d_fn, activation="silu"), add_norm)


def in_torch() -> Kernels:
    """The same in torch's operations, token by token, to test the rest."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.shape[-1]
        return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=len(weight)))

    def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total = x.float() if residual is None else residual + x
        return F.rms_norm(total, total.shape[-1:], weight, epsilon).to(x.dtype), total

    return Kernels(published.scan, convolution, add_norm)


class _Mixer(published._Mixer):
    """The published mixer with another convolution, and products that give channels first without a copy, as in the
    original code.
    """

    def __init__(self, *arguments: Any, convolution: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__(*arguments)
        self.convolution = convolution

    def __call__(self, i: int, u: Tensor) -> Tensor:
        at = f"layers.{i}.mixer."
        xz = _channels_first(self.state[at + "in_proj.weight"], u.flatten(0, 1), len(u))
        y = self._path(at, "", xz) + self._path(at, "_b", xz.flip(-1)).flip(-1)
        y = y / 2 if self.divided else y
        return F.linear(y.transpose(1, 2), self.state[at + "out_proj.weight"])

    def _projected(self, at: str, suffix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state = self.state
        taps = state[f"{at}conv1d{suffix}.weight"].squeeze(1)
        x = self.convolution(x, taps, state[f"{at}conv1d{suffix}.bias"])
        b, to_dt = len(x), state[f"{at}dt_proj{suffix}.weight"]
        n = state[f"{at}A{suffix}_log"].shape[1]
        low = F.linear(x.transpose(1, 2).flatten(0, 1), state[f"{at}x_proj{suffix}.weight"])  # (b l, r + 2n)
        dt, B, C = low.split([to_dt.shape[1], n, n], dim=1)
        B, C = (t.unflatten(0, (b, -1)).transpose(1, 2).contiguous() for t in (B, C))
        return x, _channels_first(to_dt, dt, b), B, C


def _channels_first(weight: Tensor, rows: Tensor, b: int) -> Tensor:
    """weight (o, i) times rows (b l, i): (b, o, l), whose tokens are next to each other."""
    return (weight @ rows.T).unflatten(1, (b, -1)).transpose(0, 1)


class OnCuda(nn.Module):
    """A model's weights in the original architecture: images (b, 3, h, w) -> logits (b, classes)."""

    def __init__(self, model: VisionMamba, kernels: Kernels | None = None):
        super().__init__()
        self.arguments = published_config(model)
        state = to_published(model)
        self.names, self.weights = list(state), nn.ParameterList(state.values())
        self.kernels = kernels or on_cuda()

    def forward(self, images: Tensor) -> Tensor:
        state, arguments = dict(zip(self.names, self.weights, strict=True)), self.arguments
        x = published._patches(state, images, arguments["stride"])
        middle = x.shape[1] // 2
        x = published._inserted(x, state["cls_token"], middle) + state["pos_embed"]
        settings = ("v2", bool(arguments["if_divide_out"]), arguments["ssm_cfg"] or {}, self.kernels.scan)
        mixer = _Mixer(state, *settings, convolution=self.kernels.convolution)
        residual: Tensor | None = None
        for i in range(arguments["depth"]):
            x, residual = self._add_norm(state[f"layers.{i}.norm.weight"], x, residual)
            x = mixer(i, x)
        x, _ = self._add_norm(state["norm_f.weight"], x, residual)
        return published._head(state, x[:, middle], arguments)

    def _add_norm(self, weight: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.kernels.add_norm(x, residual, weight, self.arguments["norm_epsilon"])
