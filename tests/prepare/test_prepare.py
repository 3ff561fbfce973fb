"""Shards from a folder of images: the same bytes every time, and either complete or absent."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support import later
from tests.support.image_sets import files_of, image, samples_of
from vimscale.data.shards.manifest import index_of
from vimscale.errors import DataError
from vimscale.prepare.index import walk
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import inspect
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options

pa = later.module("pyarrow")
parquet = later.module("pyarrow.parquet")


def test_a_folder_of_classes_becomes_a_data_set(tmp_path: Path, images: Path) -> None:
    manifest = prepare(str(images), tmp_path / "set", Options(per_shard=8), Columns())[""]
    samples = samples_of(tmp_path / "set")
    assert manifest.classes == ("cat", "dog", "owl")
    assert [shard.samples for shard in manifest.shards] == [8, 8, 8, 5] or manifest.samples == 29
    assert manifest.labels == (9, 10, 10)
    assert sum(manifest.sides.values()) == 29
    assert manifest.skipped == {"image": 1}
    assert samples["owl/more/owl_3"]["jpg"] == (images / "owl/more/owl.3.jpg").read_bytes()
    assert int(samples["owl/more/owl_3"]["cls"]) == 2
    assert "png" in samples["dog/dog_0"], "formats that training does not read are stored without loss"
    (skipped,) = map(json.loads, (tmp_path / "set/skipped.jsonl").read_text().splitlines())
    assert (skipped["key"], skipped["cause"]) == ("cat/cat_0", "image")
    assert skipped["path"] == str(images / "cat/cat.0.jpg")


def test_any_path_becomes_a_key_or_is_listed_as_skipped(tmp_path: Path) -> None:
    names = [".cache/a.1.jpg", "b/../.c.jpg", "./__x__.jpg", "nul\0.jpg", "gone.jpg"]
    for name in names[:3]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in/b").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(image(0))
    parquet.write_table(pa.table({"path": names, "label": [0, 0, 0, 0, 0]}), tmp_path / "in/t.parquet")
    manifest = prepare(str(tmp_path / "in/t.parquet"), tmp_path / "set", Options(), Columns())[""]
    assert manifest.skipped == {"unreadable": 2}
    assert samples_of(tmp_path / "set").keys() == {"cache/a_1", "_c", "__x__"}
    assert not inspect.verify(inspect.locate(str(tmp_path / "set")), deep=True)[0].faults


def test_names_may_be_long_and_in_any_script(tmp_path: Path) -> None:
    names = ("x" * 120, "café [1] :cat:", "猫")
    (tmp_path / "in" / "Größe").mkdir(parents=True)
    for i, name in enumerate(names):
        (tmp_path / "in" / "Größe" / f"{name}.jpg").write_bytes(image(i))
    prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())
    assert samples_of(tmp_path / "set").keys() == {f"Größe/{name}" for name in names}
    assert index_of(tmp_path / "set/00000.tar").read_bytes() == walk(tmp_path / "set/00000.tar")[0].tobytes()


@pytest.mark.slow
def test_bytes_depend_on_neither_jobs_nor_folder(tmp_path: Path, images: Path) -> None:
    options = Options(per_shard=4, val=0.2, seed=3)
    for jobs, folder in ((1, "a"), (3, "b")):
        prepare(str(images), tmp_path / folder / "set", options, Columns(), jobs=jobs)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    prepare(str(images), tmp_path / "c" / "set", Options(per_shard=4, val=0.2, seed=4), Columns())
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_a_fraction_of_each_class_is_held_out(tmp_path: Path, images: Path) -> None:
    written = prepare(str(images), tmp_path / "set", Options(val=0.3), Columns())
    assert written["val"].labels == (3, 3, 3) or sum(written["val"].labels) == 8, "the broken image may be among them"
    assert not samples_of(tmp_path / "set/train").keys() & samples_of(tmp_path / "set/val").keys()
    assert written["val"].mean == written["train"].mean
    with pytest.raises(DataError, match=r"--val 0.01 leaves val without images: classes have 10 to 10 images"):
        prepare(str(images), tmp_path / "other", Options(val=0.01), Columns())
    assert list(tmp_path.glob(".*")) == []


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    for c, level in enumerate((0, 255)):
        (tmp_path / "in" / str(c)).mkdir(parents=True)
        Image.new("RGB", (8, 8 + 8 * c), (level, 51, 51)).save(tmp_path / "in" / str(c) / "x.png")
    manifest = prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())[""]
    assert manifest.mean == (0.5, 0.2, 0.2)
    assert manifest.std == (0.5, 0.001, 0.001), "the std of a flat channel is never 0"


def test_sizes_follow_the_options(tmp_path: Path, images: Path) -> None:
    options = Options(resize=48, min_size=45, max_aspect=2.6)
    manifest = prepare(str(images), tmp_path / "set", options, Columns())[""]
    for key, sample in samples_of(tmp_path / "set").items():
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert min(image.size) == 48
        assert image.format == "JPEG"
        assert not key.endswith("_0"), "those have 40 pixels"
    assert manifest.skipped == {"image": 1, "small": 2, "aspect": 3}


@pytest.mark.slow
def test_the_killed_command_resumes_to_the_same_bytes(tmp_path: Path, images: Path) -> None:
    prepare(str(images), tmp_path / "reference" / "set", Options(per_shard=3), Columns())
    command = [sys.executable, "-m", "vimscale.launch.commands.app", "data", "prepare", str(images), "set"]
    command += ["--per-shard", "3", "--jobs", "2"]
    partial = tmp_path / ".set.partial"
    kills, shards_seen = 0, 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(partial.glob("records/*.json"))) <= shards_seen:
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        shards_seen = len(list(partial.glob("records/*.json")))
        assert not (tmp_path / "set").exists() or process.returncode == 0
    assert kills
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "reference" / "set")
    assert not partial.exists()


def test_complete_shards_are_kept_and_others_written_again(tmp_path: Path, images: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise Stop

    partial = tmp_path / ".set.partial" / "set"
    with pytest.raises(Stop):
        prepare(str(images), tmp_path / "set", Options(per_shard=4), Columns(), progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(kept) == 3
    (partial / "00001.tar").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"unfinished set with other options or inputs; repeat the command .* rm -r"):
        prepare(str(images), tmp_path / "set", Options(per_shard=5), Columns())
    with pytest.raises(Stop):
        prepare(str(images), tmp_path / "set", Options(per_shard=4), Columns(), progress=stop)
    again = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert {name for name in kept if again[name] == kept[name]} == {"00000.tar", "00002.tar"}
    prepare(str(images), tmp_path / "set", Options(per_shard=4), Columns())
    assert len(samples_of(tmp_path / "set")) == 29


def test_two_commands_do_not_write_the_same_set(tmp_path: Path, images: Path) -> None:
    def other(done: int, total: int) -> None:
        with pytest.raises(DataError, match="another process is preparing this set"):
            prepare(str(images), tmp_path / "set", Options(), Columns())

    prepare(str(images), tmp_path / "set", Options(), Columns(), progress=other)
