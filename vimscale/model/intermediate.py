"""What a VisionMamba gives besides logits: tokens, maps of chosen layers, other heads, depths and image sizes. Names,
arguments and results are those of timm's models.

Axes: b images, n tokens with class tokens first, then registers, then the image's l tokens in row order; d model width.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vimscale.model import schedule
from vimscale.model.block import Head, NoNorm, Recompute, no_decay
from vimscale.model.layout import Grid, layout
from vimscale.model.mixer import Factor
from vimscale.model.presets import Pool, VimConfig
from vimscale.model.tokens import Tokens, resized

Tap = tuple[Tensor, Tokens]
"""The residual stream (b, l, d) after a layer, and what its tokens are."""
POOLS: dict[str, Pool] = {"avg": "mean", "token": "cls", **{pool: pool for pool in get_args(Pool)}}
"""What `global_pool` may be: timm's names and ours."""


class FeatureExtractor(nn.Module):
    """What VisionMamba inherits. `_encoded`, `_pool` and `_groups` are VisionMamba's."""

    config: VimConfig
    context: Any
    blocks: nn.ModuleList
    merges: nn.ModuleDict
    norm: nn.Module
    neck: nn.Module | None
    neck_norm: nn.Module | None
    head: nn.Module | None
    pos_embed: nn.Parameter | None
    drop_rates: Tensor
    recompute: Sequence[Recompute]
    _paired: frozenset[int]

    def _encoded(
        self, images: Any, draws: Tensor | None, backward: Any, chosen: Sequence[int] = (), until: int | None = None
    ) -> tuple[Tensor, Tokens, Any, list[Tap]]:
        raise NotImplementedError

    def _pool(self, x: Tensor, grid: Grid) -> Tensor:
        raise NotImplementedError

    def _groups(self) -> list[tuple[int, ...]]:
        raise NotImplementedError

    # ---- tokens and maps

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Width of the tokens that `forward_features` returns."""
        return self.config.widths[-1]

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head reads: `num_features`, unless it reads several registers."""
        return self.config.features

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class tokens and registers."""
        return self.config.cls_tokens + self.config.registers

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Describe each map of `forward_intermediates`, those of the layers or, in a hierarchical model, of the stages:
        `num_chs`, its channels; `reduction`, the pixels from one of its cells to the next; `module`, the block whose
        output completes it.
        """
        info: list[dict[str, Any]] = []
        ran = sum(map(len, self._groups()))
        end, reduction = 0, self.config.step
        for i, stage in enumerate(self.config.parts):
            start, end = end, end + stage.depth
            reduction *= stage.downsample if i else 1
            for layer in range(end - 1 if self.config.stages else start, min(end, ran)):
                info.append({"num_chs": stage.d_model, "reduction": reduction, "module": f"blocks.{layer}"})
        return info

    def forward_features(
        self, x: Tensor, draws: Tensor | None = None, backward: Sequence[Factor] | None = None
    ) -> Tensor:
        """Return the normalized tokens (b, n, d) of images (b, 3, h, w): class tokens first, then registers, then the
        image's tokens in row order, wherever the sequence has them. `draws` and `backward` are those of `forward`.

        Raises:
            ValueError: the images are a list, or ranks share them; or patches do not fill a side.
        """
        return self._outputs(x, (), draws, backward)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return what `forward` does, the logits (b, num_classes) in fp32, from the tokens (b, n, d) of
        `forward_features`; with `pre_logits`, or without a head, what the head reads (b, head_hidden_size).

        Raises:
            ValueError: x has too few tokens.
        """
        count = x.shape[1] - self.num_prefix_tokens
        if count < max(self.config.registers, 1):
            raise ValueError(f"{x.shape[1]} tokens, {self.num_prefix_tokens} of them no patch, are not of an image")
        grid = (1, count)  # where the extra tokens are depends on the number of patches alone
        read = self._pool(layout(self.config, grid).sequence(x), grid)
        return read if pre_logits or self.head is None else self.head(read).float()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        draws: Tensor | None = None,
        backward: Sequence[Factor] | None = None,
    ) -> Any:
        """Return the last tokens and maps after chosen layers, or stages in a hierarchical model, of images
        (b, 3, h, w).

        Args:
            x: the images.
            indices: of `feature_info`: which maps, negative ones from the end, or how many of the last; None: all.
                The result has them in the model's order, each once.
            return_prefix_tokens: also return class tokens and registers (b, m, d) with each map, if the model has any.
            norm: apply the last norm to the maps; in a hierarchical model, to that of the last stage only.
            stop_early: do not run later layers; the last tokens are then those of the last chosen layer.
            output_fmt: maps as (b, d, rows, columns) or (b, l, d).
            intermediates_only: return the maps without the last tokens. Later layers then do not run.
            output_dict: return a dictionary.
            draws: as in `forward`.
            backward: as in `forward`.

        Returns:
            (tokens, maps): tokens as from `forward_features`, and a list of maps, or of pairs (map, prefix tokens).
            Only the list with `intermediates_only`. With `output_dict`, the keys are image_features,
            image_intermediates and image_intermediates_prefix.

        Raises:
            ValueError: an index is out of range; the images are a list, or ranks share them; or patches do not fill a
                side.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; use NCHW or NLC")
        layers = [self._layer(i) for i in self._taken(indices)]
        until = max(layers, default=None) if stop_early or intermediates_only else None
        tokens, prefixes, maps = self._outputs(x, layers, draws, backward, norm, until, output_fmt == "NCHW")
        return_prefix_tokens = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                named["image_intermediates_prefix"] = prefixes
            return named if intermediates_only else named | {"image_features": tokens}
        found = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return found if intermediates_only else (tokens, found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the maps of the last `n` of `forward_intermediates`, or of those with the indices `n`: (b, l, d), or
        (b, d, rows, columns) with `reshape`.
        """
        fmt: Literal["NCHW", "NLC"] = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True)

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the indices of `feature_info` that `indices` ask for, in ascending order."""
        count = len(self.feature_info)
        what = "stage" if self.config.stages else "layer"
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"the last {indices} {what}s are not among {count}: use 1 to {count}, or a list")
            return list(range(count - indices, count))
        if not indices:
            raise ValueError(f"no {what} is chosen: give at least one index")
        return sorted({index_of(i, count, what) for i in indices})

    def _layer(self, feature: int) -> int:
        """Return the layer that completes a map."""
        return int(self.feature_info[feature]["module"].removeprefix("blocks."))

    def _in_last_stage(self, layer: int) -> bool:
        return all(int(first) <= layer for first in self.merges)

    def _outputs(
        self,
        images: Tensor,
        layers: Sequence[int],
        draws: Tensor | None,
        backward: Sequence[Factor] | None,
        norm: bool = False,
        until: int | None = None,
        as_map: bool = True,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the last tokens (b, n, d), and prefix tokens and maps after each of the `layers`."""
        if self.context is not None:
            raise ValueError("tokens and maps need whole images, and ranks share these: ask for features instead")
        if not isinstance(images, Tensor):
            raise ValueError("tokens and maps need images of one size: pass a tensor (b, 3, h, w)")
        x, tokens, _, taps = self._encoded(images, draws, backward, layers, until)
        prefixes, maps = [], []
        for layer, (stream, its) in zip(layers, taps, strict=True):
            if norm and self._in_last_stage(layer):
                stream, _ = self.norm(stream, None)
            prefix, image = self._split(stream, its)
            ((grid,),) = its.rows
            prefixes.append(prefix)
            maps.append(image.mT.unflatten(-1, grid).contiguous() if as_map else image)
        return torch.cat(self._split(x, tokens), dim=1), prefixes, maps

    def _split(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Split sequences (b, n, d) into (class tokens and registers, the image's tokens in row order)."""
        ((grid,),) = tokens.rows
        slots = layout(self.config, grid)
        return slots.prefix_tokens(x), slots.image_tokens(x)

    # ---- another head, depth or size

    def get_classifier(self) -> nn.Module:
        """Return the head; the identity if there is none."""
        return nn.Identity() if self.head is None else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`, with weights drawn as at construction. 0: `forward` then
        returns what the head would read. `global_pool`: what it reads, one of `POOLS`; default: as before.

        Raises:
            ValueError: the model has no such tokens, or the pool is unknown.
        """
        config = dataclasses.replace(self.config, num_classes=num_classes)
        if global_pool is not None:
            if global_pool not in POOLS:
                hint = "; call forward_features for tokens" if global_pool == "" else ""
                raise ValueError(f"global_pool {global_pool!r} is unknown; known: {', '.join(POOLS)}{hint}")
            pool = POOLS[global_pool]
            reduce = config.register_reduce if pool == "registers" else 1
            config = dataclasses.replace(config, pool=pool, register_reduce=reduce)
        if config.register_reduce == 1:
            self.neck = self.neck_norm = None
        self.config = config
        self.head = nn.Identity()
        if num_classes:
            head = Head(config.features, num_classes)
            head.init_weights()
            self.head = head.to(next(self.parameters()).device).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last of the chosen maps. Returns the chosen indices of `feature_info`. The second
        layer of a pair stays with the first.

        Args:
            indices: those of `forward_intermediates`.
            prune_norm: also remove the last norm: tokens are then the residual stream.
            prune_head: also remove the head, as `reset_classifier(0)` does.

        Raises:
            ValueError: an index is out of range; or the last norm or the head, which stays, is for the width of a stage
                that goes.
        """
        taken = self._taken(indices)
        last = next(group[-1] for group in self._groups() if self._layer(taken[-1]) in group)
        if not self._in_last_stage(last) and not (prune_norm and prune_head):
            raise ValueError("the last norm and the head are for the last stage: set prune_norm and prune_head")
        self._shorten(last + 1)
        if prune_norm:
            self.norm = NoNorm()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def _shorten(self, depth: int) -> None:
        """Keep the first `depth` layers, which end a stage or are in the last one."""
        old = self.config
        stages, end = [], 0
        for stage in old.parts:
            start, end = end, min(end + stage.depth, depth)
            if start < end:
                written = schedule.compact(old.layers[start:end])
                stages.append(dataclasses.replace(stage, depth=end - start, directions=written))
        drop_path = old.drop_path * (depth - 1) / max(len(old.layers) - 1, 1)
        if old.stages:
            change: dict[str, Any] = {"stages": tuple(stages)}
        else:
            change = {"depth": depth, "directions": stages[0].directions}
        self.config = dataclasses.replace(old, drop_path=drop_path, **change)
        self.blocks = self.blocks[:depth]
        self.merges = nn.ModuleDict({first: merge for first, merge in self.merges.items() if int(first) < depth})
        self.drop_rates = self.drop_rates[:depth]
        self.recompute = self.recompute[:depth]
        self._paired = schedule.second_of_pairs(self.config.layers)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Make the model one of images of another size, in pixels: resize a learned position embedding, as `forward`
        does for every such image. Other positions are computed for any size.

        Raises:
            ValueError: patches do not fill such images, or `patch_size` is another one.
        """
        if patch_size not in (None, self.config.patch_size):
            raise ValueError(f"patch_size is {self.config.patch_size} and cannot become {patch_size}: train a new stem")
        if img_size is None:
            return
        config = dataclasses.replace(self.config, image_size=img_size)
        if self.pos_embed is not None:
            learns, position = self.pos_embed.requires_grad, resized(self.pos_embed.detach(), self.config, config.grid)
            self.pos_embed = nn.Parameter(position.clone(), requires_grad=learns)
        self.config = config

    # ---- training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every layer in the backward pass, or none; `recompute` sets the level of each layer."""
        self.recompute = ["block" if enable else "none"] * len(self.blocks)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return no_decay(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for timm's `group_parameters`, in the order of the groups: the stem with
        class tokens, registers and positions; every layer, or every stage of a hierarchical model if `coarse`. Names
        that match nothing are the last group: norm, neck and head. What merges tokens for a stage belongs to its first
        layer.
        """
        stem = r"^cls_token|^registers|^pos_embed|^coordinates|^patch_embed"
        if not (coarse and self.config.stages):
            return {"stem": stem, "blocks": [(r"^blocks\.(\d+)\.", None), (r"^merges\.(\d+)\.", None)]}
        firsts = [0, *map(int, self.merges), len(self.blocks)]
        stages = ["|".join(map(str, range(*ends))) for ends in pairwise(firsts)]
        return {"stem": stem, "blocks": [(rf"^(?:blocks|merges)\.(?:{of})\.", (i,)) for i, of in enumerate(stages)]}


def index_of(i: int, count: int, what: str) -> int:
    """Return i, which counts from the end if it is negative, as an index from 0; raises ValueError if out of range."""
    if not -count <= i < count:
        raise ValueError(f"there is no {what} {i}: count from 0 to {count - 1}, or from the end with -1, -2 ...")
    return i % count
