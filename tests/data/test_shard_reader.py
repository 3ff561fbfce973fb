"""Shards as files: damage is named with its offset, and samples are parsed as webdataset parses them."""

import io
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from tests.support.noise import BYTES, SAMPLE, SAMPLES, everything, moved, overwrite, resized, write_set
from vimscale.data.dataset import Dataset
from vimscale.data.shards import shard_reader, tar
from vimscale.errors import DataError

# ---- folders and damaged files


KNOWN_BEFORE = {
    "truncated inside a member": (resized(SAMPLE * 3 + 5000), "00002.tar has 37,256 bytes, not 92,160"),
    "truncated at a header": (resized(SAMPLE * 3), "00002.tar has 32,256 bytes, not 92,160"),
    "empty": (resized(0), "00002.tar has 0 bytes, not 92,160"),
    "a page": (lambda path: path.write_text("<html>not found</html>"), "00002.tar has 22 bytes, not 92,160"),
    "missing": (Path.unlink, "00002.tar is missing"),
    "no samples": (lambda path: tarfile.open(path, "w").close(), "00002.tar has 10,240 bytes, not 92,160"),
}


@pytest.mark.parametrize("case", KNOWN_BEFORE)
def test_a_shard_of_another_size_is_named_before_reading(folder: Path, case: str) -> None:
    harm, expected = KNOWN_BEFORE[case]
    harm(folder / "00002.tar")
    with pytest.raises(DataError, match=expected):
        Dataset.open(str(folder))


KNOWN_AT_READING = {
    "a corrupt header": (".tar", overwrite(SAMPLE * 5, b"\xff" * 300), 5, SAMPLE * 5, "no member header"),
    "a corrupt second header": (".tar", overwrite(SAMPLE * 5 + 1024, b"x"), 5, SAMPLE * 5 + 1024, "no member header"),
    "no samples": (".tar", overwrite(0, bytes(BYTES)), 0, 0, "no member header"),
    "a page": (".tar", overwrite(0, b"<html>" * 2000), 0, 0, "no member header"),
    "an offset of no header": (".tar.idx", moved(3, 512), 3, SAMPLE * 3 + 512, "no member header"),
    "an offset in the middle": (".tar.idx", moved(3, 1024), 2, SAMPLE * 2, "2 samples instead of one: 2-2, 2-3"),
    "an end before the end": (
        ".tar.idx",
        moved(SAMPLES, -9728),
        0,
        SAMPLE * SAMPLES - 9728,
        "the tar has more members",
    ),
    "an offset within a block": (".tar.idx", moved(3, 7), 3, None, "does not index 8 samples of a 92,160 byte shard"),
    "truncated after the check": (".tar", resized(SAMPLE * 3 + 5000), 3, SAMPLE * 3 + 5000, "the file ends there"),
}


@pytest.mark.parametrize("case", KNOWN_AT_READING)
def test_damaged_bytes_are_named_with_shard_and_offset(folder: Path, case: str) -> None:
    suffix, harm, i, offset, expected = KNOWN_AT_READING[case]
    dataset = Dataset.open(str(folder))
    harm(folder / f"00002{suffix}")
    with pytest.raises(DataError, match=expected) as caught:
        dataset.read(2, i)
    assert f"{folder}/00002.tar" in str(caught.value)
    assert offset is None or f"offset {offset}:" in str(caught.value)
    assert dataset.read(1, i)["__key__"] == f"1-{i}"


def test_a_shard_that_vanishes_is_named(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    (folder / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"train/00002.tar cannot be read: No such file"):
        dataset.read(2, 0)


def test_shards_may_be_elsewhere_than_their_manifest(tmp_path: Path, expected: list) -> None:
    for name, base in (("beside", "../shards-beside"), ("absolute", str(tmp_path / "shards-absolute"))):
        folder = write_set(tmp_path / name, base=base)
        (tmp_path / f"shards-{name}").mkdir()
        for path in folder.glob("*.tar*"):
            path.rename(tmp_path / f"shards-{name}" / path.name)
        assert everything(Dataset.open(str(folder))) == expected


# ---- samples


def _tar(*members: tuple[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return out.getvalue()[:end]


LONG = "/".join(["n01440764"] * 15)
PARSED = {
    "plain": [("a.png", b"x" * 700), ("a.cls", b"1")],
    "empty member": [("a.png", b""), ("a.cls", b"1")],
    "in a folder, several dots, capitals": [("dir.d/a.seg.PNG", b"x"), ("dir.d/a.cls", b"1")],
    "a full header field": [(f"{'n' * 96}.png", b"x"), (f"{'n' * 96}.cls", b"1")],
    "long names": [(f"{LONG}/a.png", b"x"), (f"{LONG}/a.cls", b"1")],
    "names that are not ASCII": [("größe.png", b"x"), ("größe.cls", b"1")],
    "in a hidden folder": [("a/.b/a.png", b"x"), ("a/.b/a.cls", b"1")],
    "what webdataset skips": [("__meta__", b"?"), ("a.png", b"x"), ("README", b"?"), ("a.cls", b"1")],
}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("case", PARSED)
def test_a_sample_is_parsed_as_webdataset_parses_it(case: str, kind: int) -> None:
    data = _tar(*PARSED[case], kind=kind)
    stream = {"url": "shard", "stream": io.BytesIO(data)}
    (theirs,) = group_by_keys(tar_file_expander([stream]))
    assert shard_reader.parse(data, "shard") == theirs


@pytest.mark.parametrize(
    "members",
    [
        [("a.png", b"x"), ("b.png", b"y")],
        [("a.png", b"x"), ("a.png", b"y")],
        [("README", b"?")],
        [],
    ],
)
def test_what_is_not_one_sample_is_refused(members: list) -> None:
    with pytest.raises(tar.Fault):
        shard_reader.parse(_tar(*members), "shard")


def test_members_are_bytes_whatever_their_extension() -> None:
    harm = b"cposix\nsystem\n(S'exit 1'\ntR."
    assert shard_reader.parse(_tar(("a.pyd", harm), ("a.pickle", harm), ("a.png", b"x")), "shard")["pyd"] == harm
