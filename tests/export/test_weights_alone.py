"""`model: {weights: PATH}` is a complete model; what differs from the weights is refused unless it is written out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError, RecipeError
from vimscale.export import safetensors, starting
from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.presets import OwnKind, Stage
from vimscale.model.published import quirks
from vimscale.model.published.arguments import complete
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

OURS = VimConfig(num_classes=4, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
HALF = (0.5, 0.5, 0.5)
MANIFEST = Manifest(name="set", classes=("ant", "bee", "cat", "dog"), shards=(), mean=HALF, std=HALF)
REST = "name: fine\nsteps: 10\nbatch: 4\ndata: {train: set}\n"


def _export(folder: Path, config: VimConfig = OURS) -> Path:
    torch.manual_seed(0)
    safetensors.write(folder, VisionMamba(config), MANIFEST, {})
    return folder


def _recipe(folder: Path, weights: Path, *changes: str) -> Recipe:
    file = folder / "mine.yaml"
    file.write_text(f"{REST}model: {{weights: {weights}}}\n")
    return recipes.load(file, changes)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"drop_path": 0.2, "backward_ramp": (0, 10)},
        {"directions": "bi fwd@column", "fuse": "sum", "stride": 2},
        {"cls_token": "none", "stages": (Stage(depth=1, d_model=16), Stage(depth=1, d_model=32))},
        {"layer_scale": 0.1, "pos_embed": "sincos", "image_size": (16, 32), "pool": "mean"},
    ],
)
def test_the_weights_say_what_model_it_is(tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(OURS, **change)
    weights = _export(tmp_path / "out", config)
    found = _recipe(tmp_path, weights).shape(4)
    assert starting.compare(starting.read(weights), found, MANIFEST) == []
    assert found.parts == config.parts
    assert found.image_size == config.image_size
    assert (found.drop_path, found.backward_ramp) == (0, None), "they say how the weights were trained"


@pytest.mark.parametrize("name", ["vim_digits", "vim_tiny", "mambar_tiny", "arm_base"])
def test_a_preset_is_recognized(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(PRESETS[name], drop_path=0.1)
    (tmp_path / "out").mkdir()
    description = {"format": 1, "model": config.to_dict()}
    (tmp_path / "out/config.json").write_text(json.dumps(description))
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    model = _recipe(tmp_path, tmp_path / "out").model
    assert model.preset == name
    assert model.shape(config.num_classes) == dataclasses.replace(config, drop_path=0)


def test_keys_of_the_recipe_change_the_architecture(tmp_path: Path) -> None:
    weights = _export(tmp_path / "out")
    loaded = _recipe(tmp_path, weights, "model.image_size=32", "model.drop_path=0.3")
    assert loaded.shape(4) == dataclasses.replace(OURS, image_size=32, drop_path=0.3)
    (note,) = starting.compare(starting.read(weights), loaded.shape(4), MANIFEST)
    assert note.startswith("image_size, stride: the grid goes from 4 x 4 patches")
    stages = "model.stages=[{depth: 1, d_model: 16}, {depth: 1, d_model: 32}]"
    assert len(_recipe(tmp_path, weights, stages, "model.cls_token=none").model.stages) == 2
    grown = _recipe(tmp_path, _export(tmp_path / "fwd", dataclasses.replace(OURS, directions="fwd*2")), *GROWN)
    assert grown.shape(4) == OURS


GROWN = ("model.directions=bi*2", "model.grow=copy")


def test_a_resolved_recipe_does_not_need_the_weights(tmp_path: Path) -> None:
    weights = _export(tmp_path / "out")
    loaded = _recipe(tmp_path, weights)
    weights.rename(tmp_path / "gone")
    assert recipes.parse(loaded.to_yaml(), "of a run") == loaded
    with pytest.raises(RecipeError, match="do not say what model they are of: it is not there; give other weights, or"):
        _recipe(tmp_path, weights)


def test_a_run_says_what_model_it_trained(tmp_path: Path) -> None:
    changes = ["model.patch_size=4", "model.drop_path=0.2", "model.weights=before"]
    run = recipes.load("vim_digits_cpu", changes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(run.to_yaml())
    model = _recipe(tmp_path, tmp_path / "run").model
    assert model.shape(4) == dataclasses.replace(run.model.shape(4), drop_path=0)
    assert model.weights == str(tmp_path / "run")


def test_a_preset_that_the_recipe_names_stays_and_null_leaves_it_to_the_weights(tmp_path: Path) -> None:
    weights = f"model.weights={_export(tmp_path / 'out')}"
    assert recipes.load("vim_digits_cpu", [weights]).shape(10) == PRESETS["vim_digits"]
    assert recipes.load("vim_digits_cpu", [weights, "model.preset=null"]).shape(4) == OURS


def test_code_that_the_weights_bring_along_is_not_run(tmp_path: Path) -> None:
    own = OwnKind(name="gate", kind="own_layer.py:GatedConv")
    config = dataclasses.replace(OURS, directions="bi gate", kinds=(own,)).to_dict()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(json.dumps({"format": 1, "model": config}))
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    (tmp_path / "out/own_layer.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(RecipeError, match=r"need the code 'own_layer\.py:GatedConv', which would run with your rights"):
        _recipe(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", ["[1", "[]", '{"format": 2}', '{"format": 1, "model": {"depth": "2"}}'])
def test_descriptions_that_are_none_are_one_message(tmp_path: Path, content: str) -> None:
    weights = _export(tmp_path / "out")
    (weights / "config.json").write_text(content)
    with pytest.raises(RecipeError, match="do not say what model they are of"):
        _recipe(tmp_path, weights)


# ---- changes of meaning

CHANGES: dict[str, dict[str, Any]] = {
    "cls_token": {"cls_token": "first"},
    "registers": {"registers": 3},
    "pool": {"pool": "mean"},
    "pos_embed": {"pos_embed": False},
    "directions": {"directions": "bi@column bi"},
    "fuse": {"fuse": "sum"},
    "norm_eps": {"norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_meaning_is_refused_unless_it_is_written_out(tmp_path: Path, name: str) -> None:
    weights, config = _export(tmp_path / "out"), dataclasses.replace(OURS, **CHANGES[name])
    with pytest.raises(CheckpointError, match=rf"\n  {name}: .*, or model\.change=\[{name}\] if"):
        safetensors.starting_weights(weights, config, MANIFEST)
    state, notes = safetensors.starting_weights(weights, config, MANIFEST, change=[name])
    assert any(note.startswith(f"{name}: ") and "as model.change allows" in note for note in notes)
    model = VisionMamba(config)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    torch.manual_seed(0)
    assert torch.equal(model.blocks[1].mixer.A_log, VisionMamba(OURS).blocks[1].mixer.A_log)


def test_positions_move_with_the_class_token(tmp_path: Path) -> None:
    config = dataclasses.replace(OURS, cls_token="first")
    state, _ = safetensors.starting_weights(_export(tmp_path / "out"), config, MANIFEST, change=["cls_token"])
    torch.manual_seed(0)
    before = VisionMamba(OURS).pos_embed
    assert torch.equal(state["pos_embed"], torch.cat([before[8:9], before[:8], before[9:]]))


@pytest.mark.parametrize("change", [{"fuse": "gate"}, {"directions": "fwd*2"}, {"d_state": 8}])
def test_what_changes_the_shapes_of_weights_cannot_be_written_out(tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(OURS, **change)
    with pytest.raises(CheckpointError, match="the weights are of another model than the recipe's") as caught:
        safetensors.starting_weights(_export(tmp_path / "out"), config, MANIFEST, change=[*change])
    assert "model.change" not in str(caught.value)


def test_a_change_that_no_model_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.change"):
        _recipe(tmp_path, _export(tmp_path / "out"), "model.change=[depth]")
    with pytest.raises(RecipeError, match="there are no weights to differ from"):
        recipes.load("vim_digits_cpu", ["model.change=[pool]"])


def test_each_parameter_is_in_one_of_four_groups(tmp_path: Path) -> None:
    config = dataclasses.replace(OURS, num_classes=2, image_size=32, registers=2)
    two = dataclasses.replace(MANIFEST, classes=("ant", "bee"))
    weights = _export(tmp_path / "out")
    state, _ = safetensors.starting_weights(weights, config, two, change=["registers"])
    loaded, resized, left_out, new = safetensors.groups(weights, config, state)
    assert loaded.startswith("loaded: cls_token, patch_embed (2), blocks (")
    assert loaded.endswith("), norm")
    assert (resized, left_out, new) == ("resized: pos_embed", "left out: head (2)", "new: registers, head (2)")


def test_a_published_model_without_a_head_starts_a_run(tmp_path: Path) -> None:
    arguments = complete(
        {"img_size": 16, "patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 2, "num_classes": 0, **VIM}
    )
    torch.manual_seed(0)
    model = quirks.build(arguments)
    safetensors.write(tmp_path / "out", model, MANIFEST, {"published": {}})
    loaded = _recipe(tmp_path, tmp_path / "out")
    state, notes = safetensors.starting_weights(tmp_path / "out", loaded.shape(4), MANIFEST)
    assert notes == ["head: starts from random values, because the weights have none"]
    started = VisionMamba(loaded.shape(4)).eval()
    started.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(started(images, features=True), model.eval()(images))


VIM = {"bimamba_type": "v2", "if_cls_token": True, "use_middle_cls_token": True, "if_abs_pos_embed": True}
