"""Vision Mamba: patches -> tokens with class token and registers among them -> residual blocks of mixers -> classes.

Axes: b images, l tokens, d model width; images are (b, 3, h, w), already normalised.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.model import schedule
from vimscale.model.mixer import PATH_PARAMETERS, Attention, Mamba, OutProj, Probe
from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer
from vimscale.model.tokens import PackedImage, Tokens, in_rows, layout, pack, resized
from vimscale.ops import add_norm

Recompute = Literal["none", "scan", "block"]
"""What a block keeps for the backward pass: all it needs; all but convolution, dt and scan; its input alone."""
Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""A context in which the given parameters are whole on this device, for engines that shard them as they are made."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm fused with the residual add before it; the residual stream is fp32 whatever x is."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d)) if config.norm == "layer" else None
        self.config = config

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.weight, self.bias, kind=self.config.norm, eps=self.config.norm_eps)


class SwiGLU(nn.Module):
    """w3 (silu(w1 x) * w2 x), of width 8/3 d (arXiv:2002.05202)."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        hidden = d * 8 // 3
        self.w1 = nn.Linear(d, hidden)
        self.w2 = nn.Linear(d, hidden)
        self.w3 = OutProj(hidden, d, summands=len(config.layers), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Add, norm, mix, and the same with an MLP where the model has one. What it returns has not been added to the
    residual yet: the next norm does that.
    """

    def __init__(self, config: VimConfig, layer: Layer, d: int, *, paired: bool = False):
        super().__init__()
        self.norm = Norm(config, d)
        self.mixer = Attention(config, d) if layer.kind == "attn" else Mamba(config, layer, d, paired=paired)
        self.mlp_norm = Norm(config, d) if config.mlp == "swiglu" else None
        self.mlp = SwiGLU(config, d) if config.mlp == "swiglu" else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        tokens: Tokens,
        scale: Tensor | None = None,
        backward: float = 1.0,
        recompute: bool = False,
        probe: Probe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`scale` (b or b l, broadcast over d): what drop-path multiplies contributions by, 0 or 1 / (1 - rate)."""
        x, residual = self.norm(x, residual)
        if probe is not None:
            probe["rms"] = residual.detach().square().mean().sqrt()
        x = _scaled(self.mixer(x, tokens, backward, recompute, probe), scale)
        if self.mlp is not None and self.mlp_norm is not None:
            x, residual = self.mlp_norm(x, residual)
            x = _scaled(self.mlp(x), scale)
        return x, residual


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)


class PatchEmbed(nn.Conv2d):
    """Images (b, 3, h, w) -> patches (b, d, rows, columns)."""

    def __init__(self, config: VimConfig, d: int):
        super().__init__(3, d, config.patch_size, config.step)

    def init_weights(self) -> None:
        """LeCun normal, cut at two sigmas, which shrinks the standard deviation by 0.8796; as published."""
        std = self.weight[0].numel() ** -0.5 / 0.8796
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ConvStem(nn.Sequential):
    """3 x 3 convolutions of stride 2 and doubling width down to the patch, and one of 1 x 1 (arXiv:2106.14881); group
    norm in place of batch norm, which would make images depend on each other.
    """

    def __init__(self, config: VimConfig, d: int):
        layers: list[nn.Module] = []
        for i, o in pairwise(config.stem_widths):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.GroupNorm(1, o), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(config.stem_widths[-1], d, 1))


class Merge(nn.Module):
    """Between stages: neighbouring tokens side by side, normalised and projected to the next width."""

    def __init__(self, config: VimConfig, i: int, o: int, factor: int):
        super().__init__()
        self.norm = Norm(config, i * factor**2)
        self.project = nn.Linear(i * factor**2, o, bias=False)
        self.factor = factor

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (b, l, d) -> (b, l / factor^2, o)."""
        b, _, d = x.shape
        rows, columns, f = grid[0] // self.factor, grid[1] // self.factor, self.factor
        x = x.view(b, rows, f, columns, f, d).transpose(2, 3).reshape(b, rows * columns, f * f * d)
        normed, _ = self.norm(x, None)
        return self.project(normed)


class Head(nn.Linear):
    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class VisionMamba(nn.Module):
    """An image encoder and classifier of `config`'s shape (arXiv:2401.09417). Knows one device and no environment."""

    def __init__(self, config: VimConfig, gather: Gather | None = None):
        """`gather`: for an engine that shards parameters as modules are made; initial values are then set one module
        at a time, so that no device ever holds them all. On the meta device nothing is allocated.
        """
        super().__init__()
        self.config = config
        self.recompute: Sequence[Recompute] = ["none"] * len(config.layers)
        self.backward = 1.0
        """How much of every layer's backward path is in where a call does not say: below 1 in the midst of a ramp."""
        self.probes: dict[int, Probe] | None = None
        """Set to a dict to have the next forward pass put a probe of each layer into it."""
        d = config.widths[0]
        self.patch_embed: nn.Module = ConvStem(config, d) if config.stem == "conv" else PatchEmbed(config, d)
        self.cls_token = nn.Parameter(torch.empty(config.cls_tokens, d)) if config.cls_tokens else None
        self.registers = nn.Parameter(torch.empty(config.registers, d)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.empty(config.tokens, d)) if config.pos_embed else None
        paired = schedule.second_of_pairs(config.layers)
        self.blocks = nn.ModuleList(
            Block(config, layer, width, paired=i in paired)
            for i, (layer, width) in enumerate(zip(config.layers, config.widths, strict=True))
        )
        self.merges = nn.ModuleDict()
        """By the number of the layer they come before."""
        at = 0
        for before, stage in pairwise(config.stages):
            at += before.depth
            self.merges[str(at)] = Merge(config, before.d_model, stage.d_model, stage.downsample)
        last = config.widths[-1]
        self.norm = Norm(config, last)
        self.neck = self.neck_norm = None
        if config.pooling == "registers" and config.register_reduce > 1:
            self.neck = nn.Linear(last, last // config.register_reduce, bias=False)
            self.neck_norm = Norm(config, config.features)
        self.head: nn.Module = Head(config.features, config.num_classes)
        self._paired = paired
        self._init_all(gather or (lambda parameters: nullcontext()))

    def _init_all(self, gather: Gather) -> None:
        if self.norm.weight.is_meta:  # nothing to set; drawing nothing makes torch load its compiler, for seconds
            return
        for module in self.modules():
            init = getattr(module, "init_weights", None)
            if init is not None:
                with gather(module.parameters(recurse=False)):
                    init()

    def init_weights(self) -> None:
        """Of this module's own parameters."""
        for embedding in (self.cls_token, self.registers, self.pos_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)

    def drop_rates(self) -> Tensor:
        """Drop-path rate of the contribution of each block: 0 for the first, `drop_path` for the last."""
        return torch.linspace(0, self.config.drop_path, len(self.config.layers))

    # ---- forward

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        draws: Tensor | None = None,
        backward: Sequence[float] | None = None,
        *,
        features: bool = False,
    ) -> Tensor:
        """Logits (b, num_classes) in fp32, of images (b, 3, h, w), or of a list of images (3, h, w) of any sizes, which
        are packed into rows. `draws` (b, layers), uniform in [0, 1), decide which contributions are dropped in
        training; `backward` (layers) is how much of each layer's backward path is in, all of it where absent. Both come
        from outside, so that they can be functions of sample and step and not of the rank. `features`: return what the
        head reads (b, features) instead.

        Raises:
            ValueError: an image whose sides are not a multiple of the patch.
        """
        read = self.forward_features(images, draws, backward)
        return read if features else self.head(read).float()

    @overload
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        draws: Tensor | None = None,
        backward: Sequence[float] | None = None,
        *,
        layers: None = None,
    ) -> Tensor: ...
    @overload
    def forward_features(
        self,
        images: Tensor,
        draws: Tensor | None = None,
        backward: Sequence[float] | None = None,
        *,
        layers: Sequence[int],
    ) -> list[Tensor]: ...
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        draws: Tensor | None = None,
        backward: Sequence[float] | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """What the head reads (b, features); or, after each of `layers` (counted from 0, negative from the end), the
        residual stream of the image's tokens as a map (b, d, h, w), for detection and segmentation: the maps of a
        hierarchical model's stages are a pyramid.
        """
        if isinstance(images, Tensor):
            x, tokens = self._embed(images)
            places = None
        else:
            if layers is not None:
                raise ValueError("maps of chosen layers need images of one size: pass a tensor (b, 3, h, w)")
            x, tokens, places = self._embed_packed(images)
        chosen = [self._number(layer) for layer in layers or ()]
        maps: dict[int, Tensor] = {}
        scales = self._drop_scales(draws, tokens, places)
        if backward is None:
            backward = [self.backward] * len(self.blocks)
        residual: Tensor | None = None
        for group in self._groups():
            if str(group[0]) in self.merges:
                x, tokens = self._merge(self.merges[str(group[0])], x, residual, tokens)
                residual = None
            x, residual = self._step(group, x, residual, tokens, scales, backward)
            for layer in set(chosen).intersection(group):  # the two of a pair end together
                maps[layer] = self._map(residual + x, tokens)
        if layers is not None:
            return [maps[layer] for layer in chosen]
        x, _ = self.norm(x, residual)
        return self._pooled(x, tokens, places)

    def _number(self, layer: int) -> int:
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} of {depth}: they are counted from 0 to {depth - 1}, or from the end by -1")
        return layer % depth

    def _groups(self) -> list[tuple[int, ...]]:
        """Numbers of the blocks in turn, those of a pair together."""
        firsts = [i for i in range(len(self.blocks)) if i not in self._paired]
        return [(i, i + 1) if i + 1 in self._paired else (i,) for i in firsts]

    def _step(
        self,
        group: tuple[int, ...],
        x: Tensor,
        residual: Tensor | None,
        tokens: Tokens,
        scales: list[Tensor | None],
        backward: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
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
        return outs[0] if len(outs) == 1 else self._meet(*outs)

    def _meet(self, there: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A pair's contributions, and the residual, which passes once (hustvl/Vim adds it to itself)."""
        x = there[0] + back[0]
        return (x * 0.5 if self.config.fuse == "mean" else x), there[1]

    def _drop_scales(
        self, draws: Tensor | None, tokens: Tokens, places: list[PackedImage] | None
    ) -> list[Tensor | None]:
        if draws is None or self.config.drop_path == 0:
            return [None] * len(self.blocks)
        rates = self.drop_rates().to(draws)
        kept = (draws >= rates) / (1 - rates)  # (b, layers)
        if places is None:
            return list(kept[:, None, None].unbind(dim=-1))
        spread = draws.new_ones(len(tokens.rows), tokens.length, kept.shape[1])
        for place, image in zip(places, kept, strict=True):
            spread[place.row, place.start : place.start + self._tokens_of(place.grid)] = image
        return list(spread[:, :, None].unbind(dim=-1))

    # ---- into tokens, and out of them

    def _embed(self, images: Tensor) -> tuple[Tensor, Tokens]:
        """images (b, 3, h, w) -> tokens (b, l, d) with class token, registers and position, and where they stand."""
        config = self.config
        grid = self._grid(images)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (b, l, d)
        where = layout(config, grid)
        extra: list[Tensor] = [t for t in (self.cls_token, self.registers) if t is not None]
        x = where.put(patches, torch.cat(extra) if extra else None)
        if self.pos_embed is not None:
            x = x + resized(self.pos_embed, config, grid)
        return x, Tokens(config, ((grid,),), where.tokens, x.device)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        config = self.config
        height, width = images.shape[-2:]
        patch, step = config.patch_size, config.step
        for side in (height, width):
            if side < patch or (side - patch) % step:
                low = patch + max(side - patch, 0) // step * step
                raise ValueError(
                    f"an image of {height} x {width} pixels is not a whole number of patches of {patch} every {step}"
                    f" pixels; resize or pad {side} to {low} or {low + step}"
                )
        return config.grid_of(height, width)

    def _embed_packed(self, images: Sequence[Tensor]) -> tuple[Tensor, Tokens, list[PackedImage]]:
        """Images (3, h, w) of any sizes, in rows as long as the longest of them needs."""
        if self.config.stages:
            raise ValueError("a hierarchical model merges neighbouring tokens: its images cannot be packed into rows")
        embedded = [self._embed(image[None])[0][0] for image in images]
        grids = [self._grid(image) for image in images]
        length = max(len(x) for x in embedded)
        places = pack(self.config, grids, length)
        tokens = in_rows(self.config, places, length, embedded[0].device)
        rows: list[list[Tensor]] = [[] for _ in tokens.rows]
        for place, x in zip(places, embedded, strict=True):
            rows[place.row].append(x)
        filled = [F.pad(torch.cat(row), (0, 0, 0, length - sum(map(len, row)))) for row in rows]
        return torch.stack(filled), tokens, places

    def _tokens_of(self, grid: tuple[int, int]) -> int:
        return layout(self.config, grid).tokens

    def _merge(self, merge: nn.Module, x: Tensor, residual: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tokens]:
        assert isinstance(merge, Merge)
        ((grid,),) = tokens.rows
        smaller = (grid[0] // merge.factor, grid[1] // merge.factor)
        if (smaller[0] * merge.factor, smaller[1] * merge.factor) != grid:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} tokens cannot be made {merge.factor} times smaller")
        x = merge(x if residual is None else residual + x, grid)
        return x, Tokens(self.config, ((smaller,),), smaller[0] * smaller[1], x.device)

    def _map(self, stream: Tensor, tokens: Tokens) -> Tensor:
        ((grid,),) = tokens.rows
        return layout(self.config, grid).of_image(stream).mT.unflatten(-1, grid)

    def _pooled(self, x: Tensor, tokens: Tokens, places: list[PackedImage] | None) -> Tensor:
        """(b, features) of the normalised tokens."""
        if places is None:
            ((grid,),) = tokens.rows
            return self._pool(x, grid)
        rows = [x[p.row, p.start : p.start + self._tokens_of(p.grid)][None] for p in places]
        return torch.cat([self._pool(row, p.grid) for row, p in zip(rows, places, strict=True)])

    def _pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        where = layout(self.config, grid)
        if self.config.pooling == "cls":
            return torch.stack([x[:, place] for place in where.cls]).mean(dim=0)
        if self.config.pooling == "registers":
            read = torch.stack([x[:, place] for place in where.registers], dim=1)
            if self.neck is None or self.neck_norm is None:
                return read.flatten(1)
            return self.neck_norm(self.neck(read).flatten(1), None)[0]
        if self.config.pooling == "last":
            return x[:, -1]
        image = where.of_image(x)
        return image.amax(dim=1) if self.config.pooling == "max" else image.mean(dim=1)

    def backward_stretches(self) -> dict[str, list[tuple[Fraction, Fraction]]]:
        """Which parts of which parameters belong to backward paths alone: (from, to), shares of the flattened one."""
        stretches: dict[str, list[tuple[Fraction, Fraction]]] = {}
        for i, block in enumerate(self.blocks):
            mixer = block.mixer
            if not isinstance(mixer, Mamba):
                continue
            for name in ("A_log",) if mixer.shared else PATH_PARAMETERS:
                k = len(mixer.paths)
                parts = [(Fraction(path, k), Fraction(path + 1, k)) for path in mixer.backward_paths]
                if parts:
                    stretches[f"blocks.{i}.mixer.{name}"] = parts
        return stretches

    def no_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: vectors, embeddings, the scan's A, D and biases."""
        spared = {"pos_embed", "cls_token", "registers", "A_log", "D", "conv_bias", "dt_bias", "fuse_logits"}
        vectors = {name for name, p in self.named_parameters() if p.ndim == 1 and not name.endswith("backward_gate")}
        return vectors | {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in spared}
