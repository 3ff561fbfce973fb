"""Depthwise causal convolution over tokens, in either direction, channel last.

Axes: b images, l tokens, e inner channels, k taps.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reverse: bool = False,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """y_t = bias + sum_j weight[:, j] x_{t - (k-1) + j}: token t sees itself and the k - 1 tokens before it.

    x (b, l, e), weight (e, k), bias (e); returns (b, l, e) in x's dtype. With `reverse` it sees the k - 1 tokens
    *after* it, the tap weight[:, k-1] staying on the token itself: the same as flipping, convolving and flipping back.
    """
    if x.ndim != 3 or weight.shape[0] != x.shape[-1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"causal_conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)};"
            " they must be (b, l, e), (e, k), (e)"
        )
    taps = weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        # (b, l, e) -> (b, e, l) for torch's own depthwise convolution, one-sided padding for the direction
        signal = F.pad(x.to(wide).transpose(1, 2), (0, taps - 1) if reverse else (taps - 1, 0))
        kernel = weight.flip(1) if reverse else weight
        y = F.conv1d(signal, kernel.to(wide).unsqueeze(1), bias.to(wide), groups=len(weight)).transpose(1, 2)
        if activation == "silu":
            y = F.silu(y)
    return y.to(x.dtype)
