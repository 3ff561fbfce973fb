"""Checkpoints: whole or not there, checked before they are used, readable at any world size and ZeRO stage.

    step_00002000/   state-00000-of-00002.safetensors ...   trainer.json   manifest.json (sizes and sha256, last)

A state file holds one rank's fragments as flat fp32 tensors named KIND/PARAMETER@START, KIND being weight, ema or one
of the optimizer's moments. Loading puts together whatever stretches the new layout asks for: no conversion, no pickle.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vimscale.errors import CheckpointError, RunFailed

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Trainer:
    """Where a run stands, beside its tensors."""

    step: int
    """Optimizer steps finished."""
    samples: int
    """Images consumed by them: where the stream goes on."""
    updates: int
    """Updates the optimizer made; fewer than `step` only if some were skipped."""
    fingerprint: str
    """sha256 of the training set's manifest."""
    shapes: dict[str, list[int]]
    """Every parameter and its shape."""
    world: int
    zero: int
    ema: bool
    format: int = FORMAT


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def found(folder: Path) -> list[Path]:
    """Checkpoints under `folder` that have a manifest, newest first. Whether they are whole, `damage` tells."""
    return sorted((path.parent for path in folder.glob("step_*/manifest.json")), reverse=True)


# ---- writing


def save(folder: Path, tensors: dict[str, Tensor], trainer: Trainer, keep: int) -> Path:
    """Write this rank's `tensors` and, once every rank has written, make the checkpoint exist. Called by all ranks.

    Raises:
        RunFailed: on all ranks, if one of them could not write; the checkpoints there were are untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    target = folder / name_of(trainer.step)
    partial = folder / f".{target.name}.partial"
    problem: str | None = None
    if rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    _agree_on(problem, target)

    entry: dict[str, Any] = {}
    try:
        path = partial / f"state-{rank:05d}-of-{world:05d}.safetensors"
        save_file({name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}, path)
        entry = _sealed(path)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    _agree_on(problem, target)
    entries: list[Any] = [None] * world
    dist.all_gather_object(entries, entry)

    if rank == 0:
        try:
            trainer_file = partial / "trainer.json"
            trainer_file.write_text(json.dumps(asdict(trainer), indent=1) + "\n")
            manifest = partial / "manifest.json"
            manifest.write_text(
                json.dumps({"format": FORMAT, "files": [*entries, _sealed(trainer_file)]}, indent=1) + "\n"
            )
            _sync(manifest)
            _sync(partial)
            if target.exists():  # the same step again, after a restart: the new one is as good
                shutil.rmtree(target)
            partial.rename(target)
            _sync(folder)
            for old in found(folder)[keep:]:
                shutil.rmtree(old)
        except OSError as error:
            problem = str(error)
    _agree_on(problem, target)
    return target


def _sealed(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _agree_on(problem: str | None, target: Path) -> None:
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise RunFailed(f"checkpoint {target} could not be written: {first}; earlier checkpoints are untouched")


# ---- reading


def damage(checkpoint: Path, part: int = 0, of: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None. Of its files, every `of`-th from `part` on is read."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name, size, sha256 in files[part::of]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if _sha256(path) != sha256:
            return f"{name} does not have the sha256 it was written with"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, agreed on by all ranks, each of which reads its share of the files.

    A damaged one is renamed to damaged_… with a warning, and the one before it taken.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged: going on would silently start from nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    listing: list[Any] = [[path.name for path in found(folder)] if rank == 0 else None]
    dist.broadcast_object_list(listing)
    faults = []
    for name in listing[0]:
        checkpoint = folder / name
        results: list[Any] = [None] * world
        dist.all_gather_object(results, damage(checkpoint, rank, world))
        fault = next((result for result in results if result is not None), None)
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
    return Trainer(**json.loads((checkpoint / "trainer.json").read_text()))


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
