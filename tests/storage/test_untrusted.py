"""Hostile input: names that lead out of a folder, JSON bombs, endless files. Each gives one short message."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.noise import SAMPLE, overwrite, write_set
from tests.support.web_server import WebServer
from vimscale.checkpoint import mirror
from vimscale.checkpoint.load import Reader, read_train_state
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError, DataError, LaunchError
from vimscale.guard import report
from vimscale.launch.cluster import Cluster
from vimscale.launch.jobs.on_local import LocalJobs
from vimscale.prepare import adopt
from vimscale.prepare.inputs import sources
from vimscale.prepare.inputs.rows import Columns, Files, Rows
from vimscale.prepare.inspection import inspect
from vimscale.runtime import manifest
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import untrusted

# ---- names

NAMES: list[Any] = [
    *("", ".", "..", "../a.tar", "a/../../b.tar", "/a.tar", "//host/a.tar", "a//b.tar", "a/", "./a.tar", "a/./b.tar"),
    *("..\\a.tar", "\\\\host\\a.tar", "C:a.tar", "c:/a.tar", "a\0.tar", "a\n.tar", "\x1b[2Ja.tar", "a\x85.tar"),
    *("\ud800.tar", "a\u2028.tar", "x" * 201, "ä" * 101 + ".tar", "a/" * 600 + "a.tar", "x" * 10_000_000),
    *(None, 5, 1.5, True, ["a.tar"], {"a": "tar"}),
]


def test_names_that_lead_out_of_the_folder_are_refused_in_one_line() -> None:
    for name in NAMES:
        for check in (untrusted.file_name, untrusted.file_path):
            with pytest.raises(ValueError, match=r"^the name .{,200}$"):
                check(name)
    for name in ("00000.tar", "größe 1.tar", ".hidden", "a..b", "家/の.tar", "a" * 200):
        assert untrusted.file_path(name) == name
    with pytest.raises(ValueError, match=r"'a/b.tar' cannot be used: it has a /"):
        untrusted.file_name("a/b.tar")


def _shard(**changes: Any) -> Callable[[dict], Any]:
    return lambda tree: tree["shards"][1].update(changes)


MANIFESTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    **{f"name {i}": (_shard(name=name), "the name|shards.1..name") for i, name in enumerate(NAMES)},
    "an index as shard": (_shard(name="00000.tar.idx"), "shards end in .tar"),
    "the manifest as shard": (_shard(name="manifest.json"), "shards end in .tar"),
    "a shard twice": (_shard(name="00000.tar"), "the shard 00000.tar is listed twice"),
    "no samples": (_shard(samples=-8), "cannot hold -8 samples"),
    "too many samples": (_shard(samples=10**15, bytes=10**18), "cannot hold 1,000,000,000,000,000 samples"),
    "more samples than bytes": (_shard(samples=181), "cannot hold 181 samples in 92,160 bytes"),
    "samples in words": (_shard(samples="8"), r"shards\[1\].samples is '8', not a whole number"),
    "half a sample": (_shard(samples=8.0), r"shards\[1\].samples is 8.0, not a whole number"),
    "true bytes": (_shard(bytes=True), r"shards\[1\].bytes is true, not a whole number"),
    "no sum": (_shard(sha256="x" * 64), "as its sha256"),
    "a sum with more": (_shard(sha256="0" * 64 + "\n"), "as its sha256"),
    "an unknown key": (_shard(more=1), r"shards\[1\] has an unknown key 'more'"),
    "a missing key": (lambda tree: tree["shards"][1].pop("bytes"), r"shards\[1\] has no bytes"),
    "no list": (lambda tree: tree.update(shards={"a": 1}), "shards is a mapping, not a list"),
    "no shard": (lambda tree: tree["shards"].append("00009.tar"), "not a mapping"),
    "classes as text": (lambda tree: tree.update(classes="abc"), "classes is 'abc', not a list"),
    "classes as numbers": (lambda tree: tree.update(classes=[1, 2]), r"classes\[0\] is 1, not a text"),
    "half a pair": (lambda tree: tree.update(source="\ud800"), "source is '.*', which is not Unicode"),
    "two means": (lambda tree: tree.update(mean=[0.5, 0.5]), "mean has 2 values, not 3"),
    "no deviation": (lambda tree: tree.update(std=[0.2, 0, 0.2]), "images are divided by it"),
    "labels of others": (lambda tree: tree.update(labels=[6] * 9), "labels does not count"),
    "sides in words": (lambda tree: tree.update(sides={"²": 1}), "which is not a number of pixels"),
    "a base with NUL": (lambda tree: tree.update(base="a\0b"), "base is"),
    "another format": (lambda tree: tree.update(format=[1] * 1000), "format a list, this version reads 1"),
    "true format": (lambda tree: tree.update(format=True), "format is true"),
    "another sum of samples": (lambda tree: tree.update(samples=47), "says 47 samples, its shards 48"),
}


def _one_line(tree: dict | bytes, said: str) -> None:
    text = tree if isinstance(tree, bytes) else json.dumps(tree)
    with pytest.raises(DataError, match=rf"^data there: manifest[^\n]*({said})[^\n]*$") as caught:
        Manifest.from_json(text, "there")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_with_wrong_values_is_refused_in_one_line(written: Path, case: str) -> None:
    harm, said = MANIFESTS[case]
    tree = json.loads((written / "manifest.json").read_text())
    harm(tree)
    _one_line(tree, said)


BOMBS: dict[str, tuple[bytes, str]] = {
    "depth": (b'{"a":' * 100_000, "nested too deep"),
    "a long number": (b'{"samples": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "no number": (b'{"mean": [NaN]}', "not finite"),
    "beyond all numbers": (b'{"mean": [1e999]}', "not finite"),
    "a key twice": (b'{"name": "a", "name": "b"}', "the key 'name' is there twice"),
    "a list": (b"[1, 2]", "a list, not a mapping"),
    "null": (b"null", "null, not a mapping"),
    "nothing": (b"", "cannot be read"),
    "half a letter": (b'{"name": "\xff"}', "cannot be read"),
    "megabytes": (b'{"name": "' + b"x" * 5_000_000 + b'", "shards": 5}', "is 5, not a list|has no"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_json_bomb_is_refused_in_one_line(case: str) -> None:
    _one_line(*BOMBS[case])


def test_pipes_devices_and_huge_files_are_not_read(tmp_path: Path) -> None:
    pipe, device, large = (tmp_path / name for name in ("pipe", "device", "large"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    large.touch()
    os.truncate(large, 1 << 40)
    for path, said in ((pipe, "not a regular file"), (device, "not a regular"), (large, "more than 67,108,864 bytes")):
        with pytest.raises(ValueError, match=said):
            untrusted.read(path)
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        (tmp_path / "manifest.json").symlink_to(path)
        for opened in (Dataset.open, inspect.locate):
            with pytest.raises(DataError, match=said):
                opened(str(tmp_path))


def test_opening_a_set_follows_no_name_out_of_it(tmp_path: Path, folder: Path, server: WebServer) -> None:
    outside = tmp_path / "site" / "mine.tar"
    (folder / "00001.tar").rename(outside)
    overwrite(SAMPLE * 5, b"\xff" * 300)(outside)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][1]["name"] = "../mine.tar"
    (folder / "manifest.json").write_text(json.dumps(tree))
    before = sorted(path.name for path in (tmp_path / "site").rglob("*"))
    for opened, where in (
        (Dataset.open, str(folder)),
        (inspect.locate, str(folder)),
        (Dataset.open, f"{server.url}/train"),
    ):
        with pytest.raises(DataError, match=r"the name '../mine.tar' cannot be used: it has . or .. in it"):
            opened(where)
    assert sorted(path.name for path in (tmp_path / "site").rglob("*")) == before
    assert server.requests == ["train/manifest.json"]


def test_tars_with_names_that_a_manifest_may_not_have_are_not_indexed(tmp_path: Path) -> None:
    (write_set(tmp_path / "set") / "manifest.json").unlink()
    (tmp_path / "set" / "00001.tar").rename(tmp_path / "set" / "a\nb.tar")
    with pytest.raises(
        DataError, match=r"index [^\n]*: the name 'a\\nb.tar' cannot be used: it has a control character"
    ):
        adopt.index([str(tmp_path / "set")], None)


def test_a_split_that_leads_out_of_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows()
    rows.add("a", "cat", 1, "a.jpg")
    for split in ("../../home", "a/b", "..", "a\0"):
        with pytest.raises(DataError, match="a split becomes a folder: the name"):
            sources._checked("hf:x", Files(), {split: rows}, Columns())


# ---- checkpoints


def _entry(**changes: Any) -> dict[str, Any]:
    return manifest.seal_bytes("state-0", b"x") | changes


ENTRIES = {
    **{f"name {i}": [_entry(name=name)] for i, name in enumerate(NAMES)},
    "a folder": [_entry(name="a/b")],
    "itself": [_entry(name="manifest.json")],
    "twice": [_entry(), _entry()],
    "no size": [{"name": "state-0", "sha256": "0" * 64}],
    "a size in words": [_entry(bytes="1")],
    "no sum": [_entry(sha256=None)],
    "more": [_entry(more=1)],
    "no entry": ["state-0"],
}


def test_a_checkpoint_manifest_with_wrong_names_or_values_is_damage(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").mkdir()
    for case, listed in ENTRIES.items():
        (tmp_path / "step_00000001" / "manifest.json").write_bytes(manifest.text(listed))  # type: ignore[arg-type]
        (fault,) = manifest.faults(tmp_path / "step_00000001")
        assert re.fullmatch(r"manifest.json cannot be read \(.{,250}\)", fault), case


def test_a_mirror_writes_nothing_outside_the_run_and_no_more_than_its_manifest_says(tmp_path: Path) -> None:
    there = tmp_path / "mirror" / "run" / "step_00000001"
    there.mkdir(parents=True)
    (there.parent / "mine").write_bytes(b"x")
    os.mkdir(tmp_path / "here")
    store = mirror.open_mirror(str(tmp_path / "mirror"), "run")
    assert store is not None
    for entry, said in ((_entry(name="../mine"), "it has a /"), (_entry(), "more bytes than it may have")):
        (there / "state-0").write_bytes(b"xy")
        (there / "manifest.json").write_bytes(manifest.text([entry]))
        with pytest.raises(OSError, match=said):
            mirror.fetch(store, "step_00000001", tmp_path / "here")
        assert list((tmp_path / "here").iterdir()) == []
        assert len(list(mirror.faults(store, "step_00000001"))) == 1


TRAINER = {"step": 1, "stream": {}, "updates": 1, "shapes": {"a": [2]}, "world": 1, "zero": 0, "ema": False}
TRAINERS: dict[str, Any] = {
    "depth": b"[" * 100_000,
    "depth below a key": TRAINER | {"guard": {"a": json.loads("[" * 50 + "]" * 50)}},
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"step": 1, "step": 2}',
    "text for a number": TRAINER | {"step": "1"},
    "a fraction": TRAINER | {"world": 1.5},
    "true": TRAINER | {"zero": True},
    "shapes of text": TRAINER | {"shapes": {"a": "2"}},
    "an unknown key": TRAINER | {"x" * 100_000: 1},
    "a list": b"[]",
    "nothing": b"",
    "no text": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("case", TRAINERS)
def test_an_invalid_trainer_file_gives_one_message(tmp_path: Path, case: str) -> None:
    content = TRAINERS[case]
    (tmp_path / "trainer.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(
        CheckpointError, match=r"trainer.json is not what this version writes \([^\n]{,200}\);"
    ) as caught:
        read_train_state(tmp_path)
    assert len(str(caught.value)) < 500
    infinite = TRAINER | {"guard": {"losses": [float("nan"), float("inf")]}}  # a guard may have seen such losses
    (tmp_path / "trainer.json").write_text(json.dumps(infinite))
    assert read_train_state(tmp_path).step == 1


@pytest.mark.parametrize("name", ["a", "weight/a", "weight@0", "weight/a@-1", "weight/a@" + "9" * 5000, "weight/a@x"])
def test_a_tensor_that_is_not_a_fragment_is_named(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "state-0")
    manifest.write(tmp_path, [manifest.seal(tmp_path / "state-0")])
    with pytest.raises(CheckpointError, match=r"^[^\n]{,300} which this version does not write$"):
        Reader(tmp_path)


# ---- files of runs and jobs


@pytest.mark.parametrize("text", ["[" * 100_000, "", "[]", '{"pid": "1"}', '{"pid": -1, "start": 1}', '{"pid": 1e999}'])
def test_a_damaged_file_of_a_job_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run" / "job").mkdir(parents=True)
    (tmp_path / "run" / "job" / "job.json").write_text(text)
    jobs = LocalJobs(Cluster(backend="local", runs=str(tmp_path)))
    for ask in (jobs.jobs, lambda: jobs.stop("run")):
        with pytest.raises(LaunchError, match=r"run/job/job.json cannot be read: [^\n]{,200}; remove it"):
            ask()


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[1]", '{"samples": [{"rank": "../x"}]}', '{"samples": 5}'])
def test_a_damaged_report_of_a_bad_step_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "guard" / "step_00000001").mkdir(parents=True)
    (tmp_path / "guard" / "step_00000001" / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"report [^\n]*step_00000001 cannot be read: [^\n]{,300}; remove it"):
        report.read(RunFolder(tmp_path))


def test_verifying_does_not_read_an_index_of_terabytes(folder: Path) -> None:
    os.truncate(folder / "00000.tar.idx", 1 << 42)
    located = inspect.locate(str(folder))
    health = inspect.examine(located, located.manifest.shards[0], deep=False)
    assert [fault.partition(" has ")[2] for fault in health.index_faults] == ["4,398,046,511,104 bytes, not 72"]
