"""Residual add and normalisation, the residual stream kept in fp32.

Axes: b images, l tokens, d model width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMSNorm or LayerNorm: returns (normed (b, l, d) in x's dtype, residual (b, l, d) in fp32).

    `residual` None starts the stream with x. weight and bias (d).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        total = x.to(wide) if residual is None else residual + x.to(wide)
        if kind == "rms":
            normed = F.rms_norm(total, total.shape[-1:], weight.to(wide), eps)
            normed = normed if bias is None else normed + bias.to(wide)
        else:
            normed = F.layer_norm(
                total, total.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps
            )
    return normed.to(x.dtype), total
