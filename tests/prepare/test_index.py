"""Offsets of samples in a tar: as tarfile finds them, and every kind of damage named with its offset."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vimscale.data.shards.manifest import index_of
from vimscale.errors import DataError
from vimscale.prepare.index import walk


def _reference(path: Path) -> list[int]:
    """Find offsets with tarfile, as Energon does."""
    offsets, last = [], None
    with tarfile.open(path) as tar:
        for member in tar:
            key = member.name.rpartition("/")[0] + "/" + member.name.rpartition("/")[2].partition(".")[0]
            if member.isreg() and key != last:
                offsets.append(member.offset)
                last = key
        return [*offsets, tar.offset]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [5, 90, 180])
def test_offsets_are_those_tarfile_finds_in_any_format_of_names(tmp_path: Path, form: int, length: int) -> None:
    path = tmp_path / "a.tar"
    folder = "/".join(["n" * 40] * (length // 41))
    with tarfile.open(path, "w", format=form) as tar:
        for i in range(7):
            for ext, size in (("jpg", 100 * i), ("seg.png", 512), ("cls", 1)):
                name = f"{folder}/{i:0{length % 41}d}.{ext}".lstrip("/")
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
    offsets, keys = walk(path)
    assert offsets.tolist() == _reference(path)
    assert len(keys) == 7


def test_the_writers_index_is_what_walk_finds(digits: Path) -> None:
    for path in (digits / "val").glob("*.tar"):
        assert index_of(path).read_bytes() == walk(path)[0].tobytes()


def test_folders_links_and_metadata_belong_to_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("n01")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("n01/b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        for info in (folder, tarfile.TarInfo("n01/a.jpg"), tarfile.TarInfo("n01/a.cls"), link):
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("__meta__"))
        tar.addfile(tarfile.TarInfo("LICENSE"))
    assert walk(path)[1] == ["n01/a"]
    assert walk(path)[0].tolist() == [*_reference(path)[:1], 512 * 6]


def _pack(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, name in enumerate(names):
            data = bytes([i]) * 1000 if name.endswith("jpg") else b"%d" % (i % 3)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _damaged(harm: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _pack(path, "a.jpg", "a.cls", "b.jpg", "b.cls")
        path.write_bytes(harm(bytearray(path.read_bytes())))

    return make


def _flip(data: bytearray, at: int) -> bytes:
    data[at] ^= 0x55
    return data


BROKEN = {
    "truncated in a member": (
        _damaged(lambda d: d[:700]),
        r"offset 0: member a.jpg has 1,000 bytes, 188 are there: it is truncated",
    ),
    "truncated at a header": (_damaged(lambda d: d[: d.index(b"b.jpg")]), r"offset \d{4}: the file ends here"),
    "one zero block at its end": (
        _damaged(lambda d: d[: len(d.rstrip(b"\0")) // 512 * 512 + 1024]),
        r"offset \d{4}: the tar ends in one zero block",
    ),
    "a corrupt header": (_damaged(lambda d: _flip(d, d.index(b"b.cls"))), r"offset \d{4}: no tar header: it is dam"),
    "no bytes": (lambda path: path.write_bytes(b""), "offset 0: the file is empty"),
    "a web page": (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 99), "offset 0: no tar header: .* web page"),
    "compressed": (
        lambda path: path.write_bytes(b"\x1f\x8b" + bytes(999)),
        "offset 0: no tar header: the file is compressed",
    ),
    "a tar appended to a tar": (_damaged(lambda d: bytes(d) * 2), "the tar ends here, but more bytes follow"),
    "a key that returns": (lambda path: _pack(path, "a.jpg", "b.jpg", "a.cls"), r"offset \d+: sample a comes back"),
    "a member twice": (lambda path: _pack(path, "a.jpg", "a.JPG"), r"offset \d+: member a.JPG is there twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tar_is_named_with_the_offset(tmp_path: Path, case: str) -> None:
    make, expected = BROKEN[case]
    make(tmp_path / "00001.tar")
    with pytest.raises(DataError, match=expected) as caught:
        walk(tmp_path / "00001.tar")
    assert "00001.tar, offset" in str(caught.value)
