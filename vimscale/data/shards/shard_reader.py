"""The reader of one shard: its index, and any of its samples at the cost of one read.

It parses plain tar headers itself, which is faster for small samples. If a sample has another kind of header, such as
one for a long name, tar.py parses it.
"""

import os
from typing import Any

import numpy as np

from vimscale.data.shards import tar
from vimscale.data.shards.manifest import Shard
from vimscale.errors import DataError


class ShardReader:
    """A shard's file and index. Threads may share it; it closes its descriptor when its last user drops it."""

    def __init__(self, descriptor: int, index: bytes, shard: Shard, where: str):
        """Take ownership of the descriptor.

        Raises:
            DataError: the index does not belong to this shard.
        """
        self.descriptor = descriptor
        self.shard = shard
        self.where = where
        self.offsets = offsets(index, shard, where)
        end = int(self.offsets[-1])
        if any(os.pread(descriptor, tar.BLOCK, end)):
            raise _mismatch(where, end, "the index ends there, and the tar has more members")

    def __del__(self) -> None:
        os.close(self.descriptor)

    def check(self) -> None:
        """Check that there is a tar header wherever the index says that a sample starts.

        Raises:
            DataError: a header is missing; names its offset.
        """
        for offset in self.offsets[:-1].tolist():
            header = os.pread(self.descriptor, tar.BLOCK, offset)
            if len(header) < tar.BLOCK or not tar.checksum_matches(header):
                raise _mismatch(self.where, offset, "no sample starts there")

    def read(self, i: int) -> tuple[dict[str, Any], int]:
        """Return (sample i, its size in the tar in bytes).

        Raises:
            DataError: the bytes are not a sample; names shard and offset.
        """
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        try:
            if end - start > tar.MEMBER_LIMIT:
                raise tar.Fault(0, f"it has {end - start:,} bytes; at most {tar.MEMBER_LIMIT:,} are read")
            data = os.pread(self.descriptor, end - start, start)
            if len(data) < end - start:
                raise tar.Fault(len(data), "the file ends there")
            return parse(data, self.shard.name), len(data)
        except tar.Fault as error:
            raise DataError(f"{self.where}, offset {start + error.at}: no sample there ({error.why})") from None


def offsets(index: bytes, shard: Shard, where: str) -> np.ndarray:
    """Parse the index of a shard: uint64 (n + 1).

    Raises:
        DataError: it does not index `samples` samples in `bytes` bytes.
    """
    found = np.frombuffer(index, dtype="<u8") if len(index) == shard.index_bytes else None
    if found is None or found[-1] > shard.bytes or (found[1:] <= found[:-1]).any() or (found % tar.BLOCK).any():
        raise DataError(
            f"{where}.idx does not index {shard.samples} samples of a {shard.bytes:,} byte shard;"
            " `vimscale data repair` rewrites it"
        )
    return found


def _mismatch(where: str, offset: int, why: str) -> DataError:
    fix = "copy shard and index again, or rewrite the index with `vimscale data repair`"
    return DataError(f"{where}, offset {offset}: the index does not fit the tar: {why}; {fix}")


def parse(data: bytes, url: str) -> dict[str, Any]:
    """Parse the bytes of one sample in a tar as webdataset does: `__key__`, `__url__`, and members' bytes by extension.

    It does not look into the members' bytes.

    Raises:
        tar.Fault: the bytes are not complete members of one sample.
    """
    sample: dict[str, Any] = {}
    at = 0
    while at < len(data):
        header = data[at : at + tar.BLOCK]
        if len(header) < tar.BLOCK or not tar.checksum_matches(header):
            raise tar.Fault(at, "no member header")
        name = header[: header.find(b"\0", 0, 100)].decode(errors="surrogateescape")
        split = tar.split_name(name)
        # links, folders, long names, ustar prefixes, and members that belong to no sample
        if header[156] not in b"0\0" or not header[99] == header[345] == 0 or split is None:
            return _parse_generally(data, url)
        key, extension = split
        if (size := tar.number(header[124:136])) < 0:
            raise tar.Fault(at, "a member without a size")
        start, at = at + tar.BLOCK, at + tar.BLOCK + tar.padded(size)
        if at > len(data):
            raise tar.Fault(start, f"a member of {size:,} bytes does not end with the sample")
        if not sample:
            sample = {"__key__": key, "__url__": url}
        if key != sample["__key__"] or extension in sample:
            return _parse_generally(data, url)
        sample[extension] = data[start : start + size]
    return sample or _parse_generally(data, url)


def _parse_generally(data: bytes, url: str) -> dict[str, Any]:
    """Parse a sample with headers of any kind."""
    # if all names are hidden, the index must have counted hidden files
    samples = _samples(data, url, hidden=False) or _samples(data, url, hidden=True)
    if len(samples) != 1:
        keys = ", ".join(tar.short(sample["__key__"]) for sample in samples[:3])
        raise tar.Fault(0, f"{len(samples)} samples instead of one{keys and ': '}{keys}")
    return samples[0]


def _samples(data: bytes, url: str, *, hidden: bool) -> list[dict[str, Any]]:
    """Parse all samples in `data`; `hidden` says whether hidden files count as members."""
    samples: list[dict[str, Any]] = []
    at = 0
    while at < len(data):
        member = tar.member(lambda size, offset: data[offset : offset + size], at, len(data))
        at = member.end
        split = tar.split_name(member.name, with_hidden=hidden) if member.regular else None
        if split is None:
            continue
        key, extension = split
        if not samples or samples[-1]["__key__"] != key:
            samples.append({"__key__": key, "__url__": url})
        if extension in samples[-1]:
            raise tar.Fault(member.start, f"member {tar.short(member.name)} is there twice")
        samples[-1][extension] = data[member.data : member.data + member.size]
    return samples
