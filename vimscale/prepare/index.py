"""Where the samples of a tar stand, found from its headers alone.

A shard's `.tar.idx` is as Megatron-Energon writes it: n + 1 little-endian uint64, the header of each sample's first
member, and last where the marker that ends the tar stands.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimscale.data.opened import split_name
from vimscale.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)
_WITH_DATA = b"\x0007S"
"""Types of members that webdataset reads; links, folders and devices hold no bytes."""
_NO_BYTES = b"123456"
_NAMES = b"LKxXg"
"""Headers whose payload says more about the member after them."""
_NAME_LIMIT = 1 << 20
AGAIN = "copy it again, or leave it out"
"""The fix for most faults."""


class Sample(NamedTuple):
    """One sample of a tar: consecutive members whose names are equal up to the first dot after the folder."""

    key: str
    start: int
    """Offset of its first header."""
    members: dict[str, tuple[int, int]]
    """Offset and size of each member's bytes, by extension."""

    @property
    def end(self) -> int:
        """Where its last member ends."""
        return max(offset + _padded(size) for offset, size in self.members.values())


@dataclass
class Scan:
    """What a tar holds, up to its end or its first fault."""

    samples: list[Sample] = field(default_factory=list)
    end: int = 0
    """Where the last whole member ends."""
    fault: str | None = None
    """With its offset."""
    fix: str = AGAIN
    """What helps against the fault."""
    passed: list[str] = field(default_factory=list)
    """Files that are part of no sample."""

    @property
    def offsets(self) -> np.ndarray:
        """uint64 (n + 1): what the index file holds."""
        return np.array([*(sample.start for sample in self.samples), self.end], dtype="<u8")


class _Fault(Exception):
    def __init__(self, offset: int, what: str, fix: str = AGAIN):
        super().__init__(f"offset {offset}: {what}")
        self.fix = fix


class _Member(NamedTuple):
    start: int
    name: str
    data: int
    size: int
    regular: bool

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)


def walk(path: Path) -> tuple[np.ndarray, list[str]]:
    """Offsets uint64 (n + 1) and keys (n) of the samples in the tar at `path`; payloads are not read.

    Raises:
        DataError: the tar is damaged, or its samples are not whole; names shard and offset.
    """
    found = scan(path)
    if found.fault is not None:
        raise DataError(f"{path}, {found.fault}")
    return found.offsets, [sample.key for sample in found.samples]


def scan(path: Path, *, scattered: bool = False) -> Scan:
    """All samples up to the end or to the first fault, which is told and not raised.

    A training reader takes a sample in one read, so that its members have to be neighbours; not so if `scattered`, and
    then only the members say where a sample is.

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
    except _Fault as fault:
        found.fault, found.fix = str(fault), fault.fix
    finally:
        os.close(descriptor)
    return found


def intact(path: Path, offsets: np.ndarray) -> list[Sample]:
    """The samples between the `offsets` of an index that are complete, whatever is damaged around them."""
    samples = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, end in pairwise(offsets.tolist()):
            found = Scan()
            try:
                for member in _members(descriptor, start, end):
                    _add(found, {}, member, scattered=False)
                    found.end = member.end
            except _Fault:
                continue
            if found.end == end and len(found.samples) == 1:
                samples += found.samples
    finally:
        os.close(descriptor)
    return samples


def _add(found: Scan, seen: dict[str, Sample], member: _Member, scattered: bool) -> None:
    split = split_name(member.name) if member.regular else None
    if split is None:
        if member.regular:
            found.passed.append(member.name)
        return
    key, extension = split
    sample = found.samples[-1] if found.samples else None
    if sample is None or sample.key != key:
        sample = seen.get(key)
        if sample is not None and not scattered:
            raise _Fault(
                member.start,
                f"sample {key} comes back after others: members of a sample must be neighbours",
                "pack it again with `tar --sort=name`, or let `vimscale data prepare` make a new set of it",
            )
        if sample is None:
            sample = seen[key] = Sample(key, member.start, {})
            found.samples.append(sample)
    if extension in sample.members:
        fix = "pack it again without the second, or leave it out"
        raise _Fault(member.start, f"member {member.name} is there twice", fix)
    sample.members[extension] = (member.data, member.size)


def _members(descriptor: int, offset: int = 0, end: int | None = None) -> Iterator[_Member]:
    """Every member with the long-name headers before it, as POSIX pax and GNU tar write them, from `offset` to `end`
    (default: to the mark that ends the tar).
    """
    length = os.fstat(descriptor).st_size
    if not length:
        raise _Fault(0, "the file is empty")
    start: int | None = None  # of long-name headers that wait for their member
    long_name: str | None = None
    long_size: int | None = None
    while end is None or offset < end:
        header = os.pread(descriptor, BLOCK, offset)
        if len(header) < BLOCK:
            raise _Fault(offset, "the file ends here, without the zero blocks that end a tar: it is cut")
        if header == _ZERO:
            if start is not None:
                raise _Fault(start, "a long name without its member")
            if end is not None:
                raise _Fault(offset, "zeros where a member should start")
            _check_end(descriptor, offset)
            return
        kind, name, size = _read_header(header, offset)
        first = offset if start is None else start
        data = offset + BLOCK
        if kind in _NAMES:
            if size > _NAME_LIMIT:
                raise _Fault(offset, f"a long-name header of {size:,} bytes; the header is damaged")
            payload = os.pread(descriptor, size, data)
            if kind == b"L":
                long_name = _text(payload.rstrip(b"\x00"))
            elif kind in b"xX":
                records = _pax(payload, offset)
                long_name = records.get("path", long_name)
                long_size = _pax_size(records["size"], offset) if "size" in records else long_size
            start, offset = first, data + _padded(size)
            continue
        size = 0 if kind in _NO_BYTES else size if long_size is None else long_size
        if data + size > length:
            raise _Fault(
                first, f"member {long_name or name} has {size:,} bytes, {length - data:,} are there: it is cut"
            )
        name = long_name or name
        member = _Member(first, name, data, size, kind in _WITH_DATA and not name.endswith("/"))
        yield member
        offset, start, long_name, long_size = member.end, None, None, None


def _read_header(header: bytes, offset: int) -> tuple[bytes, str, int]:
    """Type, name and size; the checksum is that of the header with its own eight bytes as blanks."""
    try:
        said = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        said = size = -1
    if size < 0 or said != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _Fault(offset, f"no tar header{_what(header) if offset == 0 else ': it is damaged'}")
    name = _text(header[:100].split(b"\x00", 1)[0])
    prefix = header[345:500].split(b"\x00", 1)[0] if header[257:263] == b"ustar\x00" else b""
    return header[156:157], f"{_text(prefix)}/{name}" if prefix else name, size


def _what(header: bytes) -> str:
    if header[:2] == b"\x1f\x8b":
        return ": the file is compressed; shards are plain tars (gunzip it)"
    if header.lstrip()[:1] == b"<":
        return f": the file is a web page ({_text(header.lstrip()[:20])!r} ...), perhaps of a failed download"
    return f": the file begins {header[:12]!r}"


def _check_end(descriptor: int, offset: int) -> None:
    """After the end there are only zeros: readers would not see a tar that was put behind another."""
    at = offset
    while block := os.pread(descriptor, 1 << 20, at):
        if block.count(0) != len(block):
            raise _Fault(offset, "the tar ends here, and more follows: unpack it, and pack it anew")
        at += len(block)
    if at - offset < 2 * BLOCK:
        raise _Fault(offset, "the tar ends in one zero block, not two: it is cut")


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU's binary numbers, for members of 8 GiB and more
        return int.from_bytes(text[1:], "big")
    return int(text.split(b"\x00", 1)[0].strip() or b"0", 8)


def _pax(payload: bytes, offset: int) -> dict[str, str]:
    """Records are "LENGTH key=value\\n", LENGTH counting all of it."""
    records = {}
    while payload.strip(b"\x00"):
        digits, _, _ = payload.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(payload):
            raise _Fault(offset, "a pax header that cannot be read: it is damaged")
        key, _, value = payload[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        payload = payload[int(digits) :]
    return records


def _pax_size(text: str, offset: int) -> int:
    if not text.isdecimal():
        raise _Fault(offset, f"a pax header says a size of {text!r}: it is damaged")
    return int(text)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
