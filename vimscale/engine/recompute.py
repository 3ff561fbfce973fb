"""Activation recomputation: which layers recompute in the backward pass what they could have kept.

The model recomputes (`VisionMamba.recompute`, one level per layer); this file chooses the levels. It does not estimate
what a layer keeps: it builds the layer with fake tensors, which have shapes and no memory, and counts what autograd
saves.
"""

import math
from functools import lru_cache
from typing import get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from vimscale.errors import RecipeError
from vimscale.model.block import Block, Recompute
from vimscale.model.cost import costs
from vimscale.model.layout import Grid, layout
from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer, second_of_pairs
from vimscale.model.stretch import Stretch
from vimscale.model.tokens import Tokens
from vimscale.ops import Alone
from vimscale.recipe.objective import ObjectiveOptions
from vimscale.recipe.sections import Parallel, recompute_every, size_bytes

_FROM_MORE_TO_LESS: tuple[Recompute, ...] = ("scan", "block")


def levels(
    parallel: Parallel,
    config: VimConfig,
    batch: int,
    device: str,
    lowest: int = 0,
    *,
    objective: ObjectiveOptions | None = None,
) -> tuple[Recompute, ...]:
    """One level per layer, for micro-batches of `batch` images on a device of that type. `lowest`: the first layer that
    the backward pass reaches; those below keep nothing, so they recompute nothing. `objective`: decides what of an
    image is encoded; default: all of it.

    Raises:
        RecipeError: the byte budget cannot be met.
    """
    rule, layers = parallel.recompute, len(config.layers)
    every, budget = recompute_every(rule), size_bytes(rule)
    if every is not None:
        return tuple("none" if i % every or i < lowest else "block" for i in range(layers))
    if budget is None:
        return ("none",) * lowest + (rule,) * (layers - lowest)  # type: ignore[return-value]  # the recipe has checked
    kept = {
        level: kept_bytes(config, level, batch, parallel.precision, device, parallel.context, objective)
        for level in get_args(Recompute)
    }
    chosen: list[Recompute] = ["none"] * layers
    total = sum(kept["none"][lowest:])
    for level in _FROM_MORE_TO_LESS:
        for i in range(lowest, layers):
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
    config: VimConfig,
    level: Recompute,
    batch: int,
    precision: str,
    device: str = "cpu",
    context: int = 1,
    objective: ObjectiveOptions | None = None,
) -> list[int]:
    """Bytes that each layer keeps from the forward to the backward pass, for `batch` images; of one of `context` ranks
    that share them. `objective`: as of `levels`.
    """
    seen = None
    if objective is not None and not config.stages and config.tiles is None:
        seen = objective.grids(config)
    seconds = second_of_pairs(config.layers)
    parts = [part for part in costs(config) if part.layer is not None]
    return [
        _kept(
            config,
            part.layer,
            part.d_model,
            seen or (_grid(config, part.tokens),),
            batch,
            level,
            precision,
            device,
            i in seconds,
            context,
        )
        for i, part in enumerate(parts)
        if part.layer is not None
    ]


def _grid(config: VimConfig, tokens: int) -> Grid:
    """The grid of a layer with so many tokens, fewer in a hierarchical model's later stages."""
    shrink = math.isqrt(config.tokens // tokens)
    return config.grid[0] // shrink, config.grid[1] // shrink


@lru_cache(maxsize=512)
def _kept(
    config: VimConfig,
    layer: Layer,
    d: int,
    grids: tuple[Grid, ...],
    batch: int,
    level: Recompute,
    precision: str,
    device: str,
    paired: bool,
    context: int,
) -> int:
    narrow = precision == "bf16"
    own = Stretch.of(Alone(context - 1, context), config, grids[0]) if context > 1 else None
    length = sum(layout(config, grid).tokens for grid in grids) if own is None else own.slots.tokens
    if level == "block":
        return batch * length * d * (2 if narrow else 4) + batch * length * d * 4
    found: dict[int, int] = {}
    with FakeTensorMode(), torch.device(device):
        block = Block(config, layer, d, paired=paired)
        parameters = {p.untyped_storage()._cdata for p in block.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in parameters:
                found[storage._cdata] = storage.nbytes()
            return t

        x = torch.empty(batch, length, d, dtype=torch.bfloat16 if narrow else torch.float32)
        residual = torch.empty(batch, length, d)
        tokens = Tokens(config, (grids,), length, torch.device(device), stretch=own)
        for t in (x, residual):
            t.requires_grad_()
        keep = []  # fake storages can be told apart only while they live
        with saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, torch.bfloat16, enabled=narrow):
            keep.append(block(x, residual, tokens, recompute=level == "scan"))
    return sum(found.values())
