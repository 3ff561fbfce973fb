"""Activation recomputation: which layers recompute in the backward pass what they could have kept.

The model recomputes (`VisionMamba.recompute`, one level per layer); this file chooses the levels. It does not estimate
what a layer keeps: it builds the layer with fake tensors, which have shapes and no memory, and counts what autograd
saves.
"""

import dataclasses
import math
from functools import lru_cache
from typing import get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from vimscale.errors import RecipeError
from vimscale.model.cost import costs
from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer, second_of_pairs
from vimscale.model.tokens import Tokens
from vimscale.model.vim import Block, Recompute
from vimscale.recipe.sections import Parallel, recompute_every, size_bytes

_LONGEST_SIDE = 2**15
"""Pixels of an image that a config takes."""
_FROM_MORE_TO_LESS: tuple[Recompute, ...] = ("scan", "block")


def levels(parallel: Parallel, config: VimConfig, batch: int, device: str) -> tuple[Recompute, ...]:
    """One level per layer, for micro-batches of `batch` images on a device of that type.

    Raises:
        RecipeError: the byte budget cannot be met.
    """
    rule, layers = parallel.recompute, len(config.layers)
    every, budget = recompute_every(rule), size_bytes(rule)
    if every is not None:
        return tuple("none" if i % every else "block" for i in range(layers))
    if budget is None:
        return (rule,) * layers  # type: ignore[return-value]  # the recipe has checked it
    kept = {
        level: kept_bytes(config, level, batch, parallel.precision, device, parallel.context)
        for level in get_args(Recompute)
    }
    chosen: list[Recompute] = ["none"] * layers
    total = sum(kept["none"])
    for level in _FROM_MORE_TO_LESS:
        for i in range(layers):
            if total > budget:
                total -= kept[chosen[i]][i] - kept[level][i]
                chosen[i] = level
    if total > budget:
        fault = (
            f"parallel.recompute {rule}: even with block in every layer, micro-batches of {batch} images keep"
            f" {total / 1e9:.2f} GB; allow that much or set a smaller parallel.micro_batch"
        )
        raise RecipeError("recipe", [fault])
    return tuple(chosen)


def kept_bytes(
    config: VimConfig, level: Recompute, batch: int, precision: str, device: str = "cpu", context: int = 1
) -> list[int]:
    """Bytes that each layer keeps from the forward to the backward pass, for `batch` images; of one of `context` ranks
    that share them.
    """
    mine = of_one_rank(config, context)
    seconds = second_of_pairs(config.layers)
    parts = [part for part in costs(mine) if part.layer is not None]
    kept = [
        _kept(mine, part.layer, part.d_model, part.tokens, batch, level, precision, device, i in seconds)
        for i, part in enumerate(parts)
        if part.layer is not None
    ]
    if context == 1 or level == "block":
        return kept
    gathered = [gathered_bytes(config, layer, batch, precision) for layer in config.layers]
    return [size + more for size, more in zip(kept, gathered, strict=True)]


def gathered_bytes(config: VimConfig, layer: Layer, batch: int, precision: str) -> int:
    """Bytes of the keys and values of all tokens, which ranks that share images gather in an attention layer."""
    if layer.kind != "attn":
        return 0
    return 2 * batch * config.tokens * config.d_model * (2 if precision == "bf16" else 4)


@lru_cache(maxsize=256)
def of_one_rank(config: VimConfig, context: int) -> VimConfig:
    """A model of images with as many tokens as one of `context` ranks holds of each image, to count what it does.

    It has the most tokens of any rank, or a few more: extra tokens are all counted, and the grid is a rectangle.
    """
    if context == 1:
        return config
    extra = config.tokens - config.patches
    patches = max(-(-config.tokens // context) - extra, config.registers, 1)
    longest = (_LONGEST_SIDE - config.patch_size) // config.step + 1
    rows = min(
        range(max(-(-patches // longest), 1), math.isqrt(patches) + 1),
        key=lambda rows: (-(-patches // rows) * rows, -rows),
    )
    height, width = (config.patch_size + (side - 1) * config.step for side in (rows, -(-patches // rows)))
    return dataclasses.replace(config, image_size=(height, width))


@lru_cache(maxsize=512)
def _kept(
    config: VimConfig,
    layer: Layer,
    d: int,
    length: int,
    batch: int,
    level: Recompute,
    precision: str,
    device: str,
    paired: bool,
) -> int:
    narrow = precision == "bf16"
    if level == "block":
        return batch * length * d * (2 if narrow else 4) + batch * length * d * 4
    found: dict[int, int] = {}
    with FakeTensorMode(), torch.device(device):
        block = Block(config, layer, d, paired=paired)
        own = {p.untyped_storage()._cdata for p in block.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage.nbytes()
            return t

        x = torch.empty(batch, length, d, dtype=torch.bfloat16 if narrow else torch.float32)
        residual = torch.empty(batch, length, d)
        shrink = math.isqrt(config.tokens // length)  # of a hierarchical model's later stages
        grid = (config.grid[0] // shrink, config.grid[1] // shrink)
        tokens = Tokens(config, ((grid,),), length, torch.device(device))
        for t in (x, residual):
            t.requires_grad_()
        keep = []  # fake storages can be told apart only while they live
        with saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, torch.bfloat16, enabled=narrow):
            keep.append(block(x, residual, tokens, recompute=level == "scan"))
    return sum(found.values())
