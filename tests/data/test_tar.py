"""Hostile tars: each gives one short message with an offset; none loops, exhausts memory or is parsed two ways."""

import tarfile
from pathlib import Path

import pytest

from vimscale.data.shards import shard_reader, tar
from vimscale.errors import DataError
from vimscale.prepare.index import scan, walk

GIB = 1 << 30


def _header(name: bytes, size: bytes | int, kind: bytes = b"0") -> bytes:
    """A header with the right checksum, whatever its fields."""
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"0" * 11 + b"\0" + b" " * 8)
    block = bytearray(bytes(block + kind).ljust(257, b"\0") + b"ustar\00000").ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _member(name: bytes, data: bytes, kind: bytes = b"0", size: bytes | int | None = None) -> bytes:
    return _header(name, len(data) if size is None else size, kind) + data + bytes(-len(data) % 512)


def _pax(*records: tuple[bytes, bytes]) -> bytes:
    lines = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        lines += b"%d %s=%s\n" % (length, key, value)
    return _member(b"pax", lines, b"x")


PNG = _member(b"a.png", b"x" * 700)
HOSTILE = {
    "a negative size": (PNG + _header(b"a.cls", b"-0000001000"), "no tar header|a member without a size"),
    "a negative binary size": (PNG + _header(b"a.cls", b"\xff" * 12), "no tar header|a member without a size"),
    "a size with a prefix": (PNG + _header(b"a.cls", b"0o10"), "no tar header|a member without a size"),
    "a size with underscores": (PNG + _header(b"a.cls", b"1_0"), "no tar header|a member without a size"),
    "a size that is not a number": (PNG + _header(b"a.cls", b"x"), "no tar header|a member without a size"),
    "a size beyond the end": (_header(b"a.png", 10**9) + PNG, "1,000,000,000 bytes"),
    "a binary size beyond all": (_header(b"a.png", b"\x80" + b"\x7f" * 11) + PNG, "bytes"),
    "another checksum": (PNG + PNG[:148] + b"000000\0 " + PNG[156:], "header"),
    "a checksum that is not a number": (PNG + PNG[:148] + b"-000001\0" + PNG[156:], "header"),
    "a negative pax size": (_pax((b"size", b"-512")) + PNG, "a pax header says a size of '-512'"),
    "a pax size of many digits": (_pax((b"size", b"9" * 5000)) + PNG, r"a pax header says a size of '9+ … 9+'"),
    "a pax size in other digits": (_pax((b"size", "٣".encode())) + PNG, "a pax header says a size of"),
    "a pax size beyond the end": (_pax((b"size", b"99999999")) + PNG, "member a.png has 99,999,999 bytes, [0-9,]+ are"),
    "a malformed pax record": (_member(b"p", b"9" * 5000 + b" a=b\n", b"x") + PNG, "a pax header that cannot be"),
    "a pax record of length 0": (_member(b"p", b"0 a=b\n", b"x") + PNG, "a pax header that cannot be read"),
    "a pax record longer than its header": (
        _member(b"p", b"900 a=b\n", b"x") + PNG,
        "a pax header that cannot be read",
    ),
    "a large pax header": (_member(b"p", bytes((1 << 20) + 1), b"x") + PNG, "headers of 1,048,577 bytes"),
    "many large headers": (_member(b"p", bytes(600_000), b"g") * 2 + PNG, "headers of 1,200,000 bytes"),
    "a name of a megabyte": (_member(b"L", b"x" * (1 << 20), b"L") + PNG, "a name of 1,048,576 bytes; at most 4,096"),
    "a pax name of a megabyte": (_pax((b"path", b"x" * 999_000)) + PNG, "a name of 999,000 bytes; at most 4,096"),
    "a long name cut off": (_header(b"L", 5000, b"L") + b"x" * 512, "a header of 5,000 bytes, [0-9,]+ are there"),
    "a long name of nothing": (_member(b"L", b"x" * 200, b"L"), "the file ends here|a long name without its member"),
    "a sparse member": (_member(b"a.png", b"x" * 700, b"S"), "a sparse member"),
    "a sparse member of pax": (
        _pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9" * 15)) + PNG,
        "a sparse member",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_gives_one_message_with_its_offset(tmp_path: Path, case: str) -> None:
    data, expected = HOSTILE[case]
    (tmp_path / "0.tar").write_bytes(data + bytes(1024))
    with pytest.raises(DataError, match=rf"0.tar, offset \d+: [^\n]*({expected})") as caught:
        walk(tmp_path / "0.tar")
    assert len(str(caught.value)) < len(str(tmp_path)) + 300
    with pytest.raises(tar.Fault, match=rf"^offset \d+: [^\n]*({expected})") as fault:
        shard_reader.parse(data, "shard")
    assert len(str(fault.value)) < 300
    assert 0 <= fault.value.at <= len(data)


def test_a_megabyte_of_the_smallest_records_is_parsed_quickly() -> None:
    records = b"5 a=\n" * 200_000 + b"14 path=b.png\n"
    data = _member(b"pax", records, b"x") + PNG
    assert shard_reader.parse(data, "shard")["__key__"] == "b"


def test_a_member_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(_header(b"a.png", 2 * GIB))
    with path.open("r+b") as file:
        file.truncate(2 * GIB + 2048)
    assert scan(path).fault == "offset 0: member a.png has 2,147,483,648 bytes; at most 1,073,741,824 are read"


def test_links_folders_and_devices_hold_no_bytes_whatever_their_headers_say(tmp_path: Path) -> None:
    kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
    odd = b"".join(_header(b"../../etc/a.txt", 10**9, kind) for kind in kinds)
    data = odd + PNG + odd + _member(b"a.cls", b"1")
    assert shard_reader.parse(data, "shard") == {"__key__": "a", "__url__": "shard", "png": b"x" * 700, "cls": b"1"}
    (tmp_path / "0.tar").write_bytes(data + bytes(1024))
    (sample,) = scan(tmp_path / "0.tar").samples
    assert sample.members.keys() == {"png", "cls"}


def test_names_in_messages_are_short_and_printable(tmp_path: Path) -> None:
    long = b"\x1b[2J" + b"y" * 4000 + b".png"
    data = _member(b"L", long, b"L") + PNG
    (tmp_path / "0.tar").write_bytes(data * 2 + bytes(1024))
    fault = scan(tmp_path / "0.tar").fault
    assert fault is not None
    assert fault.isprintable()
    assert len(fault) < 300
