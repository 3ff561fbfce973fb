"""One shard opened: its index, and any sample of it at the cost of one read.

Plain tar headers are read here, which is faster for small samples; where a header is of another kind (long names, for
one), tar.py reads the sample.
"""

import os
from typing import Any

import numpy as np

from vimscale.data.shards import tar
from vimscale.data.shards.manifest import Shard
from vimscale.errors import DataError


class ShardReader:
    """A shard's file and index. The descriptor closes with its last user; threads may share it."""

    def __init__(self, descriptor: int, index: bytes, shard: Shard, where: str):
        """Takes the descriptor over.

        Raises:
            DataError: the index is not of this shard.
        """
        self.descriptor = descriptor
        self.shard = shard
        self.where = where
        self.offsets = offsets(index, shard, where)
        end = int(self.offsets[-1])
        if any(os.pread(descriptor, tar.BLOCK, end)):
            raise _unfit(where, end, "the index has the last sample end there, and the tar goes on")

    def __del__(self) -> None:
        os.close(self.descriptor)

    def check(self) -> None:
        """A tar header stands wherever the index says that a sample starts.

        Raises:
            DataError: one does not; names its offset.
        """
        for offset in self.offsets[:-1].tolist():
            header = os.pread(self.descriptor, tar.BLOCK, offset)
            if len(header) < tar.BLOCK or not tar.holds(header):
                raise _unfit(self.where, offset, "no sample starts there")

    def read(self, i: int) -> tuple[dict[str, Any], int]:
        """(sample i, its bytes in the tar).

        Raises:
            DataError: the bytes there are no sample; names shard and offset.
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
    """The index of a shard as uint64 (n + 1).

    Raises:
        DataError: it is not that of `samples` samples in `bytes` bytes.
    """
    found = np.frombuffer(index, dtype="<u8") if len(index) == 8 * (shard.samples + 1) else None
    if found is None or found[-1] > shard.bytes or (found[1:] <= found[:-1]).any() or (found % tar.BLOCK).any():
        raise DataError(
            f"{where}.idx does not index {shard.samples} samples of a {shard.bytes:,} byte shard;"
            " `vimscale data repair` writes it anew"
        )
    return found


def _unfit(where: str, offset: int, why: str) -> DataError:
    way_out = "copy shard and index again, or write the index anew with `vimscale data repair`"
    return DataError(f"{where}, offset {offset}: the index does not fit the tar: {why}; {way_out}")


def parse(data: bytes, url: str) -> dict[str, Any]:
    """The one sample that these bytes of a tar are, as webdataset has it: `__key__`, `__url__`, and by extension the
    members' bytes, whatever they hold.

    Raises:
        tar.Fault: they are not whole members of one sample.
    """
    sample: dict[str, Any] = {}
    at = 0
    while at < len(data):
        header = data[at : at + tar.BLOCK]
        if len(header) < tar.BLOCK or not tar.holds(header):
            raise tar.Fault(at, "no header of a member")
        name = header[: header.find(b"\0", 0, 100)].decode(errors="surrogateescape")
        split = tar.split_name(name)
        # links, folders, long names, several directories, and what is part of no sample
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
    """The same for headers of any kind."""
    # where all names are hidden ones, an index that counts them means them
    samples = _samples(data, url, hidden=False) or _samples(data, url, hidden=True)
    if len(samples) != 1:
        keys = ", ".join(tar.short(sample["__key__"]) for sample in samples[:3])
        raise tar.Fault(0, f"{len(samples)} samples where one should be{keys and ': '}{keys}")
    return samples[0]


def _samples(data: bytes, url: str, *, hidden: bool) -> list[dict[str, Any]]:
    """`hidden`: whether members count that are hidden files."""
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
