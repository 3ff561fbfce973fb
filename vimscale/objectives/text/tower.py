"""A text encoder: a pre-norm Transformer whose output at the end token, projected, is the text's features.

Axes: b texts, l tokens, d width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that starts from normal weights of deviation `std` and a bias of zero."""

    def __init__(self, i: int, o: int, *, std: float, bias: bool = True):
        super().__init__(i, o, bias=bias)
        self.std = std

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Tokens(nn.Module):
    """Embeds tokens, and adds learned positions."""

    def __init__(self, vocabulary: int, context: int, d: int):
        super().__init__()
        self.token = nn.Parameter(torch.empty(vocabulary, d))
        self.position = nn.Parameter(torch.empty(context, d))

    def init_weights(self) -> None:
        nn.init.normal_(self.token, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """From (b, l), l up to the context, to (b, l, d)."""
        return F.embedding(tokens, self.token) + self.position[: tokens.shape[1]]


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, d: int, heads: int, depth: int):
        super().__init__()
        self.heads = heads
        out = d**-0.5 * (2 * depth) ** -0.5
        self.norm = nn.LayerNorm(d)
        self.qkv = Linear(d, 3 * d, std=d**-0.5)
        self.out = Linear(d, d, std=out)
        self.mlp_norm = nn.LayerNorm(d)
        self.up = Linear(d, 4 * d, std=(2 * d) ** -0.5)
        self.down = Linear(4 * d, d, std=out)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x (b, l, d). `real`, bool (b, 1, 1, l): the tokens that each token may see; None: those up to itself."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, l, .)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=real, is_causal=real is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class TextTower(nn.Module):
    """From tokens to features, with CLIP's initial values (arXiv:2103.00020)."""

    def __init__(self, *, vocabulary: int, context: int, d: int, depth: int, heads: int, features: int, causal: bool):
        """`causal`: a token sees those before it, as in CLIP; else it sees all tokens of its text."""
        super().__init__()
        self.causal = causal
        self.tokens = Tokens(vocabulary, context, d)
        self.blocks = nn.ModuleList(Block(d, heads, depth) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.project = Linear(d, features, std=d**-0.5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """From rows of `tokenizer.row` (b, l) to features (b, f). Padding does not matter."""
        end = tokens.argmax(dim=1)  # (b)
        real = None
        if not self.causal:
            real = (torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None])[:, None, None]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, real)
        at_end = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]  # (b, d)
        return self.project(self.norm(at_end))
