"""Folders for timm: opened without vimscale in a fresh process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.test_portable import CASES, new
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import parity
from vimscale.export.formats import base
from vimscale.export.formats.base import Source
from vimscale.export.formats.timm import Timm
from vimscale.model import VisionMamba

DATA = Manifest("set", ("ant", "bee", "cat", "dog", "eel"), (), (0.5, 0.4, 0.3), (0.25, 0.2, 0.25))
PACKAGES = ("torch", "timm", "torchvision", "safetensors", "numpy", "PIL", "huggingface_hub", "yaml")
SOME = (
    *(
        "shared",
        "cross, gate",
        "pair, sum",
        "attn",
        "orders",
        "registers, reduced",
        "class tokens at both ends",
        "stages",
    ),
    *("no class token", "pool max", "pool last", "layer norm of concatenated scans", "conv stem", "oblong"),
)


def _export(folder: Path, changes: dict[str, Any], *, half: bool = False) -> VisionMamba:
    """Export the model of a case into folder/export, with images next to it."""
    model = new(changes, 0.5)
    if half:
        for name in model.product_weights():
            weight = model.get_parameter(name)
            weight.data = weight.data.bfloat16().float()
    (folder / "export").mkdir(parents=True)
    source = Source(model, DATA, {"run": "first"}, half=half)
    Timm().check(source)
    Timm().write(folder / "export", source)
    save_file({"images": torch.randn(2, 3, *model.config.size)}, folder / "images.safetensors")
    return model


@pytest.fixture
def timm() -> None:
    """Skip where timm cannot be imported: it needs a torchvision whose operators load next to this torch."""
    try:
        base.of("timm")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("case", ["pair, sum", "registers, reduced", "no head"])
def test_what_is_written_opens_again(tmp_path: Path, case: str) -> None:
    model = _export(tmp_path, CASES[case])
    images = torch.randn(3, 3, *model.config.size)
    found, wanted = Timm().reopen(tmp_path / "export")(images), parity.run_of(model)(images)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= Timm.tolerance * value.abs().max()


@pytest.mark.slow
@pytest.mark.usefixtures("timm")
def test_timm_opens_it_in_a_fresh_process_without_vimscale(tmp_path: Path) -> None:
    models = {name: _export(tmp_path / name, CASES[name]) for name in SOME}
    models["half"] = _export(tmp_path / "half", {"directions": "bi attn"}, half=True)
    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    packages = sorted({str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin})
    child = Path(__file__).with_name("timm_child.py")
    command = [sys.executable, "-I", "-S", str(child), str(tmp_path), *packages]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name, model in models.items():
        images, out = (load_file(tmp_path / name / f"{file}.safetensors") for file in ("images", "out"))
        with torch.no_grad():
            wanted = {"tokens": model.forward_features(images["images"]), "logits": model(images["images"])}
        for key, tensor in wanted.items():
            assert out[key].shape == tensor.shape
            assert (out[key] - tensor).abs().max() <= Timm.tolerance * tensor.abs().max()


def test_the_folder_has_what_timm_reads(tmp_path: Path) -> None:
    model = _export(tmp_path, {"directions": "bi cross"}, half=True)
    folder = tmp_path / "export"
    tree = json.loads((folder / "config.json").read_text())
    assert tree["architecture"] == "vimscale"
    assert tree["label_names"] == list(DATA.classes)
    assert tree["pretrained_cfg"]["input_size"] == [3, 24, 24]
    assert tree["model_args"]["backward"] == 0.5
    state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(state[name].float(), tensor) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in (folder / "timm_vimscale").iterdir()) == [
        "__init__.py",
        "layers.py",
        "mixers.py",
        "modeling.py",
        "orders.py",
    ]


def test_a_model_that_plain_torch_cannot_be_is_refused() -> None:
    tiles = {"tiles": 8, "image_size": 8, "pos_embed": "coordinates"}
    with pytest.raises(CheckpointError, match="--to timm cannot hold a model of bags of tiles"):
        Timm().check(Source(new(tiles), DATA, {}))
