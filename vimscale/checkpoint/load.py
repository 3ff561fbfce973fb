"""Checkpoints: complete or absent, verified before use, readable at any number of ranks and any ZeRO stage.

    step_00002000/   state-00000-of-00002.safetensors ...   trainer.json   manifest.json (sizes and sha256, last)

A state file holds one rank's fragments as flat fp32 tensors named KIND/PARAMETER@START; KIND is weight, ema or one of
the optimizer's moments. save.py writes them. Loading reads whichever slices the new layout asks for: no conversion, no
pickle.
"""

import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field
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
    """A run's state apart from its tensors: trainer.json."""

    step: int
    """Optimizer steps finished."""
    stream: dict[str, Any]
    """Where the data stream continues, see `TrainingSet.state`."""
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
    """What gives the model's outputs their meaning, see `TrainingSet.about`; empty in checkpoints of versions that did
    not save it.
    """
    late_updates: int = 0
    """Updates of the parameters that the objective leaves alone at first, see `Objective.late`."""
    asked: bool = False
    """Whether it was saved because somebody asked for a stop: a run that is never stopped does not have it."""

    def to_json(self) -> bytes:
        """The content of trainer.json; equal states give equal bytes."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def newest(folder: Path, mirror: CheckpointStore | None = None, *, regular: bool = False) -> Path | None:
    """Find the newest intact checkpoint in a run's folder and its mirror; None if neither has any checkpoint.

    All ranks call this and agree on the result; each verifies its share of the files. If only the mirror has the
    checkpoint, rank 0 fetches it into `folder` first. `regular`: use a checkpoint that was saved for a stop
    (`TrainState.asked`) only if there is no other.

    A damaged checkpoint is renamed to damaged_... with a warning; its copy in the mirror or an earlier checkpoint is
    used instead.

    Raises:
        CheckpointError: all checkpoints are damaged, or nobody can say whether there are any: continuing would silently
            start from step 0. Or another version of this package wrote them.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    here, mirrored = _list_names(folder, mirror)
    faults = []

    def is_intact(name: str, from_mirror: bool) -> bool:
        checkpoint, fault = folder / name, None
        if from_mirror:
            assert mirror is not None
            fault = _first(distributed.together(partial(_try_fetch, mirror, name, folder) if rank == 0 else None))
        if fault is None:
            fault = _first(distributed.together(partial(run_folder.damage, checkpoint, rank, world)))
            if fault is None:
                return True
            if rank == 0:
                aside = run_folder.set_aside(checkpoint)
                log.warning("checkpoint %s is damaged and set aside as %s: %s", name, aside.name, fault)
            dist.barrier()
        faults.append(f"{'fetched ' if from_mirror else ''}{name}: {fault}")
        return False

    spare = None
    for name in run_folder.intact(here, mirrored, is_intact):
        if not (regular and read_train_state(folder / name).asked):
            return folder / name
        spare = spare or folder / name
    if faults and spare is None:
        raise CheckpointError(
            f"no checkpoint under {folder} is intact:\n  " + "\n  ".join(faults) + "\nrestore one from a copy,"
            " or choose another name= to start from step 0"
        )
    return spare


def _list_names(folder: Path, mirror: CheckpointStore | None) -> tuple[list[str], list[str]]:
    """Names of the checkpoints in the run's folder and in the mirror, as rank 0 sees them."""
    listing: list[Any] = [[], [], None]
    if dist.get_rank() == 0:
        listing[0] = [path.name for path in run_folder.checkpoints(folder)]
        if mirror is not None:
            try:
                listing[1] = mirror.names()
            except (OSError, DataError) as error:
                listing[2] = str(error)
    dist.broadcast_object_list(listing)
    here, mirrored, problem = listing
    if problem is not None and not here:
        raise CheckpointError(
            f"checkpoint.mirror: {problem}\nthere is no checkpoint under {folder}, so this would start from step 0:"
            " fix the mirror, or leave checkpoint.mirror out"
        )
    if problem is not None and dist.get_rank() == 0:
        log.warning("checkpoint.mirror: %s; only the checkpoints under %s are considered", problem, folder)
    return here, mirrored


def _try_fetch(mirror: CheckpointStore, name: str, folder: Path) -> str | None:
    """Fetch a checkpoint; returns what went wrong, or None."""
    log.info("fetching checkpoint %s", mirror.where(name))
    try:
        fetch(mirror, name, folder)
    except (OSError, DataError) as error:
        log.warning("checkpoint %s cannot be used: %s", mirror.where(name), error)
        return str(error)
    return None


def _first(faults: list[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises:
    CheckpointError: it cannot be read, or another version of this package wrote it.
    """
    path = checkpoint / "trainer.json"
    try:
        return untrusted.build(TrainState, untrusted.loads(untrusted.read(path), finite=False))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not what this version writes ({error}); resume with the version that wrote it, or choose"
            " another name="
        ) from None


BUFFER = "buffer"
"""The kind of an objective's buffers, which every rank holds and rank 0 saves."""
_KEY = re.compile(r"(\w+/[\w.]+)@(\d{1,18})", re.ASCII)


def piece_key(kind: str, parameter: str, start: int) -> str:
    """Name a piece of a parameter in a state file, by the element it starts at: KIND/PARAMETER@START."""
    return f"{kind}/{parameter}@{start}"


def parse_key(key: str) -> tuple[str, int] | None:
    """Split a `piece_key` into (KIND/PARAMETER, START); None if it is not one."""
    found = _KEY.fullmatch(key)
    return None if found is None else (found[1], int(found[2]))


class Reader:
    """Reads any slice of any parameter from a checkpoint."""

    def __init__(self, checkpoint: Path):
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        names = [entry["name"] for entry in manifest.files(checkpoint)]  # other files are not part of it
        for path in [checkpoint / name for name in names if name.startswith("state-")]:
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is not a safetensors file ({error}), and a checkpoint holds no other kind; remove the"
                    " checkpoint to resume from the one before, or choose another name="
                ) from None
            for key in file.keys():  # noqa: SIM118  safe_open is not a dict
                named, piece = parse_key(key), file.get_slice(key)
                if named is None or len(piece.get_shape()) != 1 or piece.get_dtype() != "F32":
                    raise CheckpointError(f"{path} holds {key[:100]!r}, which this version does not write")
                self._pieces.setdefault(named[0], []).append((named[1], piece.get_shape()[0], file, key))

    @property
    def kinds(self) -> dict[str, set[str]]:
        """Names of the parameters that it holds pieces of, by kind."""
        found: dict[str, set[str]] = {}
        for name in self._pieces:
            kind, parameter = name.split("/", 1)
            found.setdefault(kind, set()).add(parameter)
        return found

    def read(self, kind: str, parameter: str, start: int, numel: int) -> Tensor:
        """Read elements [start, start + numel) of a flattened parameter: fp32, on the CPU.

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
    """Read all parameters in full: fp32, on the CPU. `kind`: weight or ema.

    Raises:
        CheckpointError: the checkpoint does not hold all of them, or is damaged.
    """
    reader, shapes = Reader(checkpoint), read_train_state(checkpoint).shapes
    if negative := [name for name, shape in shapes.items() if min(shape, default=0) < 0]:
        raise CheckpointError(f"{checkpoint}/trainer.json has negative sizes, for {negative[0][:100]}")
    parameters = shapes.keys() - reader.kinds.get(BUFFER, set())
    return {n: reader.read(kind, n, 0, math.prod(shape)).view(shape) for n, shape in shapes.items() if n in parameters}
