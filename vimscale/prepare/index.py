"""Where the samples of a tar stand, found from its headers alone.

A shard's `.tar.idx` is as Megatron-Energon writes it: n + 1 little-endian uint64, the header of each sample's first
member, and last where the marker that ends the tar stands.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimscale.data import tar
from vimscale.data.tar import BLOCK, META
from vimscale.errors import DataError

_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class Sample(NamedTuple):
    """One sample of a tar: consecutive members whose names are equal up to the first dot after the folder."""

    key: str
    start: int
    """Offset of its first header."""
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's bytes, by extension."""


@dataclass
class Scan:
    """What a tar holds, up to its end or its first fault."""

    samples: list[Sample] = field(default_factory=list)
    end: int = 0
    """Where the last whole member ends."""
    fault: str | None = None
    """With its offset."""

    @property
    def offsets(self) -> np.ndarray:
        """uint64 (n + 1): what the index file holds."""
        return np.array([*(sample.start for sample in self.samples), self.end], dtype="<u8")


def walk(path: Path) -> tuple[np.ndarray, list[str]]:
    """Offsets uint64 (n + 1) and keys (n) of the samples in the tar at `path`; payloads are not read.

    Raises:
        DataError: the tar is damaged, or its samples are not whole; names shard and offset.
    """
    found = scan(path)
    if found.fault is not None:
        raise DataError(f"{path}, {found.fault}")
    return found.offsets, [sample.key for sample in found.samples]


def scan(path: Path) -> Scan:
    """All samples up to the end or to the first fault, which is told and not raised.

    Raises:
        DataError: the file cannot be opened.
    """
    found = Scan()
    seen: set[str] = set()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        for member in _members(descriptor):
            key, extension = _split(member)
            if extension is not None:
                _add(found, seen, member, key, extension)
            found.end = member.end
    except tar.Fault as fault:
        found.fault = str(fault)
    finally:
        os.close(descriptor)
    return found


def _split(member: tar.Member) -> tuple[str, str | None]:
    """Key and extension by webdataset's rule; no extension for what is part of no sample."""
    name = member.name
    matched = _SPLIT.match(name)
    ours = member.regular and not META.match(name) and matched
    return (matched[1], matched[2].lower()) if ours and matched else (name, None)


def _add(found: Scan, seen: set[str], member: tar.Member, key: str, extension: str) -> None:
    if not found.samples or found.samples[-1].key != key:
        if key in seen:
            raise tar.Fault(
                member.start, f"sample {tar.short(key)} comes back after others: members of a sample must be neighbours"
            )
        seen.add(key)
        found.samples.append(Sample(key, member.start, {}))
    members = found.samples[-1].members
    if extension in members:
        raise tar.Fault(member.start, f"member {tar.short(member.name)} is there twice")
    members[extension] = (member.data, member.size)


def _members(descriptor: int) -> Iterator[tar.Member]:
    """Every member with the long-name headers before it, as POSIX pax and GNU tar write them."""
    length = os.fstat(descriptor).st_size
    if not length:
        raise tar.Fault(0, "the file is empty")
    offset = 0
    while os.pread(descriptor, BLOCK, offset) != tar.ZERO:
        member = tar.member(partial(os.pread, descriptor), offset, length)
        yield member
        offset = member.end
    _check_end(descriptor, offset)


def _check_end(descriptor: int, offset: int) -> None:
    """After the end there are only zeros: readers would not see a tar that was put behind another."""
    at = offset
    while block := os.pread(descriptor, 1 << 20, at):
        if block.count(0) != len(block):
            raise tar.Fault(offset, "the tar ends here, and more follows: unpack it, and pack it anew")
        at += len(block)
    if at - offset < 2 * BLOCK:
        raise tar.Fault(offset, "the tar ends in one zero block, not two: it is cut")
