"""Sets of tars that exist: indexed, verified, repaired, merged, and described."""

import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from PIL import Image

from tests.support.image_sets import image, samples_of
from tests.support.shell import Shell
from tests.support.web_server import WebServer
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import write_file, write_shard
from vimscale.errors import DataError
from vimscale.prepare import adopt, merge
from vimscale.prepare.index import scan
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import inspect, repair
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_indexing_the_shards_of_a_set_finds_what_its_manifest_says(made: Path, tmp_path: Path, jobs: int) -> None:
    before = Dataset.open(str(made)).manifest
    index = {path.name: path.read_bytes() for path in made.glob("*.idx")}
    for path in (*made.glob("*.idx"), made / "manifest.json"):
        path.unlink()
    folder, found, unread = adopt.index([str(made)], None, classes=before.classes, jobs=jobs)
    assert (folder, unread) == (made, [])
    assert {path.name: path.read_bytes() for path in made.glob("*.idx")} == index
    for key in ("shards", "labels", "sides", "mean", "std", "classes"):
        assert getattr(found, key) == getattr(before, key)
    _, elsewhere, _ = adopt.index([str(made / "0000{0..1}.tar")], tmp_path / "out")
    assert elsewhere.base == str(made)
    assert [shard.name for shard in elsewhere.shards] == ["00000.tar", "00001.tar"]
    assert (tmp_path / "out/00001.tar.idx").read_bytes() == index["00001.tar.idx"]


def test_shards_of_a_web_server_are_indexed_and_read_without_changing_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIMSCALE_CACHE", str(tmp_path / "cache"))
    expected = samples_of(made)
    for path in (*made.glob("*.idx"), made / "manifest.json"):
        path.unlink()
    server = WebServer(tmp_path)
    try:
        address = f"{server.url}/set/0000{{0..3}}.tar"
        with pytest.raises(DataError, match="the index cannot be written there; give a folder with --output"):
            adopt.index([address], None)
        adopt.index([address], tmp_path / "index")
        found = samples_of(tmp_path / "index")
    finally:
        server.shutdown()
        server.server_close()
    assert {key: sample["cls"] for key, sample in found.items()} == {key: s["cls"] for key, s in expected.items()}
    assert sorted(path.suffix for path in made.iterdir()) == [".jsonl"] + [".tar"] * 4


UNFIT = {
    "no label": (
        {"jpg": image(0), "txt": b"a cat"},
        r"00000.tar, offset 0, sample k: no member .cls, .* has jpg, txt",
    ),
    "a name as label": ({"jpg": image(0), "cls": b"cat"}, "its .cls is 'cat', but training reads whole numbers"),
    "a label of no class": ({"jpg": image(0), "cls": b"7"}, "label 7 is not one of the 2 classes"),
    "no image": ({"gif": image(0, kind="GIF"), "cls": b"0"}, r"no image among its members \(cls, gif\)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tars_that_cannot_be_trained_on_are_not_indexed(tmp_path: Path, case: str) -> None:
    members, expected = UNFIT[case]
    write_shard(tmp_path / "00000.tar", [{"__key__": "k", **members}])
    with pytest.raises(DataError, match=expected):
        adopt.index([str(tmp_path)], None, classes=("a", "b"))
    assert not (tmp_path / "manifest.json").exists()


def _harm_index(folder: Path) -> None:
    data = bytearray((folder / "00001.tar.idx").read_bytes())
    data[8:16] = struct.pack("<Q", 512)
    (folder / "00001.tar.idx").write_bytes(data)


def _harm_image(folder: Path) -> None:
    data = bytearray((folder / "00001.tar").read_bytes())
    offset, size = scan(folder / "00001.tar").samples[3].members["jpg"]
    data[offset : offset + size] = bytes(size)
    (folder / "00001.tar").write_bytes(data)


def _truncate(folder: Path) -> None:
    offset, size = scan(folder / "00001.tar").samples[5].members["jpg"]
    os.truncate(folder / "00001.tar", offset + size // 2)


def _harm_headers(folder: Path) -> None:
    """Damage a header of the second and of the second-to-last of eight samples; zero one of them."""
    data = bytearray((folder / "00001.tar").read_bytes())
    samples = scan(folder / "00001.tar").samples
    data[samples[1].start] ^= 1
    data[samples[6].start : samples[6].start + 512] = bytes(512)
    (folder / "00001.tar").write_bytes(data)


def _lose_the_padding(folder: Path) -> None:
    last = scan(folder / "00001.tar").samples[-1]
    os.truncate(folder / "00001.tar", max(offset + size for offset, size in last.members.values()))


def _harm_tar_and_index(folder: Path) -> None:
    _harm_headers(folder)
    (folder / "00001.tar.idx").unlink()


HARM = {
    "headers of two samples": (_harm_headers, r"00001.tar, offset \d+: no tar header: it is damaged", 2, False),
    "headers, and the index is gone": (_harm_tar_and_index, "no tar header: it is damaged", 7, False),
    "a tar without its last zeros": (_lose_the_padding, r"00001.tar, offset \d+: the file ends here", 0, False),
    "an index of other offsets": (_harm_index, r"00001.tar.idx says that sample 1 starts at 512; in the tar", 0, False),
    "an index that is gone": (lambda f: (f / "00001.tar.idx").unlink(), "00001.tar.idx is missing", 0, False),
    "a truncated shard": (_truncate, r"00001.tar, offset \d+: member .*jpg has .* it is truncated", 3, False),
    "a shard that is gone": (lambda f: (f / "00001.tar").unlink(), "00001.tar is missing", 8, False),
    "an image of zeros": (_harm_image, r"00001.tar, offset \d+, sample .*: the image cannot be decoded", 1, True),
}


@pytest.mark.parametrize("case", HARM)
def test_damage_is_found_and_complete_samples_are_saved(made: Path, case: str) -> None:
    harm, expected, lost, deep = HARM[case]
    before = samples_of(made)
    harm(made)
    located = inspect.locate(str(made))
    faults = [fault for health in inspect.verify(located, deep=deep) for fault in health.faults + health.index_faults]
    assert any(re.search(expected, fault) for fault in faults), faults
    todo = repair.steps(inspect.verify(located, deep=True))
    old = repair.repair(located, todo)
    assert (old is None) == all(step.kind == "index" for step in todo)
    repaired = inspect.locate(str(made))
    healths = inspect.verify(repaired, deep=True)
    assert not repair.steps(healths)
    assert not inspect.miscounted(repaired, healths)
    after = samples_of(made)
    assert len(after) == len(before) - lost
    assert all(after[key]["cls"] == before[key]["cls"] for key in after)


def test_sets_of_the_same_classes_become_one(tmp_path: Path, images: Path) -> None:
    written = prepare(str(images), tmp_path / "set", Options(per_shard=8, val=0.3), Columns())
    whole = prepare(str(images), tmp_path / "whole", Options(), Columns())[""]
    parts = [inspect.locate(str(tmp_path / "set" / split)) for split in written]
    merged = merge.merge(parts, tmp_path / "all")
    assert samples_of(tmp_path / "all").keys() == samples_of(tmp_path / "whole").keys()
    assert (merged.labels, merged.sides, merged.skipped) == (whole.labels, whole.sides, whole.skipped)
    with pytest.raises(DataError, match="are the same; give each set once"):
        merge.merge([parts[0], parts[0]], tmp_path / "twice")
    write_file(tmp_path / "whole/manifest.json", whole.to_json().replace("owl", "emu").encode())
    with pytest.raises(DataError, match="class 2 is 'emu', not 'owl'"):
        merge.merge([parts[0], inspect.locate(str(tmp_path / "whole"))], tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "set", "whole"]


def test_the_commands_report_what_they_did(shell: Shell, images: Path) -> None:
    out = shell.run("data", "prepare", str(images), "set", "--val", "0.3", "--per-shard", "5", "--jobs", "1")
    assert "1 skipped (1 x image): set/" in out
    made = {path: path.stat().st_mtime_ns for path in (shell.folder / "set").rglob("*")}
    same = ("data", "prepare", str(images), "set", "--val", "0.3", "--per-shard", "5")
    assert "set is finished" in shell.run(*same)
    for changes in (("--seed", "1"), ("--val", "0"), ("--source", "elsewhere")):
        assert "there is a set made from another input or with other options" in shell.run(*same, *changes, expect=2)
    assert {path: path.stat().st_mtime_ns for path in (shell.folder / "set").rglob("*")} == made
    assert "are intact: every image decodes" in shell.run("data", "verify", "set/train", "--deep", "--jobs", "1")
    out = shell.run("data", "stats", "set/train", "--sheet", "sheet.png")
    assert "dog" in out
    with Image.open(shell.folder / "sheet.png") as sheet:
        assert sheet.width > 1000
    (shell.folder / "set/train/00001.tar").unlink()
    out = shell.run("data", "verify", "set/train", "--jobs", "1", expect=2)
    assert "00001.tar is missing" in out
    out = shell.run("data", "repair", "set/train", "--jobs", "1")
    assert "nothing is done yet" in out
    assert not (shell.folder / "set/train/manifest.json.before").exists()
    assert "done; the old manifest is" in shell.run("data", "repair", "set/train", "--yes", "--jobs", "1")
    assert "merge takes two or more data sets" in shell.run("data", "merge", "set/val", "all", expect=2)


def test_shards_in_subfolders_are_repaired_there(made: Path, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / "many" / name).mkdir(parents=True)
        shutil.copy(made / f"{number:05d}.tar", tmp_path / "many" / name / "0.tar")
    adopt.index([str(tmp_path / "many/{a,b}/0.tar")], tmp_path / "index")
    before = samples_of(tmp_path / "index")
    tar = tmp_path / "many/b/0.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    located = inspect.locate(str(tmp_path / "index"))
    repair.repair(located, repair.steps(inspect.verify(located, deep=True)))
    after = samples_of(tmp_path / "index")
    repaired = Dataset.open(str(tmp_path / "index")).manifest
    assert [shard.name for shard in repaired.shards] == ["a/0.tar", "b/0-salvaged.tar"]
    assert len(after) < len(before)
    assert all(before[key]["cls"] == sample["cls"] for key, sample in after.items())
