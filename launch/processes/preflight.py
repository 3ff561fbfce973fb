"""What a run needs of this machine, checked before its ranks start: data, weights, number of ranks, memory.

Without the check of memory, the kernel kills ranks minutes later, and again after each restart.
"""

from typing import TYPE_CHECKING

from vimscale.estimate.devices import DEVICES, key_of
from vimscale.model.cost import costs, parameters
from vimscale.tracking import trackers

from ..hardware import cpus, gpus, memory
from . import num_ranks

if TYPE_CHECKING:
    from vimscale.data.training_set import TrainingSet
    from vimscale.estimate.planner import Target
    from vimscale.model.presets import VimConfig
    from vimscale.recipe.recipe import Recipe
    from vimscale.runtime.run_folder import RunFolder

RANK = 0.75e9
"""Bytes of a rank before it has a model: interpreter, torch, DeepSpeed. Measured: 0.74 GB."""
RAY = 0.7e9
"""Bytes of a Ray that this package starts."""
WORKER = 0.15e9
"""Bytes of a data worker that it does not share with the others."""
HEAP = 1.2
"""Bytes that a rank on a CPU grows by for each byte of a plan. Measured: 1.2 on vim_tiny and vim_small, with
checkpoints.
"""
_PER_TOKEN = 300
"""Bytes per token and channel of a layer, more than any model keeps. Likewise, 32 bytes per parameter."""


def check(recipe: "Recipe", folder: "RunFolder", workers: str | None, *, ray: bool, force: bool = False) -> int:
    """Check a run on this machine, and return its number of ranks. `ray`: the run starts its own Ray as well.
    `force`: do not check memory.

    Raises:
        UserError: the trackers, data, weights, number of ranks or memory do not allow the run; says what would.
    """
    trackers.check(recipe)
    train_set = check_inputs(recipe, folder)
    allowed = num_ranks.sizes(workers, recipe, cpus(), gpus(), "this machine")
    world = num_ranks.largest(allowed, cpus(), gpus())
    if not force:
        check_memory(recipe, train_set, world, ray=ray)
    return world


def check_inputs(recipe: "Recipe", folder: "RunFolder") -> "TrainingSet":
    """Open the recipe's data sets and check the weights that it starts from.

    Raises:
        DataError: a data set cannot be used.
        CheckpointError: the weights, or the checkpoint in `folder`, do not fit.
    """
    from vimscale.data.dataset import Dataset
    from vimscale.data.images.choice import Choice, check_kind
    from vimscale.data.training_set import TrainingSet, check_labels, check_same_labels
    from vimscale.export import starting

    labels = recipe.objective.classifies
    train_set = TrainingSet.open(recipe.data, labels=labels)
    opened = [*train_set.datasets]
    if recipe.data.val is not None:
        opened.append(Dataset.open(recipe.data.val, recipe.data.cache))
        if labels:
            check_labels(recipe.data.val, opened[-1].manifest)
    if recipe.evaluate.knn is not None and recipe.data.val is not None:
        bank = Dataset.open(recipe.evaluate.knn, recipe.data.cache)
        check_same_labels(bank.manifest, opened[-1].manifest)
        opened.append(bank)
    choice = Choice.of(recipe.shape(len(train_set.manifest.classes)), recipe.data)
    for dataset in opened:
        check_kind(dataset.manifest, choice)
    starting.check(recipe, folder, train_set.manifest)
    return train_set


def check_memory(recipe: "Recipe", data: "TrainingSet", world: int, *, ray: bool) -> None:
    """Refuse a run that `world` ranks on this machine have no memory for. `ray`: the run starts its own Ray as well.

    A coarse estimate comes first, since a plan takes seconds, most of them to import torch. If it is less than half of
    the memory for a rank on CPUs, the run passes without a plan.

    Raises:
        LaunchError: the run does not fit; gives the numbers, and what would fit.
    """
    config = recipe.largest(recipe.shape(len(data.manifest.classes)))
    if config.tiles is not None and recipe.data.max_tiles is None:  # bags of any size, whose memory cannot be planned
        return
    known = recipe.objective.kind == "classification"  # others add heads, teachers, passes
    if (
        known
        and not gpus()
        and upper_bound(recipe, config, world) < _bytes_per_rank(recipe, config, world, ray=ray) / 2
    ):
        return
    target = this_machine(recipe, config, world, ray=ray)
    if target is None:
        return
    from vimscale.estimate.planner import Planner

    Planner(recipe, config, target, data.samples).refuse(world, "--force starts it anyway")


def this_machine(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> "Target | None":
    """This machine as the target of a plan; None if its GPUs are not in the table of devices."""
    return _gpu(world) if gpus() else _cpu(recipe, config, world, ray=ray)


def upper_bound(recipe: "Recipe", config: "VimConfig", world: int) -> float:
    """Bytes of tensors that a rank stays below, estimated without a plan."""
    micro, _ = recipe.micro_batch(world)
    height, width = config.size
    largest = 1.0
    for phase in recipe.phases:
        high, wide = recipe.size_at(phase.step, config.size)
        largest = max(largest, high * wide / (height * width) * recipe.batch_at(phase.step) / recipe.batch)
    shared = recipe.parallel.context
    layers = sum(
        (part.tokens if part.layer is not None and part.layer.kind == "attn" else -(-part.tokens // shared))
        * part.d_model
        for part in costs(config)
    )
    return 32 * parameters(config) + micro * largest * (_PER_TOKEN * layers + 5 * 3 * height * width)


def _bytes_per_rank(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> int:
    """Bytes that a plan may use for each of `world` ranks on this machine's CPUs."""
    height, width = config.size
    micro, _ = recipe.micro_batch(world)
    workers = recipe.data.workers * (WORKER + 3 * micro * 3 * height * width)
    return int(max((memory().available - RAY * ray) / world - RANK - workers, 0) / HEAP)


def _cpu(recipe: "Recipe", config: "VimConfig", world: int, *, ray: bool) -> "Target":
    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    name = f"this machine ({memory().available / 1e9:.1f} GB available)"
    return Target(name, None, _bytes_per_rank(recipe, config, world, ray=ray), Fabric(world, 1, 1), None)


def _gpu(world: int) -> "Target | None":
    """None if the GPU is not in the table of devices. Not tested on a GPU."""
    import torch

    from vimscale.estimate.planner import Target
    from vimscale.estimate.roofline import Fabric

    kind = key_of(torch.cuda.get_device_name(0))
    if kind is None:
        return None
    free = min(torch.cuda.mem_get_info(number)[0] for number in range(min(world, gpus())))
    return Target(f"this machine's {kind}", DEVICES[kind], free, Fabric(world, DEVICES[kind].link, 1), None)
