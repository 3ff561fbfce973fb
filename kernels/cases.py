"""Shapes, inputs and tolerances for tests and benchmarks.

Axes: k directions, b images, l tokens, e inner channels, n states per channel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest allowed error, relative to the tensor's largest value. fp32: sums over up to 1000 tokens in another order.
# 16-bit types: two roundings of the result (2^-8 and 2^-11 each); the inputs are the same.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# (b, l, e, n): one token, just under a multiple of the chunk, the tokens of a 224-pixel image, a long sequence; odd
# widths
ODD_SHAPES = [(2, 1, 24, 4), (2, 63, 80, 8), (1, 197, 96, 16), (1, 1000, 24, 16)]

# (b, l, e, n) that benchmarks measure: Vim-B at 224 pixels, Vim-Ti at 1248 pixels
BENCH_SHAPES = [(64, 197, 768, 16), (4, 6084, 384, 16)]

# inner widths of the presets, for compiling ahead of time
PRESET_WIDTHS = {"vim_tiny": 384, "vim_small": 768, "vim_base": 1536}


@dataclass(frozen=True)
class ScanCase:
    """The tensors of one scan, of `k` directions, as the public functions take them (k = 1: without that axis)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor
    initial_state: Tensor
    reset: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors that get a gradient, in the order of the fields."""
        return [self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial_state]


def scan_case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    directions: int = 1,
    seed: int = 0,
) -> ScanCase:
    """Random inputs like those of a trained mixer: steps from 1e-3 to 1, A from -1 to -n, a border every 50 tokens."""
    b, length, e, n = shape
    k = directions
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    activation = {
        "x": draw(k, b, length, e),
        "dt": draw(k, b, length, e),
        "B": draw(k, b, length, n),
        "C": draw(k, b, length, n),
        "z": draw(1, b, length, e),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameter = {
        "A": -torch.arange(1, n + 1, dtype=torch.float64).expand(k, e, n) * F.softplus(draw(k, e, n) + 1),
        "D": draw(k, e),
        "dt_bias": draw(k, e) - 3,
        "initial_state": draw(k, b, e, n),
    }
    tensors = {name: t.to(dtype) for name, t in activation.items()}
    tensors |= {name: t.to(wide) for name, t in parameter.items()}
    tensors["z"] = tensors["z"].squeeze(0)
    if k == 1:
        tensors = {name: t if name == "z" else t.squeeze(0) for name, t in tensors.items()}
    reset = torch.rand(b, length, generator=g) < 1 / 50
    return ScanCase(reset=reset.to(device), **{name: t.to(device).contiguous() for name, t in tensors.items()})
