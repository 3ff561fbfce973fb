"""Encoders without a head: exported, loaded, imported, and started from."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import vimscale
from tests.support.models import computes_the_same
from vimscale.data.shards.manifest import Manifest
from vimscale.export import published, safetensors, starting
from vimscale.model import VimConfig, VisionMamba

BARE = VimConfig(num_classes=0, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
CLASSIFIER = dataclasses.replace(BARE, num_classes=3)
DATA = Manifest("set", ("a", "b", "c"), (), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
UNLABELLED = dataclasses.replace(DATA, classes=())


def _model(config: VimConfig) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(config).eval()


@pytest.mark.parametrize("manifest", [DATA, UNLABELLED], ids=["labels", "no labels"])
def test_an_export_gives_the_same_features(tmp_path: Path, manifest: Manifest) -> None:
    model = _model(BARE)
    safetensors.write(tmp_path / "out", model, manifest, {})
    assert json.loads((tmp_path / "out/config.json").read_text())["classes"] == []
    loaded, preprocessing = vimscale.load(tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images, features=True), model(images, features=True))
    assert preprocessing.mean == DATA.mean


def test_a_classifier_starts_from_an_encoder_without_a_head(tmp_path: Path) -> None:
    model = _model(BARE)
    safetensors.write(tmp_path / "out", model, DATA, {})
    weights, notes = safetensors.starting_weights(tmp_path / "out", CLASSIFIER, DATA)
    assert not any(name.startswith("head") for name in weights)
    assert notes == ["head: starts from random values, because the weights have none"]
    started = _model(CLASSIFIER)
    started.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(started(images, features=True), model(images, features=True))


def test_an_encoder_without_a_head_starts_from_a_classifier_or_another_one(tmp_path: Path) -> None:
    for name, config, note in (("classifier", CLASSIFIER, ["head: left out"]), ("bare", BARE, [])):
        safetensors.write(tmp_path / name, _model(config), DATA, {})
        weights, notes = safetensors.starting_weights(tmp_path / name, BARE, UNLABELLED)
        assert [one[:14] for one in notes] == note
        VisionMamba(BARE).load_state_dict({k: v for k, v in weights.items() if not k.startswith("head")})
        assert not any(key.startswith("head") for key in weights)
    assert starting.rows(starting.read(tmp_path / "bare"), BARE, DATA) is None


def test_the_published_code_gets_no_classes(tmp_path: Path) -> None:
    config = dataclasses.replace(BARE, directions="bi*2", cls_token="middle")
    model = _model(config)
    published.write(tmp_path / "out", model, DATA)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_classes"] == 0
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["classes"] == []
    manifest, _, _ = published.manifest_for(tmp_path / "out/model.pth", 0)
    imported = published.load(tmp_path / "out")
    assert computes_the_same(imported, model)
    safetensors.write(tmp_path / "again", imported, manifest, {})
    assert computes_the_same(safetensors.load(tmp_path / "again"), imported)
