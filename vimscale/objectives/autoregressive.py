"""Autoregressive pretraining (ARM, arXiv:2406.07537): a model that scans forward only reads an image cluster by
cluster, and a small decoder predicts the pixels of each cluster from all clusters before it.

Axes: b images, l patches, c patches of a cluster, q = l - c patches that are predicted (all but the first cluster's;
as many are read: all but the last cluster's), d model width, w decoder width, h heads, p pixels along a patch's side.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimscale.model import VimConfig
from vimscale.model.block import Norm
from vimscale.model.layout import Grid
from vimscale.model.tokens import plane_sincos
from vimscale.objectives.base import Inputs, Learner, Objective
from vimscale.objectives.patches import norm_pix, patchify
from vimscale.recipe.reconstruction import AutoregressiveOptions


class Autoregressive(Objective):
    Options = AutoregressiveOptions
    options: AutoregressiveOptions

    def modules(self) -> dict[str, nn.Module]:
        return {"decoder": Decoder(self.options, self.config)}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        assert isinstance(inputs.images, Tensor), "recipes with images of several shapes are refused"
        predicted = self.predict(model, inputs)
        return (predicted - self.targets(inputs.images)).square().mean(dim=(1, 2))

    def predict(self, model: Learner, inputs: Inputs) -> Tensor:
        """Predict the normalized pixels of all clusters but the first: (b, q, 3 p p), at least fp32."""
        assert isinstance(inputs.images, Tensor)
        grid = self.config.grid_of(*inputs.images.shape[2:])
        side = self.options.cluster
        read = clusters(model.encoder.patches(inputs.images), grid, side)[:, : -side * side]
        taps = self.options.layers(self.config.depth)
        encoded = model.encoder.encode([(read, (1, read.shape[1]))], inputs.draws, inputs.backward, layers=taps[:-1])
        predicted = model["decoder"](encoded.taps, encoded.tokens, grid)
        return predicted if predicted.dtype == torch.float64 else predicted.float()

    def targets(self, images: Tensor) -> Tensor:
        """Return what `predict` should give for images (b, 3, h, w)."""
        side, patch = self.options.cluster, self.config.patch_size
        pixels = norm_pix(patchify(images, patch))
        return clusters(pixels, self.config.grid_of(*images.shape[2:]), side)[:, side * side :]


def clusters(x: Tensor, grid: Grid, side: int) -> Tensor:
    """Reorder tokens (b, l, d) of a grid from row order to cluster order: clusters of side x side tokens in row order,
    and in row order within each. `side` divides both sides of the grid.
    """
    rows, columns = grid
    x = x.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)  # (b, R, C, side, side, d)
    return x.flatten(1, 4)


class Decoder(nn.Module):
    """Blocks of cross-attention. A query is a learned token with the position of the patch that it predicts; it sees
    what the encoder made of the clusters before that patch's. Queries do not see each other.
    """

    positions: Tensor | None
    """Positions (l, w) in row order, in place of sines and cosines; `vimscale.objectives.published` sets it."""

    def __init__(self, options: AutoregressiveOptions, config: VimConfig):
        super().__init__()
        d, width, depth = config.d_model, options.decoder_width, options.decoder_depth
        taps = len(options.layers(config.depth))
        self.cluster = options.cluster
        self.norms = nn.ModuleList(Norm(config, d) for _ in range(taps - 1))
        """Of each tap but the last, which the encoder's own last norm normalizes."""
        self.memory = _Linear(taps * d, depth * width)
        self.query = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(
            CrossBlock(width, options.heads, round(width * options.mlp_ratio)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = _Linear(width, 3 * config.patch_size**2)
        self.register_buffer("positions", None, persistent=False)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, taps: list[Tensor], last: Tensor, grid: Grid) -> Tensor:
        """From the encoder's residual streams `taps` and its normalized tokens `last`, (b, q, d) each, to pixels
        (b, q, 3 p p). `grid`: that of the images' patches.
        """
        normed = [norm(tap, None)[0] for norm, tap in zip(self.norms, taps, strict=True)]
        memories = self.memory(torch.cat([*normed, last], dim=-1)).chunk(len(self.blocks), dim=-1)  # (b, q, w) each
        count = self.cluster**2
        x = (self.query + self._positions(grid, last)[count:]).expand(len(last), -1, -1)
        cluster = torch.arange(last.shape[1], device=last.device) // count
        allowed = cluster[:, None] >= cluster  # (q, q): query i is one cluster ahead of memory i
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, memory, allowed)
        return self.pixels(self.norm(x))

    def _positions(self, grid: Grid, like: Tensor) -> Tensor:
        """Return the positions of all patches (l, w) in cluster order."""
        width = self.query.shape[0]
        if self.positions is not None:
            return clusters(self.positions[None], grid, self.cluster)[0].to(self.query.dtype)
        if torch.compiler.is_compiling() or type(like) is not Tensor:  # they must not leave their tensors to others
            return _table(grid, width, self.cluster).to(like.device, self.query.dtype)
        return _table_on(grid, width, self.cluster, like.device, self.query.dtype)


@lru_cache(maxsize=64)
def _table_on(grid: Grid, width: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _table(grid, width, side).to(device, dtype)


def _table(grid: Grid, width: int, side: int) -> Tensor:
    return clusters(torch.tensor(plane_sincos(grid, width), dtype=torch.float32)[None], grid, side)[0]


class _Linear(nn.Linear):
    """With the initial values of the public code."""

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class CrossBlock(nn.Module):
    """x + attention to a memory, then x + MLP; each with LayerNorms before it."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width)
        self.q = _Linear(width, width)
        self.kv = _Linear(width, 2 * width)
        self.out = _Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(_Linear(width, hidden), nn.GELU(), _Linear(hidden, width))

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """x (b, q, w), memory (b, m, w); `allowed` (q, m) bool: which part of the memory each query sees."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, q, w / h)
        kv = self.kv(self.memory_norm(memory)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))
