"""Members of a tar, read within limits: plain headers, and the long names that POSIX pax and GNU tar put before them.

Every step advances by at least one block, and no header can request more memory than the file has bytes: negative
sizes, sizes beyond the end and sparse members are faults.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from vimscale.errors import brief

BLOCK = 512
ZERO = bytes(BLOCK)
META = re.compile(r"__[^/]*__(?:$|/)")
"""Names that webdataset skips."""
_SPLIT = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_HIDDEN = re.compile(
    r"(?:.*/|)(?:[.](?![.]?(?:/|$))|(?:__MACOSX|@eaDir)/|(?:thumbs[.]db|desktop[.]ini)$)", re.IGNORECASE
)
AGAIN = "copy it again, or leave it out"
"""The fix for most faults."""
MEMBER_LIMIT = 1 << 30
"""Largest size of a member, and of a sample, in bytes: each is read in one piece."""
_WITH_DATA = b"\x0007"
"""Types of members that webdataset reads; links, folders and devices hold no bytes."""
_NO_BYTES = b"123456"
_NAMES = b"LKxXg"
"""Headers whose payload describes the member after them."""
_SPARSE = "a sparse member, which can expand to any number of bytes; pack it again without --sparse"
_HEADERS_LIMIT = 1 << 20
_NAME_LIMIT = 4096
_SPACES = 8 * ord(" ")
_RECORD = re.compile(rb"([0-9]{1,8}) ([^=]{1,1000})=")

Read = Callable[[int, int], bytes]
"""(bytes, offset) -> this many bytes from the offset on, fewer at the end; like os.pread."""


class Fault(Exception):
    """What is wrong with a tar, at which offset, and the fix."""

    def __init__(self, at: int, why: str, fix: str = AGAIN):
        super().__init__(why)
        self.at = at
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"offset {self.at}: {self.why}"


class Member(NamedTuple):
    start: int
    """Offset of its first header, which may be that of a long name."""
    name: str
    data: int
    size: int
    regular: bool

    @property
    def end(self) -> int:
        return self.data + padded(self.size)


def member(read: Read, offset: int, length: int) -> Member:
    """Read the member whose headers begin at `offset` of a tar of `length` bytes.

    Raises:
        Fault: no member begins there, or it does not end within the tar.
    """
    start, headers = offset, 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = read(BLOCK, offset)
        if len(header) < BLOCK:
            raise Fault(offset, "the file ends here, without the zero blocks that end a tar: it is truncated")
        if header == ZERO:
            raise Fault(start, "a long name without its member" if start < offset else "the tar ends here")
        kind, name, size = _read_header(header, offset)
        data = offset + BLOCK
        if kind not in _NAMES:
            break
        headers += size
        if headers > _HEADERS_LIMIT:
            raise Fault(offset, f"headers of {headers:,} bytes before a member; at most {_HEADERS_LIMIT:,} are read")
        payload = read(size, data)
        if len(payload) < size:
            raise Fault(offset, f"a header of {size:,} bytes, {len(payload):,} are there: it is truncated")
        if kind == b"L":
            long_name = _name(payload.split(b"\x00", 1)[0], offset)
        elif kind in b"xX":
            records = _pax(payload, offset)
            if any(key.startswith("GNU.sparse.") for key in records):
                raise Fault(offset, _SPARSE)
            long_name = _name(records["path"], offset) if "path" in records else long_name
            long_size = _pax_size(records["size"], offset) if "size" in records else long_size
        offset = data + padded(size)
    if kind == b"S":
        raise Fault(offset, _SPARSE)
    name = long_name or name
    size = 0 if kind in _NO_BYTES else size if long_size is None else long_size
    if data + size > length:
        raise Fault(start, f"member {short(name)} has {size:,} bytes, {length - data:,} are there: it is truncated")
    if size > MEMBER_LIMIT:
        raise Fault(start, f"member {short(name)} has {size:,} bytes; at most {MEMBER_LIMIT:,} are read")
    return Member(start, name, data, size, kind in _WITH_DATA and not name.endswith("/"))


def hidden(name: str) -> bool:
    """Whether macOS, Windows or notebooks leave files of this name behind.

    Examples: ._0001.jpg, .DS_Store, Thumbs.db, .ipynb_checkpoints/0001.jpg. A folder's name ends in a slash.
    """
    return _HIDDEN.match(name) is not None


def split_name(name: str, *, with_hidden: bool = False) -> tuple[str, str] | None:
    """Return (key, extension) of a member by webdataset's rule: the key ends at the first dot after the folder.

    Returns None for a member of no sample: a hidden file, a name without a dot, webdataset's own __x__ and x.__key__.
    """
    found = None if META.match(name) or (hidden(name) and not with_hidden) else _SPLIT.fullmatch(name)
    if found is None or (found[2].startswith("__") and found[2].endswith("__")):
        return None
    return found[1], found[2].lower()


def checksum_matches(header: bytes) -> bool:
    """Whether a header's checksum is that of its bytes, with its own eight bytes as blanks."""
    return number(header[148:156]) == sum(header) - sum(header[148:156]) + _SPACES


def number(field: bytes) -> int:
    """Parse a header's number: octal or, above 8 GiB, binary. Return -1 if it is not a number, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\x00", 1)[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _read_header(header: bytes, offset: int) -> tuple[bytes, str, int]:
    """Return type, name and size."""
    size = number(header[124:136])
    if size < 0 or not checksum_matches(header):
        raise Fault(offset, f"no tar header{_what(header) if offset == 0 else ': it is damaged'}")
    name = text(header[:100].split(b"\x00", 1)[0])
    prefix = header[345:500].split(b"\x00", 1)[0] if header[257:263] == b"ustar\x00" else b""
    return header[156:157], f"{text(prefix)}/{name}" if prefix else name, size


def _what(header: bytes) -> str:
    if header[:2] == b"\x1f\x8b":
        return ": the file is compressed; shards are plain tars (gunzip it)"
    if header.lstrip()[:1] == b"<":
        return f": the file is a web page ({text(header.lstrip()[:20])!r} ...), perhaps from a failed download"
    return f": the file begins with {header[:12]!r}"


def _pax(payload: bytes, offset: int) -> dict[str, bytes]:
    """Parse records of the form "LENGTH key=value\\n", where LENGTH counts the complete record."""
    records, at, end = {}, 0, len(payload.rstrip(b"\x00"))
    while at < end:
        found = _RECORD.match(payload, at)
        stop = at + int(found[1]) if found else 0
        if not found or not found.end() < stop <= end or payload[stop - 1 : stop] != b"\n":
            raise Fault(offset, "a pax header that cannot be read: it is damaged")
        records[text(found[2])] = payload[found.end() : stop - 1]
        at = stop
    return records


def _pax_size(value: bytes, offset: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise Fault(offset, f"a pax header says a size of {brief(text(value))}: it is damaged")
    return int(value)


def _name(raw: bytes, offset: int) -> str:
    if len(raw) > _NAME_LIMIT:
        raise Fault(offset, f"a name of {len(raw):,} bytes; at most {_NAME_LIMIT:,} are read")
    return text(raw)


def short(name: str) -> str:
    """Shorten a member's name for messages."""
    return name if len(name) <= 100 and name.isprintable() else brief(name, 100)
