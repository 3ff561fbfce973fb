"""Programs of torch.export: what they compute, where they run, and what they need."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import safetensors
from vimscale.export.formats.base import Outputs, Source
from vimscale.export.formats.torch_program import COMPILED, KERNELS, PLAIN, TorchProgram
from vimscale.launch.commands.app import app
from vimscale.model import VimConfig, VisionMamba, schedule
from vimscale.model.presets import Stage

PAGE = (Path(__file__).resolve().parents[2] / "docs/exports.md").read_text().partition("## torch.export\n")[2]
CLASSES = ("ant", "bee", "cat", "dog", "emu")


def model_of(directions: str, **fields: Any) -> VisionMamba:
    """Return a small model, no parameter of which has its initial value, where that is a constant."""
    torch.manual_seed(0)
    shape = {"num_classes": 5, "image_size": 32, "patch_size": 8, "d_model": 32, "d_state": 4, "window": 3} | fields
    if "stages" not in fields:
        shape |= {"directions": directions, "depth": len(schedule.parse(directions))}
    model = VisionMamba(VimConfig(**shape))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def source_of(model: VisionMamba, **options: bool) -> Source:
    classes = CLASSES if model.head is not None else ()
    manifest = Manifest(name="five", classes=classes, shards=(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return Source(model, manifest, {"run": "first"}, **options)


@torch.no_grad()
def outputs_of(model: VisionMamba, images: Tensor) -> Outputs:
    features = model(images, features=True)
    return {"features": features} | ({} if model.head is None else {"logits": model(images)})


def assert_same(found: Outputs, wanted: Outputs, tolerance: float = TorchProgram.tolerance) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max()


def assert_written(folder: Path, source: Source, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> None:
    """Export and compare every program with the model, for batches of other sizes than that of the trace."""
    form = TorchProgram()
    form.check(source)
    form.write(folder, source)
    written = (PLAIN, KERNELS)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*written, "config.json"))
    for file in written:
        run = form.reopen(folder, file)
        for b, size in zip((1, 5, 3), (*sizes, *sizes, *sizes), strict=False):
            images = torch.randn(b, 3, *size)
            assert_same(run(images), outputs_of(source.model, images))


def test_programs_compute_what_the_model_does_at_any_batch(tmp_path: Path) -> None:
    model = model_of("bi@column")
    model.backward = 0.5
    assert_written(tmp_path, source_of(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classes"] == list(CLASSES)
    assert (config["mean"], config["size"], config["any_size"]) == ([0.5, 0.4, 0.3], [32, 32], None)
    assert (config["about"], config["torch"]) == ({"run": "first"}, torch.__version__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directions", "fields"),
    [
        ("fwd bwd", {"cls_token": "first"}),
        ("shared", {"fuse": "sum", "pos_embed": "sincos"}),
        ("pair*2", {"norm": "layer"}),
        ("cross", {"expand": 1, "mlp": "swiglu"}),
        ("attn bi", {"d_head": 16, "pool": "last"}),
        ("bi@snake bi@window", {"cls_token": "both", "pool": "max"}),
        ("bi", {"fuse": "gate", "backward_gate": True, "pos_embed": False}),
        ("bi cross", {"fuse": "concat", "layer_scale": 0.1, "pool": "mean"}),
        ("bi", {"registers": 3, "pool": "registers", "register_reduce": 2, "pos_embed": "coordinates"}),
        ("bi", {"ssm_norm": "layer", "stem": "conv", "num_classes": 0}),
        ("bi", {"ssm_norm": True, "stride": 4}),
        ("", {"stages": (Stage(depth=1, d_model=16), Stage(depth=1, d_model=32)), "cls_token": "none"}),
    ],
    ids=str,
)
def test_every_kind_of_layer_is_exported(tmp_path: Path, directions: str, fields: dict[str, Any]) -> None:
    assert_written(tmp_path, source_of(model_of(directions, **fields)))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"registers": 2}, {"pos_embed": "sincos"}])
def test_one_program_takes_images_of_any_size(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = source_of(model_of("bi@window cross", **fields), any_size=True)
    assert_written(tmp_path, source, sizes=((32, 32), (16, 48), (64, 24)))
    for file in (PLAIN, KERNELS):
        run = TorchProgram().reopen(tmp_path, file)
        with pytest.raises(RuntimeError, match=r"the height of images must be 8 \+ k 8 pixels"):
            run(torch.zeros(1, 3, 36, 32))
        with pytest.raises(RuntimeError, match=r"the width of images must be 8 \+ k 8 pixels"):
            run(torch.zeros(1, 3, 32, 33))
        with pytest.raises(AssertionError, match=r"size\(\)\[2\] >= 16"):
            run(torch.zeros(1, 3, 8, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["any_size"] == {"least": 16, "step": 8}


@pytest.mark.slow
def test_a_program_of_any_size_that_would_refuse_one_image_is_not_written(tmp_path: Path) -> None:
    source = source_of(model_of("cross", stride=4, pos_embed="coordinates"), any_size=True)
    with pytest.raises(CheckpointError, match="refuses a batch of one; leave out --any-size"):
        TorchProgram().write(tmp_path, source)


@pytest.mark.slow
def test_half_stores_products_in_bf16_and_computes_in_fp32(tmp_path: Path) -> None:
    model = model_of("bi", mlp="swiglu")
    with torch.no_grad():
        for name in model.product_weights():
            weight = model.get_parameter(name)
            weight.copy_(weight.bfloat16())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_written(tmp_path, source_of(model, half=True))
    for file in (PLAIN, KERNELS):
        state = torch.export.load(tmp_path / file).state_dict
        stored = {name.removeprefix("model.").removeprefix("model."): value for name, value in state.items()}
        assert {name for name, value in stored.items() if value.dtype == torch.bfloat16} == model.product_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.slow
def test_kernels_are_chosen_where_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("fwd shared")
    TorchProgram().write(tmp_path, source_of(model))
    run = TorchProgram().reopen(tmp_path, KERNELS)
    images = torch.randn(2, 3, 32, 32)
    assert_same(run(images), outputs_of(model, images), tolerance=0)
    monkeypatch.setenv("VIMSCALE_BACKEND", "reference")
    assert_same(run(images), outputs_of(model, images), tolerance=0)
    monkeypatch.setenv("VIMSCALE_BACKEND", "tpu")
    with pytest.raises(ValueError, match="VIMSCALE_BACKEND 'tpu'"):
        run(images)


@pytest.mark.slow
def test_the_program_of_the_page_needs_nothing_of_ours(tmp_path: Path) -> None:
    model = model_of("bi")
    folder = tmp_path / "mine_torch"
    folder.mkdir()
    TorchProgram().write(folder, source_of(model))
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    (program, *_) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    guard = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("vimscale", "kernels", "launch", "numba", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""
    (tmp_path / "page.py").write_text(guard + program + "assert 'vimscale' not in sys.modules\n")
    done = subprocess.run(
        [sys.executable, "page.py", "photo.png"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    images = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None]
    chances = outputs_of(model, images)["logits"].softmax(-1)[0]
    name, chance = done.stdout.split()
    assert name == CLASSES[int(chances.argmax())]
    assert float(chance) == pytest.approx(float(chances.max()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Inductor and g++ take minutes where others compute
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++, and there is no g++ here")
def test_the_compiled_program_runs_in_python_and_in_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    model = model_of("bi@column shared ssd", d_head=16)
    folder, source = tmp_path / "mine_aoti", source_of(model)
    safetensors.write(tmp_path / "model", model, source.manifest, source.about)
    command = ["export", str(tmp_path / "model"), "--to", "torch", "--aoti", "--output", str(folder)]
    said = CliRunner().invoke(app, command, catch_exceptions=False)
    assert said.output.startswith("AOTInductor compiles 3 layers")
    report = json.loads((folder / "parity.json").read_text())
    assert (said.exit_code, report["passed"]) == (0, True)
    assert list(report["others"]) == [KERNELS, COMPILED]
    run = TorchProgram().reopen(folder, COMPILED)
    for b in (1, 5):
        images = torch.randn(b, 3, 32, 32)
        assert_same(run(images), outputs_of(model, images))
    with pytest.raises(RuntimeError, match="unmatched dim value at 2, expected: 32, but got: 40"):
        run(torch.zeros(1, 3, 40, 32))
    with pytest.raises(RuntimeError, match="unmatched stride value"):
        run(images.contiguous(memory_format=torch.channels_last))
    (program,) = re.findall(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
    commands = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[-1].replace("python", sys.executable)
    (tmp_path / "main.cpp").write_text(program)
    done = subprocess.run(["sh", "-ec", commands], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    best = int(outputs_of(model, torch.zeros(1, 3, 32, 32))["logits"].argmax())
    assert done.stdout == f"features [1, 32], class {best}\n"


def test_compiling_without_a_compiler_or_for_all_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("fwd")
    with pytest.raises(CheckpointError, match="one size: leave out --any-size"):
        TorchProgram().check(source_of(model, aoti=True, any_size=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    TorchProgram().check(source_of(model))
    with pytest.raises(CheckpointError, match=r"no no-such-compiler here: install it .* or leave out --aoti"):
        TorchProgram().check(source_of(model, aoti=True))


def test_models_of_tiles_are_refused() -> None:
    model = model_of("bi", tiles=32, pos_embed="coordinates")
    with pytest.raises(CheckpointError, match="--to torch cannot hold a model of bags of tiles"):
        TorchProgram().check(source_of(model))
