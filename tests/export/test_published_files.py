"""Published checkpoints as files: read without running code, written, imported and exported by commands."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.models import computes_the_same
from tests.support.published import CASES, VIM, arguments_of, random_state
from tests.support.shell import Shell
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import published, safetensors, starting, unwrap
from vimscale.model import VisionMamba
from vimscale.model.published.arguments import complete, config_of
from vimscale.model.published.weights import PUBLISHED, from_published, published_config, to_published


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    state = random_state(complete(VIM))
    for i, content in enumerate(({"model": state, "args": _Trap(tmp_path / "made")}, _Trap(tmp_path / "made"))):
        torch.save(content, tmp_path / f"{i}.pth")
        with pytest.raises(CheckpointError, match=r"holds \w+\.mkdir, and a checkpoint .* could run code"):
            unwrap.read(tmp_path / f"{i}.pth")
    assert not (tmp_path / "made").exists()


def test_the_command_line_saved_in_a_file_is_read(tmp_path: Path) -> None:
    state = random_state(complete(VIM))
    args = argparse.Namespace(model="vim", drop_path=np.float64(0.5), output_dir=tmp_path, sizes=[1, (2, None)])
    torch.save({"model": state, "args": args, "epoch": np.int64(3), "rng": np.random.get_state()}, tmp_path / "a.pth")
    found = unwrap.read(tmp_path / "a.pth")
    assert found.args == args
    assert found.state.keys() == state.keys()


def test_a_bare_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    state = random_state(complete(VIM))
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pth")
    for name in ("a.pth", "a.safetensors", "wrapped.pth"):
        found, args, _ = unwrap.read(tmp_path / name)
        assert args is None
        assert all(torch.equal(found[key], state[key]) for key in state)


UNREADABLE = {
    "a list": ([torch.ones(1)], "holds a list, not a dict of tensors"),
    "no tensors": ({"model": {"w": 3, "v": [1]}}, r"holds w \(int\), v \(list\); a state dict of tensors"),
    "nothing": ({}, "holds nothing"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_of_something_else_are_refused_by_type(case: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[case]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        unwrap.read(tmp_path / "a.pth")


def test_damaged_and_missing_files_are_reported(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            unwrap.read(tmp_path / name)
        (tmp_path / name).write_bytes(b"no checkpoint at all")
        with pytest.raises(CheckpointError, match="is text, not a checkpoint"):
            unwrap.read(tmp_path / name)


@pytest.mark.parametrize("case", CASES)
def test_every_mode_survives_folders_of_both_formats(case: str, tmp_path: Path) -> None:
    arguments, _ = arguments_of(case)
    model = from_published(arguments, random_state(arguments)).eval()
    manifest = _manifest(arguments["num_classes"])
    safetensors.write(tmp_path / "ours", model, manifest, {})
    published.write(tmp_path / "theirs", model, manifest)
    for folder, load in ((tmp_path / "ours", safetensors.load), (tmp_path / "theirs", published.load)):
        again = load(folder)
        assert type(again) is type(model)
        assert published_config(again) == published_config(model)
        assert computes_the_same(again, model)


def _manifest(classes: int) -> Manifest:
    names = tuple(map(str, range(classes)))
    return Manifest(name="test", classes=names, shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_a_model_with_quirks_cannot_start_a_run(tmp_path: Path) -> None:
    arguments, _ = arguments_of("pairs of v2")
    model = from_published(arguments, random_state(arguments))
    safetensors.write(tmp_path, model, _manifest(5), {})
    with pytest.raises(CheckpointError, match="options that no recipe has: if_bidirectional"):
        safetensors.starting_weights(tmp_path, model.config, _manifest(5))


# ---- commands


def test_import_names_the_model_and_writes_it(shell: Shell) -> None:
    state = random_state(complete(VIM))
    torch.save({"model": state}, shell.folder / "v2.pth")
    output = shell.run("import", "v2.pth")
    assert "those of a vim" in output
    assert "if_divide_out True, the class token in the middle" in output
    assert "loaded again, it gives the same logits and features for 8 images" in output
    out = to_published(safetensors.load(shell.folder / "v2"))
    assert all(torch.equal(out[key], state[key]) for key in state)
    config = json.loads((shell.folder / "v2/config.json").read_text())
    assert config["classes"] == ["0", "1", "2", "3", "4"]
    assert config["mean"] == [0.485, 0.456, 0.406]


def test_import_reads_arguments_with_quirks_from_json(shell: Shell) -> None:
    arguments, _ = arguments_of("flipped rope in pairs")
    save_file(random_state(arguments), shell.folder / "pairs.safetensors")
    (shell.folder / "pairs.json").write_text(json.dumps(arguments))
    shell.run("import", "pairs.safetensors", "--model", "pairs.json", "--output", "out")
    assert published_config(safetensors.load(shell.folder / "out")) == arguments


def test_import_uses_the_model_name_in_the_file(tmp_path: Path) -> None:
    name = "mambar_tiny_patch16_224"
    state = to_published(VisionMamba(config_of(complete(PUBLISHED[name] | {"num_classes": 7, "img_size": 96}))))
    args = argparse.Namespace(model=name, input_size=96, drop_path=0.2)
    arguments, notes = published.arguments_for(state, args, None)
    assert notes == [f"the file says it is a {name}"]
    assert arguments == complete(PUBLISHED[name] | {"num_classes": 7, "img_size": 96, "drop_path_rate": 0.2})
    assert published.arguments_for(state, None, name)[0] == arguments | {"drop_path_rate": 0.1}
    assert from_published(arguments, state).config.num_classes == 7


def test_import_refuses_code_with_one_message(shell: Shell) -> None:
    torch.save(_Trap(shell.folder / "made"), shell.folder / "trap.pth")
    output = shell.run("import", "trap.pth", expect=2)
    assert "could run code" in output
    assert "Traceback" not in output
    assert not (shell.folder / "made").exists()


@pytest.mark.slow
def test_a_run_is_exported_for_the_published_code_and_started_from(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.run("launch", "small.yaml", "--no-ray", "--workers", "1", "steps=6")
    output = shell.run("export", "small", "--to", "hustvl", "--output", "theirs")
    assert "loaded again, it gives the same logits and features for 8 images" in output
    state = unwrap.read(shell.folder / "theirs/model.pth").state
    arguments = json.loads((shell.folder / "theirs/config.json").read_text())
    assert arguments["embed_dim"] == 32
    assert from_published(arguments, state).config.cls_token == "middle"
    kept = json.loads((shell.folder / "theirs/preprocessing.json").read_text())
    assert kept["classes"] == [str(digit) for digit in range(10)]
    assert kept["mean"] == [0.3053] * 3
    output = shell.run("import", "theirs/model.pth", "--output", "back", "--image-size", "48")
    assert "the same logits" in output
    assert "classes, mean and std are those of theirs/preprocessing.json" in output
    assert safetensors.load(shell.folder / "back").config.image_size == 48
    config = json.loads((shell.folder / "back/config.json").read_text())
    assert {key: config[key] for key in kept} == kept

    shell.run("export", "small")
    monkeypatch.setenv("XDG_CACHE_HOME", shell.env["XDG_CACHE_HOME"])
    manifest = Dataset.open("digits:train").manifest
    exported = safetensors.load(shell.folder / "runs/small/export").state_dict()
    for folder in ("back", "runs/small", "runs/small/export"):
        source = starting.read(shell.folder / folder)
        assert (source.classes, source.mean, source.std) == (manifest.classes, manifest.mean, manifest.std)
        weights, _ = safetensors.starting_weights(shell.folder / folder, source.config, manifest)
        assert all(torch.equal(weights[name], exported[name]) for name in exported if name != "pos_embed")
    output = shell.run("launch", "small.yaml", "--no-ray", "--workers", "1", "name=b", "steps=6", "model.weights=back")
    assert "model.weights: image_size, stride: the grid goes from 6 x 6 patches" in output
