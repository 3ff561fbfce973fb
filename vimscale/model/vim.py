"""Vision Mamba: patches -> tokens with a class token among them -> residual blocks of bidirectional mixers -> classes.

Axes: b images, l tokens, d model width; images are (b, 3, h, w), already normalised.
"""

import math

import torch
from torch import Tensor, nn

from vimscale.model.mixer import BiMamba
from vimscale.model.presets import VimConfig
from vimscale.ops import add_norm


class Norm(nn.Module):
    """RMSNorm fused with the residual add before it; the residual stream is fp32 whatever x is."""

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.weight, kind="rms", eps=self.eps)


class Block(nn.Module):
    """Add, norm, mix. What it returns has not been added to the residual yet: the next norm does that."""

    def __init__(self, norm: Norm, mixer: BiMamba):
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x: Tensor, residual: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """`scale` (b): what drop-path multiplies each image's contribution by, 0 or 1 / (1 - rate)."""
        if scale is not None:
            x = x * scale[:, None, None].to(x.dtype)
        normed, residual = self.norm(x, residual)
        return self.mixer(normed), residual


class VisionMamba(nn.Module):
    """An image classifier of `config`'s shape (arXiv:2401.09417). Knows one device and no environment."""

    def __init__(self, config: VimConfig):
        super().__init__()
        self.config = config
        d = config.d_model
        self.patch_embed = nn.Conv2d(3, d, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(d)) if config.cls_token != "none" else None
        self.pos_embed = nn.Parameter(torch.zeros(config.tokens, d))
        self.blocks = nn.ModuleList(
            Block(
                Norm(d),
                BiMamba(
                    d,
                    e=config.d_inner,
                    n=config.d_state,
                    r=config.dt_rank,
                    w=config.d_conv,
                    direction=direction,
                    fuse=config.fuse,
                    init=config.init,
                ),
            )
            for direction in config.layers
        )
        self.norm = Norm(d)
        self.head = nn.Linear(d, config.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Everything but a scan's own, as published: out_proj shrunk with depth, embeddings N(0, 0.02^2)."""
        # LeCun normal cut at two sigmas, which shrinks the standard deviation by 0.8796
        std = self.patch_embed.weight[0].numel() ** -0.5 / 0.8796
        nn.init.trunc_normal_(self.patch_embed.weight, std=std, a=-2 * std, b=2 * std)
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
                block.mixer.out_proj.weight /= math.sqrt(self.config.depth)

    def drop_rates(self) -> Tensor:
        """Drop-path rate of the contribution of each block (depth): 0 for the first, `drop_path` for the last."""
        return torch.linspace(0, self.config.drop_path, self.config.depth)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Logits (b, num_classes) in fp32. `draws` (b, depth), uniform in [0, 1), decide which contributions are
        dropped in training: drawn outside, so that they can be a function of the sample and not of the rank.
        """
        return self.head(self.forward_features(images, draws)).float()

    def forward_features(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """What the head reads (b, d): the class token, or the mean of the tokens where there is none."""
        config = self.config
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)  # (b, l, d)
        if self.cls_token is not None:
            cls = self.cls_token.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([tokens[:, : config.cls_index], cls, tokens[:, config.cls_index :]], dim=1)
        x = tokens + self.pos_embed

        scales: list[Tensor | None] = [None] * (config.depth + 1)
        if draws is not None and config.drop_path > 0:
            rates = self.drop_rates().to(draws)
            kept = (draws >= rates) / (1 - rates)  # (b, depth)
            scales[1:] = list(kept.unbind(dim=1))  # block i + 1 drops what block i contributed

        residual = None
        for block, scale in zip(self.blocks, scales[:-1], strict=True):
            x, residual = block(x, residual, scale)
        if scales[-1] is not None:
            x = x * scales[-1][:, None, None].to(x.dtype)
        x, _ = self.norm(x, residual)
        return x.mean(dim=1) if config.cls_index is None else x[:, config.cls_index]

    def no_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: vectors, embeddings, the scan's A, D and biases."""
        spared = ("pos_embed", "A_log", "D", "conv_bias", "dt_bias")
        return {name for name, p in self.named_parameters() if p.ndim == 1 or name.rpartition(".")[2] in spared}


def flops(config: VimConfig) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counted as two.

    Matrix products, convolutions and the scan (9 operations a state: exp, three products, two multiply-adds, shared
    work included); norms and activations, below 1 %, are left out.
    """
    d, e, n, r, k = config.d_model, config.d_inner, config.d_state, config.dt_rank, config.d_conv
    path = 2 * k * e + 2 * e * (r + 2 * n) + 2 * r * e + 9 * e * n
    total = config.patches * 2 * 3 * config.patch_size**2 * d + 2 * d * config.num_classes
    for direction in config.layers:
        total += config.tokens * (2 * d * 2 * e + 2 * e * d + path * (2 if direction == "bi" else 1))
    return total
