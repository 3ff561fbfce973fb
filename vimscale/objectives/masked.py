"""Masked autoencoding: encode a few patches of an image, and predict the pixels of the others (arXiv:2111.06377).

The recipe is that of insitro/FastVim for a plain Vim: hidden patches are dropped; the kept ones stay in row order, so
that both directions of a scan walk over the image; a few bidirectional layers decode.

Axes: b images, l patches in row order, k kept patches, m class tokens and registers, d width of the encoder, w width of
the decoder, p pixels of a patch's side.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.data.sample import Sample
from vimscale.model import VimConfig
from vimscale.model.block import Block, Norm, Recompute
from vimscale.model.layout import Grid, layout
from vimscale.model.tokens import Tokens, sincos
from vimscale.objectives.base import Inputs, Learner, Objective
from vimscale.objectives.patches import norm_pix, patchify
from vimscale.recipe.reconstruction import MaskedOptions, kept_patches


class Masked(Objective):
    Options = MaskedOptions
    options: MaskedOptions

    def modules(self) -> dict[str, nn.Module]:
        return {"decoder": Decoder(self.config, self.options.decoder(self.config))}

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """noise: fp32 (l), uniform in [0, 1); the patches with the least are kept."""
        rows, columns = self.config.grid_of(*sample.size)
        return {"noise": torch.from_numpy(rng.random(rows * columns, dtype=np.float32))}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        """Mean squared error over the pixels of the hidden patches of each image: fp32 (b)."""
        images = inputs.images
        assert isinstance(images, Tensor), "images of several shapes or bags of tiles: the recipe refuses them"
        kept = self.kept(inputs.views["noise"])
        guess = self.reconstruct(model, inputs, kept)
        targets = patchify(images, self.config.patch_size)
        if self.options.norm_pix:
            targets = norm_pix(targets)
        errors = (guess.to(targets.dtype) - targets).square().mean(dim=2)  # (b, l)
        hidden = torch.ones_like(errors).scatter(1, kept, 0.0)
        return (errors * hidden).sum(dim=1) / (errors.shape[1] - kept.shape[1])

    def kept(self, noise: Tensor) -> Tensor:
        """The indices of the kept patches, ascending, from noise (b, l): int64 (b, k)."""
        order = noise.argsort(dim=1, stable=True)  # equal numbers must not make masks depend on the device
        return order[:, : kept_patches(noise.shape[1], self.options.mask_ratio)].sort(dim=1).values

    def reconstruct(self, model: Learner, inputs: Inputs, kept: Tensor) -> Tensor:
        """The predicted pixels of all patches (b, l, 3 p p), from the patches `kept` (b, k) of each image."""
        images, encoder = inputs.images, model.encoder
        assert isinstance(images, Tensor)
        x = encoder.patches(images)  # (b, l, d)
        chosen = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        row = (1, kept.shape[1])
        encoded = encoder.encode([(chosen, row)], inputs.draws, inputs.backward)
        grid = self.config.grid_of(*images.shape[2:])
        return model["decoder"](encoded.tokens, kept, grid, encoder.recompute[-1])


class Decoder(nn.Module):
    """Bidirectional layers over all patches: kept ones as the encoder left them, a learned token for each hidden one.
    Class tokens and registers follow the patches.
    """

    def __init__(self, encoder: VimConfig, config: VimConfig):
        """`config`: the shape of the decoder's layers."""
        super().__init__()
        self.encoder, self.config = encoder, config
        width = config.d_model
        self.embed = _Linear(encoder.widths[-1], width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(config, layer, width) for layer in config.layers)
        self.norm = Norm(config, width)
        self.pixels = _Linear(width, 3 * encoder.patch_size**2)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, kept: Tensor, grid: Grid, recompute: Recompute = "none") -> Tensor:
        """Predict the pixels of all patches of a grid, (b, l, 3 p p), from what the encoder makes (b, k + m, d) of the
        patches `kept` (b, k), class tokens and registers. `recompute`: as of an encoder's layer.
        """
        x, residual = self.tokens(encoded, kept, grid), None
        tokens = Tokens(self.config, (((1, x.shape[1]),),), x.shape[1], x.device)
        for block in self.blocks:
            run = partial(block, tokens=tokens, recompute=recompute == "scan")
            if recompute == "block" and torch.is_grad_enabled():
                x, residual = checkpoint(run, x, residual, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = run(x, residual)
        x, _ = self.norm(x, residual)
        return self.pixels(x[:, : grid[0] * grid[1]])

    def tokens(self, encoded: Tensor, kept: Tensor, grid: Grid) -> Tensor:
        """What the first layer reads: (b, l + m, w)."""
        slots = layout(self.encoder, (1, kept.shape[1]))
        x = self.embed(encoded)  # (b, k + m, w)
        patches = slots.image_tokens(x)
        every = self.mask_token.to(x.dtype).expand(len(x), grid[0] * grid[1], -1)
        every = every.scatter(1, kept[:, :, None].expand_as(patches), patches)
        extra = [slots.token(x, at)[:, None] for at in (*slots.cls, *slots.registers)]
        return self.positioned(torch.cat([every, *extra], dim=1), grid)

    def positioned(self, x: Tensor, grid: Grid) -> Tensor:
        """Add positions to tokens (b, l + m, w); class tokens and registers have none."""
        table = sincos(self.config, grid, x)  # (l, w)
        return x + nn.functional.pad(table, (0, 0, 0, x.shape[1] - len(table)))


class _Linear(nn.Linear):
    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
