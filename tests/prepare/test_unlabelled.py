"""Sets without labels and with captions, from every kind of input; what needs labels refuses them at once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.image_sets import image, samples_of
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images import decode
from vimscale.data.shards.manifest import MANIFEST, Manifest, write_shard
from vimscale.data.training_set import TrainingSet
from vimscale.errors import DataError
from vimscale.launch.commands.app import app
from vimscale.launch.processes import preflight
from vimscale.prepare import adopt, merge
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import contact_sheet, inspect, repair
from vimscale.prepare.make import finished, prepare
from vimscale.prepare.shapes import Options
from vimscale.recipe import recipe as recipes
from vimscale.runtime.run_folder import RunFolder

OWN = Path(__file__).parents[1] / "objectives/own.py"
CAPTIONS = ("a cat", "", "  ein Hund, größer \n", "two owls", None, "five")


def _folder(root: Path, captions: tuple[str | None, ...] = CAPTIONS) -> Path:
    """Images in one folder, with captions next to some."""
    root.mkdir()
    for i, text in enumerate(captions):
        (root / f"{i}.jpg").write_bytes(image(i))
        if text is not None:
            (root / f"{i}.txt").write_text(text)
    return root


def _captions(folder: Path) -> dict[str, str | None]:
    return {key[-1]: decode.caption_of(sample) for key, sample in samples_of(folder).items()}


WANTED = {"0": "a cat", "1": None, "2": "ein Hund, größer", "3": "two owls", "4": None, "5": "five"}


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plain_folder_becomes_a_set_without_labels(tmp_path: Path, jobs: int) -> None:
    source = _folder(tmp_path / "in")
    options = Options(per_shard=4)
    (manifest,) = prepare(str(source), tmp_path / "set", options, Columns(), jobs=jobs).values()
    assert (manifest.classes, manifest.labels, manifest.samples, manifest.captions) == ((), (), 6, 4)
    assert manifest == Manifest.from_json((tmp_path / "set" / MANIFEST).read_bytes(), "set")
    assert _captions(tmp_path / "set") == WANTED
    assert all("cls" not in sample for sample in samples_of(tmp_path / "set").values())
    assert finished(str(source), tmp_path / "set", options, Columns()) is not None
    split = prepare(str(source), tmp_path / "split", Options(val=0.5), Columns())
    assert [part.samples for part in split.values()] == [3, 3]


def test_folders_of_classes_become_a_set_without_labels_on_request(tmp_path: Path, images: Path) -> None:
    (manifest,) = prepare(str(images), tmp_path / "set", Options(), Columns(labels=False)).values()
    assert (manifest.classes, manifest.samples, manifest.captions) == ((), 29, 0)
    with pytest.raises(DataError, match="--classes names classes, and the input has no labels"):
        prepare(str(images), tmp_path / "other", Options(), Columns(labels=False, classes=("cat",)))


def test_splits_have_labels_or_none(tmp_path: Path) -> None:
    _folder(tmp_path / "val")
    (tmp_path / "in/train").mkdir(parents=True)
    (tmp_path / "val").rename(tmp_path / "in/val")
    _folder(tmp_path / "in/train/cat")
    with pytest.raises(DataError, match=r"split val has no labels, unlike the first split; .* with --no-labels"):
        prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns())
    written = prepare(str(tmp_path / "in"), tmp_path / "set", Options(), Columns(labels=False))
    assert [part.classes for part in written.values()] == [(), ()]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tables_give_captions_and_need_no_labels(tmp_path: Path, jobs: int) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the extra dev")
    pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets", reason="needs the extra dev")
    source = _folder(tmp_path / "in")
    texts = ["" if text is None else text.strip() for text in CAPTIONS]
    rows = [{"file_name": f"{i}.jpg", "title": text} for i, text in enumerate(texts)]
    (source / "t.tsv").write_text("file_name\ttitle\n" + "".join(f"{r['file_name']}\t{r['title']}\n" for r in rows))
    (source / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), source / "paths.parquet")
    inside = [{"image": {"bytes": image(i), "path": None}, "title": text} for i, text in enumerate(texts)]
    pa.parquet.write_table(pa.Table.from_pylist(inside), source / "bytes.parquet")
    features = datasets.Features({"image": datasets.Image(), "title": datasets.Value("string")})
    datasets.Dataset.from_list(inside, features=features).save_to_disk(source / "saved")
    for name in ("t.tsv", "t.jsonl", "paths.parquet", "bytes.parquet", "saved"):
        folder = tmp_path / f"of {name}"
        (manifest,) = prepare(str(source / name), folder, Options(), Columns(caption="title"), jobs=jobs).values()
        assert (manifest.classes, manifest.captions) == ((), 4), name
        assert _captions(folder) == WANTED, name
    with pytest.raises(DataError, match=r"no column 'titel' \(did you mean title\?\).*name one with --caption"):
        prepare(str(source / "t.tsv"), tmp_path / "odd", Options(), Columns(caption="titel"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[1]\n", "line 1 is not an object"),
        ("{\n", "in.jsonl cannot be read"),
        ("", "it has none; name one"),
    ],
)
def test_a_faulty_jsonl_gives_one_message(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(DataError, match=fault):
        prepare(str(tmp_path / "in.jsonl"), tmp_path / "set", Options(), Columns())


def _tar(path: Path, *, labelled: int = 0, field: str = "txt") -> Path:
    """A tar as open_clip reads it; the first samples also have a label."""
    samples = []
    for i, text in enumerate(CAPTIONS):
        sample: dict = {"__key__": str(i), "jpg": image(i), "json": json.dumps({"caption": text}).encode()}
        if field == "txt" and text is not None:
            sample["txt"] = text.encode()
        if i < labelled:
            sample["cls"] = b"0"
        samples.append(sample)
    path.parent.mkdir(exist_ok=True)
    write_shard(path, samples)
    return path


def test_tars_of_images_and_text_are_indexed_as_they_are(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "in/a.tar")
    before = tar.read_bytes()
    _, manifest, unread = adopt.index([str(tmp_path / "in")], None)
    assert (manifest.classes, manifest.captions, unread) == ((), 4, [])
    assert tar.read_bytes() == before
    assert _captions(tmp_path / "in") == WANTED
    _tar(tmp_path / "some/a.tar", labelled=2)
    with pytest.raises(DataError, match=r"sample 2: no member \.cls, the label .*; all samples of a set have labels"):
        adopt.index([str(tmp_path / "some")], None)


def test_tars_are_prepared_with_captions_of_a_field(tmp_path: Path) -> None:
    tar = _tar(tmp_path / "in/a.tar", field="json")
    (manifest,) = prepare(str(tar), tmp_path / "set", Options(), Columns(caption="caption")).values()
    assert (manifest.classes, manifest.captions) == ((), 4)
    assert _captions(tmp_path / "set") == WANTED
    tar = _tar(tmp_path / "some/a.tar", labelled=2)
    with pytest.raises(DataError, match=r"4 rows have no label.*--no-labels makes a set without labels"):
        prepare(str(tar), tmp_path / "other", Options(), Columns())
    prepare(str(tar), tmp_path / "other", Options(), Columns(labels=False))
    assert all("cls" not in sample for sample in samples_of(tmp_path / "other").values())


def test_inspection_repair_and_merging_understand_such_sets(tmp_path: Path, made: Path) -> None:
    for name in ("a", "b"):
        prepare(str(_folder(tmp_path / f"in {name}")), tmp_path / name, Options(per_shard=3, seed=ord(name)), Columns())
    said = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "a"), "--deep", "--jobs", "1"])
    assert said.exit_code == 0, said.output
    assert "captions: 2 samples have none, 0 have an empty one" in said.output
    assert contact_sheet.draw(inspect.locate(str(tmp_path / "a")), None).size[0] > 0
    shown = CliRunner().invoke(app, ["data", "stats", str(tmp_path / "a")]).output
    assert "none: no labels" in shown
    assert "of 4 samples" in shown
    located = [inspect.locate(str(tmp_path / name)) for name in ("a", "b")]
    joined = merge.merge(located, tmp_path / "joined")
    assert (joined.classes, joined.samples, joined.captions) == ((), 12, 8)
    with pytest.raises(DataError, match=r"no labels, not 3 classes as in .*--no-labels"):
        merge.merge([inspect.locate(str(made)), located[0]], tmp_path / "odd")
    tar = tmp_path / "a/00000.tar"
    tar.write_bytes(tar.read_bytes()[:-12_000])
    todo = repair.steps(inspect.verify(located[0], deep=True))
    repair.repair(located[0], todo)
    repaired = inspect.locate(str(tmp_path / "a")).manifest
    assert repaired.classes == ()
    assert 3 <= repaired.samples < 6
    assert repaired.captions == sum(text is not None for text in _captions(tmp_path / "a").values())


def test_verify_counts_captions_that_are_missing_or_empty(tmp_path: Path) -> None:
    _tar(tmp_path / "in/a.tar")
    adopt.index([str(tmp_path / "in")], None)
    said = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "in")])
    assert "captions: 1 samples have none, 1 have an empty one" in said.output


# ---- training


def _recipe(train: str, *changes: str, labels: bool) -> recipes.Recipe:
    kind = [] if labels else [f"objective.kind={OWN}:Unlabelled"]
    small = ["batch=4", "steps=2", "epochs=null", "optim.warmup=0", "model.image_size=32"]
    return recipes.load("vim_digits_cpu", [f"data.train={train}", "data.val=null", *small, *kind, *changes])


def test_an_objective_that_classifies_refuses_a_set_without_labels_at_once(tmp_path: Path) -> None:
    prepare(str(_folder(tmp_path / "in")), tmp_path / "set", Options(), Columns())
    run = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=r"set has no labels, and an objective that classifies needs them"):
        preflight.check_inputs(_recipe(str(tmp_path / "set"), labels=True), run)
    with pytest.raises(DataError, match=r"set has no labels, and an objective that classifies needs them"):
        preflight.check_inputs(_recipe("digits:train", f"data.val={tmp_path}/set", labels=True), run)
    opened = preflight.check_inputs(_recipe(str(tmp_path / "set"), labels=False), run)
    assert opened.manifest.classes == ()


def test_sets_with_and_without_labels_can_be_mixed_where_labels_do_not_matter(tmp_path: Path) -> None:
    prepare(str(_folder(tmp_path / "in")), tmp_path / "set", Options(), Columns())
    text = "[{data: '%s', weight: 1}, {data: 'digits:train', weight: 1}]" % (tmp_path / "set")
    chosen = _recipe(text, "batch=64", "augment.mixup=0.5", labels=False)
    data = TrainingSet.open(chosen.data, labels=False)
    with pytest.raises(DataError, match="has no labels"):
        TrainingSet.open(chosen.data)
    config = chosen.shape(len(data.manifest.classes))
    assert config.num_classes == 0
    (first, *_) = stream.training(chosen, data, config, rank=0, world=1, start=0, steps=1)
    sources = np.array([ref.source for ref in first.refs])
    labels = first.labels.numpy()
    assert {0, 1} == {*sources.tolist()}
    assert (labels[sources == 0] == decode.NO_LABEL).all()
    assert (labels[sources == 1] >= 0).all()


def test_members_called_cls_are_ignored_in_a_set_without_classes(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    manifest = replace(Dataset.open(str(made)).manifest, classes=(), labels=())
    (tmp_path / "copy" / MANIFEST).write_text(manifest.to_json())
    parts = stream.evaluation(Dataset.open(str(tmp_path / "copy")), rank=0, world=1, batch=8, size=(32, 32))
    counted = torch.cat([part.labels[part.weights > 0] for part in parts])
    assert counted.tolist() == [decode.NO_LABEL] * 29
