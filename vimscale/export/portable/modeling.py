"""A Vision Mamba in plain torch (2.4 or later), for programs that do not have vimscale: exports carry a copy of this
file, of layers.py, mixers.py and orders.py.

Axes: b images, l tokens (class tokens and registers included), d model width. Images are (b, 3, h, w), already
normalized. Parameters have the names and shapes of vimscale's own model. Products run in the dtype of their weights;
norms, convolutions, scans and the residual stream are fp32.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Block, Coordinates, Merge, Norm, SwiGLU, conv_stem, patches
from .mixers import Attention, Kernels, Scan, Scans, scan
from .orders import Orders, Slots, parse, seconds_of_pairs, sincos, slots_of


class Encoder(nn.Module):
    """Images (b, 3, h, w) -> tokens, features and logits."""

    def __init__(
        self, config: dict[str, Any], scan: Scan = scan, *, inner: Kernels | None = None, backward: float = 1.0
    ):
        """Build a model with freshly drawn parameters.

        Args:
            config: the `model` section of an export's config.json.
            scan: what computes the scans of Mamba-1.
            inner: what computes scans and all around them instead, if anything does; see `kernels`.
            backward: factor on the backward paths, the `backward` of an export's config.json.

        Raises:
            ValueError: the model has layers of a kind that is not here.
        """
        super().__init__()
        self.config = config
        self.scan = scan
        self.inner = inner
        self.backward = backward
        self.gradient_checkpointing = False
        """Recompute every block in the backward pass."""
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        stages = config["stages"] or [{key: config[key] for key in ("depth", "d_model", "directions")}]
        layers = [layer for s in stages for layer in parse(s["directions"] or f"bi*{s['depth']}")]
        widths = [stage["d_model"] for stage in stages for _ in range(stage["depth"])]
        d, last = widths[0], widths[-1]
        self.patch_embed = conv_stem(config, d) if config["stem"] == "conv" else patches(config, d)
        cls = {"none": 0, "both": 2}.get(config["cls_token"], 1)
        size = config["image_size"]
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        rows, columns = self._grid(*self.image_size)
        length, registers = rows * columns + cls + config["registers"], config["registers"]
        self.cls_token = nn.Parameter(torch.empty(cls, d)) if cls else None
        self.registers = nn.Parameter(torch.empty(registers, d)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(length, d)) if config["pos_embed"] is True else None
        self.coordinates = Coordinates(config, d) if config["pos_embed"] == "coordinates" else None
        seconds = seconds_of_pairs(layers)
        rates = torch.linspace(0, config["drop_path"], len(layers), device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(config, layer, width, i in seconds, rates[i])
            for i, (layer, width) in enumerate(zip(layers, widths, strict=True))
        )
        firsts = [i for i in range(len(layers)) if i not in seconds]
        self._groups = [(i, i + 1) if i + 1 in seconds else (i,) for i in firsts]
        """Indices of blocks in order; those of a pair run on the same input."""
        self.merges = nn.ModuleDict()
        """Keyed by the index of the layer that follows."""
        first = 0
        for before, stage in pairwise(stages):
            first += before["depth"]
            self.merges[str(first)] = Merge(config, before["d_model"], stage["d_model"], stage["downsample"])
        self.norm = Norm(config, last)
        self.pool = config["pool"] or ("cls" if cls else "mean")
        reduce = config["register_reduce"]
        self.num_features = config["registers"] * (last // reduce) if self.pool == "registers" else last
        """Width of what the head reads."""
        reduces = self.pool == "registers" and reduce > 1
        self.neck = nn.Linear(last, last // reduce, bias=False) if reduces else None
        self.neck_norm = Norm(config, self.num_features) if reduces else None
        self.head = nn.Linear(self.num_features, config["num_classes"]) if config["num_classes"] else None
        if not self.norm.weight.is_meta:
            self.apply(self.init_weights)

    # ---- forward

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return fp32 `features` (b, num_features), what the head reads, and `logits` (b, classes) with a head."""
        x, orders, _ = self.encode(images)
        read = self.pooled(x, orders.slots)
        out = {"features": read.float()}
        if self.head is not None:
            out["logits"] = self.head(read).float()
        return out

    def tokens(self, images: Tensor) -> Tensor:
        """Return the normalized tokens (b, l, d) in the model's order, class tokens and registers included. In a
        hierarchical model they are those of the last stage.
        """
        return self.encode(images)[0]

    def encode(self, images: Tensor, keep: bool = False) -> tuple[Tensor, Orders, list[Tensor]]:
        """Return the normalized tokens (b, l, d), what their positions are, and with `keep` the embedded tokens and the
        residual stream (b, l, d) after every layer, or pair of layers.

        Raises:
            ValueError: patches do not fill a side of the images, or a stage cannot merge their tokens.
        """
        x, orders = self._embed(images)
        residual: Tensor | None = None
        kept = [x] if keep else []
        for group in self._groups:
            if str(group[0]) in self.merges:
                x, orders = self._merge(self.merges[str(group[0])], x if residual is None else residual + x, orders)
                residual = None
            if self.gradient_checkpointing and self.training:
                x, residual = self._gradient_checkpointing_func(self._run, group, x, residual, orders)
            else:
                x, residual = self._run(group, x, residual, orders)
            if keep:
                kept.append(residual + x)
        return self.norm(x, residual)[0], orders, kept

    def _run(self, group: tuple[int, ...], x: Tensor, residual: Tensor | None, orders: Orders) -> tuple[Tensor, Tensor]:
        """Run one block, or both blocks of a pair, whose outputs are added or averaged."""
        arguments = (orders, self.backward, self.scan, self.inner)
        outs = [self.blocks[i](x, residual, *arguments) for i in group]
        if len(outs) == 1:
            return outs[0]
        (forward, residual), (reverse, _) = outs
        return (forward + reverse) * (0.5 if self.config["fuse"] == "mean" else 1.0), residual

    def _merge(self, merge: nn.Module, x: Tensor, orders: Orders) -> tuple[Tensor, Orders]:
        assert isinstance(merge, Merge)
        (rows, columns), f = orders.grid, merge.factor
        if type(rows) is int and type(columns) is int and (rows % f or columns % f):
            raise ValueError(f"a grid of {rows} x {columns} tokens is not divisible by {f}")
        return merge(x, orders.grid), Orders(self.config, (rows // f, columns // f), x.device)

    def pooled(self, x: Tensor, slots: Slots) -> Tensor:
        """Return what the head reads (b, num_features) of the normalized tokens."""
        if self.pool == "cls":
            return x.index_select(1, slots.cls).mean(dim=1)
        if self.pool == "registers":
            registers = x.index_select(1, slots.registers)
            if self.neck is None or self.neck_norm is None:
                return registers.flatten(1)
            return self.neck_norm(self.neck(registers).flatten(1), None)[0]
        if self.pool == "last":
            return x[:, -1]
        image = x if self.cls_token is None and self.registers is None else x.index_select(1, slots.image)
        return image.amax(dim=1) if self.pool == "max" else image.mean(dim=1)

    # ---- images to tokens

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of an image's patches. (Sizes are not ints where a tracer leaves them open.)"""
        patch, step = self.config["patch_size"], self.config["stride"] or self.config["patch_size"]
        for side in (height, width):
            if type(side) is int and (side < patch or (side - patch) % step):
                raise ValueError(
                    f"patches of {patch} pixels every {step} pixels do not fill an image of {height} x {width} pixels"
                )
        return (height - patch) // step + 1, (width - patch) // step + 1

    def _embed(self, images: Tensor) -> tuple[Tensor, Orders]:
        grid = self._grid(*images.shape[-2:])
        orders = Orders(self.config, grid, images.device)
        x = self.patch_embed(images.to(next(self.patch_embed.parameters()).dtype)).flatten(2).transpose(1, 2)
        if self.coordinates is not None:
            x = x + self.coordinates(grid).to(x.dtype)
        extra = [t.to(x.dtype).expand(x.shape[0], -1, -1) for t in (self.cls_token, self.registers) if t is not None]
        if extra:
            x = torch.cat([*extra, x], dim=1).index_select(1, orders.slots.visits)
        if self.pos_embed is not None:
            x = x + self._positions(grid, orders.slots).to(x.dtype)
        elif self.config["pos_embed"] == "sincos":
            table = F.pad(sincos(grid, x.shape[-1]), (0, 0, x.shape[1] - grid[0] * grid[1], 0))
            x = x + table.to(x)[orders.slots.visits]
        return x, orders

    def _positions(self, grid: tuple[int, int], slots: Slots) -> Tensor:
        """Return the position embedding (l, d), resized if the images are not of the size that it was made for."""
        assert self.pos_embed is not None
        made_for = self._grid(*self.image_size)
        if type(grid[0]) is int and type(grid[1]) is int and grid == made_for:
            return self.pos_embed
        own = slots_of(self.config, made_for[0] * made_for[1], self.pos_embed.device)
        plane = self.pos_embed[own.image].float().unflatten(0, made_for).permute(2, 0, 1)[None]
        plane = F.interpolate(plane, grid, mode="bicubic", align_corners=False)[0].flatten(1).mT
        if self.cls_token is None and self.registers is None:
            return plane.to(self.pos_embed.dtype)
        extra = self.pos_embed[torch.cat([own.cls, own.registers])]
        return torch.cat([extra, plane.to(extra.dtype)])[slots.visits]

    # ---- parameters of a new model

    @torch.no_grad()
    def init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of one module of the model, not those of its children, as vimscale does."""
        if module is self:
            for embedding in (self.cls_token, self.registers, self.pos_embed):
                if embedding is not None:
                    nn.init.trunc_normal_(embedding, std=0.02)
        elif module is self.head and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif module is self.patch_embed and isinstance(module, nn.Conv2d):
            std = module.weight[0].numel() ** -0.5 / 0.8796
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Coordinates):
            nn.init.ones_(module.scale)
        elif isinstance(module, Scans):
            module.init_weights()
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            module.reset_parameters()
        if isinstance(module, Attention | Scans):
            _init_out(module.out_proj, len(self.blocks))
            if module.layer_scale is not None:
                nn.init.constant_(module.layer_scale, self.config["layer_scale"])
        elif isinstance(module, SwiGLU):
            _init_out(module.w3, len(self.blocks))


def _init_out(linear: nn.Linear, summands: int) -> None:
    """Divide by sqrt(summands): the variance of the residual stream does not depend on how many layers add to it."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    linear.weight /= math.sqrt(summands)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
