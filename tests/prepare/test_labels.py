"""Labels in every kind of input: label k is class k, and a label that is not a class is an error."""

import json
from pathlib import Path

import pytest

from tests.support import later
from tests.support.image_sets import image, samples_of
from vimscale.data.images import decode
from vimscale.data.shards.manifest import write_shard
from vimscale.errors import DataError
from vimscale.prepare import adopt
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options

datasets = later.module("datasets")
pa = later.module("pyarrow")
parquet = later.module("pyarrow.parquet")

NUMBERED = (*range(12), 11)


def _numbered_folders(folder: Path, *others: str) -> str:
    for i, label in enumerate((*NUMBERED, *others)):
        (folder / f"in/{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"in/{label}/{i}.jpg").write_bytes(image(i))
    return "in"


def _table(folder: Path, labels: list, extension: str = "jpg", name: str = "in.csv") -> str:
    for i in range(len(labels)):
        (folder / f"{i}.{extension}").write_bytes(image(i))
    rows = "".join(f"{i}.{extension},{label}\n" for i, label in enumerate(labels))
    (folder / name).write_text(f"path,label\n{rows}", "utf-8-sig")
    return name


def _parquet(folder: Path, labels: list) -> str:
    parquet.write_table(
        pa.table({"image": [image(i) for i in range(len(labels))], "label": labels}), folder / "in.parquet"
    )
    return "in.parquet"


def _jsons(folder: Path, labels: list) -> str:
    samples = [
        {"__key__": str(i), "jpg": image(i), "json": json.dumps({"label": label}).encode()}
        for i, label in enumerate(labels)
    ]
    write_shard(folder / "in.tar", samples)
    return "in.tar"


def _cls(folder: Path, labels: list) -> str:
    samples = [{"__key__": str(i), "jpg": image(i), "cls": str(label).encode()} for i, label in enumerate(labels)]
    write_shard(folder / "in.tar", samples)
    return "in.tar"


COUNTED = {
    "folders": _numbered_folders,
    "a table of floats": lambda folder: _table(folder, [f"{label}.0" for label in NUMBERED]),
    "a column of floats": lambda folder: _parquet(folder, [float(label) for label in NUMBERED]),
    "fields of json": lambda folder: _jsons(folder, [*NUMBERED[:11], 11.0, "11"]),
    "members with byte order marks": lambda folder: _cls(folder, [*NUMBERED[:11], "\ufeff11", "11.0\r\n"]),
}


@pytest.mark.parametrize("case", COUNTED)
def test_label_k_is_class_k_in_every_kind_of_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    source = COUNTED[case](tmp_path)
    manifest = prepare(source, Path("set"), Options(), Columns())[""]
    assert manifest.classes == tuple(map(str, range(12)))
    assert manifest.labels == (1,) * 11 + (2,)
    for key, sample in samples_of(Path("set")).items():
        assert int(sample["cls"]) == NUMBERED[int(key.rpartition("/")[2])]
    if case == "members with byte order marks":
        adopt.index([source], tmp_path / "index")
        assert sorted(decode.decode(s, "in", 12)[1] for s in samples_of(tmp_path / "index").values()) == [*NUMBERED]


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
    "a list in json": (lambda folder: _jsons(folder, [0, [1]]), "in.tar, sample 1: its .json holds a list, but labels"),
    "an empty member": (lambda folder: _cls(folder, [0, "\n"]), "1 rows have no label"),
    "a folder of another name": (
        lambda folder: _numbered_folders(folder, "cat"),
        "label 'cat' of in/cat/13.jpg, sample cat/13 (1 rows) is not a whole number from 0 on, as 13 others are",
    ),
    "one number twice": (lambda folder: _numbered_folders(folder, "07"), "the folders 07 and 7 are both class 7"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_invalid_label_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, expected = ODD[case]
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(source, Path("set"), Options(), Columns())
    assert expected in str(caught.value)


def test_gaps_between_numbers_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "jpg": image(i), "cls": b"%d" % i} for i in (0, 1, 5)])
    assert prepare(str(tmp_path), tmp_path / "set", Options(), Columns())[""].labels == (1, 1, 0, 0, 0, 1)
    assert adopt.index([str(tmp_path)], None)[1].labels == (1, 1, 0, 0, 0, 1)
    assert caplog.text.count("3 of 6 classes have no images: 2, 3, 4") == 2
    write_shard(tmp_path / "x0.tar", [{"__key__": "k", "jpg": image(0), "cls": b"99999"}])
    with pytest.raises(DataError, match="labels go up to 99,999, but only 1 of them occur"):
        adopt.index([str(tmp_path / "x0.tar")], tmp_path / "out")


def test_numbers_of_a_hugging_face_set_stay_with_its_own_names(tmp_path: Path) -> None:
    def save(split: str, names: list[str], labels: list[int]) -> None:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = [{"image": {"bytes": image(i), "path": None}, "label": label} for i, label in enumerate(labels)]
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
