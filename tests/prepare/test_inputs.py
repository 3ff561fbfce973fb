"""Tables, Hugging Face sets and tars give the same samples as folders; unusable inputs give one message."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import later
from tests.support.image_sets import image, samples_of
from vimscale.data.shards.manifest import write_shard
from vimscale.errors import DataError
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options

datasets = later.module("datasets")
pa = later.module("pyarrow")
parquet = later.module("pyarrow.parquet")


def test_tables_of_paths_and_folders_give_the_same_samples(tmp_path: Path, images: Path) -> None:
    root = shutil.copytree(images, tmp_path / "in")
    prepare(str(root), tmp_path / "folder", Options(), Columns())
    rows = [(str(path.relative_to(root)), path.relative_to(root).parts[0]) for path in sorted(root.rglob("*.jpg"))]
    (root / "table.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    parquet.write_table(pa.table({"file": [r[0] for r in rows], "kind": [r[1] for r in rows]}), root / "t.parquet")
    manifest = prepare(str(root / "table.csv"), tmp_path / "csv", Options(), Columns())[""]
    prepare(str(root / "t.parquet"), tmp_path / "parquet", Options(), Columns(image="file", label="kind"))
    assert manifest.classes == ("cat", "dog", "owl")
    in_csv, in_parquet, in_folder = (
        {key: (sample["cls"], sample.get("jpg")) for key, sample in samples_of(tmp_path / kind).items()}
        for kind in ("csv", "parquet", "folder")
    )
    del in_folder["dog/dog_0"]
    assert in_csv == in_parquet == in_folder


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bytes_in_parquet_and_hugging_face_sets_keep_their_class_names(tmp_path: Path, jobs: int) -> None:
    names = ["sparrow", "2", "1"]
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})
    rows = {
        "train": [{"img": {"bytes": image(i), "path": None}, "fine_label": i % 3} for i in range(9)],
        "test": [{"img": {"bytes": image(i), "path": None}, "fine_label": i % 3} for i in range(9, 12)],
    }
    loaded = datasets.DatasetDict({k: datasets.Dataset.from_list(v, features=features) for k, v in rows.items()})
    loaded.save_to_disk(tmp_path / "saved")
    for split in loaded:
        (tmp_path / "files" / split).mkdir(parents=True)
        loaded[split].to_parquet(tmp_path / "files" / split / "0.parquet")
    for kind in ("saved", "files"):
        options = Options(per_shard=4)
        written = prepare(str(tmp_path / kind), tmp_path / f"from-{kind}", options, Columns(), jobs=jobs)
        assert written["train"].classes == tuple(names)
        assert written["train"].labels == (3, 3, 3)
        assert int(samples_of(tmp_path / f"from-{kind}" / "train")["00000004"]["cls"]) == 1
        assert samples_of(tmp_path / f"from-{kind}" / "train")["00000004"]["jpg"] == image(4)
    a, b = (samples_of(tmp_path / f"from-{kind}" / "test") for kind in ("saved", "files"))
    assert a == b


def test_tars_are_sharded_again_with_all_their_members(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{i}", "jpg": image(i), "cls": b"%d" % (i % 2), "json": b"{}"} for i in range(6)]
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", samples)
    with pytest.raises(DataError, match=r"a.tar and .*b.tar both have the key k0 \(6 such keys\); --prefix-keys"):
        prepare(str(tmp_path), tmp_path / "set", Options(), Columns())
    columns = Columns(prefix_keys=True)
    manifest = prepare(str(tmp_path / "{a,b}.tar"), tmp_path / "set", Options(per_shard=5), columns)[""]
    assert manifest.labels == (6, 6)
    assert samples_of(tmp_path / "set")["b/k3"]["json"] == b"{}"
    labelled = [{"__key__": f"k{i}", "png": image(i, kind="PNG"), "json": b'{"class": "owl"}'} for i in range(2)]
    write_shard(tmp_path / "c.tar", labelled)
    columns = Columns(classes=("cat", "owl"))
    assert prepare(str(tmp_path / "c.tar"), tmp_path / "c", Options(), columns)[""].labels == (0, 2)


# ---- bad input


def _file(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _alone(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in/cat").mkdir()
    for name in ("x.jpg", "cat/y.jpg"):
        (folder / "in" / name).write_bytes(image(0))


def _twins(folder: Path) -> None:
    (folder / "in/a").mkdir(parents=True)
    for kind in ("jpg", "png"):
        (folder / "in/a" / f"x.{kind}").write_bytes(image(0))


def _hidden(folder: Path) -> None:
    (folder / "in/__other__").mkdir(parents=True)
    (folder / "in/__other__/x.jpg").write_bytes(image(0))


def _junk(folder: Path) -> None:
    (folder / "in/a").mkdir(parents=True)
    (folder / "in/a/x.jpg").write_bytes(b"junk")
    (folder / "in/a/y.jpg").symlink_to("nowhere")


def _floats(folder: Path) -> None:
    parquet.write_table(pa.table({"image": [b"x"], "label": [0.5]}), folder / "in.parquet")


def _numbers(folder: Path) -> None:
    parquet.write_table(pa.table({"image": [1], "label": [1]}), folder / "in.parquet")


WRONG = {
    "nothing there": ("in", None, "input in: it is not there; give a folder of images"),
    "an empty folder": ("in", lambda folder: (folder / "in").mkdir(), "no images in it; looked for jpg"),
    "images in no class": ("in", _alone, "x.jpg is not in a class folder, and others are; move it to"),
    "two images of a name": ("in", _twins, "in/a/x.jpg and in/a/x.png both have the key a/x; rename one"),
    "a class webdataset would not see": ("in", _hidden, "__other__/x would be ignored"),
    "only bad images": ("in", _junk, "none of the 2 inputs is usable (1 x image, 1 x unreadable)"),
    "a command": ("pipe:cat x.tar", None, "commands are not run"),
    "an address": ("s3://bucket/x", None, "only local files are prepared"),
    "braces that are not closed": ("{a,b.tar", None, "its braces are not closed"),
    "an unknown kind": (
        "in.zip",
        _file("in.zip", ""),
        "files ending in .zip; give files of one kind: .tar, .parquet, .csv, .tsv",
    ),
    "a csv without images": ("in.csv", _file("in.csv", "klass,label\n"), "no column for the image, such as image"),
    "a csv that is empty": ("in.csv", _file("in.csv", ""), "it has none; name one with --image-column"),
    "a row without label": (
        "in.csv",
        _file("in.csv", "path,label\na.jpg,\n"),
        "1 rows have no label; leave them out; the first is ./a.jpg",
    ),
    "labels far apart": ("in.csv", _file("in.csv", "path,label\na.jpg,99999\n"), "labels go up to 99,999, but only 1"),
    "labels that are fractions": ("in.parquet", _floats, "column 'label' holds 0.5 (a number)"),
    "images that are numbers": ("in.parquet", _numbers, "column 'image' has type int64, but images are bytes or paths"),
    "a file that is not parquet": ("in.parquet", _file("in.parquet", "x"), "in.parquet cannot be read"),
    "a file that is not a tar": ("in.tar", _file("in.tar", "<html>"), "in.tar, offset 0: the file ends here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unusable_input_gives_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
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
        DataError, match=r"label 'owl' of .*/owl/owl.0.jpg.* \(10 rows\) is not one of .* \(did you mean owls\?\)"
    ):
        prepare(str(images), tmp_path / "set", Options(), Columns(classes=("dog", "cat", "owls")))


def test_without_its_library_an_input_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"")
    code = "import sys; sys.modules['pyarrow'] = None; from vimscale.launch.commands.app import main; main()"
    command = [sys.executable, "-c", code, "data", "prepare", "in.parquet", "set"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs pyarrow, which is not installed: pip install 'vimscale[prepare]'" in result.stderr
