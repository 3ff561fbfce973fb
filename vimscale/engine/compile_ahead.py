"""The first step's Triton kernels, compiled while the engine is built and data are opened.

Without this they are compiled one after the other when the first forward and backward pass launch them.
"""

import dataclasses
import logging
import platform
from collections.abc import Callable

import torch
import torch.distributed as dist

from vimscale.data.images import augment
from vimscale.engine import recompute
from vimscale.model import VimConfig, VisionMamba, tiles
from vimscale.model.block import Recompute
from vimscale.model.schedule import Layer
from vimscale.model.vim import Images
from vimscale.ops import Alone, Precompiler
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import distributed

log = logging.getLogger(__name__)


class CompileAhead:
    """Starts to compile at once on a GPU; does nothing on a CPU, whose kernels are cached elsewhere. After an error,
    the first step compiles.
    """

    def __init__(self, config: VimConfig, recipe: Recipe, device: torch.device, threads: int):
        self._used = device.type == "cuda"
        self._compiler: Precompiler | None = None
        if not self._used:
            return
        node, nodes = platform.node(), [""] * dist.get_world_size()
        dist.all_gather_object(nodes, platform.node())
        index = nodes[: dist.get_rank()].count(node)

        def record() -> None:
            self._compiler = Precompiler(threads, index, nodes.count(node))
            with self._compiler.recording():
                rehearse(config, recipe, len(nodes), device)

        self._try(record)
        torch.cuda.empty_cache()

    def finish(self) -> None:
        """Wait for the kernels. All ranks call it, before anything launches one.

        The ranks of one machine share the work through Triton's cache on disk.
        """
        if not self._used:
            return
        if self._compiler is not None:
            self._try(self._compiler.compile_own)
        dist.barrier()
        if self._compiler is not None:
            self._try(self._compiler.finish)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # of any kind: what the rehearsal meets, the first step meets again if it is real
            log.warning("kernels cannot be compiled ahead; the first step compiles them: %s", error)
            self._compiler = None


def rehearse(config: VimConfig, recipe: Recipe, world: int, device: torch.device) -> None:
    """A forward and backward pass as in the first step, of an encoder that has each kind of layer once or twice. Leaves
    random generators alone. A user's own kinds of layers are left out.
    """
    micro, config = recipe.micro_batch(world).size, recipe.largest(config)
    levels = recompute.levels(recipe.parallel, config, micro, device.type, objective=recipe.objective)
    small, chosen = _sample(config, levels)
    if not chosen:
        return
    with torch.device("meta"):
        encoder = VisionMamba(small)
    encoder.to_empty(device=device)
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        tensor.detach().zero_()
    encoder.recompute = chosen
    if recipe.parallel.context > 1:
        encoder.context = Alone(0, recipe.parallel.context)
    images = _images(small, recipe, recipe.micro_batch(world, 0).size, device)
    draws = torch.full((len(images), len(chosen)), 0.5, device=device) if small.drop_path > 0 else None
    parts = distributed.backward_parts(config, recipe.seed, 0)
    for backward in (None,) if parts is None else ([0.5] * len(chosen), [0.0] * len(chosen)):
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.parallel.precision == "bf16"):
            y = encoder(images, draws, backward, features=True)
        y.sum().backward()


def _images(config: VimConfig, recipe: Recipe, count: int, device: torch.device) -> Images:
    """Blank images of the first step's shapes, as `Prefetcher` gives them."""
    if config.tiles is not None:
        return [tiles.blank(config, device) for _ in range(count)]
    shapes = augment.buckets(config.size, config.patch_size, recipe.augment.buckets)
    if len(shapes) > 1:
        return [torch.zeros(3, *shapes[i % len(shapes)], device=device) for i in range(count)]
    return torch.zeros(count, 3, *recipe.size_at(0, config.size), device=device)


def _sample(config: VimConfig, levels: tuple[Recompute, ...]) -> tuple[VimConfig, list[Recompute]]:
    """The config with only one of each kind of layer, and the recomputation level of each. The first layer of a stage
    counts as a kind, because it has no residual stream to add.
    """
    stages = config.stages or (None,)
    chosen: list[Recompute] = []
    texts: list[str] = []
    first = 0
    for stage in stages:
        depth = len(config.layers) if stage is None else stage.depth
        both = list(zip(config.layers, levels, strict=True))[first : first + depth]
        first += depth
        kept = _one_of_each([(layer, level) for layer, level in both if not layer.is_own])
        texts.append(" ".join(str(layer) for layer, _ in kept))
        chosen += [level for _, level in kept]
    if not all(texts):
        return config, []
    counts = [len(text.split()) for text in texts]
    if not config.stages:
        return dataclasses.replace(config, directions=texts[0], depth=counts[0], kinds=()), chosen
    shrunk = tuple(
        dataclasses.replace(stage, directions=text, depth=count)
        for stage, text, count in zip(config.stages, texts, counts, strict=True)
    )
    return dataclasses.replace(config, stages=shrunk, kinds=()), chosen


def _one_of_each(layers: list[tuple[Layer, Recompute]]) -> list[tuple[Layer, Recompute]]:
    """The first layer, or pair, and one of each distinct one among those that follow."""
    groups = []
    while layers:
        size = 2 if layers[0][0].kind == "pair" else 1
        groups.append(tuple(layers[:size]))
        layers = layers[size:]
    kept = [*groups[:1], *dict.fromkeys(groups[1:])]
    return [layer for group in kept for layer in group]
