"""Members of tars by any name: each belongs to a sample or is reported as ignored, and the right one is the image."""

import io
import json
import logging
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.shell import Shell
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.shards.tar import split_name
from vimscale.errors import DataError
from vimscale.prepare import adopt, merge
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import inspect, repair
from vimscale.prepare.make import finished, prepare
from vimscale.prepare.shapes import Options


def _image(kind: str = "JPEG", side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 99, np.uint8)).save(file, kind)
    return file.getvalue()


def _pack(folder: Path, members: Iterable[tuple[str, bytes]], name: str = "00000.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def _samples(folder: Path) -> dict[str, dict]:
    dataset = Dataset.open(str(folder))
    read = [dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    return {sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")} for sample in read}


def _sides(folder: Path) -> set[int]:
    """Return the heights of the images that training reads."""
    dataset = Dataset.open(str(folder))
    samples = [(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    read = (stream.read(dataset, *sample, lambda image: (1, 1), lambda seen: {})[0] for sample in samples)
    return {sample.image.shape[1] for sample in read}


# ---- names

LEFT_BEHIND = (
    "._0001.jpg",
    "n01/._0001.jpg",
    "n01/.DS_Store",
    "n01/Thumbs.db",
    "desktop.ini",
    "__MACOSX/n01/._0001.jpg",
    "n01/.ipynb_checkpoints/0001-checkpoint.jpg",
    ".ipynb_checkpoints/0001.cls",
    "@eaDir/0001.jpg/thumb.jpg",
    f"{'n' * 150}/._0001.jpg",
)


@pytest.mark.parametrize(
    "name", [*LEFT_BEHIND, "README", "n01/", "__meta__", "__x__/a.jpg", "a.__key__", "n.1/a.__url__"]
)
def test_files_that_systems_leave_behind_belong_to_no_sample(name: str) -> None:
    assert split_name(name) is None


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("./a.jpg", ("./a", "jpg")),
        ("../b/a.JPG", ("../b/a", "jpg")),
        ("v1.0/a.seg.png", ("v1.0/a", "seg.png")),
        ("_a.jpg", ("_a", "jpg")),
        ("__x__.jpg", ("__x__", "jpg")),
        ("a._meta.json", ("a", "_meta.json")),
        ("a.", ("a", "")),
        ("thumbs.jpg", ("thumbs", "jpg")),
    ],
)
def test_other_names_split_as_webdataset_does(name: str, split: tuple[str, str]) -> None:
    assert split_name(name) == split


def test_left_behind_files_change_nothing_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = [(f"n01/{i}.{ext}", data) for i in range(6) for ext, data in (("jpg", _image()), ("cls", b"%d" % (i % 2)))]
    left = [(name, b"?") for name in LEFT_BEHIND]
    mixed = [left[0], *(member for pair in zip(own, [*left[1:], *left[1:]], strict=False) for member in pair)]
    clean, littered = _pack(tmp_path / "clean", own), _pack(tmp_path / "littered", mixed)
    _pack(littered, [("x.txt", b"?")], "._00000.tar")
    with caplog.at_level(logging.WARNING):
        prepare(str(clean), tmp_path / "a", Options(), Columns())
        adopt.index([str(clean)], None)
        assert caplog.text == ""
        prepare(str(littered), tmp_path / "b", Options(), Columns())
        adopt.index([str(littered)], None)
    ignored = len(mixed) - len(own)
    assert caplog.text.count(f"{ignored} files in the tars belong to no sample and are ignored: ._0001.jpg") == 2
    assert _samples(tmp_path / "a") == _samples(tmp_path / "b") == _samples(clean) == _samples(littered)
    assert not inspect.verify(inspect.locate(str(littered)), deep=True)[0].faults


def test_left_behind_files_in_folders_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/a/x.jpg", "val/a/y.jpg", "train/a/._x.jpg", "train/__MACOSX/a/x.jpg", "__MACOSX/b/x.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(_image())
    (tmp_path / "in/train/a/.ipynb_checkpoints").mkdir()
    (tmp_path / "in/train/a/.ipynb_checkpoints/x.jpg").write_bytes(_image())
    written = prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())
    assert {split: (manifest.classes, manifest.samples) for split, manifest in written.items()} == {
        "train": (("a",), 1),
        "val": (("a",), 1),
    }
    assert "files that are not images are ignored: 1 hidden" in caplog.text
    (tmp_path / "in/docs").mkdir()
    with pytest.raises(DataError, match=r"it has splits, and other folders \(docs\)"):
        prepare(str(tmp_path / "in"), tmp_path / "other", Options(), Columns())


def test_names_with_dots_are_separated_by_their_labels(tmp_path: Path) -> None:
    members = [
        (f"n01/photo.2021.{i}.{ext}", data)
        for i in range(3)
        for ext, data in (("jpg", _image()), ("seg.png", _image("PNG", 8)), ("cls", b"%d" % (i % 2)))
    ]
    members += [("plain.jpg", _image()), ("plain.cls", b"1"), ("plain.depth.png", b"?")]
    members += [("b.1.jpg", _image()), ("b.1.json", b'{"label": 1.0}'), ("c.input.jpg", _image()), ("c.cls", b"0")]
    folder = _pack(tmp_path / "in", members)
    with pytest.raises(DataError, match=r"sample n01/photo: no member .cls, .* `vimscale data prepare` of the tars"):
        adopt.index([str(folder)], None)
    prepare(str(folder), tmp_path / "set", Options(), Columns())
    found = _samples(tmp_path / "set")
    assert {key: (sample["cls"], sorted(sample.keys() - {"cls"})) for key, sample in found.items()} == {
        "n01/photo_2021_0": (b"0", ["jpg", "seg.png"]),
        "n01/photo_2021_1": (b"1", ["jpg", "seg.png"]),
        "n01/photo_2021_2": (b"0", ["jpg", "seg.png"]),
        "plain": (b"1", ["depth.png", "jpg"]),
        "b_1": (b"1", ["jpg", "json"]),
        "c": (b"0", ["jpg"]),
    }


def test_members_of_any_extension_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"": b"x", "_meta.json": b"{}", "image": b"no image", "txt": b"y"}
    folder = _pack(
        tmp_path / "in",
        [(f"s.{ext}", data) for ext, data in {**others, "jpg": _image(), "cls": b"0", "__key__": b"z"}.items()],
    )
    adopt.index([str(folder)], None)
    prepare(str(folder), tmp_path / "set", Options(), Columns())
    for made, names in ((folder, others), (tmp_path / "set", {**others, "other.image": b"no image"})):
        names = {name: data for name, data in names.items() if made == folder or name != "image"}
        assert _samples(made) == {"s": {**names, "jpg": _image(), "cls": b"0"}}
    assert caplog.text.count("are ignored: s.__key__") == 2


def test_a_tar_of_only_hidden_files_is_an_error(tmp_path: Path) -> None:
    folder = _pack(tmp_path / "in", [(".cache/s.jpg", _image()), (".cache/s.cls", b"0")])
    with pytest.raises(DataError, match=r"holds no samples \(2 files in the tars .* are ignored: .cache/s.jpg, "):
        adopt.index([str(folder)], None)


# ---- order


def test_tars_that_are_not_sorted_are_prepared_and_not_indexed(tmp_path: Path) -> None:
    parts = [
        (ext, f"s{i}.{ext}", data) for i in range(4) for ext, data in (("jpg", _image()), ("cls", b"%d" % (i % 2)))
    ]
    folder = _pack(tmp_path / "in", [(name, data) for _, name, data in sorted(parts)])
    with pytest.raises(
        DataError, match=r"sample s0 comes back after others: .*`tar --sort=name`.*`vimscale data prepare`"
    ):
        adopt.index([str(folder)], None)
    assert prepare(str(folder), tmp_path / "set", Options(), Columns())[""].labels == (2, 2)
    assert {key: sample["cls"] for key, sample in _samples(tmp_path / "set").items()} == {
        f"s{i}": b"%d" % (i % 2) for i in range(4)
    }


# ---- several images in a sample

KINDS = {"tif": "TIFF", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "jfif": "JPEG", "webp": "WEBP", "jpg": "JPEG"}


def _masked(folder: Path, ext: str, *, mask: str = "png") -> Path:
    members = [(ext, _image(KINDS[ext.rpartition(".")[2]])), ("cls", b"0"), (mask, _image("PNG", 8))]
    return _pack(folder, [(f"s{i}.{name}", data) for i in range(2) for name, data in members])


@pytest.mark.parametrize("ext", ["tif", "bmp", "gif", "ppm", "webp", "input.jpg"])
def test_the_user_chooses_one_of_several_images(tmp_path: Path, ext: str) -> None:
    mask = "target.png" if "." in ext else "png"
    folder = _masked(tmp_path / "in", ext, mask=mask)
    for work in (
        lambda: adopt.index([str(folder)], None),
        lambda: prepare(str(folder), tmp_path / "set", Options(), Columns()),
    ):
        with pytest.raises(
            DataError, match=rf"sample s0: {ext} and {mask} may each be the image; choose one with --image"
        ):
            work()
    images = prepare(str(folder), tmp_path / "set", Options(), Columns(members=(ext,)))
    masks = prepare(str(folder), tmp_path / "masks", Options(), Columns(members=("none", mask)))
    assert images[""].plan != masks[""].plan
    assert (_sides(tmp_path / "set"), _sides(tmp_path / "masks")) == ({40}, {8})
    kept = {"target.png"} if "." in ext else {"other.png"}
    assert _samples(tmp_path / "set")["s0"].keys() - {"jpg", "png", "webp", "cls"} == kept
    assert "image" not in json.loads((tmp_path / "set/manifest.json").read_text()), (
        "only one member is left that may be the image"
    )


def test_next_to_a_mask_a_jpeg_is_the_image(tmp_path: Path) -> None:
    folder = _masked(tmp_path / "in", "jpg")
    adopt.index([str(folder)], None)
    prepare(str(folder), tmp_path / "set", Options(), Columns())
    assert _sides(folder) == _sides(tmp_path / "set") == {40}


def test_training_reads_the_member_that_was_chosen_when_the_tars_were_indexed(tmp_path: Path) -> None:
    for ext in ("jfif", "webp", "input.jpg"):
        folder = _masked(tmp_path / ext, ext, mask="target.jpg" if "." in ext else "png")
        with pytest.raises(DataError, match=f"--image {ext}"):
            adopt.index([str(folder)], None)
        adopt.index([str(folder)], None, image=(ext,))
        assert _sides(folder) == {40}
        located = inspect.locate(str(folder))
        assert not repair.steps(inspect.verify(located, deep=True))
    with pytest.raises(DataError, match=r"training reads .*; `vimscale data prepare --image tif` converts"):
        adopt.index([str(_masked(tmp_path / "tif", "tif"))], None, image=("tif",))
    with pytest.raises(DataError, match=r"s0: no image among its members \(tif, cls, png\); training reads jpg"):
        adopt.index([str(tmp_path / "tif")], None, image=("jpg",))
    with pytest.raises(DataError, match="its images are webp, not jfif"):
        merge.merge([inspect.locate(str(tmp_path / name)) for name in ("jfif", "webp")], tmp_path / "all")
    _pack(tmp_path / "webp2", [("t.webp", _image("WEBP")), ("t.png", _image("PNG", 8)), ("t.cls", b"0")])
    adopt.index([str(tmp_path / "webp2")], None, image=("webp",))
    merge.merge([inspect.locate(str(tmp_path / name)) for name in ("webp", "webp2")], tmp_path / "all")
    assert _sides(tmp_path / "all") == {40}


def test_the_command_takes_extensions_as_people_write_them(shell: Shell) -> None:
    _masked(shell.folder / "in", "jfif")
    out = shell.run("data", "prepare", "in", "set", "--image", "tif, .JFIF", "--jobs", "1")
    assert "2 images of 1 classes" in out
    assert _sides(shell.folder / "set") == {40}


def test_a_choice_of_members_needs_members(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("path,label\na.jpg,0\n")
    with pytest.raises(DataError, match="--image names a member of samples in tars"):
        prepare(str(tmp_path / "in.csv"), tmp_path / "set", Options(), Columns(members=("jpg",)))


def test_a_finished_set_of_a_chosen_member_is_recognized(tmp_path: Path) -> None:
    folder, options, columns = _masked(tmp_path / "in", "jfif"), Options(), Columns(members=("jfif",))
    written = prepare(str(folder), tmp_path / "set", options, columns)
    assert finished(str(folder), tmp_path / "set", options, columns) == written
    with pytest.raises(DataError, match="made from another input or with other options"):
        finished(str(folder), tmp_path / "set", options, Columns(members=("png",)))
