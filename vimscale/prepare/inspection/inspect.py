"""Is a data set on this machine what its manifest says? Every fault, with shard and offset."""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vimscale.data.images import decode
from vimscale.data.shards.manifest import MANIFEST, Manifest, Shard, index_of, sha256_of
from vimscale.data.shards.shard_reader import offsets
from vimscale.errors import BadSample, DataError
from vimscale.prepare import pool
from vimscale.prepare.index import Sample, Scan, intact, scan
from vimscale.storage import untrusted


@dataclass(frozen=True)
class Located:
    """A data set's files."""

    folder: Path
    """With the manifest."""
    shards: Path
    manifest: Manifest

    def tar(self, shard: Shard) -> Path:
        return self.shards / shard.name

    def index(self, shard: Shard) -> Path:
        own = index_of(self.folder / shard.name)
        return own if own.exists() or not self.manifest.base else index_of(self.tar(shard))


def locate(source: str) -> Located:
    """The files of a data set, which need not be whole.

    Raises:
        DataError: it is not on this machine, or has no manifest that can be read.
    """
    if source.startswith("digits:"):
        from vimscale.data import digits

        folder = digits.cached() / source.removeprefix("digits:")
    elif "://" in source:
        raise DataError(f"data {source}: only sets on this machine can be examined; copy the folder here")
    else:
        folder = Path(source)
    try:
        text = untrusted.read(folder / MANIFEST)
    except (OSError, ValueError) as error:
        below = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"sets below it: {', '.join(below)}" if below else "`vimscale data index` makes one for tars"
        missing = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
        reason = missing if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DataError(f"data {source}: {folder} {reason}; {hint}") from None
    manifest = Manifest.from_json(text, source)
    if "://" in manifest.base:
        raise DataError(f"data {source}: its shards are at {manifest.base}; copy them here to examine them")
    return Located(folder, folder / manifest.base, manifest)


@dataclass
class Health:
    """How a shard was found."""

    shard: Shard
    faults: list[str] = field(default_factory=list)
    """Of the tar and its samples, each with the place."""
    index_faults: list[str] = field(default_factory=list)
    found: Scan = field(default_factory=Scan)
    bad: list[int] = field(default_factory=list)
    """Numbers of samples that cannot be used."""
    labels: Counter[int] = field(default_factory=Counter)
    sha256: str = ""
    """As it is; only where it was asked for."""


def verify(
    located: Located, *, deep: bool, jobs: int = 1, progress: pool.Progress = lambda done, total: None
) -> list[Health]:
    """Look at every shard: sizes, and the index against the tar's headers; if `deep`, sha256 and every image too."""
    found: dict[int, Health] = {}
    shards = located.manifest.shards
    progress(0, len(shards))
    for number, health in pool.run(partial(examine, located, deep=deep), shards, jobs):
        found[number] = health
        progress(len(found), len(shards))
    return [found[number] for number in range(len(shards))]


def miscounted(located: Located, healths: list[Health]) -> list[str]:
    """Classes whose labels are not as many as the manifest says, after a deep look."""
    counts = Counter[int]()
    for health in healths:
        counts += health.labels
    said = located.manifest.labels
    return [
        f"{MANIFEST} says {said[label]:,} samples of class {label} ({name}), {counts[label]:,} are there"
        for label, name in enumerate(located.manifest.classes)
        if said and counts[label] != said[label]
    ]


def examine(located: Located, shard: Shard, *, deep: bool) -> Health:
    """One shard."""
    health = Health(shard)
    path = located.tar(shard)
    if not path.is_file():
        health.faults.append(f"{path} is missing")
        return health
    found = health.found = scan(path)
    size = path.stat().st_size
    if size != shard.bytes:
        health.faults.append(f"{path} has {size:,} bytes, not {shard.bytes:,}")
    if found.fault is not None:
        health.faults.append(f"{path}, {found.fault}")
        if deep:
            found.samples = _rescued(located, shard, found)
    elif len(found.samples) != shard.samples:
        health.faults.append(f"{path} holds {len(found.samples):,} samples, not {shard.samples:,}")
    if found.fault is None and (fault := _index_fault(located.index(shard), found)):
        health.index_faults.append(fault)
    if deep:
        health.sha256 = sha256_of(path)
        if health.sha256 != shard.sha256 and size == shard.bytes:
            health.faults.append(f"{path} does not have the sha256 it was written with")
        _decode_all(path, health, located.manifest)
    return health


def _rescued(located: Located, shard: Shard, found: Scan) -> list[Sample]:
    """Complete samples of a damaged tar: those before the fault, or by its index those after it, too."""
    try:
        index = offsets(located.index(shard).read_bytes(), shard, located.tar(shard).name)
        by_index = intact(located.tar(shard), index)
    except (OSError, DataError):
        by_index = []
    # where a tar is cut between two members, its last sample lacks what the others have
    last = found.samples[-1:]
    short = last and len(found.samples) > 1 and last[0].members.keys() != found.samples[-2].members.keys()
    return max(by_index, found.samples[:-1] if short else found.samples, key=len)


def _index_fault(path: Path, found: Scan) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != 8 * len(found.offsets):
        return f"{path} has {path.stat().st_size:,} bytes, not {8 * len(found.offsets):,}"
    said = np.fromfile(path, "<u8")
    wrong = np.flatnonzero(said != found.offsets)
    if not len(wrong):
        return None
    first = int(wrong[0])
    return f"{path} says that sample {first} starts at {said[first]}; in the tar it does at {found.offsets[first]}"


def _decode_all(path: Path, health: Health, manifest: Manifest) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, sample in enumerate(health.found.samples):
            try:
                where = f"{path}, offset {sample.start}"
                label = decode.decode(read(descriptor, sample), where, len(manifest.classes), manifest.image)[1]
                health.labels[label] += 1
            except BadSample as error:
                health.bad.append(number)
                health.faults.append(str(error))
    finally:
        os.close(descriptor)


def read(descriptor: int, sample: Sample) -> dict:
    """A sample as training gets it; a member that is cut has the bytes that are there."""
    members = sample.members.items()
    return {"__key__": sample.key} | {ext: os.pread(descriptor, size, offset) for ext, (offset, size) in members}
