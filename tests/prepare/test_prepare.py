"""Shards from folders, tables and tars: the same bytes each time, whole or not there, and mended where damaged."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.support.shell import Shell
from tests.support.web_server import WebServer
from vimscale.data.dataset import Dataset
from vimscale.data.images import decode
from vimscale.data.shards import manifest as shards
from vimscale.errors import DataError
from vimscale.prepare import adopt, merge
from vimscale.prepare.index import scan, walk
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import inspect, repair
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options


def _image(seed: int, height: int = 40, width: int = 48, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of three classes, one of them broken, one a BMP, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for c, name in enumerate(("cat", "dog", "owl")):
        (root / name / "more").mkdir(parents=True)
        for i in range(10):
            folder = root / name / ("more" if i % 2 else ".")
            (folder / f"{name}.{i}.jpg").write_bytes(_image(10 * c + i, 40 + 10 * i))
    (root / "cat" / "cat.0.jpg").write_bytes(b"\xff\xd8 no more than that")
    (root / "dog" / "dog.0.jpg").unlink()
    (root / "dog" / "dog.0.bmp").write_bytes(_image(10, kind="BMP"))
    (root / "owl" / "README.txt").write_text("not an image")
    return root


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _samples(folder: Path) -> dict[str, dict]:
    dataset = Dataset.open(str(folder))
    read = [dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    assert len({sample["__key__"] for sample in read}) == len(read)
    return {sample["__key__"]: sample for sample in read}


# ---- prepare


def test_a_folder_of_classes_becomes_a_data_set(tmp_path: Path, images: Path) -> None:
    manifest = prepare(str(images), tmp_path / "set", Options(per_shard=8), Columns())[""]
    samples = _samples(tmp_path / "set")
    assert manifest.classes == ("cat", "dog", "owl")
    assert [shard.samples for shard in manifest.shards] == [8, 8, 8, 5] or manifest.samples == 29
    assert manifest.labels == (9, 10, 10)
    assert sum(manifest.sides.values()) == 29
    assert manifest.skipped == {"image": 1}
    assert samples["owl/more/owl_3"]["jpg"] == (images / "owl/more/owl.3.jpg").read_bytes()
    assert int(samples["owl/more/owl_3"]["cls"]) == 2
    assert "png" in samples["dog/dog_0"], "what training does not read is stored without loss"
    (skipped,) = map(json.loads, (tmp_path / "set/skipped.jsonl").read_text().splitlines())
    assert (skipped["key"], skipped["cause"]) == ("cat/cat_0", "image")
    assert skipped["path"] == str(images / "cat/cat.0.jpg")


def test_a_path_of_any_name_becomes_a_key_or_is_listed(tmp_path: Path) -> None:
    names = [".cache/a.1.jpg", "b/../.c.jpg", "./__x__.jpg", "nul\0.jpg", "gone.jpg"]
    for name in names[:3]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in/b").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(_image(0))
    pa.parquet.write_table(pa.table({"path": names, "label": [0, 0, 0, 0, 0]}), tmp_path / "in/t.parquet")
    manifest = prepare(str(tmp_path / "in/t.parquet"), tmp_path / "set", Options(), Columns())[""]
    assert manifest.skipped == {"unreadable": 2}
    assert _samples(tmp_path / "set").keys() == {"cache/a_1", "_c", "__x__"}
    assert not inspect.verify(inspect.locate(str(tmp_path / "set")), deep=True)[0].faults


def test_names_may_be_long_and_in_any_script(tmp_path: Path) -> None:
    names = ("x" * 120, "café [1] :cat:", "猫")
    (tmp_path / "in" / "Größe").mkdir(parents=True)
    for i, name in enumerate(names):
        (tmp_path / "in" / "Größe" / f"{name}.jpg").write_bytes(_image(i))
    prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())
    assert _samples(tmp_path / "set").keys() == {f"Größe/{name}" for name in names}
    assert shards.index_of(tmp_path / "set/00000.tar").read_bytes() == walk(tmp_path / "set/00000.tar")[0].tobytes()


def test_bytes_depend_on_neither_jobs_nor_place(tmp_path: Path, images: Path) -> None:
    options = Options(per_shard=4, val=0.2, seed=3)
    for jobs, place in ((1, "a"), (3, "b")):
        prepare(str(images), tmp_path / place / "set", options, Columns(), jobs=jobs)
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")
    prepare(str(images), tmp_path / "c" / "set", Options(per_shard=4, val=0.2, seed=4), Columns())
    assert _tree(tmp_path / "a") != _tree(tmp_path / "c")


def test_a_share_of_each_class_is_held_out(tmp_path: Path, images: Path) -> None:
    written = prepare(str(images), tmp_path / "set", Options(val=0.3), Columns())
    assert written["val"].labels == (3, 3, 3) or sum(written["val"].labels) == 8, "the broken image may be among them"
    assert not _samples(tmp_path / "set/train").keys() & _samples(tmp_path / "set/val").keys()
    assert written["val"].mean == written["train"].mean
    with pytest.raises(DataError, match=r"--val 0.01 leaves val without images: classes have 10 to 10 images"):
        prepare(str(images), tmp_path / "other", Options(val=0.01), Columns())
    assert list(tmp_path.glob(".*")) == []


def test_mean_and_deviation_are_the_pixels(tmp_path: Path) -> None:
    for c, level in enumerate((0, 255)):
        (tmp_path / "in" / str(c)).mkdir(parents=True)
        Image.new("RGB", (8, 8 + 8 * c), (level, 51, 51)).save(tmp_path / "in" / str(c) / "x.png")
    manifest = prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())[""]
    assert manifest.mean == (0.5, 0.2, 0.2)
    assert manifest.std == (0.5, 0.001, 0.001), "a flat channel's deviation is never 0"


def test_sizes_are_as_asked(tmp_path: Path, images: Path) -> None:
    options = Options(resize=48, min_size=45, max_aspect=2.6)
    manifest = prepare(str(images), tmp_path / "set", options, Columns())[""]
    for key, sample in _samples(tmp_path / "set").items():
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert min(image.size) == 48
        assert image.format == "JPEG"
        assert not key.endswith("_0"), "those have 40 pixels"
    assert manifest.skipped == {"image": 1, "small": 2, "aspect": 3}


def test_the_killed_command_goes_on_to_the_same_bytes(tmp_path: Path, images: Path) -> None:
    prepare(str(images), tmp_path / "whole" / "set", Options(per_shard=3), Columns())
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
    assert _tree(tmp_path / "set") == _tree(tmp_path / "whole" / "set")
    assert not partial.exists()


def test_shards_that_are_whole_are_kept_and_others_made_again(tmp_path: Path, images: Path) -> None:
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
    with pytest.raises(DataError, match=r"of other options or other inputs is there; give the same again .* rm -r"):
        prepare(str(images), tmp_path / "set", Options(per_shard=5), Columns())
    with pytest.raises(Stop):
        prepare(str(images), tmp_path / "set", Options(per_shard=4), Columns(), progress=stop)
    again = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert {name for name in kept if again[name] == kept[name]} == {"00000.tar", "00002.tar"}
    prepare(str(images), tmp_path / "set", Options(per_shard=4), Columns())
    assert len(_samples(tmp_path / "set")) == 29


def test_two_commands_do_not_write_the_same_set(tmp_path: Path, images: Path) -> None:
    def other(done: int, total: int) -> None:
        with pytest.raises(DataError, match="another process prepares this set"):
            prepare(str(images), tmp_path / "set", Options(), Columns())

    prepare(str(images), tmp_path / "set", Options(), Columns(), progress=other)


# ---- other inputs


def test_tables_of_paths_and_folders_give_the_same_samples(tmp_path: Path, images: Path) -> None:
    root = shutil.copytree(images, tmp_path / "in")
    prepare(str(root), tmp_path / "folder", Options(), Columns())
    rows = [(str(path.relative_to(root)), path.relative_to(root).parts[0]) for path in sorted(root.rglob("*.jpg"))]
    (root / "table.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    pa.parquet.write_table(pa.table({"file": [r[0] for r in rows], "kind": [r[1] for r in rows]}), root / "t.parquet")
    manifest = prepare(str(root / "table.csv"), tmp_path / "csv", Options(), Columns())[""]
    prepare(str(root / "t.parquet"), tmp_path / "parquet", Options(), Columns(image="file", label="kind"))
    assert manifest.classes == ("cat", "dog", "owl")
    in_csv, in_parquet, in_folder = (
        {key: (sample["cls"], sample.get("jpg")) for key, sample in _samples(tmp_path / kind).items()}
        for kind in ("csv", "parquet", "folder")
    )
    del in_folder["dog/dog_0"]
    assert in_csv == in_parquet == in_folder


def test_bytes_in_parquet_and_hugging_face_sets_keep_their_names_of_classes(tmp_path: Path) -> None:
    names = ["sparrow", "2", "1"]
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})
    rows = {
        "train": [{"img": {"bytes": _image(i), "path": None}, "fine_label": i % 3} for i in range(9)],
        "test": [{"img": {"bytes": _image(i), "path": None}, "fine_label": i % 3} for i in range(9, 12)],
    }
    loaded = datasets.DatasetDict({k: datasets.Dataset.from_list(v, features=features) for k, v in rows.items()})
    loaded.save_to_disk(tmp_path / "saved")
    for split in loaded:
        (tmp_path / "files" / split).mkdir(parents=True)
        loaded[split].to_parquet(tmp_path / "files" / split / "0.parquet")
    for kind in ("saved", "files"):
        written = prepare(str(tmp_path / kind), tmp_path / f"from-{kind}", Options(per_shard=4), Columns(), jobs=2)
        assert written["train"].classes == tuple(names)
        assert written["train"].labels == (3, 3, 3)
        assert int(_samples(tmp_path / f"from-{kind}" / "train")["00000004"]["cls"]) == 1
        assert _samples(tmp_path / f"from-{kind}" / "train")["00000004"]["jpg"] == _image(4)
    a, b = (_samples(tmp_path / f"from-{kind}" / "test") for kind in ("saved", "files"))
    assert a == b


def test_tars_are_cut_anew_with_all_their_members(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{i}", "jpg": _image(i), "cls": b"%d" % (i % 2), "json": b"{}"} for i in range(6)]
    for name in ("a", "b"):
        shards.write_shard(tmp_path / f"{name}.tar", samples)
    with pytest.raises(DataError, match=r"a.tar and .*b.tar both have the key k0 \(6 such keys\); --prefix-keys"):
        prepare(str(tmp_path), tmp_path / "set", Options(), Columns())
    columns = Columns(prefix_keys=True)
    manifest = prepare(str(tmp_path / "{a,b}.tar"), tmp_path / "set", Options(per_shard=5), columns)[""]
    assert manifest.labels == (6, 6)
    assert _samples(tmp_path / "set")["b/k3"]["json"] == b"{}"
    labelled = [{"__key__": f"k{i}", "png": _image(i, kind="PNG"), "json": b'{"class": "owl"}'} for i in range(2)]
    shards.write_shard(tmp_path / "c.tar", labelled)
    columns = Columns(classes=("cat", "owl"))
    assert prepare(str(tmp_path / "c.tar"), tmp_path / "c", Options(), columns)[""].labels == (0, 2)


# ---- labels


NUMBERED = (*range(12), 11)


def _numbered_folders(folder: Path, *others: str) -> str:
    for i, label in enumerate((*NUMBERED, *others)):
        (folder / f"in/{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"in/{label}/{i}.jpg").write_bytes(_image(i))
    return "in"


def _table(folder: Path, labels: list, image: str = "jpg", name: str = "in.csv") -> str:
    for i in range(len(labels)):
        (folder / f"{i}.{image}").write_bytes(_image(i))
    rows = "".join(f"{i}.{image},{label}\n" for i, label in enumerate(labels))
    (folder / name).write_text(f"path,label\n{rows}", "utf-8-sig")
    return name


def _parquet(folder: Path, labels: list) -> str:
    pa.parquet.write_table(
        pa.table({"image": [_image(i) for i in range(len(labels))], "label": labels}), folder / "in.parquet"
    )
    return "in.parquet"


def _jsons(folder: Path, labels: list) -> str:
    samples = [
        {"__key__": str(i), "jpg": _image(i), "json": json.dumps({"label": label}).encode()}
        for i, label in enumerate(labels)
    ]
    shards.write_shard(folder / "in.tar", samples)
    return "in.tar"


def _cls(folder: Path, labels: list) -> str:
    samples = [{"__key__": str(i), "jpg": _image(i), "cls": str(label).encode()} for i, label in enumerate(labels)]
    shards.write_shard(folder / "in.tar", samples)
    return "in.tar"


COUNTED = {
    "folders": _numbered_folders,
    "a table of floats": lambda folder: _table(folder, [f"{label}.0" for label in NUMBERED]),
    "a column of floats": lambda folder: _parquet(folder, [float(label) for label in NUMBERED]),
    "fields of json": lambda folder: _jsons(folder, [*NUMBERED[:11], 11.0, "11"]),
    "members with byte order marks": lambda folder: _cls(folder, [*NUMBERED[:11], "\ufeff11", "11.0\r\n"]),
}


@pytest.mark.parametrize("case", COUNTED)
def test_label_k_is_class_k_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    source = COUNTED[case](tmp_path)
    manifest = prepare(source, Path("set"), Options(), Columns())[""]
    assert manifest.classes == tuple(map(str, range(12)))
    assert manifest.labels == (1,) * 11 + (2,)
    for key, sample in _samples(Path("set")).items():
        assert int(sample["cls"]) == NUMBERED[int(key.rpartition("/")[2])]
    if case == "members with byte order marks":
        adopt.index([source], tmp_path / "index")
        assert sorted(decode.decode(s, "in", 12)[1] for s in _samples(tmp_path / "index").values()) == [*NUMBERED]


ODD = {
    "a name": (
        lambda folder: _table(folder, [0, "cat", 2]),
        "label 'cat' of ./1.jpg, sample 1 (1 rows) is not a whole",
    ),
    "below 0": (lambda folder: _parquet(folder, [0, 1, -1]), "label -1 of rows-00000"),
    "a gap in a table": (
        lambda folder: _table(folder, [0, 1, "nan"]),
        "1 rows have no label; leave them out; the first is",
    ),
    "a gap in a column": (lambda folder: _parquet(folder, [0.0, None, float("nan")]), "2 rows have no label"),
    "a list in json": (lambda folder: _jsons(folder, [0, [1]]), "in.tar, sample 1: its .json holds a list, and labels"),
    "an empty member": (lambda folder: _cls(folder, [0, "\n"]), "1 rows have no label"),
    "a folder of another name": (
        lambda folder: _numbered_folders(folder, "cat"),
        "label 'cat' of in/cat/13.jpg, sample cat/13 (1 rows) is not a whole number from 0 on, as 13 others are",
    ),
    "one number twice": (lambda folder: _numbered_folders(folder, "07"), "the folders 07 and 7 are both class 7"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_label_that_is_none_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, expected = ODD[case]
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(source, Path("set"), Options(), Columns())
    assert expected in str(caught.value)


def test_gaps_between_numbers_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards.write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "jpg": _image(i), "cls": b"%d" % i} for i in (0, 1, 5)])
    assert prepare(str(tmp_path), tmp_path / "set", Options(), Columns())[""].labels == (1, 1, 0, 0, 0, 1)
    assert adopt.index([str(tmp_path)], None)[1].labels == (1, 1, 0, 0, 0, 1)
    assert caplog.text.count("3 of 6 classes have no images: 2, 3, 4") == 2
    shards.write_shard(tmp_path / "x0.tar", [{"__key__": "k", "jpg": _image(0), "cls": b"99999"}])
    with pytest.raises(DataError, match="labels go up to 99,999, and only 1 of them occur"):
        adopt.index([str(tmp_path / "x0.tar")], tmp_path / "out")


def test_numbers_of_a_hugging_face_set_stay_with_its_own_names(tmp_path: Path) -> None:
    def save(split: str, names: list[str], labels: list[int]) -> None:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = [{"image": {"bytes": _image(i), "path": None}, "label": label} for i, label in enumerate(labels)]
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / "in" / split / f"{'-'.join(names)}.parquet")

    save("train", ["cat", "dog"], [0, 0, 1])
    save("val", ["dog", "cat"], [0, 1, 1])
    written = prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())
    assert {split: manifest.labels for split, manifest in written.items()} == {"train": (2, 1), "val": (2, 1)}
    for names, labels in ((("dog", "cat"), (1, 2)), (("chien", "chat"), (2, 1)), (("cat", "cow", "dog"), (2, 0, 1))):
        columns = Columns(classes=names)
        found = prepare(str(tmp_path / "in/train"), tmp_path / "-".join(names), Options(), columns)
        assert found[""].labels == labels, names
    save("train", ["dog", "cat"], [0])
    with pytest.raises(DataError, match=r"dog-cat.parquet: it names other classes than .*cat-dog.parquet"):
        prepare(str(tmp_path / "in"), tmp_path / "other", Options(), Columns())


# ---- bad input


def _file(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _alone(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in/x.jpg").write_bytes(_image(0))


def _twins(folder: Path) -> None:
    (folder / "in/a").mkdir(parents=True)
    for kind in ("jpg", "png"):
        (folder / "in/a" / f"x.{kind}").write_bytes(_image(0))


def _hidden(folder: Path) -> None:
    (folder / "in/__other__").mkdir(parents=True)
    (folder / "in/__other__/x.jpg").write_bytes(_image(0))


def _junk(folder: Path) -> None:
    (folder / "in/a").mkdir(parents=True)
    (folder / "in/a/x.jpg").write_bytes(b"junk")
    (folder / "in/a/y.jpg").symlink_to("nowhere")


def _floats(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"image": [b"x"], "label": [0.5]}), folder / "in.parquet")


def _numbers(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"image": [1], "label": [1]}), folder / "in.parquet")


WRONG = {
    "nothing there": ("in", None, "input in: it is not there; give a folder of images"),
    "an empty folder": ("in", lambda folder: (folder / "in").mkdir(), "no images in it; looked for jpg"),
    "images in no class": ("in", _alone, "x.jpg lies in no class's folder; move it to in/CLASS/x.jpg"),
    "two images of a name": ("in", _twins, "in/a/x.jpg and in/a/x.png both have the key a/x; rename one"),
    "a class webdataset would not see": ("in", _hidden, "__other__/x would be passed over"),
    "only bad images": ("in", _junk, "none of the 2 inputs can be used (1 x image, 1 x unreadable)"),
    "a command": ("pipe:cat x.tar", None, "commands are not run"),
    "an address": ("s3://bucket/x", None, "only local files are prepared"),
    "braces that are open": ("{a,b.tar", None, "its braces are not closed"),
    "an unknown kind": ("in.zip", _file("in.zip", ""), "files ending in .zip; known: .tar, .parquet, .csv, .tsv"),
    "a csv without the column": ("in.csv", _file("in.csv", "path,klass\n"), "no column for the label, such as label"),
    "a csv that is empty": ("in.csv", _file("in.csv", ""), "it has none; name one with --image-column"),
    "a row without label": (
        "in.csv",
        _file("in.csv", "path,label\na.jpg,\n"),
        "1 rows have no label; leave them out; the first is ./a.jpg",
    ),
    "labels far apart": ("in.csv", _file("in.csv", "path,label\na.jpg,99999\n"), "labels go up to 99,999, and only 1"),
    "labels that are fractions": ("in.parquet", _floats, "column 'label' holds 0.5 (a number)"),
    "images that are numbers": ("in.parquet", _numbers, "column 'image' is of type int64; images are bytes or paths"),
    "a parquet file that is none": ("in.parquet", _file("in.parquet", "x"), "in.parquet cannot be read"),
    "a tar that is none": ("in.tar", _file("in.tar", "<html>"), "in.tar, offset 0: the file ends here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_input_that_cannot_be_used_gets_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    source, make, expected = WRONG[case]
    if make:
        make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(source, Path("set"), Options(), Columns())
    assert expected in str(caught.value)
    assert not Path("set").exists()


def test_a_label_outside_the_class_map_is_named_with_the_nearest(tmp_path: Path, images: Path) -> None:
    with pytest.raises(
        DataError, match=r"label 'owl' of .*/owl/owl.0.jpg.* \(10 rows\) is none of .* \(did you mean owls\?\)"
    ):
        prepare(str(images), tmp_path / "set", Options(), Columns(classes=("dog", "cat", "owls")))


def test_without_its_library_an_input_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"")
    code = "import sys; sys.modules['pyarrow'] = None; from vimscale.launch.commands.app import main; main()"
    command = [sys.executable, "-c", code, "data", "prepare", "in.parquet", "set"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs pyarrow, which is not installed: pip install 'vimscale[prepare]'" in result.stderr


# ---- index, verify, repair, merge, stats


@pytest.fixture
def made(tmp_path: Path, images: Path) -> Path:
    prepare(str(images), tmp_path / "set", Options(per_shard=8), Columns())
    return tmp_path / "set"


def test_indexing_the_shards_of_a_set_finds_what_its_manifest_says(made: Path, tmp_path: Path) -> None:
    before = Dataset.open(str(made)).manifest
    index = {path.name: path.read_bytes() for path in made.glob("*.idx")}
    for path in (*made.glob("*.idx"), made / "manifest.json"):
        path.unlink()
    folder, found, unread = adopt.index([str(made)], None, classes=before.classes, jobs=2)
    assert (folder, unread) == (made, [])
    assert {path.name: path.read_bytes() for path in made.glob("*.idx")} == index
    for key in ("shards", "labels", "sides", "mean", "std", "classes"):
        assert getattr(found, key) == getattr(before, key)
    _, elsewhere, _ = adopt.index([str(made / "0000{0..1}.tar")], tmp_path / "out")
    assert elsewhere.base == str(made)
    assert [shard.name for shard in elsewhere.shards] == ["00000.tar", "00001.tar"]
    assert (tmp_path / "out/00001.tar.idx").read_bytes() == index["00001.tar.idx"]


def test_shards_of_a_web_server_are_indexed_and_read_without_touching_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIMSCALE_CACHE", str(tmp_path / "cache"))
    expected = _samples(made)
    for path in (*made.glob("*.idx"), made / "manifest.json"):
        path.unlink()
    server = WebServer(tmp_path)
    try:
        address = f"{server.url}/set/0000{{0..3}}.tar"
        with pytest.raises(DataError, match="the index cannot be written there; give a folder with --output"):
            adopt.index([address], None)
        adopt.index([address], tmp_path / "index")
        found = _samples(tmp_path / "index")
    finally:
        server.shutdown()
        server.server_close()
    assert {key: sample["cls"] for key, sample in found.items()} == {key: s["cls"] for key, s in expected.items()}
    assert sorted(path.suffix for path in made.iterdir()) == [".jsonl"] + [".tar"] * 4


UNFIT = {
    "no label": (
        {"jpg": _image(0), "txt": b"a cat"},
        r"00000.tar, offset 0, sample k: no member .cls, .* has jpg, txt",
    ),
    "a name as label": ({"jpg": _image(0), "cls": b"cat"}, "its .cls is 'cat', and training reads whole numbers"),
    "a label of no class": ({"jpg": _image(0), "cls": b"7"}, "label 7 is none of the 2 classes"),
    "no image": ({"gif": _image(0, kind="GIF"), "cls": b"0"}, r"no image among its members \(cls, gif\)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tars_that_cannot_be_trained_on_are_not_indexed(tmp_path: Path, case: str) -> None:
    members, expected = UNFIT[case]
    shards.write_shard(tmp_path / "00000.tar", [{"__key__": "k", **members}])
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


def _cut(folder: Path) -> None:
    offset, size = scan(folder / "00001.tar").samples[5].members["jpg"]
    os.truncate(folder / "00001.tar", offset + size // 2)


def _harm_headers(folder: Path) -> None:
    """Of the second and the last but one of eight samples, a header each, one of them by zeros."""
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
    "a shard that is cut": (_cut, r"00001.tar, offset \d+: member .*jpg has .* it is cut", 3, False),
    "a shard that is gone": (lambda f: (f / "00001.tar").unlink(), "00001.tar is missing", 8, False),
    "an image of zeros": (_harm_image, r"00001.tar, offset \d+, sample .*: the image cannot be decoded", 1, True),
}


@pytest.mark.parametrize("case", HARM)
def test_damage_is_found_and_what_is_whole_is_saved(made: Path, case: str) -> None:
    harm, expected, lost, deep = HARM[case]
    before = _samples(made)
    harm(made)
    located = inspect.locate(str(made))
    faults = [fault for health in inspect.verify(located, deep=deep) for fault in health.faults + health.index_faults]
    assert any(re.search(expected, fault) for fault in faults), faults
    todo = repair.steps(inspect.verify(located, deep=True))
    old = repair.repair(located, todo)
    assert (old is None) == all(step.kind == "index" for step in todo)
    mended = inspect.locate(str(made))
    healths = inspect.verify(mended, deep=True)
    assert not repair.steps(healths)
    assert not inspect.miscounted(mended, healths)
    after = _samples(made)
    assert len(after) == len(before) - lost
    assert all(after[key]["cls"] == before[key]["cls"] for key in after)


def test_sets_of_the_same_classes_become_one(tmp_path: Path, images: Path) -> None:
    written = prepare(str(images), tmp_path / "set", Options(per_shard=8, val=0.3), Columns())
    whole = prepare(str(images), tmp_path / "whole", Options(), Columns())[""]
    parts = [inspect.locate(str(tmp_path / "set" / split)) for split in written]
    merged = merge.merge(parts, tmp_path / "all")
    assert _samples(tmp_path / "all").keys() == _samples(tmp_path / "whole").keys()
    assert (merged.labels, merged.sides, merged.skipped) == (whole.labels, whole.sides, whole.skipped)
    with pytest.raises(DataError, match="are the same; give each set once"):
        merge.merge([parts[0], parts[0]], tmp_path / "twice")
    shards.write_file(tmp_path / "whole/manifest.json", whole.to_json().replace("owl", "emu").encode())
    with pytest.raises(DataError, match="class 2 is 'emu', not 'owl'"):
        merge.merge([parts[0], inspect.locate(str(tmp_path / "whole"))], tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "set", "whole"]


def test_the_commands_say_what_they_did(shell: Shell, images: Path) -> None:
    out = shell.run("data", "prepare", str(images), "set", "--val", "0.3", "--per-shard", "5", "--jobs", "1")
    assert "1 skipped (1 x image): set/" in out
    made = {path: path.stat().st_mtime_ns for path in (shell.folder / "set").rglob("*")}
    same = ("data", "prepare", str(images), "set", "--val", "0.3", "--per-shard", "5")
    assert "set is finished" in shell.run(*same)
    for changes in (("--seed", "1"), ("--val", "0"), ("--source", "elsewhere")):
        assert "made of another input or with other options is there" in shell.run(*same, *changes, expect=2)
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


def test_shards_below_folders_are_repaired_where_they_are(made: Path, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / "many" / name).mkdir(parents=True)
        shutil.copy(made / f"{number:05d}.tar", tmp_path / "many" / name / "0.tar")
    adopt.index([str(tmp_path / "many/{a,b}/0.tar")], tmp_path / "index")
    before = _samples(tmp_path / "index")
    tar = tmp_path / "many/b/0.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    located = inspect.locate(str(tmp_path / "index"))
    repair.repair(located, repair.steps(inspect.verify(located, deep=True)))
    after = _samples(tmp_path / "index")
    repaired = Dataset.open(str(tmp_path / "index")).manifest
    assert [shard.name for shard in repaired.shards] == ["a/0.tar", "b/0-salvaged.tar"]
    assert len(after) < len(before)
    assert all(before[key]["cls"] == sample["cls"] for key, sample in after.items())
