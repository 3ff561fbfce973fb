"""Checkpoints: whole or not there, checked before they are used, readable at any world size and ZeRO stage.

    step_00002000/   state-00000-of-00002.safetensors ...   trainer.json   manifest.json (sizes and sha256, last)

A state file holds one rank's fragments as flat fp32 tensors named KIND/PARAMETER@START, KIND being weight, ema or one
of the optimizer's moments. Loading puts together whatever stretches the new layout asks for: no conversion, no pickle.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vimscale import manifest, run_folder
from vimscale.errors import CheckpointError, RunFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Where a run stands, beside its tensors."""

    step: int
    """Optimizer steps finished."""
    stream: dict[str, Any]
    """Where the data go on, see `TrainingSet.state`."""
    updates: int
    """Updates the optimizer made; fewer than `step` only if some were skipped."""
    shapes: dict[str, list[int]]
    """Every parameter and its shape."""
    world: int
    zero: int
    ema: bool
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembers, see `Guard.state`."""


# ---- writing


def save(folder: Path, tensors: dict[str, Tensor], trainer: Trainer, keep: int) -> Path:
    """Write this rank's `tensors` and, once every rank has written, make the checkpoint exist. Called by all ranks.

    Raises:
        RunFailed: on all ranks, if one of them could not write; the checkpoints there were are untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    target = folder / run_folder.checkpoint_name(trainer.step)
    unfinished = folder / f".{target.name}.partial"

    def prepare() -> None:
        for leftover in folder.glob(".step_*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)

    def write() -> dict[str, Any]:
        path = unfinished / f"state-{rank:05d}-of-{world:05d}.safetensors"
        save_file({name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}, path)
        return manifest.seal(path)

    def finish() -> None:
        trainer_file = unfinished / "trainer.json"
        trainer_file.write_text(json.dumps(asdict(trainer), indent=1) + "\n")
        manifest.write(unfinished, [*entries, manifest.seal(trainer_file)])
        if target.exists():
            _remove(target)
        unfinished.rename(target)
        manifest.sync(folder)
        for old in run_folder.checkpoints(folder)[keep:]:
            _remove(old)

    try:
        _together(prepare if rank == 0 else None)
        entries = _together(write)
        _together(finish if rank == 0 else None)
    except OSError as error:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise RunFailed(
            f"checkpoint {target} could not be written: {error}; earlier checkpoints are untouched"
        ) from None
    return target


def _together(action: Callable[[], Any] | None) -> list[Any]:
    """Run `action`, None on ranks that have none; what each rank's returned, or the first one's error on all ranks.

    Raises:
        OSError: on every rank alike.
    """
    problem, result = None, None
    try:
        result = action() if action is not None else None
    except (OSError, SafetensorError) as error:
        problem = str(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (problem, result))
    for problem, _ in outcomes:
        if problem is not None:
            raise OSError(problem)
    return [result for _, result in outcomes]


def _remove(checkpoint: Path) -> None:
    """In two steps, so that a crash leaves no half checkpoint under a checkpoint's name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


# ---- reading


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, agreed on by all ranks, each of which reads its share of the files.

    A damaged one is renamed to damaged_… with a warning, and the one before it taken.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged: going on would silently start from nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listing: list[Any] = [[path.name for path in run_folder.checkpoints(folder)] if rank == 0 else None]
    dist.broadcast_object_list(listing)
    faults = []
    for name in listing[0]:
        checkpoint = folder / name
        found = _together(partial(manifest.damage, checkpoint, rank, world))
        fault = next((fault for fault in found if fault is not None), None)
        if fault is None:
            return checkpoint
        faults.append(f"{name}: {fault}")
        if rank == 0:
            log.warning("checkpoint %s is damaged and set aside as damaged_%s: %s", name, name, fault)
            checkpoint.rename(folder / f"damaged_{name}")
    if faults:
        raise CheckpointError(
            f"no checkpoint under {folder} is whole:\n  " + "\n  ".join(faults) + "\nrestore one from a copy,"
            " or choose another name= to start from step 0"
        )
    return None


def read_trainer(checkpoint: Path) -> Trainer:
    """Raises:
    CheckpointError: another version of this package wrote it.
    """
    try:
        return Trainer(**json.loads((checkpoint / "trainer.json").read_text()))
    except TypeError as error:
        raise CheckpointError(
            f"{checkpoint}/trainer.json is not what this version writes ({error}); go on with the version that wrote"
            " it, or choose another name="
        ) from None


class Reader:
    """The tensors of a checkpoint, by any stretch of any parameter."""

    def __init__(self, checkpoint: Path):
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        for path in sorted(checkpoint.glob("state-*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118  safe_open is no dict
                name, start = key.rsplit("@", 1)
                numel = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault(name, []).append((int(start), numel, file, key))

    def read(self, kind: str, parameter: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, fp32, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        result = torch.empty(numel)
        filled = 0
        for begin, length, file, key in self._pieces.get(f"{kind}/{parameter}", []):
            low, high = max(start, begin), min(start + numel, begin + length)
            if low < high:
                result[low - start : high - start] = file.get_slice(key)[low - begin : high - begin]
                filled += high - low
        if filled != numel:
            raise CheckpointError(f"the checkpoint holds {filled} of {numel} elements of {kind} {parameter}")
        return result


def consolidated(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Whole parameters, `kind` weight or ema, fp32 on the CPU."""
    reader, shapes = Reader(checkpoint), read_trainer(checkpoint).shapes
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {name: reader.read(kind, name, 0, numels[name]).view(shape) for name, shape in shapes.items()}
