"""Every format through the command line: kinds of layers, options, messages, and what is left when writing fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from tests.support.faults import SmallDisk
from tests.support.models import computes_the_same
from tests.support.shell import Shell
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError, DataError, RunFailed
from vimscale.export import parity, safetensors
from vimscale.export.formats import base
from vimscale.export.formats.own import Own
from vimscale.inference.opened import open_model
from vimscale.launch.commands.app import app
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.presets import Stage
from vimscale.recipe.formats import PROGRAMS, READ_BACK

SMALL: dict[str, Any] = {
    "num_classes": 10,
    "image_size": 32,
    "patch_size": 8,
    "d_model": 16,
    "depth": 2,
    "d_state": 4,
    "directions": "bi*2",
}
KINDS: dict[str, dict[str, Any]] = {
    "vim": {},
    "shared": {"directions": "shared*2", "fuse": "sum"},
    "forward": {"directions": "fwd bwd", "cls_token": "first"},
    "mambar": {"cls_token": "none", "registers": 3, "pool": "registers", "norm": "layer"},
    "arm": {"directions": "cross*2", "mlp": "swiglu", "norm": "layer", "expand": 1},
    "pairs": {"directions": "pair*2", "cls_token": "both"},
    "attention": {"directions": "bi attn", "d_head": 8, "layer_scale": 0.5},
    "orders": {"directions": "bi@column bi@snake fwd@window cross@row", "depth": 4, "window": 2, "pos_embed": False},
    "gates": {"fuse": "gate", "backward_gate": True, "ssm_norm": True, "pos_embed": "sincos"},
    "concat": {"fuse": "concat", "ssm_norm": "layer", "cls_token": "none", "pool": "max", "stem": "conv"},
    "stages": {
        "cls_token": "none",
        "pool": "mean",
        "stages": (Stage(depth=1, d_model=16), Stage(depth=2, d_model=32, directions="bi fwd")),
    },
    "headless": {"num_classes": 0, "registers": 2},
    "ssd": {"directions": "ssd ssd@column", "d_head": 8, "ssd_state": 4},
    "ssd shared": {"directions": "ssd*2", "ssd_form": "shared", "d_head": 8, "ssd_state": 4, "backward_gate": True},
    "ssd mlp": {"directions": "ssd*2", "ssd_form": "shared", "d_head": 8, "ssd_state": 4, "expand": 1, "mlp": "swiglu"},
    "ssd quasiseparable": {"directions": "ssd*2", "ssd_form": "quasiseparable", "d_head": 8, "ssd_state": 4},
    "ssd one direction": {"directions": "ssd_fwd ssd_bwd@snake", "d_head": 8, "ssd_state": 4, "registers": 2},
    "overlapping": {"stride": 4, "image_size": (32, 24), "cls_token": "none", "pool": "last"},
}
PUBLISHED = {"hustvl": ("vim", "shared", "overlapping"), "mambar": ("mambar",), "arm": ("arm",)}
"""The kinds that published layouts hold. Every other format holds all."""
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
NAMES = tuple(f"class {number}" for number in range(10))


def _model(**changes: Any) -> VisionMamba:
    """A model whose parameters all differ from their initial values, so that each matters."""
    torch.manual_seed(0)
    model = VisionMamba(VimConfig(**(SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if model.config.optional and model.config.backward_gate:
        model.backward = 0.7
    return model


def _source(folder: Path, **changes: Any) -> VisionMamba:
    model = _model(**changes)
    classes = NAMES if model.config.num_classes else ()
    safetensors.write(folder, model, Manifest("ten", classes, (), MEAN, STD), {"from": "a test"})
    return model


def _said(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _fits(to: str, kind: str) -> bool:
    return to not in PUBLISHED or kind in PUBLISHED[to]


def _installed(to: str) -> None:
    try:
        base.of(to)
    except CheckpointError as error:
        pytest.skip(str(error))


def _example(to: str) -> str:
    return PUBLISHED.get(to, ("vim",))[0]


def test_what_is_said_of_formats_that_are_read_back_is_true() -> None:
    read = {name: type(base.unchecked(name)).read is not base.Format.read for name in base.FORMATS}
    assert read | {"safetensors": True} == READ_BACK


@pytest.mark.parametrize(
    "to", [pytest.param(f, marks=pytest.mark.slow) if f in ("onnx", "torch") else f for f in base.FORMATS]
)  # test_onnx and test_torch_program export and run these
def test_an_export_of_every_format_computes_the_same(tmp_path: Path, to: str, digits: Path) -> None:
    _installed(to)
    model = _source(tmp_path / "model", **KINDS[_example(to)])
    said = _said("export", tmp_path / "model", "--to", to, "--data", digits / "val")
    out = tmp_path / f"model_{to}"
    assert f"{out}: {tmp_path / 'model'} as {to}" in said
    report = json.loads((out / "parity.json").read_text())
    assert report["passed"] is True
    assert (report["format"], report["images"]) == (to, {"noise": 8, "real": 64, "set": str(digits / "val")})
    assert report["outputs"].keys() == {"logits", "features"}
    assert report["top1_agreement"] == 1
    assert set(report["files"]) == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {
        "parity.json"
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if type(base.of(to)).read is not base.Format.read or to in PUBLISHED:
        opened = open_model(out)
        assert computes_the_same(opened.model, model)
        assert (opened.manifest.classes, opened.manifest.mean, opened.manifest.std) == (NAMES, MEAN, STD)
        assert opened.named
        _said("import", out, "--output", tmp_path / "back")
        again = safetensors.load(tmp_path / "back").state_dict()
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    elif to != "safetensors":
        with pytest.raises(CheckpointError, match="is for other programs"):
            open_model(out)
        for program in (path for path in out.iterdir() if path.suffix in PROGRAMS):
            with pytest.raises(CheckpointError, match=r"is a program of .*, and its weights cannot be read back"):
                open_model(program)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [to for to in base.FORMATS if to != "timm"])
def test_every_kind_of_layer_in_every_format(tmp_path: Path, to: str, kind: str) -> None:
    """timm opens the code that hf gets."""
    _installed(to)
    _source(tmp_path / "model", **KINDS[kind])
    command = ("export", tmp_path / "model", "--to", to)
    if not _fits(to, kind):
        with pytest.raises(CheckpointError, match=r"code cannot express"):
            _said(*command)
        assert not (tmp_path / f"model_{to}").exists()
        return
    assert "compared with noise only, because there is no validation set" in _said(*command)
    assert json.loads((tmp_path / f"model_{to}/parity.json").read_text())["passed"] is True


@pytest.mark.parametrize("kind", ["ssd", "ssd quasiseparable"])
def test_ssd_layers_come_back_from_hf_bit_by_bit(tmp_path: Path, kind: str) -> None:
    _installed("hf")
    model = _source(tmp_path / "model", **KINDS[kind])
    _said("export", tmp_path / "model", "--to", "hf")
    _said("import", tmp_path / "model_hf", "--output", tmp_path / "back")
    again = safetensors.load(tmp_path / "back").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--no-head", "--half bf16", "--no-head --half bf16", "--any-size"])
@pytest.mark.parametrize("to", base.FORMATS)
def test_every_option_in_every_format(tmp_path: Path, to: str, options: str) -> None:
    _installed(to)
    _source(tmp_path / "model", **KINDS[_example(to)])
    said = _said("export", tmp_path / "model", "--to", to, *options.split())
    report = json.loads((tmp_path / f"model_{to}/parity.json").read_text())
    assert report["passed"] is True
    assert ("logits" in report["outputs"]) == ("--no-head" not in options)
    assert (report["bf16"] is not None) == ("bf16" in options) == ("are in bf16, which itself changes" in said)
    if "bf16" in options:
        assert 0 < report["bf16"]["outputs"]["features"]["relative"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ssd shared", "ssd quasiseparable"])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_ssd_layers_of_any_size(tmp_path: Path, to: str, kind: str) -> None:
    _installed(to)
    model = _source(tmp_path / "model", **KINDS[kind])
    _said("export", tmp_path / "model", "--to", to, "--any-size")
    run = base.of(to).reopen(tmp_path / f"model_{to}")
    for height, width in ((16, 16), (24, 40), (136, 144)):  # 5, 16 and 307 tokens, or one or two more
        images = torch.randn(1, 3, height, width)
        wanted = model(images)
        assert (run(images)["logits"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("to", base.FORMATS)
def test_directions_are_expanded_for_every_format_that_holds_them(tmp_path: Path, to: str) -> None:
    _installed(to)
    changes = KINDS[_example(to)]
    one = changes | {"directions": "fwd*2"}
    _source(tmp_path / "model", **one)
    directions = changes.get("directions", "bi*2")
    said = _said("export", tmp_path / "model", "--to", to, "--directions", directions)
    assert "the new scans of every layer start as copies" in said


# ---- options


def test_bf16_halves_the_products_and_nothing_else(tmp_path: Path) -> None:
    model = _source(tmp_path / "model")
    _said("export", tmp_path / "model", "--half", "bf16", "--output", tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    products = model.product_weights()
    assert {name for name, value in tensors.items() if value.dtype == torch.bfloat16} == products
    own = model.state_dict()
    for name, value in tensors.items():
        assert torch.equal(value, own[name].to(value.dtype)), name
    loaded = safetensors.load(tmp_path / "out").state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(value, tensors[name].float()) for name, value in loaded.items())


def test_an_encoder_without_its_head_gives_the_same_features(tmp_path: Path) -> None:
    model = _source(tmp_path / "model")
    assert "it gives the same features for 8" in _said("export", tmp_path / "model", "--no-head")
    opened = open_model(tmp_path / "model_safetensors")
    assert opened.model.head is None
    assert opened.manifest.classes == ()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened.model(images, features=True), model(images, features=True))


def test_an_export_of_an_export_needs_another_folder(tmp_path: Path) -> None:
    _source(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is what is exported; name another folder"):
        _said("export", tmp_path / "model", "--to", "hustvl", "--output", tmp_path / "model")
    for option in ("--teacher", "--objective"):
        with pytest.raises(CheckpointError, match=f"leave out {option}"):
            _said("export", tmp_path / "model", option)
    with pytest.raises(CheckpointError, match="--step and --raw are for runs"):
        _said("export", tmp_path / "model", "--raw")


def test_the_published_layout_of_a_file_is_exported_and_named(tmp_path: Path) -> None:
    _source(tmp_path / "model")
    _said("export", tmp_path / "model", "--to", "hustvl")
    _said("export", tmp_path / "model_hustvl/model.pth", "--output", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["classes"] == list(NAMES)
    shutil.copy(tmp_path / "model_hustvl/model.pth", tmp_path / "vim.pth")
    _said("export", tmp_path / "vim.pth", "--half", "bf16")
    assert (tmp_path / "vim_safetensors/model.safetensors").is_file()


# ---- parity


class Broken(Own):
    """Reads back other weights than it wrote."""

    def reopen(self, folder: Path) -> Callable[[Tensor], base.Outputs]:
        run = super().reopen(folder)
        return lambda images: {name: value * 1.5 for name, value in run(images).items()}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    known = base.unchecked
    monkeypatch.setattr(base, "unchecked", lambda name: Broken() if name == "broken" else known(name))


@pytest.mark.usefixtures("broken")
def test_an_export_that_differs_fails_and_deletes_nothing(tmp_path: Path) -> None:
    _source(tmp_path / "model")
    command = ("export", tmp_path / "model", "--to", "broken", "--output", tmp_path / "out")
    with pytest.raises(RunFailed, match=r"out: loaded again, it does not compute the same; do not use it$"):
        _said(*command)
    report = json.loads((tmp_path / "out/parity.json").read_text())
    assert report["passed"] is False
    assert report["outputs"]["logits"]["relative"] == pytest.approx(0.5)
    assert (tmp_path / "out/model.safetensors").is_file()
    shutil.rmtree(tmp_path / "out")

    _said("export", tmp_path / "model", "--output", tmp_path / "out")
    before = (tmp_path / "out/parity.json").read_bytes()
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"out_failed: loaded again, .*; \S+/out is as it was"):
            _said(*command)
        assert (tmp_path / "out/parity.json").read_bytes() == before
        assert json.loads((tmp_path / "out_failed/parity.json").read_text())["passed"] is False


def test_every_program_in_a_folder_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _source(tmp_path / "model")
    monkeypatch.setattr(Own, "others", lambda self, folder: {"a.bin": Broken().reopen(folder)})
    with pytest.raises(RunFailed, match="does not compute the same"):
        _said("export", tmp_path / "model", "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out/parity.json").read_text())
    assert report["outputs"]["logits"]["absolute"] == 0
    assert report["others"]["a.bin"]["outputs"]["logits"]["relative"] == pytest.approx(0.5)


def test_a_diverged_model_is_not_written(tmp_path: Path) -> None:
    model = _model()
    model.norm.weight.data[0] = torch.nan
    safetensors.write(tmp_path / "model", model, Manifest("ten", NAMES, (), MEAN, STD), {})
    with pytest.raises(CheckpointError, match="values that are not finite for images of noise: its run diverged"):
        _said("export", tmp_path / "model", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_missing_or_not_numbers_differ() -> None:
    one = {"features": torch.ones(2, 3), "logits": torch.eye(2)}
    for other in (
        {"features": one["features"]},
        one | {"logits": torch.eye(2) * torch.nan},
        one | {"logits": torch.ones(2, 5)},
    ):
        assert parity.compared(one, other).outputs["logits"].relative == float("inf")
        assert parity.compared(other, one).outputs["logits"].relative == float("inf")
    assert parity.compared(one, one | {"logits": 1 - torch.eye(2)}).top1 == 0


def test_a_set_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    _source(tmp_path / "model")
    with pytest.raises(DataError, match="nowhere is not there"):
        _said("export", tmp_path / "model", "--data", tmp_path / "nowhere")
    assert not (tmp_path / "model_safetensors").exists()


# ---- messages


def test_unknown_formats_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _source(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"--to onxn is not a format; did you mean onnx\?"):
        _said("export", tmp_path / "model", "--to", "onxn")
    with pytest.raises(CheckpointError, match="--aoti compiles a program of --to torch"):
        _said("export", tmp_path / "model", "--aoti")
    monkeypatch.setattr(Own, "needs", {"nowhere": "nowhere>=2", "torch": "torch"})
    with pytest.raises(CheckpointError, match="needs nowhere, not installed here: pip install 'nowhere>=2'"):
        _said("export", tmp_path / "model")


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _source(tmp_path / "model")
    (tmp_path / "of_another_torch.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Own, "needs", {"of_another_torch": "of_another_torch"})
    with pytest.raises(CheckpointError, match=r"here \(operator torchvision::nms does not exist\); install what"):
        _said("export", tmp_path / "model")


def test_the_file_of_weights_in_an_export_stands_for_its_folder(tmp_path: Path) -> None:
    model = _source(tmp_path / "model")
    for to in ("safetensors", "hf"):
        _said("export", tmp_path / "model", "--to", to)
        file = tmp_path / f"model_{to}/model.safetensors"
        _said("import", file, "--output", tmp_path / "back")
        back = safetensors.load(tmp_path / "back").state_dict()
        assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
        shutil.copy(file, tmp_path / "alone.safetensors")
        with pytest.raises(CheckpointError, match=r"alone\.safetensors holds weights .* give the folder of both"):
            _said("import", tmp_path / "alone.safetensors")


def test_a_published_layout_names_the_one_that_fits(tmp_path: Path) -> None:
    for kind in ("arm", "mambar"):
        _source(tmp_path / kind, **KINDS[kind])
        with pytest.raises(CheckpointError, match=f"export it --to {kind} instead"):
            _said("export", tmp_path / kind, "--to", "hustvl")
    _source(tmp_path / "gates", **KINDS["gates"])
    with pytest.raises(CheckpointError, match=r"backward paths of this model have a factor of 0\.7"):
        _said("export", tmp_path / "gates", "--to", "hustvl")


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    _source(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out holds notes\.txt, which no export wrote"):
        _said("export", tmp_path / "model", "--output", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a file"):
        _said("export", tmp_path / "model", "--output", tmp_path / "out/notes.txt")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "hf", "onnx"])
def test_a_full_disk_or_a_read_only_folder_ends_in_one_message(shell: Shell, to: str) -> None:
    _installed(to)
    _source(shell.folder / "model", **KINDS[_example(to)])
    shell.run("export", "model", "--to", to, "--output", "runs_before")
    said = shell.run("export", "model", "--to", to, "--output", "/proc/1/out", expect=2)
    assert said.startswith("error: /proc/1/out: ")
    limited = shell.popen("export", "model", "--to", to, "--output", "runs_before", file_limit=8)
    said = shell.finish(limited, expect=1)
    assert "files may not grow that large there (ulimit -f)" in said
    assert "Traceback" not in said
    assert ".partial" not in said
    assert json.loads((shell.folder / "runs_before/parity.json").read_text())["passed"] is True
    assert not list(shell.folder.glob(".*partial*"))
    try:
        disk = SmallDisk(shell, 1)
    except PermissionError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    try:
        disk.fill(40_000)
        full = shell.popen("export", "model", "--to", to, "--output", "runs/out", inside=disk.inside)
        said = shell.finish(full, expect=1)
        assert "No space left on device; free space there" in said
        assert "Traceback" not in said
        assert [path.name for path in (disk.seen.folder / "runs").iterdir()] == ["filler"]
    finally:
        disk.close()
