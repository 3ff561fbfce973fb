"""Commands on a run that was copied away from its data: the run holds all that they need."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from tests.support.shell import SMALL
from vimscale.checkpoint.load import TrainState
from vimscale.checkpoint.save import write_state
from vimscale.data.dataset import Dataset
from vimscale.data.training_set import TrainingSet
from vimscale.errors import CheckpointError, DataError, RecipeError
from vimscale.export import starting
from vimscale.export.formats import base
from vimscale.launch.commands.app import app
from vimscale.launch.supervise.progress import figures
from vimscale.model import VimConfig, VisionMamba
from vimscale.objectives import classification
from vimscale.recipe import recipe
from vimscale.recipe.objective import ClassificationOptions
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.run_folder import RunFolder

NAMES = tuple(f"a {number}" for number in range(10))
DATA = ("data.train=../data/train", "data.val=../data/val")


def _train(site: Path, **changes: Any) -> None:
    """Write a run with one checkpoint, as training does, next to its data."""
    chosen = recipe.load(site / "small.yaml", DATA)
    run = RunFolder(site / "runs/small")
    checkpoint = run.checkpoints / run_folder.checkpoint_name(5)
    checkpoint.mkdir(parents=True)
    (run.path / "recipe.yaml").write_text(chosen.to_yaml())
    training_set = TrainingSet.open(chosen.data)
    torch.manual_seed(1)
    state = VisionMamba(chosen.model.shape(len(training_set.manifest.classes))).state_dict()
    write_state(
        checkpoint / "state-00000-of-00001.safetensors", {f"weight/{k}@0": v.flatten() for k, v in state.items()}
    )
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    about = {"training_set": training_set.about} | changes
    train_state = asdict(TrainState(5, {}, 5, shapes, 1, 1, ema=False, **about))
    (checkpoint / "trainer.json").write_text(
        json.dumps({k: v for k, v in train_state.items() if k != "training_set" or v})
    )
    manifest.write(checkpoint, [manifest.seal(path) for path in sorted(checkpoint.iterdir())])


@pytest.fixture
def site(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run; its data, with unusual classes and mean, are in ../data."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(site)
    for split in ("train", "val"):
        shutil.copytree(digits / split, tmp_path / "data" / split)
        changed = replace(Dataset.open(str(tmp_path / "data" / split)).manifest, classes=NAMES, mean=(0.1, 0.2, 0.3))
        (tmp_path / "data" / split / "manifest.json").write_text(changed.to_json())
    return site


def _said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("to", ["safetensors", "hustvl"])
def test_a_run_exports_the_same_without_its_data(site: Path, to: str) -> None:
    _train(site)
    _said("export", "small", "--to", to, "--output", "here")
    (site.parent / "data").rename(site.parent / "elsewhere")
    assert "the same logits and features for 8 images" in _said("export", "small", "--to", to, "--output", "there")
    for name in ("config.json", "model.safetensors" if to == "safetensors" else "model.pth"):
        assert (site / "there" / name).read_bytes() == (site / "here" / name).read_bytes()
    if to == "safetensors":
        config = json.loads((site / "there/config.json").read_text())
        assert (config["classes"], config["mean"]) == (list(NAMES), [0.1, 0.2, 0.3])


HELD = [pytest.param(to, marks=pytest.mark.slow) for to in base.FORMATS if to not in ("safetensors", "arm", "mambar")]


@pytest.mark.parametrize("to", ["safetensors", *HELD])
def test_a_run_and_its_exports_are_used_without_the_training_set(site: Path, to: str) -> None:
    try:
        base.of(to)
    except CheckpointError as error:
        pytest.skip(str(error))
    _train(site)
    _said("export", "small", "--to", to)
    (site.parent / "data/val").rename(site.parent / "val")
    shutil.rmtree(site.parent / "data")
    said = _said("export", "small", "--to", to)
    assert "compared with noise only, because data ../data/val: " in said
    export = f"runs/small/export{'' if to == 'safetensors' else f'_{to}'}"
    if to != "safetensors" and type(base.of(to)).read is base.Format.read and to != "hustvl":
        with pytest.raises(CheckpointError, match="is for other programs"):
            _said("evaluate", export, "--data", "../val")
        return
    PIL.Image.new("RGB", (32, 32), "gray").save("gray.png")
    found = []
    for model in ("small", export):
        said = _said("evaluate", model, "--data", "../val")
        _said("features", model, "--data", "../val", "--to", f"{model.replace('/', '_')}.npy")
        found.append((said.partition(": ")[2], _said("predict", model, "gray.png"), model.replace("/", "_")))
    (first, second) = found
    assert first[:2] == second[:2]
    assert any(name in first[1] for name in NAMES)
    assert Path(f"{first[2]}.npy").read_bytes() == Path(f"{second[2]}.npy").read_bytes()


def test_an_evaluation_needs_only_the_validation_set_wherever_it_is(site: Path) -> None:
    _train(site)
    shutil.rmtree(site.parent / "data/train")
    before = _said("evaluate", "small")
    (site.parent / "data/val").rename(site.parent / "moved")
    assert _said("evaluate", "small", "data.val=../moved") == before
    missing = r"(?s)\.\./data/val is not there.*its path on this machine, with data\.val=\.\.\."
    with pytest.raises(DataError, match=missing):
        _said("evaluate", "small")


@pytest.mark.parametrize("change", ["model.d_model=64", "data.train=../moved", "optim.lr=1"])
def test_an_evaluation_cannot_change_the_recipe(site: Path, change: str) -> None:
    _train(site)
    with pytest.raises(RecipeError, match=rf"{change.partition('=')[0]}: an evaluation may change data\.val, "):
        _said("evaluate", "small", change)


def test_a_checkpoint_without_training_set_reads_the_data(site: Path) -> None:
    _train(site, training_set={})
    _said("export", "small")
    assert json.loads((site / "runs/small/export/config.json").read_text())["classes"] == list(NAMES)
    (site.parent / "data").rename(site.parent / "elsewhere")
    early = r"of an early version, .*(?s:.)*\.\./data/train is not there.*\n  put the set there, or change data\.train"
    with pytest.raises(DataError, match=early):
        _said("export", "small")
    with pytest.raises(CheckpointError, match=early):
        starting.read(site / "runs/small")


def test_a_run_starts_another_one_without_its_data(site: Path) -> None:
    _train(site)
    shutil.rmtree(site.parent / "data")
    source = starting.read(site / "runs/small")
    assert (source.classes, source.mean) == (NAMES, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(("classes", "reported"), [(4, False), (5, False), (6, True)])
def test_top_5_of_few_classes_is_not_reported(classes: int, reported: bool) -> None:
    logits = torch.eye(classes)
    objective = classification.Classification(ClassificationOptions(), VimConfig(num_classes=classes))
    found = objective.figures(classification.sums(logits, torch.arange(classes), torch.ones(classes)))
    assert ("top5" in found, "top-5" in figures(found)) == (reported, reported)
    assert found["top1"] == 1.0
    assert "top-1 100.00%" in figures(found)
