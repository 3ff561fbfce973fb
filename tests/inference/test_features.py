"""Features of a data set: equal to the model called by hand, complete, in order, and the same bytes after a kill."""

import csv
import io
import json
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from typer.testing import CliRunner

import vimscale
from tests.support.image_sets import damaged_set, files_of
from tests.support.models import MEAN, STD, export
from vimscale.errors import DataError, LaunchError, UserError
from vimscale.inference import feature_files
from vimscale.inference.features import Features, Reading, features
from vimscale.inference.loaded import Loaded
from vimscale.launch.commands.app import app
from vimscale.model import PRESETS, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.presets import Stage
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import build


def _by_hand(digits: Path, split: str = "val") -> tuple[Tensor, list[str], list[int]]:
    """(normalized images, keys, labels) of a split, read from its tars without the package."""
    images, keys, labels = [], [], []
    for path in sorted((digits / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in (name for name in members if name.endswith(".png")):
            pixels = np.asarray(Image.open(io.BytesIO(members[name])).convert("RGB"), np.float32) / 255
            images.append(torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1))
            keys.append(name.removesuffix(".png"))
            labels.append(int(members[f"{keys[-1]}.cls"]))
    return torch.stack(images), keys, labels


def _joined(batches: Any) -> Tensor:
    return torch.cat([one.features for one in batches])


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    export(tmp_path / "export")
    return vimscale.load(tmp_path / "export")


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums in another order: other batches


def test_features_are_what_the_model_gives_by_hand(loaded: Loaded, digits: Path) -> None:
    images, keys, labels = _by_hand(digits)
    found = list(features(loaded, str(digits / "val"), batch=50))
    with torch.no_grad():
        expected = loaded.model(images, features=True)
    torch.testing.assert_close(_joined(found), expected, **CLOSE)
    assert [key for one in found for key in one.keys] == keys
    assert torch.cat([one.labels for one in found]).tolist() == labels
    assert torch.cat([one.numbers for one in found]).tolist() == list(range(len(keys)))
    later = list(features(loaded, vimscale.dataset(str(digits / "val")), batch=50, start=3))
    assert torch.equal(_joined(later), _joined(found[3:]))
    assert later[0].numbers[0] == 150


def _stream(model: VisionMamba, images: Tensor, layer: int) -> Tensor:
    """The normalized residual stream after a layer, all tokens: from a model that ends there."""
    config = replace(model.config, depth=layer + 1, directions=" ".join(["bi"] * (layer + 1)))
    shorter = VisionMamba(config).eval()
    shorter.load_state_dict({key: model.state_dict()[key] for key in shorter.state_dict()})
    return shorter.encode([(shorter.patches(images), config.grid)]).tokens


@pytest.mark.parametrize("cls_token", ["middle", "first", "both"])
def test_pooled_layers_are_tokens_of_a_model_that_ends_there(tmp_path: Path, digits: Path, cls_token: str) -> None:
    model = export(tmp_path / "export", cls_token=cls_token, pool="cls", registers=2)
    images = _by_hand(digits)[0][:20]
    slots = layout(model.config, model.config.grid)
    with torch.no_grad():
        streams = [_stream(model, images, layer) for layer in (0, 1)]
        cls = [x[:, list(slots.cls)].mean(dim=1) for x in streams]
        tokens = [slots.image_tokens(x) for x in streams]
        for pool, expected in (
            ("cls", torch.cat(cls, dim=1)),
            ("mean", torch.cat([x.mean(dim=1) for x in tokens], dim=1)),
            ("none", torch.cat([x.mT.unflatten(2, (4, 4)) for x in tokens], dim=1)),
        ):
            found = Reading.of(model, [0, -1], pool)(model, images)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, **CLOSE)
        last = Reading.of(model, None, "cls")(model, images)
        torch.testing.assert_close(last, Reading.of(model, None, None)(model, images), **CLOSE)


def test_maps_of_a_hierarchical_model_have_the_sizes_of_their_stages(tmp_path: Path) -> None:
    changes = {"stages": (Stage(depth=1, d_model=32), Stage(depth=1, d_model=64)), "cls_token": "none", "pool": "mean"}
    model = export(tmp_path / "export", **changes)
    images = torch.randn(2, 3, 32, 32)
    merged: list[Tensor] = []  # what the first stage gives to the second
    model.merges["1"].register_forward_pre_hook(lambda module, inputs: merged.append(inputs[0]))
    with torch.no_grad():
        mean = Reading.of(model, [0, 1], "mean")(model, images)
        assert mean.shape == (2, 96)
        torch.testing.assert_close(mean[:, 32:], model(images, features=True), **CLOSE)
        torch.testing.assert_close(mean[:, :32], merged[0].mean(dim=1), **CLOSE)
        with pytest.raises(UserError, match=r"different sizes \(0: 4 x 4, 1: 2 x 2\)"):
            Reading.of(model, [0, 1], "none")(model, images)
    with pytest.raises(UserError, match="no class token"):
        Reading.of(model, None, "cls")


def test_layers_of_models_with_other_tokens_are_refused() -> None:
    tiles = VisionMamba(replace(PRESETS["vim_digits"], tiles=32, image_size=32, pos_embed="coordinates"))
    with pytest.raises(UserError, match="features of whole bags only; use pool head"):
        Reading.of(tiles, [0], None)
    arguments = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 32, "if_bidirectional": True}
    odd = build(complete(arguments))
    with pytest.raises(UserError, match="published quirks"):
        Reading.of(odd, None, "mean")
    assert Reading.of(odd, None, None)(odd, torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize(
    ("layers", "pool", "message"),
    [
        ([2], None, "no layer 2: count from 0 to 1, or from the end with -1 to -2"),
        ([0], "head", "leave out the layers"),
        ([], "mean", "name at least one"),
    ],
)
def test_features_that_the_model_lacks_are_refused_at_once(
    loaded: Loaded, layers: list[int], pool: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        features(loaded, "nowhere", layers=layers, pool=pool)


# ---- files


def _write(loaded: Loaded, digits: Path, to: Path, **options: Any) -> feature_files.Written:
    return feature_files.write(loaded, str(digits / "val"), to, batch=32, rows=64, **options)


def test_parquet_npy_and_tars_hold_the_same_rows(loaded: Loaded, digits: Path, tmp_path: Path) -> None:
    images, keys, labels = _by_hand(digits)
    names = [str(label) for label in labels]
    numbers = [str(i) for i in range(len(keys))]
    with torch.no_grad():
        expected = loaded.model(images, features=True).numpy()

    for name in ("out.npy", "out.parquet", "tars"):
        written = _write(loaded, digits, tmp_path / name)
        assert (written.rows, written.shape, written.unreadable) == (len(keys), (32,), [])
    array = np.load(tmp_path / "out.npy")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, **CLOSE)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["number", "key", "label", "class"]
    assert rows[1:] == [list(row) for row in zip(numbers, keys, names, names, strict=True)]

    table = parquet.read_table(tmp_path / "out.parquet")
    assert np.array_equal(np.stack(table["features"].to_numpy()), array)
    assert table["key"].to_pylist() == keys
    assert table["label"].to_pylist() == labels
    assert table["class"].to_pylist() == names
    about = json.loads(table.schema.metadata[b"vimscale"])
    assert about == json.loads((tmp_path / "out.parquet.json").read_text())
    assert about["model"] == loaded.about
    assert about["data"]["fingerprint"] == vimscale.dataset(str(digits / "val")).manifest.fingerprint

    found: dict[str, bytes] = {}
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert [name for name in found if name.endswith(".npy")] == [f"{key}.npy" for key in keys]
    assert np.array_equal(np.stack([np.load(io.BytesIO(found[f"{key}.npy"])) for key in keys]), array)
    assert [int(found[f"{key}.cls"]) for key in keys] == labels
    assert not list(tmp_path.glob("*.parts"))


def test_maps_in_half_precision_keep_their_shape(loaded: Loaded, digits: Path, tmp_path: Path) -> None:
    options = {"layers": [0, 1], "pool": "none", "dtype": "fp16"}
    for name in ("out.npy", "out.parquet", "tars"):
        assert _write(loaded, digits, tmp_path / name, **options).shape == (64, 4, 4)
    array = np.load(tmp_path / "out.npy")
    assert array.shape == (359, 64, 4, 4)
    assert array.dtype == np.float16
    full = _joined(features(loaded, str(digits / "val"), layers=[0, 1], pool="none", batch=32))
    assert np.array_equal(array, full.numpy().astype(np.float16))
    table = parquet.read_table(tmp_path / "out.parquet")
    assert np.array_equal(np.stack(table["features"].to_numpy()).reshape(array.shape), array)
    assert json.loads(table.schema.metadata[b"vimscale"])["shape"] == [64, 4, 4]


def test_unreadable_images_are_listed_and_left_out(loaded: Loaded, tmp_path: Path) -> None:
    data = damaged_set(tmp_path / "six", [0, 3])
    written = feature_files.write(loaded, str(data), tmp_path / "out.npy", batch=1, rows=1)
    assert (written.rows, len(written.unreadable)) == (4, 2)
    assert "00000.tar, sample sample0: the image cannot be decoded" in written.unreadable[0]
    assert np.load(tmp_path / "out.npy").shape == (4, 32)
    assert [line.split(",")[:2] for line in (tmp_path / "out.csv").read_text().splitlines()[1:]] == [
        [str(i), f"sample{i}"] for i in (1, 2, 4, 5)
    ]
    assert json.loads((tmp_path / "out.npy.json").read_text())["unreadable"] == written.unreadable

    damaged_set(tmp_path / "none", range(6))
    with pytest.raises(DataError, match="none of its images can be read"):
        feature_files.write(loaded, str(tmp_path / "none"), tmp_path / "none.npy")


KILLED = """
import os, signal, sys
from pathlib import Path
import vimscale
from vimscale.inference import feature_files
def progress(done, total):
    if done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
feature_files.write(vimscale.load(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), batch=32, rows=64, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.npy", "out.parquet", "tars"])
def test_a_killed_writer_continues_and_the_bytes_are_those_of_an_undisturbed_one(
    loaded: Loaded, digits: Path, tmp_path: Path, name: str
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    _write(loaded, digits, alone / name)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "export"), str(digits / "val"), str(killed / name), "200"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    parts = killed / f"{name}.parts"
    assert sorted(path.name for path in parts.glob("*.json")) == [
        "000000.json",
        "000001.json",
        "000002.json",
        "plan.json",
    ]
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("0*")}
    computed: list[int] = []

    def progress(done: int, total: int) -> None:
        computed.append(done)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "complete parts stay"

    written = _write(loaded, digits, killed / name, progress=progress)
    assert computed[0] == 192, "three parts of 64 are not computed again"
    assert written.rows == 359
    assert files_of(killed) == files_of(alone)


def test_the_same_call_again_changes_nothing_and_another_is_refused(
    loaded: Loaded, digits: Path, tmp_path: Path
) -> None:
    to = tmp_path / "out.npy"
    first = _write(loaded, digits, to)
    before = to.stat().st_mtime_ns
    (tmp_path / "out.npy.parts").mkdir()  # of a writer that was killed after it gave the results their names
    assert _write(loaded, digits, to) == first
    assert to.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.csv", "out.npy", "out.npy.json"]
    with pytest.raises(LaunchError, match="holds something else"):
        _write(loaded, digits, to, dtype="fp16")

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 64:
            raise Interrupted

    other = tmp_path / "other.npy"
    with pytest.raises(Interrupted):
        _write(loaded, digits, other, progress=stop)
    with pytest.raises(LaunchError, match=r"parts of other features \(layers, pool differ\)"):
        _write(loaded, digits, other, layers=[-1])
    export(tmp_path / "export", seed=1)
    with pytest.raises(LaunchError, match=r"parts of other features \(model differ\)"):
        _write(vimscale.load(tmp_path / "export"), digits, other)


def test_two_writers_do_not_share_a_folder_of_parts(loaded: Loaded, digits: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        if done == 32:
            with pytest.raises(LaunchError, match="in use by another process"):
                _write(loaded, digits, tmp_path / "out.npy")

    _write(loaded, digits, tmp_path / "out.npy", progress=second)


def test_values_that_half_precision_cannot_hold_are_refused(
    loaded: Loaded, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*arguments: Any, **options: Any) -> Any:
        for one in features(*arguments, **options):
            yield Features(one.numbers, one.keys, one.labels, one.features * 1e5, one.unreadable)

    monkeypatch.setattr(feature_files, "features", large)
    with pytest.raises(UserError, match=r"do not fit fp16, whose largest is 65,504; use fp32"):
        _write(loaded, digits, tmp_path / "out.npy", dtype="fp16")


@pytest.mark.slow
def test_workers_give_the_same_bytes(loaded: Loaded, digits: Path, tmp_path: Path) -> None:
    _write(loaded, digits, tmp_path / "one.npy")
    _write(loaded, digits, tmp_path / "two.npy", workers=2)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()


def test_parquet_without_pyarrow_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'vimscale\[prepare\]'"):
        feature_files.format_of("out.parquet")
    assert feature_files.format_of("out.npy") == "npy"


# ---- the command


def test_the_command_writes_and_says_what(
    loaded: Loaded, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["features", "export", "--data", str(digits / "val"), "--to", "out.npy", "--layers", "-1"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.stdout == f"out.npy: features (359, 32) of {digits}/val\n"
    expected = _joined(features(loaded, str(digits / "val"), layers=[1], pool="mean"))
    assert np.array_equal(np.load("out.npy"), expected.numpy())
    for wrong, message in (
        (["--to", "out.h5"], "name a file .parquet or .npy, or a folder"),
        (["--to", "new.npy", "--layers", "last"], "write numbers, such as 5,11,-1"),
        (["--to", "new.npy", "--layers", "7"], "there is no layer 7"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, [*arguments[:4], *wrong], catch_exceptions=False)
