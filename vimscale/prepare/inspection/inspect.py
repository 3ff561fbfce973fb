"""Verify a data set on this machine against its manifest; report every fault with shard and offset."""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vimscale.data import embedded
from vimscale.data.images import bags, decode
from vimscale.data.shards.manifest import MANIFEST, Manifest, Shard, index_of, sha256_of
from vimscale.data.shards.shard_reader import offsets
from vimscale.errors import BadSample, DataError
from vimscale.prepare import pool
from vimscale.prepare.index import Sample, Scan, intact, scan
from vimscale.storage import untrusted


@dataclass(frozen=True)
class Located:
    """The files of a data set."""

    folder: Path
    """The folder with the manifest."""
    shards: Path
    """The folder that shard names are relative to."""
    manifest: Manifest

    def tar(self, shard: Shard) -> Path:
        return self.shards / shard.name

    def index(self, shard: Shard) -> Path:
        own = index_of(self.folder / shard.name)
        return own if own.exists() or not self.manifest.base else index_of(self.tar(shard))


def locate(source: str) -> Located:
    """Find the files of a data set, without checking that they are complete.

    Raises:
        DataError: the set is not on this machine, or has no readable manifest.
    """
    own = embedded.folder_of(source)
    if own is not None:
        folder = own
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
    """The state of a shard."""

    shard: Shard
    faults: list[str] = field(default_factory=list)
    """Faults of the tar and its samples, each with its path or offset."""
    index_faults: list[str] = field(default_factory=list)
    found: Scan = field(default_factory=Scan)
    bad: list[int] = field(default_factory=list)
    """Indices of unusable samples."""
    labels: Counter[int] = field(default_factory=Counter)
    uncaptioned: int = 0
    """Samples without a member .txt."""
    empty_captions: int = 0
    sha256: str = ""
    """Actual sha256; empty unless `deep`."""


def verify(
    located: Located, *, deep: bool, jobs: int = 1, progress: pool.Progress = lambda done, total: None
) -> list[Health]:
    """Check every shard: sizes, and the index against the tar's headers; if `deep`, also sha256 and every image."""
    return pool.run_all(partial(examine, located, deep=deep), located.manifest.shards, jobs, progress)


def miscounted(located: Located, healths: list[Health]) -> list[str]:
    """Report classes whose number of samples, after a deep check, differs from the manifest."""
    counts = Counter[int]()
    for health in healths:
        counts += health.labels
    expected = located.manifest.labels
    return [
        f"{MANIFEST} says {expected[label]:,} samples of class {label} ({name}), {counts[label]:,} are there"
        for label, name in enumerate(located.manifest.classes)
        if expected and counts[label] != expected[label]
    ]


def examine(located: Located, shard: Shard, *, deep: bool) -> Health:
    """Check one shard."""
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
            found.samples = _complete_samples(located, shard, found)
    elif len(found.samples) != shard.samples:
        health.faults.append(f"{path} holds {len(found.samples):,} samples, not {shard.samples:,}")
    if found.fault is None and (fault := _index_fault(located.index(shard), found)):
        health.index_faults.append(fault)
    _count_captions(path, health)
    if deep:
        health.sha256 = sha256_of(path)
        if health.sha256 != shard.sha256 and size == shard.bytes:
            health.faults.append(f"{path} does not have the sha256 it was written with")
        _decode_all(path, health, located.manifest)
    return health


def _count_captions(path: Path, health: Health) -> None:
    captioned = [sample for sample in health.found.samples if decode.CAPTION in sample.members]
    health.uncaptioned = len(health.found.samples) - len(captioned)
    if not captioned:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for sample in captioned:
            offset, size = sample.members[decode.CAPTION]
            health.empty_captions += decode.caption_of({decode.CAPTION: os.pread(descriptor, size, offset)}) is None
    finally:
        os.close(descriptor)


def _complete_samples(located: Located, shard: Shard, found: Scan) -> list[Sample]:
    """Return the complete samples of a damaged tar: those before the fault and, with its index, also those after it."""
    try:
        index = offsets(located.index(shard).read_bytes(), shard, located.tar(shard).name)
        by_index = intact(located.tar(shard), index)
    except (OSError, DataError):
        by_index = []
    # in a tar that is truncated between two members, the last sample lacks members that the others have
    last = found.samples[-1:]
    short = last and len(found.samples) > 1 and last[0].members.keys() != found.samples[-2].members.keys()
    return max(by_index, found.samples[:-1] if short else found.samples, key=len)


def _index_fault(path: Path, found: Scan) -> str | None:
    """Describe how the index differs from the tar; None if it does not."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != 8 * len(found.offsets):
        return f"{path} has {path.stat().st_size:,} bytes, not {8 * len(found.offsets):,}"
    index = np.fromfile(path, "<u8")
    wrong = np.flatnonzero(index != found.offsets)
    if not len(wrong):
        return None
    first = int(wrong[0])
    return f"{path} says that sample {first} starts at {index[first]}; in the tar it starts at {found.offsets[first]}"


def _decode_all(path: Path, health: Health, manifest: Manifest) -> None:
    """Decode every sample; count its label or record its fault."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, sample in enumerate(health.found.samples):
            try:
                label = _decode(read(descriptor, sample), f"{path}, offset {sample.start}", manifest)
                health.labels[label] += 1
            except BadSample as error:
                health.bad.append(number)
                health.faults.append(str(error))
    finally:
        os.close(descriptor)


def _decode(sample: dict, where: str, manifest: Manifest) -> int:
    """Decode a sample's image, or each of its tiles; return its label."""
    classes = len(manifest.classes)
    if manifest.tiles is None:
        return decode.decode(sample, where, classes, manifest.image)[1]
    where = f"{where}, sample {sample['__key__']}"
    for _ in bags.images(sample, bags.stored(sample, where, manifest.tiles.side), where):
        pass
    return decode.label_of(sample, where, classes)


def read(descriptor: int, sample: Sample) -> dict:
    """Read a sample as training gets it; a truncated member has the bytes that exist."""
    members = sample.members.items()
    return {"__key__": sample.key} | {ext: os.pread(descriptor, size, offset) for ext, (offset, size) in members}
