"""Checkpoints: whole or not there, checked before they are used, readable at any world size and ZeRO stage.

    step_00002000/   state-00000-of-00002.safetensors ...   trainer.json   manifest.json (sizes and sha256, last)

A state file holds one rank's fragments as flat fp32 tensors named KIND/PARAMETER@START, KIND being weight, ema or one
of the optimizer's moments; saving.py writes them. Loading puts together whatever stretches the new layout asks for: no
conversion, no pickle.
"""

import logging
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vimscale.checkpoint.mirror import CheckpointStore, fetch
from vimscale.errors import CheckpointError, DataError
from vimscale.runtime import distributed, manifest, run_folder
from vimscale.storage import untrusted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, beside its tensors."""

    step: int
    """Optimizer steps finished."""
    stream: dict[str, Any]
    """Where the data go on, see `TrainingSet.state`."""
    updates: int
    """Updates the optimizer made; fewer than `step` only if some were skipped."""
    shapes: dict[str, list[int]]
    """Every parameter, and every buffer of the objective, with its shape."""
    world: int
    zero: int
    ema: bool
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembers, see `Guard.state`."""
    training_set: dict[str, Any] = field(default_factory=dict)
    """What a model means without its data, see `TrainingSet.about`; empty where it was not kept yet."""
    asked: bool = False
    """Whether it was saved because a stop was asked for: a run that nobody stops does not have it."""


def newest(folder: Path, place: CheckpointStore | None = None, *, regular: bool = False) -> Path | None:
    """The newest whole checkpoint of a run's folder and of its second `place`, agreed on by all ranks, each of which
    reads its share of the files. One that is at the second place alone is brought here first. `regular`: those that
    were saved for a stop (`TrainState.asked`) are taken only if there is no other.

    A damaged one is renamed to damaged_… with a warning, and its copy or the one before it taken.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged, or nobody can say whether there are: going on would
            silently start from nothing. Or another version of this package wrote them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    here, there = _listed(folder, place)
    faults, spare = [], None
    for name in sorted({*here, *there}, reverse=True):
        checkpoint = folder / name
        for source in [where for where, names in (("", here), ("fetched ", there)) if name in names]:
            if source:
                assert place is not None
                fault = _first(distributed.together(partial(_fetch, place, name, folder) if rank == 0 else None))
            else:
                fault = None
            if fault is None:
                fault = _first(distributed.together(partial(run_folder.damage, checkpoint, rank, world)))
                if fault is None:
                    if not (regular and read_train_state(checkpoint).asked):
                        return checkpoint
                    spare = spare or checkpoint
                    break
                if rank == 0:
                    aside = run_folder.set_aside(checkpoint)
                    log.warning("checkpoint %s is damaged and set aside as %s: %s", name, aside.name, fault)
                dist.barrier()
            faults.append(f"{source}{name}: {fault}")
    if faults and spare is None:
        raise CheckpointError(
            f"no checkpoint under {folder} is whole:\n  " + "\n  ".join(faults) + "\nrestore one from a copy,"
            " or choose another name= to start from step 0"
        )
    return spare


def _listed(folder: Path, place: CheckpointStore | None) -> tuple[list[str], list[str]]:
    """Names of the checkpoints here and at the second place, as rank 0 sees them."""
    listing: list[Any] = [[], [], None]
    if dist.get_rank() == 0:
        listing[0] = [path.name for path in run_folder.checkpoints(folder)]
        if place is not None:
            try:
                listing[1] = place.names()
            except (OSError, DataError) as error:
                listing[2] = str(error)
    dist.broadcast_object_list(listing)
    here, there, problem = listing
    if problem is not None and not here:
        raise CheckpointError(
            f"checkpoint.second: {problem}\nthere is no checkpoint under {folder}, so this would start from step 0:"
            " mend the second place, or leave checkpoint.second out"
        )
    if problem is not None and dist.get_rank() == 0:
        log.warning("checkpoint.second: %s; only the checkpoints under %s are looked at", problem, folder)
    return here, there


def _fetch(place: CheckpointStore, name: str, folder: Path) -> str | None:
    log.info("fetching checkpoint %s", place.where(name))
    try:
        fetch(place, name, folder)
    except (OSError, DataError) as error:
        log.warning("checkpoint %s cannot be used: %s", place.where(name), error)
        return str(error)
    return None


def _first(found: list[str | None]) -> str | None:
    return next((fault for fault in found if fault is not None), None)


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises:
    CheckpointError: it cannot be read, or another version of this package wrote it.
    """
    path = checkpoint / "trainer.json"
    try:
        return untrusted.build(TrainState, untrusted.loads(untrusted.read(path), finite=False))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not what this version writes ({error}); go on with the version that wrote"
            " it, or choose another name="
        ) from None


BUFFER = "buffer"
"""The kind of an objective's buffers, which every rank holds and rank 0 saves."""
_KEY = re.compile(r"(\w+/[\w.]+)@(\d{1,18})", re.ASCII)


def piece_key(kind: str, parameter: str, start: int) -> str:
    """The name in a state file of a piece of a parameter that starts at element `start`: KIND/PARAMETER@START."""
    return f"{kind}/{parameter}@{start}"


def parse_key(key: str) -> tuple[str, int] | None:
    """(KIND/PARAMETER, START) of a `piece_key`; None if it is not one."""
    found = _KEY.fullmatch(key)
    return None if found is None else (found[1], int(found[2]))


class Reader:
    """The tensors of a checkpoint, by any stretch of any parameter."""

    def __init__(self, checkpoint: Path):
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        names = [entry["name"] for entry in manifest.files(checkpoint)]  # whatever else is there is no part of it
        for path in [checkpoint / name for name in names if name.startswith("state-")]:
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is no safetensors file ({error}); nothing else is read from a checkpoint: remove it to go"
                    " on from the one before, or choose another name="
                ) from None
            for key in file.keys():  # noqa: SIM118  safe_open is no dict
                named, piece = parse_key(key), file.get_slice(key)
                if named is None or len(piece.get_shape()) != 1 or piece.get_dtype() != "F32":
                    raise CheckpointError(f"{path} holds {key[:100]!r}, which this version does not write")
                self._pieces.setdefault(named[0], []).append((named[1], piece.get_shape()[0], file, key))

    @property
    def kinds(self) -> dict[str, set[str]]:
        """The parameters that it holds something of, by kind."""
        found: dict[str, set[str]] = {}
        for name in self._pieces:
            kind, parameter = name.split("/", 1)
            found.setdefault(kind, set()).add(parameter)
        return found

    def read(self, kind: str, parameter: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter, fp32, on the CPU.

        Raises:
            CheckpointError: the checkpoint does not hold all of them.
        """
        found = []
        reached = start
        for begin, length, file, key in sorted(self._pieces.get(f"{kind}/{parameter}", []), key=lambda piece: piece[0]):
            low, high = max(reached, begin), min(start + numel, begin + length)
            if begin > reached:
                break
            if low < high:
                found.append((low, high, begin, file, key))
                reached = high
        if reached != start + numel:
            raise CheckpointError(f"the checkpoint holds {reached - start} of {numel} elements of {kind} {parameter}")
        result = torch.empty(numel)
        for low, high, begin, file, key in found:
            result[low - start : high - start] = file.get_slice(key)[low - begin : high - begin]
        return result


def consolidated(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Whole parameters, `kind` weight or ema, fp32 on the CPU."""
    reader, shapes = Reader(checkpoint), read_train_state(checkpoint).shapes
    if strange := [name for name, shape in shapes.items() if min(shape, default=0) < 0]:
        raise CheckpointError(f"{checkpoint}/trainer.json has shapes below 0, of {strange[0][:100]}")
    parameters = shapes.keys() - reader.kinds.get(BUFFER, set())
    return {n: reader.read(kind, n, 0, math.prod(shape)).view(shape) for n, shape in shapes.items() if n in parameters}
