"""One shard opened: its index, and any sample of it at the cost of one read.

Plain tar headers are read here, which takes a sixth of what the general parser does for a small sample; where a header
is of another kind (long names, for one), webdataset's parser reads the sample.
"""

import io
import os
import re
from typing import Any

import numpy as np

from vimscale.data.shards import Shard
from vimscale.errors import DataError

_BLOCK = 512
_SPACES = 8 * ord(" ")
_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
META = re.compile(r"__[^/]*__(?:$|/)")
"""Names that webdataset passes over."""
_HIDDEN = re.compile(
    r"(?:.*/|)(?:[.](?![.]?(?:/|$))|(?:__MACOSX|@eaDir)/|(?:thumbs[.]db|desktop[.]ini)$)", re.IGNORECASE
)


def hidden(name: str) -> bool:
    """Whether Macs, Windows or notebooks leave files of this name: ._0001.jpg, .DS_Store, Thumbs.db,
    .ipynb_checkpoints/0001.jpg. A folder's name ends in a slash.
    """
    return _HIDDEN.match(name) is not None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member by webdataset's rule: the key ends at the first dot after the folder.

    None for what is part of no sample: a hidden file, a name without a dot, and webdataset's own __x__ and x.__key__.
    """
    found = None if META.match(name) or hidden(name) else _SPLIT.fullmatch(name)
    if found is None or (found[2].startswith("__") and found[2].endswith("__")):
        return None
    return found[1], found[2].lower()


class Opened:
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
        if any(os.pread(descriptor, _BLOCK, end)):
            raise _unfit(where, end, "the index has the last sample end there, and the tar goes on")

    def __del__(self) -> None:
        os.close(self.descriptor)

    def check(self) -> None:
        """A tar header stands wherever the index says that a sample starts.

        Raises:
            DataError: one does not; names its offset.
        """
        for offset in self.offsets[:-1].tolist():
            if not _holds(os.pread(self.descriptor, _BLOCK, offset)):
                raise _unfit(self.where, offset, "no sample starts there")

    def read(self, i: int) -> tuple[dict[str, Any], int]:
        """(sample i, its bytes in the tar).

        Raises:
            DataError: the bytes there are no sample; names shard and offset.
        """
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        data = os.pread(self.descriptor, end - start, start)
        try:
            if len(data) < end - start:
                raise _NoSample(len(data), "the file ends there")
            return parse(data, self.shard.name), len(data)
        except _NoSample as error:
            raise DataError(f"{self.where}, offset {start + error.at}: no sample there ({error})") from None


def offsets(index: bytes, shard: Shard, where: str) -> np.ndarray:
    """The index of a shard as uint64 (n + 1).

    Raises:
        DataError: it is not that of `samples` samples in `bytes` bytes.
    """
    found = np.frombuffer(index, dtype="<u8") if len(index) == 8 * (shard.samples + 1) else None
    if found is None or found[-1] > shard.bytes or (found[1:] <= found[:-1]).any() or (found % _BLOCK).any():
        raise DataError(
            f"{where}.idx does not index {shard.samples} samples of a {shard.bytes:,} byte shard;"
            " `vimscale data repair` writes it anew"
        )
    return found


def _unfit(where: str, offset: int, why: str) -> DataError:
    way_out = "copy shard and index again, or write the index anew with `vimscale data repair`"
    return DataError(f"{where}, offset {offset}: the index does not fit the tar: {why}; {way_out}")


class _NoSample(Exception):
    """What is wrong with the bytes of a sample, and at which of them."""

    def __init__(self, at: int, why: str):
        super().__init__(why)
        self.at = at


def parse(data: bytes, url: str) -> dict[str, Any]:
    """The one sample that these bytes of a tar are, as webdataset has it: `__key__`, `__url__`, and by extension the
    members' bytes, whatever they hold.

    Raises:
        _NoSample: they are not whole members of one sample.
    """
    sample: dict[str, Any] = {}
    plain = True
    at = 0
    while at < len(data):
        header = data[at : at + _BLOCK]
        if not _holds(header):
            raise _NoSample(at, "no header of a member")
        try:
            size = int(header[124:136].rstrip(b" \0"), 8)
        except ValueError:
            raise _NoSample(at, "a member without a size") from None
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if at > len(data):
            raise _NoSample(start, f"a member of {size:,} bytes does not end with the sample")
        name = header[: header.find(b"\0", 0, 100)].decode(errors="surrogateescape")
        # links, folders, long names, several directories
        if header[156] not in b"0\0" or not header[99] == header[345] == 0:
            plain = False
        if plain and (found := split_name(name)):
            key, extension = found
            if not sample:
                sample = {"__key__": key, "__url__": url}
            plain = key == sample["__key__"] and extension not in sample
            sample[extension] = data[start : start + size]
    return sample if plain and sample else _parse_generally(data, url)


def _parse_generally(data: bytes, url: str) -> dict[str, Any]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples: list[dict[str, Any]] = []
    try:
        # where all names are hidden ones, an index that counts them means them
        for select in (lambda name: split_name(name) is not None, None):
            stream = {"url": url, "stream": io.BytesIO(data)}
            members = tar_file_expander([stream], handler=_reraise, select_files=select)
            samples = samples or list(group_by_keys(members, handler=_reraise))
    except Exception as error:  # tarfile and webdataset raise what they like on bytes that are no tar
        raise _NoSample(0, str(error)) from error
    if len(samples) != 1:
        keys = ", ".join(sample["__key__"] for sample in samples[:3])
        raise _NoSample(0, f"{len(samples)} samples where one should be{keys and ': '}{keys}")
    return samples[0]


def _reraise(error: Exception) -> bool:
    raise error


def _holds(header: bytes) -> bool:
    """Whether a tar header's checksum is that of its bytes."""
    try:
        told = int(header[148:156].rstrip(b" \0"), 8)
    except ValueError:
        return False
    return told == sum(header) - sum(header[148:156]) + _SPACES
