"""Repair a damaged data set with what is left of it. Repair adds shard files, and never changes existing ones."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from vimscale.data.images import decode
from vimscale.data.shards.manifest import MANIFEST, Shard, sha256_of, write_file, write_index
from vimscale.errors import DataError
from vimscale.prepare import adopt, pool
from vimscale.prepare.index import BLOCK
from vimscale.prepare.inspection.inspect import Health, Located
from vimscale.prepare.tally import Tally


@dataclass(frozen=True)
class Step:
    """The repair of one shard."""

    kind: Literal["index", "salvage", "accept", "drop"]
    health: Health
    good: tuple[int, ...]
    """Indices of the samples that remain."""

    def __str__(self) -> str:
        shard = self.health.shard
        lost = f"{shard.samples - len(self.good):,} of {shard.samples:,} samples are lost"
        return {
            "index": f"{shard.name}: rewrite its index",
            "salvage": f"{shard.name}: copy its {len(self.good):,} complete samples to {_salvaged(shard)}; {lost}",
            "accept": f"{shard.name}: keep it, as all its {len(self.good):,} samples are readable; record its sha256",
            "drop": f"{shard.name}: leave it out; {lost}",
        }[self.kind]


def steps(healths: list[Health]) -> list[Step]:
    """Derive the repairs from a deep check; a shard without faults needs none."""
    found = []
    for health in healths:
        good = tuple(number for number in range(len(health.found.samples)) if number not in set(health.bad))
        if not good:
            found.append(Step("drop", health, ()))
        elif health.found.fault is not None or len(good) < len(health.found.samples):
            found.append(Step("salvage", health, good))
        elif health.faults:
            found.append(Step("accept", health, good))
        elif health.index_faults:
            found.append(Step("index", health, good))
    return found


def repair(located: Located, todo: list[Step], jobs: int = 1) -> Path | None:
    """Repair the set. If shards change, write a new manifest, and return the path of the old one.

    Raises:
        DataError: no sample would remain, or the folder is not writable.
    """
    try:
        return _repair(located, todo, jobs)
    except OSError as error:
        fix = "make it writable, or copy the set to another folder"
        raise DataError(f"data {located.folder}: {error.strerror} ({error.filename}); {fix}") from None


def _repair(located: Located, todo: list[Step], jobs: int) -> Path | None:
    by_name = {step.health.shard.name: step for step in todo}
    shards = []
    for shard in located.manifest.shards:
        step = by_name.get(shard.name)
        if step is None or step.kind == "index":
            shards.append(shard)
        elif step.kind == "salvage":
            shards.append(_salvage(located, step))
        elif step.kind == "accept":
            path = located.tar(shard)
            shards.append(Shard(shard.name, len(step.good), path.stat().st_size, step.health.sha256))
        if step is not None and step.kind in ("index", "accept"):
            write_index(located.folder / shard.name, step.health.found.offsets)
    if all(step.kind == "index" for step in todo):
        return None
    if not shards:
        raise DataError(f"data {located.folder}: no sample is readable any more; prepare the set again")
    tars = [adopt.Tar(shard.name, str(located.tar(shard))) for shard in shards]
    image = located.manifest.image or decode.EXTENSIONS
    found = pool.run_all(partial(adopt.scan_tar, quota=1, classes=None, image=image), tars, jobs)
    tally = Tally.sum(one.tally for one in found)
    manifest = replace(
        located.manifest,
        shards=tuple(shards),
        labels=tally.label_counts(len(located.manifest.classes)),
        sides=tally.side_counts(),
        tiles=tally.bags(found[0].side),
        captions=tally.captions,
        plan="",  # the set no longer holds what was planned
    )
    before = located.folder / f"{MANIFEST}.before"
    if before.exists():
        before = located.folder / f"{MANIFEST}.before-{located.manifest.fingerprint[:8]}"
    write_file(before, (located.folder / MANIFEST).read_bytes())
    write_file(located.folder / MANIFEST, manifest.to_json().encode())
    return before


def _salvaged(shard: Shard) -> str:
    return f"{shard.name.removesuffix('.tar')}-salvaged.tar"


def _salvage(located: Located, step: Step) -> Shard:
    """Write the good samples, byte for byte, as a new tar."""
    path = located.shards / _salvaged(step.health.shard)
    offsets = [0]
    pieces = []
    descriptor = os.open(located.tar(step.health.shard), os.O_RDONLY)
    try:
        for number in step.good:
            sample = step.health.found.samples[number]
            piece = os.pread(descriptor, sample.end - sample.start, sample.start)
            pieces.append(piece + bytes(-len(piece) % BLOCK))  # truncation may have removed the padding
            offsets.append(offsets[-1] + len(pieces[-1]))
    finally:
        os.close(descriptor)
    write_file(path, b"".join(pieces) + bytes(2 * BLOCK))
    name = _salvaged(step.health.shard)
    write_index(located.folder / name, np.array(offsets))
    return Shard(name, len(step.good), path.stat().st_size, sha256_of(path))
