"""A run starts from weights only if its model computes the same with them, and reports how it adapts them."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.shell import Shell
from vimscale.data.images.augment import normalise
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import published, safetensors, starting
from vimscale.export.formats.base import Format, Source
from vimscale.export.formats.hf import HuggingFace
from vimscale.export.formats.timm import Timm
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import OwnKind, Stage
from vimscale.recipe import recipe as recipes
from vimscale.runtime.run_folder import RunFolder

OURS = VimConfig(num_classes=4, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
NAMES = ("ant", "bee", "cat", "dog")
HALF = (0.5, 0.5, 0.5)


def _manifest(classes: tuple[str, ...] = NAMES, **changes: Any) -> Manifest:
    return Manifest(**{"name": "set", "classes": classes, "shards": (), "mean": HALF, "std": HALF} | changes)


def _source(config: VimConfig = OURS, **changes: Any) -> starting.Source:
    known = {"folder": Path("w"), "config": config, "classes": NAMES, "mean": HALF, "std": HALF, "backward": 1.0}
    return starting.Source(**known | changes)


def _model(config: VimConfig = OURS) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


# ---- which models compute the same


def test_every_field_of_a_model_is_in_one_of_three_groups() -> None:
    fields = [field.name for field in dataclasses.fields(VimConfig) if field.init]
    assert sorted(fields) == sorted([*starting.MEANING, *starting.OWN_RULE, *starting.TRAINING])


WINDOWS = {"directions": "bi@window*2"}
ATTENTION = {"directions": "bi attn", "d_head": 8}
DUAL = {"directions": "ssd*2", "d_head": 8}
REGISTERS = {"registers": 4, "pool": "registers", "register_reduce": 2, "cls_token": "none"}
STAGES = {"stages": (Stage(depth=1, d_model=16), Stage(depth=1, d_model=16)), "cls_token": "none"}
GATED = OwnKind(name="gate", kind=f"{Path(__file__).parents[2]}/examples/own_layer.py:GatedConv")
OWN = {"directions": "bi gate", "kinds": (GATED,)}
CHANGES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "patch_size": [({}, {"patch_size": 8, "stride": 4})],
    "stem": [({}, {"stem": "conv"})],
    "stages": [(STAGES, {"stages": (Stage(depth=1, d_model=16), Stage(depth=1, d_model=16, downsample=4))})],
    "d_model": [({}, {"d_model": 32})],
    "depth": [({}, {"depth": 3, "directions": "bi*3"})],
    "directions": [({}, {"directions": d}) for d in ("bi@column*2", "bi bi@snake", "fwd*2", "shared*2", "bi bwd")],
    "kinds": [(OWN, {"kinds": (dataclasses.replace(GATED, options='{"taps":3}'),)})],
    "d_state": [({}, {"d_state": 8})],
    "d_conv": [({}, {"d_conv": 3})],
    "expand": [({}, {"expand": 1})],
    "fuse": [({}, {"fuse": "sum"}), ({"directions": "pair*2"}, {"fuse": "sum"}), ({}, {"fuse": "gate"})],
    "window": [(WINDOWS, {"window": 2})],
    "d_head": [(ATTENTION, {"d_head": 16})],
    "ssd_state": [(DUAL, {"ssd_state": 8})],
    "ssd_form": [(DUAL, {"ssd_form": "shared"})],
    "mlp": [({}, {"mlp": "swiglu"})],
    "norm": [({}, {"norm": "layer"})],
    "norm_eps": [({}, {"norm_eps": 1e-6})],
    "ssm_norm": [({}, {"ssm_norm": True})],
    "layer_scale": [({}, {"layer_scale": 0.1}), ({"layer_scale": 0.1}, {"layer_scale": None})],
    "cls_token": [({}, {"cls_token": value}) for value in ("first", "both", "none")],
    "registers": [({}, {"registers": 4}), ({"registers": 4}, {"registers": 3})],
    "pool": [({}, {"pool": value}) for value in ("mean", "last", "max")],
    "register_reduce": [(REGISTERS, {"register_reduce": 4})],
    "pos_embed": [({}, {"pos_embed": False})],
    "backward_gate": [({"backward_gate": True}, {"backward_gate": False})],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_computes_something_else_is_refused_field_by_field(name: str) -> None:
    for before, change in CHANGES[name]:
        old = dataclasses.replace(OURS, **before)
        starting.compare(_source(old), old, _manifest())
        with pytest.raises(CheckpointError, match=rf"\n  {name}: the weights have .*; "):
            starting.compare(_source(old), dataclasses.replace(old, **change), _manifest())


def test_every_field_of_meaning_has_a_case() -> None:
    assert starting.MEANING.keys() <= CHANGES.keys()


def test_all_differences_are_listed_with_the_fix() -> None:
    ours = dataclasses.replace(OURS, cls_token="first", directions="bi@column*2", pos_embed=False)
    with pytest.raises(CheckpointError) as caught:
        starting.compare(_source(), ours, _manifest())
    message = str(caught.value)
    assert "cls_token: the weights have middle, the recipe first; set model.cls_token=middle" in message
    assert "directions: the weights have bi*2, the recipe bi@column*2; set model.directions=bi*2" in message
    assert "pos_embed: the weights have true, the recipe false; set model.pos_embed=true" in message
    assert message.count("\n") == 3


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another text for the same layers": ({}, {"directions": "(bi)*1 bi"}),
    "how paths meet, of one path": ({"directions": "fwd*2"}, {"fuse": "sum"}),
    "windows that nobody walks": ({}, {"window": 3}),
    "a kind that no layer is": ({}, {"kinds": (GATED,)}),
    "heads without attention": ({}, {"d_head": 8}),
    "states without ssd layers": ({}, {"ssd_state": 8, "ssd_form": "shared"}),
    "states of other scans": (DUAL, {"d_state": 8}),
    "a pool by its default": ({}, {"pool": "cls"}),
    "one stage": ({"cls_token": "none"}, {"stages": (Stage(depth=2, d_model=16),)}),
    "drop-path": ({}, {"drop_path": 0.3}),
    "a drop of backward paths": ({}, {"backward_drop": 0.3}),
    "initial values": ({"layer_scale": 0.1}, {"layer_scale": 1e-5, "init": "published"}),
}


@pytest.mark.parametrize("case", SAME)
def test_what_computes_the_same_starts_without_a_note(case: str) -> None:
    before, change = SAME[case]
    old = dataclasses.replace(OURS, **before)
    assert starting.compare(_source(old), dataclasses.replace(old, **change), _manifest()) == []


def test_weights_without_a_head_start_models_with_one_and_the_other_way_round() -> None:
    headless = dataclasses.replace(OURS, num_classes=0)
    (note,) = starting.compare(_source(headless), dataclasses.replace(OURS, pool="mean"), _manifest())
    assert note == "head: starts from random values, because the weights have none"
    assert starting.compare(_source(), headless, _manifest()) == ["head: left out, because the objective needs none"]


def test_a_ramp_is_noted_and_an_unfinished_one_refused() -> None:
    ramp = dataclasses.replace(OURS, backward_ramp=(0, 10))
    (note,) = starting.compare(_source(), ramp, _manifest())
    assert note.startswith("backward_ramp: ")
    assert starting.compare(_source(ramp), OURS, _manifest()) == []
    with pytest.raises(CheckpointError, match=r"backward paths at 0\.3; train that run to the end of its ramp"):
        starting.compare(_source(ramp, backward=0.3), OURS, _manifest())


# ---- adapted weights


def _images(config: VimConfig = OURS) -> Tensor:
    return torch.randint(0, 256, (3, 3, *config.size), dtype=torch.uint8)


def _logits(model: VisionMamba, images: Tensor, manifest: Manifest) -> Tensor:
    with torch.no_grad():
        return model(normalise(images, torch.tensor(manifest.mean), torch.tensor(manifest.std)))


def _started(folder: Path, config: VimConfig, manifest: Manifest) -> tuple[VisionMamba, list[str]]:
    weights, notes = safetensors.starting_weights(folder, config, manifest)
    torch.manual_seed(1)
    model = VisionMamba(config).eval()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model, notes


def test_a_head_follows_the_names_of_its_classes(tmp_path: Path) -> None:
    model, images = _model(), _images()
    safetensors.write(tmp_path, model, _manifest(), {})
    expected = _logits(model, images, _manifest())
    order = [2, 0, 3, 1]
    there = _manifest(tuple(NAMES[i] for i in order))
    started, notes = _started(tmp_path, OURS, there)
    assert torch.equal(_logits(started, images, there), expected[:, order])
    assert len(notes) == 1
    assert "its rows are reordered by name to match the training set" in notes[0]


@pytest.mark.parametrize("classes", [("ant", "bee", "cat", "eel"), ("ant", "bee"), (*NAMES, "eel")])
def test_a_head_of_other_classes_starts_from_random_values(tmp_path: Path, classes: tuple[str, ...]) -> None:
    safetensors.write(tmp_path, _model(), _manifest(), {})
    config = dataclasses.replace(OURS, num_classes=len(classes))
    weights, notes = safetensors.starting_weights(tmp_path, config, _manifest(classes))
    assert not [name for name in weights if name.startswith("head.")]
    assert len(notes) == 1
    assert notes[0].startswith("head: starts from random values, because the weights are of ")


def test_an_imported_head_is_kept_by_number_with_a_note(tmp_path: Path) -> None:
    safetensors.write(tmp_path, _model(), _manifest(("0", "1", "2", "3")), {"file": "x.pth", "published": {}})
    started, notes = _started(tmp_path, OURS, _manifest())
    assert torch.equal(_logits(started, _images(), _manifest()), _logits(_model(), _images(), _manifest())) is False
    assert torch.equal(started.head.weight, _model().head.weight)
    assert "the names of its 4 classes are not known, so class 0 is assumed to be ant" in notes[0]


@pytest.mark.parametrize("stride", [4, 2])
def test_images_with_another_normalisation_give_the_same_logits(tmp_path: Path, stride: int) -> None:
    config = dataclasses.replace(OURS, stride=stride)
    model, images = _model(config), _images()
    there = _manifest(mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 0.6))
    safetensors.write(tmp_path, model, _manifest(), {})
    started, notes = _started(tmp_path, config, there)
    torch.testing.assert_close(_logits(started, images, there), _logits(model, images, _manifest()))
    assert "patch_embed is converted" in notes[0]


def test_a_stem_that_pads_cannot_be_converted() -> None:
    config = dataclasses.replace(OURS, stem="conv")
    with pytest.raises(CheckpointError, match="a conv stem cannot be converted; write the weights' mean and std into"):
        starting.compare(_source(config), config, _manifest(std=(0.1, 0.3, 0.6)))


def test_new_gates_change_nothing(tmp_path: Path) -> None:
    model, images = _model(), _images()
    safetensors.write(tmp_path, model, _manifest(), {})
    started, notes = _started(tmp_path, dataclasses.replace(OURS, backward_gate=True), _manifest())
    torch.testing.assert_close(_logits(started, images, _manifest()), _logits(model, images, _manifest()))
    assert notes == ["backward_gate: every gate starts at 1, as if there were none"]


@pytest.mark.parametrize("change", [{"image_size": 24}, {"image_size": (16, 32)}, {"stride": 2}])
def test_a_finer_or_larger_grid_is_noted(tmp_path: Path, change: dict[str, Any]) -> None:
    model = _model()
    safetensors.write(tmp_path, model, _manifest(), {})
    config = dataclasses.replace(OURS, **change)
    started, notes = _started(tmp_path, config, _manifest())
    assert started.pos_embed is not None
    assert started.pos_embed.shape == (config.tokens, 16)
    assert torch.equal(started.blocks[1].mixer.A_log, model.blocks[1].mixer.A_log)
    assert len(notes) == 1
    assert re.match(
        "image_size, stride: the grid goes from 4 x 4 patches, one every 4 pixels to .*is resized", notes[0]
    )


# ---- before any rank


def _folder_of_weights(folder: Path) -> Path:
    safetensors.write(folder / "good", _model(), _manifest(), {})
    return folder / "good"


def _pth(folder: Path) -> Path:
    torch.save({}, folder / "vim.pth")
    return folder / "vim.pth"


def _published(folder: Path) -> Path:
    published.write(folder / "theirs", _model(), _manifest())
    return folder / "theirs"


def _exported(form: Format) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "theirs").mkdir()
        form.write(folder / "theirs", Source(_model(), _manifest(), {}))
        return folder / "theirs"

    return write


def _program(folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(b"\x08\x0a")
    return folder / "model.onnx"


def _cut(folder: Path) -> Path:
    path = _folder_of_weights(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return path.parent


def _config(**changes: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = _folder_of_weights(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path.parent

    return write


NO_WEIGHTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a typo": (lambda folder: folder / "typo", "it is not there"),
    "a published checkpoint": (
        _pth,
        "it is a file; `vimscale import .*vim.pth` makes a folder of a published checkpoint",
    ),
    "the file": (lambda folder: _folder_of_weights(folder) / "model.safetensors", "it is a file; give the folder"),
    "the folder above": (lambda folder: _folder_of_weights(folder).parent, "no config.json; perhaps .*/good is meant"),
    "for the published code": (_published, "for the published code; `vimscale import .*model.pth`"),
    "for transformers": (_exported(HuggingFace()), "an export --to hf; `vimscale import .*theirs` makes one that"),
    "for timm": (_exported(Timm()), "an export --to timm, and its weights cannot be read back; give the run"),
    "a program": (_program, "a program of ONNX, and its weights cannot be read back; give the run"),
    "cut short": (_cut, "model.safetensors has .* bytes, not the .* that its header says"),
    "fewer names": (_config(classes=["a"]), "names 1 classes, its model has 4"),
    "no names": (_config(classes=None), "classes is null, not a list of names"),
    "no deviation": (_config(std=[0, 1, 1]), "std is"),
    "another format": (_config(format=2), "format 2, this version reads 1"),
    "an unknown field": (_config(model=OURS.to_dict() | {"rope": True}), "rope: no such field"),
    "a field of another type": (
        _config(model=OURS.to_dict() | {"depth": "2"}),
        "depth is '2', which has the wrong type str",
    ),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_folders_without_weights_are_refused_without_reading_any(case: str, tmp_path: Path) -> None:
    make, said = NO_WEIGHTS[case]
    with pytest.raises(CheckpointError, match=f"model.weights .* does not hold an exported model: (.|\n)*{said}"):
        starting.read(make(tmp_path))


def test_a_config_larger_than_its_weights_allocates_nothing(tmp_path: Path) -> None:
    huge = dataclasses.replace(OURS, d_model=50_000).to_dict()
    with pytest.raises(CheckpointError, match="weights and config are of different models"):
        safetensors.load(_config(model=huge)(tmp_path))


def test_a_typo_is_found_before_ray_starts_and_leaves_nothing(shell: Shell) -> None:
    output = shell.run("launch", "small.yaml", "model.weights=typo", expect=2)
    assert "model.weights typo does not hold an exported model: it is not there" in output
    assert not (shell.folder / "runs").exists()


def test_a_run_that_resumes_does_not_need_its_weights(tmp_path: Path) -> None:
    recipe = recipes.load("vim_digits_cpu", ["model.weights=gone"])
    with pytest.raises(CheckpointError, match="it is not there"):
        starting.check(recipe, RunFolder(tmp_path / "run"), _manifest())
    (tmp_path / "run/checkpoints/step_00000010").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000010/manifest.json").write_text("{}")
    starting.check(recipe, RunFolder(tmp_path / "run"), _manifest())
    there = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"mirror": str(tmp_path)})})
    (tmp_path / "run").rename(tmp_path / "checkpoints")
    (tmp_path / "checkpoints/checkpoints").rename(tmp_path / recipe.name)
    starting.check(there, RunFolder(tmp_path / "nowhere"), _manifest())
