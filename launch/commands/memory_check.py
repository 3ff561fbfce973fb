"""Whether a recipe fits into this machine's memory, asked before anything starts.

Otherwise the kernel kills its ranks minutes later, and again after each restart.
"""

from typing import TYPE_CHECKING

from vimscale.estimate.devices import DEVICES, key_of
from vimscale.model.cost import costs, parameters

from ..hardware import gpus, memory

if TYPE_CHECKING:
    from vimscale.data.training_set import TrainingSet
    from vimscale.estimate.planner import Target
    from vimscale.model.presets import VimConfig
    from vimscale.recipe.recipe import Recipe

RANK = 0.75e9
"""Bytes of a rank before it has a model: interpreter, torch, DeepSpeed. Measured: 0.74 GB."""
RAY = 0.7e9
"""Bytes of a Ray of our own."""
WORKER = 0.15e9
"""Bytes that a data worker does not share with the others."""
HEAP = 1.2
"""What a rank on a CPU grows to for each byte of a plan. Measured: 1.2 on vim_tiny and vim_small, with checkpoints."""
_A_TOKEN = 300
"""Bytes for each token and channel of a layer, and for each of the model's parameters 32: more than any model keeps."""


def check(recipe: "Recipe", data: "TrainingSet", world: int, *, ray: bool) -> None:
    """Refuse what `world` ranks of this machine have no room for. `ray`: whether a Ray of our own runs as well.

    What needs less than half of a CPU's room by a coarse estimate is not looked at further: a plan takes seconds, most
    of them to import torch.

    Raises:
        LaunchError: the numbers, and what would fit.
    """
    config = recipe.model.shape(len(data.manifest.classes))
    if not gpus() and at_most(recipe, config, world) < _room(recipe, config, world, ray=ray) / 2:
        return
    place = this_machine(recipe, config, world, ray=ray)
    if place is None:
        return
    from vimscale.estimate.planner import Planner

    Planner(recipe, config, place, data.samples).refuse(world, "--force starts it anyway")


def this_machine(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> "Target | None":
    """This machine as a place to plan for; None where its GPUs are not known to plans."""
    return _gpu(world) if gpus() else _cpu(recipe, config, world, ray=ray)


def at_most(recipe: "Recipe", config: "VimConfig", world: int) -> float:
    """Bytes of tensors that a rank will not exceed, without a plan."""
    micro, _ = recipe.micro_batch(world)
    height, width = config.size
    largest = 1.0
    for phase in recipe.phases:
        high, wide = recipe.size_at(phase.step, config.size)
        largest = max(largest, high * wide / (height * width) * recipe.batch_at(phase.step) / recipe.batch)
    layers = sum(part.tokens * part.d_model for part in costs(config))
    return 32 * parameters(config) + micro * largest * (_A_TOKEN * layers + 5 * 3 * height * width)


def _room(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> int:
    """Bytes that a plan may give each of `world` ranks that compute on this machine's CPUs."""
    height, width = config.size
    micro, _ = recipe.micro_batch(world)
    workers = recipe.data.workers * (WORKER + 3 * micro * 3 * height * width)
    return int(max((memory().available - RAY * ray) / world - RANK - workers, 0) / HEAP)


def _cpu(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> "Target":
    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    name = f"this machine ({memory().available / 1e9:.1f} GB available)"
    return Target(name, None, _room(recipe, config, world, ray=ray), Fabric(world, 1, 1), None)


def _gpu(world: int) -> "Target | None":
    """None where the GPU is not one that plans know. Not run on a GPU."""
    import torch

    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    kind = key_of(torch.cuda.get_device_name(0))
    if kind is None:
        return None
    free = min(torch.cuda.mem_get_info(number)[0] for number in range(min(world, gpus())))
    return Target(f"this machine's {kind}", DEVICES[kind], free, Fabric(world, DEVICES[kind].link, 1), None)
