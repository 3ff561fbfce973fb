"""Vision Mamba: patches -> tokens, class token and registers included -> residual blocks of mixers -> class logits.

Axes: b images, l tokens, d model width; images are (b, 3, h, w), already normalized.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.model import schedule, tiles
from vimscale.model.block import Block, Head, Merge, Norm, Recompute, new_stem
from vimscale.model.intermediate import FeatureExtractor, Tap, index_of
from vimscale.model.layout import Grid, Layout, layout
from vimscale.model.mixer import Factor, Mamba, Probe, Scans
from vimscale.model.own import OwnMixer
from vimscale.model.presets import VimConfig
from vimscale.model.stretch import Stretch
from vimscale.model.tokens import Encoded, PackedImage, Tokens, pack, packed_tokens, resized, sincos, tokens_of_parts
from vimscale.ops import Context, gathered, summed

Images = Tensor | Sequence[Tensor] | Sequence[tiles.Bag]
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""A context in which the given parameters are complete on this device, for engines that shard them at construction."""


class VisionMamba(FeatureExtractor):
    """An image encoder and classifier with the shape `config` (arXiv:2401.09417), for one device. It reads nothing from
    the environment.
    """

    drop_rates: Tensor
    """Each block's drop-path rate (layers): 0 for the first, `drop_path` for the last."""

    def __init__(self, config: VimConfig, gather: Gather | None = None):
        """`gather`: for an engine that shards parameters as modules are constructed. Initialization then gathers one
        module at a time, so that no device ever holds all parameters. On the meta device nothing is allocated.
        """
        super().__init__()
        self.config = config
        self.recompute: Sequence[Recompute] = ["none"] * len(config.layers)
        self.backward = 1.0
        """Factor on every backward path when a call does not pass one: below 1 during a ramp."""
        self.probes: dict[int, Probe] | None = None
        """Set to a dict, and the next forward pass puts a probe of each layer into it."""
        self.context: Context | None = None
        """The ranks that share every image, if any: each then holds a stretch of its tokens, and all get its features.
        Gradients are those of the sum of what all ranks compute from them.
        """
        d = config.widths[0]
        self.patch_embed = new_stem(config, d)
        self.cls_token = nn.Parameter(torch.empty(config.cls_tokens, d)) if config.cls_tokens else None
        self.registers = nn.Parameter(torch.empty(config.registers, d)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.empty(config.tokens, d)) if config.pos_embed is True else None
        self.coordinates = tiles.Coordinates(config, d) if config.pos_embed == "coordinates" else None
        paired = schedule.second_of_pairs(config.layers)
        self.blocks = nn.ModuleList(
            Block(config, layer, width, paired=i in paired)
            for i, (layer, width) in enumerate(zip(config.layers, config.widths, strict=True))
        )
        self.merges = nn.ModuleDict()
        """Keyed by the index of the layer that follows."""
        first = 0
        for before, stage in pairwise(config.stages):
            first += before.depth
            self.merges[str(first)] = Merge(config, before.d_model, stage.d_model, stage.downsample)
        last = config.widths[-1]
        self.norm = Norm(config, last)
        self.neck = self.neck_norm = None
        if config.pooling == "registers" and config.register_reduce > 1:
            self.neck = nn.Linear(last, last // config.register_reduce, bias=False)
            self.neck_norm = Norm(config, config.features)
        self.head: nn.Module | None = Head(config.features, config.num_classes) if config.num_classes else None
        self._paired = paired
        self.register_buffer("drop_rates", torch.empty(len(config.layers)), persistent=False)
        self._tokens: dict[tuple[Grid, torch.device, Stretch | None], Tokens] = {}
        self._rows_of_parts: dict[tuple[tuple[Grid, ...], int, torch.device], Tokens] = {}
        self._init_all(gather or (lambda parameters: nullcontext()))

    def _init_all(self, gather: Gather) -> None:
        if self.norm.weight.is_meta:  # nothing to set, and random draws on meta load torch's compiler, for seconds
            return
        for module in self.modules():
            init = getattr(module, "init_weights", None)
            if init is not None:
                with gather(module.parameters(recurse=False)):
                    init()

    def init_weights(self) -> None:
        """Initialize this module's own parameters, not its children's."""
        for embedding in (self.cls_token, self.registers, self.pos_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        self.drop_rates.copy_(torch.linspace(0, self.config.drop_path, len(self.drop_rates)))

    # ---- forward

    def forward(
        self,
        images: Images,
        draws: Tensor | None = None,
        backward: Sequence[Factor] | None = None,
        *,
        features: bool = False,
    ) -> Tensor:
        """Return logits (b, num_classes) in fp32 for images (b, 3, h, w), or for a list of images (3, h, w) of any
        sizes, or of bags of tiles, which the model packs into rows.

        `draws` (b, layers), uniform in [0, 1), decide which contributions drop-path drops in training; default: none.
        `backward` (layers) is the factor on each layer's backward path, a number or a tensor (); default:
        `self.backward`. The caller passes both, so that they can depend on sample and step and not on the rank.
        `features`: return what the head reads (b, features) instead of logits. Images of a size seen before copy
        nothing from the host, and nothing is ever read on the host.

        Raises:
            ValueError: patches do not fill a side of an image; or the model has no head.
        """
        if self.head is None and not features:
            raise ValueError("the model was trained without classes and has no head: ask for features")
        read = self._pooled(*self._encoded(images, draws, backward)[:3])
        return read if features or self.head is None else self.head(read).float()

    def tile_features(self, bag: tiles.Bag) -> Tensor:
        """Return the mean of each tile's normalized tokens (t, d)."""
        x, tokens, _, _ = self._encoded([bag], None, None)
        ((grid,),) = tokens.rows
        return layout(self.config, grid).image_tokens(x)[0].unflatten(0, (len(bag.tiles), -1)).mean(dim=1)

    def _encoded(
        self, images: Images, draws: Tensor | None, backward: Any, chosen: Sequence[int] = (), until: int | None = None
    ) -> tuple[Tensor, Tokens, list[PackedImage] | None, list[Tap]]:
        """Embed images and run the blocks, as `_blocks`. The third value says how images are packed, if they are."""
        packed = None
        if isinstance(images, Tensor):
            x, tokens = self._embed(images)
        else:
            x, tokens, packed = self._embed_packed(images)
        scales = self._drop_scales(draws, tokens, packed)
        x, tokens, taps = self._blocks(x, tokens, scales, backward, chosen, until)
        return x, tokens, packed, taps

    def _blocks(
        self,
        x: Tensor,
        tokens: Tokens,
        scales: list[Tensor | None],
        backward: Any,
        chosen: Sequence[int],
        until: int | None = None,
    ) -> tuple[Tensor, Tokens, list[Tap]]:
        """Run all blocks on embedded tokens, or those up to the layer `until`; return the normalized tokens, what they
        are, and the residual stream after each of the layers `chosen`. The last norm is for the last stage: tokens of
        an earlier one are not normalized.
        """
        if backward is None:
            backward = [self.backward] * len(self.blocks)
        found: dict[int, Tap] = {}
        residual: Tensor | None = None
        for group in self._groups():
            if until is not None and group[0] > until:
                break
            if str(group[0]) in self.merges:
                x, tokens = self._merge(self.merges[str(group[0])], x, residual, tokens)
                residual = None
            x, residual = self._step(group, x, residual, tokens, scales, backward)
            for layer in set(chosen).intersection(group):  # both layers of a pair end with the group
                found[layer] = residual + x, tokens
        if until is None or self._in_last_stage(until):
            x, _ = self.norm(x, residual)
        elif residual is not None:
            x = residual + x
        return x, tokens, [found[layer] for layer in chosen]

    # ---- for objectives that look inside

    def patches(self, images: Tensor) -> Tensor:
        """Embed the patches of images (b, 3, h, w), with positions but without extra tokens: (b, l, d) in row order."""
        grid = self._grid(images)
        x = self._patches(images)
        position = self._positions(grid, x)
        if position is None:
            return x
        return x + layout(self.config, grid).image_tokens(position[None]).to(x.dtype)

    def encode(
        self,
        parts: Sequence[tuple[Tensor, Grid]],
        draws: Tensor | None = None,
        backward: Sequence[Factor] | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Encode rows of tokens that `patches` embedded, or some of them: each part is (b, l, d) and the grid of its l
        tokens, such as (1, l) for a selection. Every part gets the model's class tokens and registers, and parts do not
        see each other. `draws` and `backward` are those of `forward`; `layers`: see `Encoded.taps`.

        Raises:
            ValueError: a layer is out of range; the model is hierarchical and there are several parts; or ranks share
                images.
        """
        if self.context is not None or (self.config.stages and len(parts) > 1):
            raise ValueError("tokens can be encoded in parts only on one rank and without stages")
        extra = self._extra_tokens()
        rows = [layout(self.config, grid).insert(x, extra) for x, grid in parts]
        ends = list(accumulate((x.shape[1] for x in rows), initial=0))
        x = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        grids = tuple(grid for _, grid in parts)
        tokens = self._tokens_of_parts(grids, x)
        chosen = [index_of(layer, len(self.blocks), "layer") for layer in layers]
        x, _, taps = self._blocks(x, tokens, self._drop_scales(draws, tokens, None), backward, chosen)
        spans = tuple((slice(start, end), grid) for (start, end), grid in zip(pairwise(ends), grids, strict=True))
        return Encoded(x, [stream for stream, _ in taps], spans)

    def pooled(self, encoded: Encoded) -> list[Tensor]:
        """Return what the head reads of each part, (b, features)."""
        return [self._pool(encoded.tokens[:, span], grid) for span, grid in encoded.parts]

    def _extra_tokens(self) -> Tensor | None:
        """Return class tokens and registers (m, d) with their positions."""
        extra: list[Tensor] = [t for t in (self.cls_token, self.registers) if t is not None]
        if not extra:
            return None
        joined = torch.cat(extra)
        if self.pos_embed is None:
            return joined
        slots = layout(self.config, self.config.grid)
        return joined + torch.stack([self.pos_embed[at] for at in (*slots.cls, *slots.registers)])

    def _positions(self, grid: Grid, x: Tensor) -> Tensor | None:
        """Return what to add to all tokens (l, d) of an image, if the model has a table of positions."""
        if self.pos_embed is not None:
            return resized(self.pos_embed, self.config, grid)
        return sincos(self.config, grid, x) if self.config.pos_embed == "sincos" else None

    def _tokens_of_parts(self, grids: tuple[Grid, ...], x: Tensor) -> Tokens:
        if len(grids) == 1:
            return self._row_tokens(grids[0], x)
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return tokens_of_parts(self.config, grids, len(x), x.device)
        key = (grids, len(x), x.device)
        if key not in self._rows_of_parts:
            self._rows_of_parts[key] = tokens_of_parts(self.config, *key)
        return self._rows_of_parts[key]

    def _groups(self) -> list[tuple[int, ...]]:
        """List the indices of the blocks in order, those of a pair together."""
        firsts = [i for i in range(len(self.blocks)) if i not in self._paired]
        return [(i, i + 1) if i + 1 in self._paired else (i,) for i in firsts]

    def _step(
        self,
        group: tuple[int, ...],
        x: Tensor,
        residual: Tensor | None,
        tokens: Tokens,
        scales: list[Tensor | None],
        backward: Sequence[Factor],
    ) -> tuple[Tensor, Tensor]:
        """Run one block, or both blocks of a pair; return (output, residual)."""
        outs = []
        for i in group:
            probe: Probe | None = None
            if self.probes is not None:
                probe = self.probes[i] = {}
            level = self.recompute[i]
            arguments = (x, residual, tokens, scales[i], backward[i], level == "scan", probe)
            if level == "block" and torch.is_grad_enabled():
                out = checkpoint(self.blocks[i], *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self.blocks[i](*arguments)
            outs.append(out)
        if len(outs) == 1:
            return outs[0]
        (forward, residual), (reverse, _) = outs  # a pair passes the residual on once; hustvl/Vim adds it to itself
        x = forward + reverse
        return (x * 0.5 if self.config.fuse == "mean" else x), residual

    def _drop_scales(
        self, draws: Tensor | None, tokens: Tokens, packed: list[PackedImage] | None
    ) -> list[Tensor | None]:
        """Return drop-path's factor for each layer, per image or, in a pack, per token; None if nothing is dropped."""
        if draws is None or self.config.drop_path == 0:
            return [None] * len(self.blocks)
        rates = self.drop_rates.to(draws)
        kept = (draws >= rates) / (1 - rates)  # (b, layers)
        if packed is None:
            return list(kept[:, None, None].unbind(dim=-1))
        per_token = draws.new_ones(len(tokens.rows), tokens.length, kept.shape[1])
        for image, scale in zip(packed, kept, strict=True):
            per_token[image.row, image.start : image.end] = scale
        return list(per_token[:, :, None].unbind(dim=-1))

    # ---- images to tokens, tokens to features

    def _embed(self, images: Tensor | tiles.Bag) -> tuple[Tensor, Tokens]:
        """Embed images (b, 3, h, w), or one bag, as tokens (b, l, d) with class token, registers and positions."""
        config = self.config
        grid = self._grid(images)
        own = None if self.context is None else Stretch.of(self.context, config, grid)
        patches = self._patches_of(images, own)
        extra: list[Tensor] = [t for t in (self.cls_token, self.registers) if t is not None]
        x = self._slots(grid, own).insert(patches, torch.cat(extra) if extra else None)  # (b, l, d)
        if (position := self._positions(grid, x)) is not None:
            x = x + (position if own is None else position[own.start : own.end])
        return x, self._row_tokens(grid, x, own)

    def _slots(self, grid: Grid, own: Stretch | None) -> Layout:
        return layout(self.config, grid) if own is None else own.slots

    def _patches_of(self, images: Tensor | tiles.Bag, own: Stretch | None) -> Tensor:
        """Embed the patches (b, l, d) of images or of a bag; only those of this rank, where ranks share them."""
        if isinstance(images, Tensor):
            if own is None:
                return self._patches(images)
            corner = images.new_tensor([[own.rows.start * self.config.step, 0]])
            return self._patches(own.pixels(images), corner)[:, own.inside()]
        if own is None:
            return tiles.embed(self._patches, images)
        per_tile = own.grid[0] // len(images.tiles)
        kept = own.tiles(per_tile)
        return tiles.embed(self._patches, tiles.Bag(*(t[kept] for t in images)))[:, own.inside(per_tile)]

    def _patches(self, images: Tensor, at: Tensor | None = None) -> Tensor:
        """Embed images (b, 3, h, w) as (b, l, d), with positions from coordinates if the model has them; `at` (b, 2):
        coordinates of the images' corners.
        """
        patches = self.patch_embed(images)
        x = patches.flatten(2).transpose(1, 2)
        return x if self.coordinates is None else x + self.coordinates(at, patches.shape[2:])

    def _grid(self, images: Tensor | tiles.Bag) -> Grid:
        config = self.config
        height, width = (images.tiles if isinstance(images, tiles.Bag) else images).shape[-2:]
        for side in (height, width):
            if fitting := config.fitting_sides(side):
                raise ValueError(
                    f"patches of {config.patch_size} pixels every {config.step} pixels do not fill an image of"
                    f" {height} x {width} pixels; resize or pad {side} to {fitting[0]} or {fitting[1]}"
                )
        grid = config.grid_of(height, width)
        return tiles.grid_of(images, config, grid) if isinstance(images, tiles.Bag) else grid

    def _embed_packed(
        self, images: Sequence[Tensor] | Sequence[tiles.Bag]
    ) -> tuple[Tensor, Tokens, list[PackedImage] | None]:
        """Embed images (3, h, w) of any sizes, or bags, and pack them into rows as long as the longest one. A single
        one is not packed.
        """
        if self.config.stages:
            raise ValueError("a hierarchical model merges adjacent tokens: its images cannot be packed into rows")
        if self.context is not None and (len(images) > 1 or isinstance(images[0], Tensor)):
            raise ValueError("ranks share images of one size, a tensor (b, 3, h, w), or a single bag; not packed rows")
        every = [self._embed(image[None] if isinstance(image, Tensor) else image) for image in images]
        if len(every) == 1:
            return *every[0], None
        embedded, grids = [x[0] for x, _ in every], [self._grid(image) for image in images]
        length = max(len(x) for x in embedded)
        packed = pack(self.config, grids, length)
        tokens = packed_tokens(self.config, packed, length, embedded[0].device)
        rows: list[list[Tensor]] = [[] for _ in tokens.rows]
        for image, x in zip(packed, embedded, strict=True):
            rows[image.row].append(x)
        padded = [F.pad(torch.cat(row), (0, 0, 0, length - sum(map(len, row)))) for row in rows]
        return torch.stack(padded), tokens, packed

    def _merge(self, merge: nn.Module, x: Tensor, residual: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tokens]:
        assert isinstance(merge, Merge)
        ((grid,),) = tokens.rows
        smaller = (grid[0] // merge.factor, grid[1] // merge.factor)
        if (smaller[0] * merge.factor, smaller[1] * merge.factor) != grid:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} tokens is not divisible by {merge.factor}")
        x = merge(x if residual is None else residual + x, grid)
        return x, self._row_tokens(smaller, x)

    def _row_tokens(self, grid: Grid, x: Tensor, own: Stretch | None = None) -> Tokens:
        """Describe rows of one image each. Later calls get the same object, with the scan orders that are on the device
        by then; but compilers and fake tensors must not leave theirs to others.
        """
        new = Tokens(self.config, ((grid,),), self._slots(grid, own).tokens, x.device, stretch=own)
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return new
        return self._tokens.setdefault((grid, x.device, own), new)

    def _pooled(self, x: Tensor, tokens: Tokens, packed: list[PackedImage] | None) -> Tensor:
        """Pool the normalized tokens to (b, features)."""
        if packed is None:
            ((grid,),) = tokens.rows
            return self._pool(x, grid, tokens.stretch)
        return torch.cat([self._pool(x[p.row, p.start : p.end][None], p.grid) for p in packed])

    def _pool(self, x: Tensor, grid: Grid, own: Stretch | None = None) -> Tensor:
        slots = self._slots(grid, own)

        def whole(part: Tensor) -> Tensor:
            return part if own is None else summed(own.context, part)

        if self.config.pooling == "cls":
            tokens = [slots.token(x, position) for position in slots.cls]
            return whole(tokens[0] if len(tokens) == 1 else torch.stack(tokens).mean(dim=0))
        if self.config.pooling == "registers":
            registers = whole(torch.stack([slots.token(x, position) for position in slots.registers], dim=1))
            if self.neck is None or self.neck_norm is None:
                return registers.flatten(1)
            return self.neck_norm(self.neck(registers).flatten(1), None)[0]
        if self.config.pooling == "last":
            start, end = (0, slots.tokens) if own is None else (own.start, layout(self.config, grid).tokens)
            return whole(slots.token(x, end - 1 - start))
        image = slots.image_tokens(x)
        if self.config.pooling == "max":
            most = image.amax(dim=1)
            return most if own is None else gathered(own.context, most).amax(dim=0)
        if own is None:
            return image.mean(dim=1)
        return whole(image.float().sum(dim=1) / (grid[0] * grid[1])).to(x.dtype)

    # ---- what optimizers need to know

    def backward_slices(self) -> dict[str, list[tuple[Fraction, Fraction]]]:
        """Return the slices of parameters that belong only to backward paths: (start, end), as fractions of the
        flattened parameter.
        """
        slices: dict[str, list[tuple[Fraction, Fraction]]] = {}
        for i, block in enumerate(self.blocks):
            mixer = block.mixer
            if not isinstance(mixer, Scans):
                continue
            for name in mixer.path_parameters:
                k = len(mixer.paths)
                parts = [(Fraction(path, k), Fraction(path + 1, k)) for path in mixer.backward_paths]
                if parts:
                    slices[f"blocks.{i}.mixer.{name}"] = parts
        return slices

    def product_weights(self) -> set[str]:
        """Return the names of the weights that only enter products, and so are only read in autocast's dtype, whatever
        their own: those of linear layers and convolutions. The weights of a user's own layers are not among them.
        """
        modules = dict(self.named_modules())
        own = tuple(f"{name}." for name, module in modules.items() if isinstance(module, OwnMixer))
        names: set[str] = set()
        for name, module in modules.items():
            if isinstance(module, Mamba):
                names |= {f"{name}.x_proj", f"{name}.dt_proj"}
            elif isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(own):
                names.add(f"{name}.weight")
        return names
