"""What DeepSpeed holds and sends for given parameters, to the byte, at every ZeRO stage; needs no engine.

`tests/estimate/test_planning.py` tests these figures against what a real engine holds and sends. They follow DeepSpeed
0.19 under `deepspeed_engine.ds_config`: fp32 parameters whatever the precision of the compute, groups flattened and
padded at stages 1 and 2, each parameter separately at stage 3, and a bucket that gradients are copied into.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from vimscale.engine import flat, layerwise, optim
from vimscale.model import VimConfig, VisionMamba
from vimscale.objectives.base import Learner
from vimscale.objectives.build import build
from vimscale.recipe.recipe import Recipe

BUCKET = 500_000_000
"""The most elements of gradients that DeepSpeed sends at once: its reduce_bucket_size."""
_SUB_GROUP = 1_000_000_000
_REUSE = 1_000_000_000
"""stage3_max_reuse_distance: stage 3 keeps a parameter that is used again within this many elements."""
_PREFETCH = 50_000_000
_NARROW_KINDS = (nn.Linear, nn.Conv2d)
"""Modules whose gradients and weights travel in bf16 under autocast at stage 3; subclasses do not."""


@dataclass(frozen=True)
class Parameter:
    name: str
    numel: int
    group: int
    """Its group in the optimizer."""
    narrow: bool
    """Whether its gradient travels in bf16."""


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds between steps; `gradients`: at the end of a step's backward passes."""

    parameters: int
    """The weights that the model computes with."""
    weights: int
    """The weights that the optimizer updates, if they are a separate copy."""
    optimizer: int
    """Moments and counts of updates."""
    ema: int
    gradients: int

    @property
    def between_steps(self) -> int:
        return self.parameters + self.weights + self.optimizer + self.ema


@dataclass(frozen=True)
class Sent:
    """A step's collectives as one rank sees them: bytes of the complete tensors, and the least number of calls."""

    all_reduce: int
    reduce_scatter: int
    all_gather: int
    calls: int

    @property
    def total(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather


def parameters(config: VimConfig, recipe: Recipe, zero: int, world: int) -> tuple[Parameter, ...]:
    """What DeepSpeed takes for the trained parameters of encoder and objective, in its order: at stage 3 each one,
    otherwise the pieces of flat tensors. Allocates nothing.
    """
    model = learner(config, recipe)
    bf16 = recipe.parallel.precision == "bf16"
    if zero < 3:
        groups = flat.layout(model, recipe.optim, zero, world, bf16=bf16)
        return tuple(
            Parameter(group.kind, numel, number, segment.narrow)
            for number, group in enumerate(groups)
            for segment in group.segments
            for numel in segment.pieces
        )
    factors = layerwise.factors(model, recipe.optim)
    adamw = optim.optimizer(model.trained(), model.no_decay(), recipe.optim, fused=False, factors=factors).param_groups
    group_of = {id(p): number for number, group in enumerate(adamw) for p in group["params"]}
    narrow = set()
    if bf16:
        narrow = {id(p) for m in model.modules() if type(m) in _NARROW_KINDS for p in m.parameters(recurse=False)}
    return tuple(Parameter(name, p.numel(), group_of[id(p)], id(p) in narrow) for name, p in model.trained())


def learner(config: VimConfig, recipe: Recipe) -> Learner:
    """What the recipe trains, on the meta device, with its frozen parameters frozen."""
    with torch.device("meta"):
        model = Learner(build(recipe.objective, config), VisionMamba(config))
    layerwise.freeze(model, recipe.optim.freeze)
    return model


def frozen(sizes: Sequence[int], zero: int, world: int, *, persist: int) -> int:
    """Bytes that a rank holds of frozen parameters with that many elements: nothing but their weights."""
    if zero < 3:
        return 4 * sum(sizes)
    kept_full = sum(size for size in sizes if size <= persist) if world > 1 else 0
    return 4 * (sum(-(-size // world) for size in sizes) + kept_full)


def _groups(parameters: Sequence[Parameter]) -> list[list[int]]:
    """Sizes of each group's parameters."""
    return [[p.numel for p in parameters if p.group == group] for group in range(max(p.group for p in parameters) + 1)]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _shard_sizes(parameters: Sequence[Parameter], world: int) -> list[int]:
    """Elements of a rank's shard of each group, padding included, at stages 1 and 2."""
    return [flat.shard_size(sum(sizes), world) for sizes in _groups(parameters)]


def _kept_gradients(ends: list[int], shard: int, rank: int) -> int:
    """Elements of gradients that a rank keeps of one group at stages 1 and 2: every parameter that overlaps its shard,
    in full, and its padding. `ends`: where in the group each parameter ends.
    """
    low, high = rank * shard, (rank + 1) * shard
    total = ends[-1]
    first = bisect_right(ends, low)
    last = bisect_left(ends, min(high, total))
    here = ends[last] - (ends[first - 1] if first else 0) if low < total else 0
    return here + max(high - max(low, total), 0)


def held(parameters: Sequence[Parameter], zero: int, world: int, rank: int, *, persist: int, ema: bool) -> Held:
    """What rank `rank` of `world` holds."""
    total = sum(p.numel for p in parameters)
    if zero == 0:
        return Held(4 * total, 0, 8 * total + 4 * len(parameters), 4 * total if ema else 0, 4 * total)
    if zero < 3:
        shards = _shard_sizes(parameters, world)
        mine = sum(shards)
        groups = _groups(parameters)
        ends = [list(accumulate(sizes)) for sizes in groups]
        gradients = sum(_kept_gradients(e, shard, rank) for e, shard in zip(ends, shards, strict=True))
        return Held(4 * mine * world, 4 * mine, 8 * mine + 4 * len(shards), 4 * mine if ema else 0, 4 * gradients)
    parts = [-(-p.numel // world) for p in parameters]
    kept_full = sum(p.numel for p in parameters if p.numel <= persist) if world > 1 else 0
    flat_tensors = sum(_sub_groups(sizes, world) for sizes in _groups(parameters))
    mine = 4 * sum(parts)
    return Held(mine + 4 * kept_full, mine, 2 * mine + 4 * flat_tensors, mine if ema else 0, mine)


def _sub_groups(sizes: list[int], world: int) -> int:
    """The number of flat tensors that one group becomes at stage 3."""
    count, filled = 0, 0
    for i, size in enumerate(sizes):
        filled += -(-size // world)
        if filled >= _SUB_GROUP or i == len(sizes) - 1:
            count, filled = count + 1, 0
    return count


def heaviest(parameters: Sequence[Parameter], zero: int, world: int, *, persist: int, ema: bool) -> Held:
    """What the rank that holds the most holds."""
    if zero in (0, 3):
        return held(parameters, zero, world, 0, persist=persist, ema=ema)
    shards = _shard_sizes(parameters, world)
    ends = [list(accumulate(sizes)) for sizes in _groups(parameters)]
    most = max(
        range(world),
        key=lambda rank: sum(_kept_gradients(e, shard, rank) for e, shard in zip(ends, shards, strict=True)),
    )
    return held(parameters, zero, world, most, persist=persist, ema=ema)


def buckets(parameters: Sequence[Parameter], zero: int) -> int:
    """Bytes of the buckets that gradients are copied into: during the backward pass at stages 1 and 2, always at 3.
    There is one for each dtype that travels; at stages 1 and 2 all are as large as fp32's.
    """
    if zero == 0:
        return 0
    room = min(BUCKET, sum(p.numel for p in parameters))
    return sum(room * (2 if narrow and zero == 3 else 4) for narrow in {p.narrow for p in parameters})


def gathered(parameters: Sequence[Parameter], world: int, *, persist: int) -> int:
    """The most bytes of parameters that stage 3 gathers at a time, not counting those that stay gathered."""
    sizes = [p.numel for p in parameters if p.numel > persist]
    total = sum(sizes) if world > 1 else 0
    return 4 * (total if total <= _REUSE // 2 else min(total, _REUSE // 2 + _PREFETCH + max(sizes)))


def slices(parameters: Sequence[Parameter]) -> int:
    """The most bytes of gradients at the end of a flat segment's backward pass: its slices', all of them in two
    dtypes, or twice.
    """
    group = max(sum(sizes) for sizes in _groups(parameters))
    return 8 * min(group, flat.SEGMENT + max(p.numel for p in parameters))


def transient(parameters: Sequence[Parameter], zero: int, world: int) -> int:
    """The most bytes that reducing gradients or updating takes for a moment, when the activations are gone."""
    total = sum(p.numel for p in parameters)
    if zero == 0:
        return 4 * min(total, BUCKET + max(p.numel for p in parameters))
    if zero < 3:
        return 4 * max(_shard_sizes(parameters, world))
    return 4 * max(min(total, BUCKET), *(min(-(-sum(g) // world), _SUB_GROUP) for g in _groups(parameters)))


def sent(parameters: Sequence[Parameter], zero: int, world: int, accumulation: int, *, persist: int) -> Sent:
    """The collectives of one step of `accumulation` micro-batches; leaves out those of a few numbers, for norms."""
    if world == 1:
        return Sent(0, 0, 0, 0)
    total = sum(p.numel for p in parameters)
    travelling = sum(p.numel * (2 if p.narrow else 4) for p in parameters)
    rounds = -(-total // BUCKET)
    if zero == 0:
        return Sent(4 * total, 0, 0, rounds)
    if zero < 3:
        times = accumulation if zero == 2 else 1
        weights = 4 * world * sum(_shard_sizes(parameters, world))
        return Sent(times * travelling, 0, weights, times * rounds + len(_groups(parameters)))

    def size(p: Parameter, width: int) -> int:
        return width * _up(p.numel, world)

    scattered = sum(size(p, 2 if p.narrow else 4) for p in parameters)
    large = [p for p in parameters if p.numel > persist]
    once = sum(size(p, 2 if p.narrow else 4) for p in large)
    of_large = sum(p.numel for p in large)
    # parameters that the backward pass needs soon after the forward pass stay gathered
    again = max(of_large - _REUSE // 2, 0) / of_large if large else 0.0
    small = sum(size(p, 4) for p in parameters if p.numel <= persist)
    calls = accumulation * (rounds + -(-of_large // _PREFETCH)) + len(parameters) - len(large)
    return Sent(0, accumulation * scattered, round(accumulation * once * (1 + again)) + small, calls)
