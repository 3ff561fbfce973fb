"""ONNX files in onnxruntime: every kind of layer, one file for all batches and sizes, and a process without torch."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import later
from tests.support.image_sets import image
from vimscale.data import digits
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export.formats.base import Source
from vimscale.export.formats.onnx import IR_VERSION, OPSET, Onnx
from vimscale.inference.preprocessing import Preprocessing
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import Stage

onnx = later.module("onnx", "onnxscript", reason="pip install onnx onnxscript onnxruntime")
onnxruntime = later.module("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

BASE = VimConfig(
    num_classes=5, image_size=24, patch_size=4, d_model=32, depth=2, d_state=4, directions="bi*2", d_head=8
)
STAGES = (
    Stage(depth=1, d_model=16, directions="bi@column"),
    Stage(depth=2, d_model=32, directions="cross attn", downsample=2),
)
CASES: dict[str, dict[str, Any]] = {
    "kinds": {"directions": "fwd bwd bi shared cross attn pair*2", "depth": 8},
    "orders": {"directions": "bi@column bi@snake bwd@window", "depth": 3, "window": 4, "cls_token": "both"},
    "gate, registers": {"directions": "bi cross", "fuse": "gate", "ssm_norm": True, "norm": "layer"}
    | {"registers": 3, "pool": "registers", "register_reduce": 2},
    "concat, swiglu, sincos": {"directions": "cross bi", "fuse": "concat", "mlp": "swiglu", "layer_scale": 0.1}
    | {"ssm_norm": "layer", "backward_gate": True, "pos_embed": "sincos", "cls_token": "first"},
    "overlapping patches, no head": {"stride": 2, "pool": "max", "pos_embed": "coordinates", "num_classes": 0},
    "stages, conv stem": {"stages": STAGES, "stem": "conv", "cls_token": "none"},
}


def source(changes: dict[str, Any], **of_source: Any) -> Source:
    """A model with random values in the parameters that start as constants."""
    torch.manual_seed(0)
    model = VisionMamba(dataclasses.replace(BASE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    classes = tuple("abcde")
    manifest = Manifest(name="noise", classes=classes, shards=(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    return Source(model, manifest, {"run": "runs/a"}, **of_source)


@torch.no_grad()
def assert_equal(folder: Path, model: VisionMamba, images: torch.Tensor) -> None:
    outputs = Onnx().reopen(folder)(images)
    wanted = {"features": model(images, features=True)}
    if model.head is not None:
        wanted["logits"] = model(images)
        assert torch.equal(outputs["logits"].argmax(dim=1), wanted["logits"].argmax(dim=1))
    assert outputs.keys() == wanted.keys()
    for name, value in wanted.items():
        assert outputs[name].dtype == torch.float32
        assert (outputs[name] - value).abs().max() <= Onnx.tolerance * value.abs().max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    folder, of = tmp_path_factory.mktemp("onnx"), source({"depth": 1, "directions": "bi@column"})
    Onnx().write(folder, of)
    return folder, of


def test_one_file_gives_our_logits_and_features_for_any_batch(exported: tuple[Path, Source]) -> None:
    folder, of = exported
    for batch in (1, 5):
        assert_equal(folder, of.model, torch.randn(batch, 3, 24, 24))
    scans = digits.table()[0][:16] / 16
    pixels = torch.tensor(scans, dtype=torch.float32)[:, None].repeat(1, 3, 3, 3)
    assert_equal(folder, of.model, pixels)
    prepare = Preprocessing((24, 24), of.manifest.mean, of.manifest.std)
    assert_equal(folder, of.model, torch.stack([prepare(image(i)) for i in range(4)]))


def test_the_graph_has_one_scan_per_path_and_names_of_modules(exported: tuple[Path, Source]) -> None:
    folder, of = exported
    model = onnx.load(folder / "model.onnx")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json"}
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
    assert model.ir_version == IR_VERSION
    assert not model.functions
    names = [node.name for node in model.graph.node]
    assert Counter(node.op_type for node in model.graph.node)["Scan"] == 2
    assert {"blocks.0.mixer/Scan", "blocks.0.mixer/Scan_1", "blocks.0.mixer.in_proj/MatMul", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)
    values = sum(int(torch.tensor(one.dims).prod()) for one in model.graph.initializer)
    assert values < sum(p.numel() for p in of.model.parameters()) + 800
    assert b"/site-packages/" not in (folder / "model.onnx").read_bytes()


def test_config_says_what_preparing_an_image_needs(exported: tuple[Path, Source]) -> None:
    config = json.loads((exported[0] / "config.json").read_text())
    assert config == {
        "format": 1,
        "classes": list("abcde"),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "size": [24, 24],
        "any_size": None,
        "opset": OPSET,
        "about": {"run": "runs/a"},
    }


def test_the_runtimes_optimizer_keeps_the_results(exported: tuple[Path, Source]) -> None:
    images = torch.randn(2, 3, 24, 24).numpy()
    found = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(exported[0] / "model.onnx", options)
        found.append(torch.from_numpy(session.run(["logits"], {"images": images})[0]))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def test_a_model_of_bags_is_refused() -> None:
    bags = source({"tiles": 24, "image_size": (48, 24), "pos_embed": "coordinates"})
    with pytest.raises(CheckpointError, match="bags of tiles"):
        Onnx().check(bags)


@pytest.mark.slow
@pytest.mark.parametrize("any_size", [False, True], ids=["fixed", "any size"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_gives_our_outputs(tmp_path: Path, case: str, any_size: bool) -> None:
    of = source(CASES[case], any_size=any_size)
    of.model.backward = 0.5 if case == "kinds" else 1.0
    Onnx().check(of)
    Onnx().write(tmp_path, of)
    sides = json.loads((tmp_path / "config.json").read_text())["any_size"]
    sizes = [(24, 24)]
    step = {"overlapping patches, no head": 2, "stages, conv stem": 8}.get(case, 4)
    least = max(step, 4)
    if any_size:
        assert sides == {"least": least, "step": step}
        sizes += [(16, 40), (least, 24)]
    else:
        assert sides is None
        assert "TopK" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    for size in sizes:
        for batch in (1, 5):
            assert_equal(tmp_path, of.model, torch.randn(batch, 3, *size))
    for size in ((24, 24 + step // 2), (24 + 3 * step // 2, 24)) if any_size else ():
        with pytest.raises(Exception, match=f"the sides of images must be {least} . k {step} pixels"):
            Onnx().reopen(tmp_path)(torch.zeros(1, 3, *size))


@pytest.mark.slow
def test_bf16_weights_make_the_file_smaller_and_change_no_bit(tmp_path: Path) -> None:
    wide = source({"d_model": 64})
    with torch.no_grad():
        for name in wide.model.product_weights():
            parameter = wide.model.get_parameter(name)
            parameter.copy_(parameter.bfloat16())
    half = dataclasses.replace(wide, half=True)
    images = torch.randn(2, 3, 24, 24)
    outputs = []
    for name, of in (("wide", wide), ("half", half)):
        (tmp_path / name).mkdir()
        Onnx().write(tmp_path / name, of)
        outputs.append(Onnx().reopen(tmp_path / name)(images)["logits"])
    assert torch.equal(*outputs)
    products = sum(wide.model.get_parameter(name).numel() for name in wide.model.product_weights())
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("wide", "half")]
    assert sizes[0] - sizes[1] > 1.9 * products


@pytest.mark.slow
def test_weights_beyond_protobufs_limit_are_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimscale.export.formats.onnx._EXTERNAL", 1000)
    of = source({"depth": 1, "directions": "bi"})
    Onnx().write(tmp_path, of)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data", "config.json"}
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size / 2
    assert_equal(tmp_path, of.model, torch.randn(2, 3, 24, 24))


_ALONE = """
import importlib.util, sys
sys.path.append({site!r})
for name in ("torch", "vimscale", "triton", "onnx"):
    assert importlib.util.find_spec(name) is None, name
sys.argv = ["run.py", {image!r}]
exec({program!r})
"""


@pytest.mark.slow
def test_the_program_in_the_docs_runs_with_nothing_but_onnxruntime_numpy_and_pillow(tmp_path: Path) -> None:
    folder = tmp_path / "mine_onnx"
    folder.mkdir()
    of = source({})
    Onnx().write(folder, of)
    site = tmp_path / "site"
    site.mkdir()
    for package in ("onnxruntime", "numpy", "PIL"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        home = Path(next(iter(spec.submodule_search_locations)))
        for path in (home, home.with_name(f"{package.lower()}.libs"), home.with_name("pillow.libs")):
            if path.exists() and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    (tmp_path / "photo.jpg").write_bytes(image(3, 40, 48))
    page = (Path(__file__).parents[2] / "docs/exports.md").read_text().partition("## ONNX\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = _ALONE.format(site=str(site), image="photo.jpg", program=blocks[0])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    prepared = Preprocessing((24, 24), of.manifest.mean, of.manifest.std)(tmp_path / "photo.jpg")
    with torch.no_grad():
        p = of.model(prepared[None])[0].softmax(dim=0)
    name, chance = done.stdout.split()
    assert name == of.manifest.classes[int(p.argmax())]
    assert float(chance) == pytest.approx(float(p.max()), abs=0.01)


_QUIET = """
import torch, pathlib
from tests.export.test_onnx import Onnx, source
Onnx().write(pathlib.Path({folder!r}), source({{"depth": 1, "directions": "bi"}}))
"""


@pytest.mark.slow
def test_writing_prints_nothing_and_names_a_folder_that_it_cannot_write_to(tmp_path: Path) -> None:
    code = _QUIET.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(OSError, match=r"model\.onnx") as caught:
        Onnx().write(tmp_path / "absent", source({"depth": 1, "directions": "bi"}))
    assert str(caught.value.filename).endswith("model.onnx")
