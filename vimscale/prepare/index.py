"""The samples of a tar and their offsets, found from its headers only.

A shard's `.tar.idx` has the format of Megatron-Energon: n + 1 little-endian uint64, the offsets of each sample's first
header and, last, of the marker that ends the tar.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimscale.data.shards import tar
from vimscale.data.shards.tar import AGAIN, BLOCK
from vimscale.errors import DataError


class Sample(NamedTuple):
    """One sample of a tar: the members whose names are equal up to the first dot after the folder."""

    key: str
    start: int
    """Offset of its first header."""
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's bytes, by extension."""

    @property
    def end(self) -> int:
        """Offset at which its last member ends."""
        return max(offset + tar.padded(size) for offset, size in self.members.values())


@dataclass
class Scan:
    """What a tar holds, up to its end or its first fault."""

    samples: list[Sample] = field(default_factory=list)
    end: int = 0
    """Offset at which the last complete member ends."""
    fault: str | None = None
    """The first fault, with its offset."""
    fix: str = AGAIN
    """How to fix the fault."""
    ignored: list[str] = field(default_factory=list)
    """Files that belong to no sample."""

    @property
    def offsets(self) -> np.ndarray:
        """The contents of the index file: uint64 (n + 1)."""
        return np.array([*(sample.start for sample in self.samples), self.end], dtype="<u8")


def walk(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the offsets, uint64 (n + 1), and keys (n) of the samples in a tar, without reading payloads.

    Raises:
        DataError: the tar is damaged, or the members of a sample are not neighbours; names shard and offset.
    """
    found = scan(path)
    if found.fault is not None:
        raise DataError(f"{path}, {found.fault}")
    return found.offsets, [sample.key for sample in found.samples]


def scan(path: Path, *, scattered: bool = False) -> Scan:
    """Find all samples up to the end or the first fault, which is returned, not raised.

    Training reads a sample in one read, so its members must be neighbours, unless `scattered`. A scattered sample has
    no range of bytes: use the offsets of its members.

    Raises:
        DataError: the file cannot be opened.
    """
    found = Scan()
    seen: dict[str, Sample] = {}
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        for member in _members(descriptor):
            _add(found, seen, member, scattered)
            found.end = member.end
    except tar.Fault as fault:
        found.fault, found.fix = str(fault), fault.fix
    finally:
        os.close(descriptor)
    return found


def intact(path: Path, offsets: np.ndarray) -> list[Sample]:
    """Return the samples between the `offsets` of an index that are complete, despite damage around them."""
    samples = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, end in pairwise(offsets.tolist()):
            found = Scan()
            try:
                for member in _members(descriptor, start, end):
                    _add(found, {}, member, scattered=False)
                    found.end = member.end
            except tar.Fault:
                continue
            if found.end == end and len(found.samples) == 1:
                samples += found.samples
    finally:
        os.close(descriptor)
    return samples


def _add(found: Scan, seen: dict[str, Sample], member: tar.Member, scattered: bool) -> None:
    split = tar.split_name(member.name) if member.regular else None
    if split is None:
        if member.regular:
            found.ignored.append(member.name)
        return
    key, extension = split
    sample = found.samples[-1] if found.samples else None
    if sample is None or sample.key != key:
        sample = seen.get(key)
        if sample is not None and not scattered:
            raise tar.Fault(
                member.start,
                f"sample {tar.short(key)} comes back after others: members of a sample must be neighbours",
                "pack it again with `tar --sort=name`, or make a new set from it with `vimscale data prepare`",
            )
        if sample is None:
            sample = seen[key] = Sample(key, member.start, {})
            found.samples.append(sample)
    if extension in sample.members:
        fix = "pack it again without the second one, or leave it out"
        raise tar.Fault(member.start, f"member {tar.short(member.name)} is there twice", fix)
    sample.members[extension] = (member.data, member.size)


def _members(descriptor: int, offset: int = 0, end: int | None = None) -> Iterator[tar.Member]:
    """Yield every member from `offset` to `end` (default: the marker that ends the tar).

    A member starts with its long-name headers, as POSIX pax and GNU tar write them.
    """
    length = os.fstat(descriptor).st_size
    if not length:
        raise tar.Fault(0, "the file is empty")
    while offset < end if end is not None else os.pread(descriptor, BLOCK, offset) != tar.ZERO:
        member = tar.member(partial(os.pread, descriptor), offset, length)
        yield member
        offset = member.end
    if end is None:
        _check_end(descriptor, offset)


def _check_end(descriptor: int, offset: int) -> None:
    """Check that only zeros follow the end: readers would ignore a tar that was appended to another."""
    at = offset
    while block := os.pread(descriptor, 1 << 20, at):
        if block.count(0) != len(block):
            raise tar.Fault(offset, "the tar ends here, but more bytes follow: unpack it, and pack it again")
        at += len(block)
    if at - offset < 2 * BLOCK:
        raise tar.Fault(offset, "the tar ends in one zero block, not two: it is truncated")
