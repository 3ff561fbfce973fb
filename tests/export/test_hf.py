"""Folders for transformers: opened without vimscale in a fresh process, fine-tuned, saved, and read back."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.export.test_portable import CASES, new
from vimscale.data.images.augment import for_evaluation, normalise
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export.formats import hf
from vimscale.export.formats.base import Source
from vimscale.export.portable import limits
from vimscale.model import VisionMamba
from vimscale.model.presets import OwnKind
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import PublishedVim

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers"
)
DATA = Manifest("set", ("ant", "bee", "cat", "dog", "eel"), (), (0.5, 0.4, 0.3), (0.25, 0.2, 0.25))
ABOUT = {"run": "first", "step": 12}


def _export(folder: Path, changes: dict[str, Any], *, half: bool = False, backward: float = 1.0) -> VisionMamba:
    """Export the model of a case into folder/export, with images next to it."""
    model = new(changes, backward)
    if half:
        for name in model.product_weights():
            weight = model.get_parameter(name)
            weight.data = weight.data.bfloat16().float()
    source = Source(model, DATA, ABOUT, half=half)
    (folder / "export").mkdir(parents=True)
    form = hf.HuggingFace()
    form.check(source)
    form.write(folder / "export", source)
    save_file({"images": torch.randn(2, 3, *model.config.size)}, folder / "images.safetensors")
    return model


def _run_child(root: Path, steps: str) -> None:
    packages = sorted(
        {
            str(Path(spec.origin).parent.parent)
            for name in ("torch", "transformers", "accelerate", "safetensors", "numpy", "PIL")
            if (spec := importlib.util.find_spec(name)) is not None and spec.origin
        }
    )
    child = Path(__file__).with_name("hf_child.py")
    home = root.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {"HF_MODULES_CACHE": str(home / "modules"), "HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-I", "-S", str(child), str(root), steps, *packages]
    ran = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@torch.no_grad()
def _assert_outputs(folder: Path, model: VisionMamba) -> None:
    """What the child computed is what the model computes."""
    images, out = load_file(folder / "images.safetensors")["images"], load_file(folder / "out.safetensors")
    _assert_near(out["features"], model(images, features=True))
    _assert_near(out["tokens"], model._encoded(images, None, None)[0])
    _assert_near(out["last"], model._encoded(images, None, None, [len(model.blocks) - 1])[3][0][0])
    if model.head is None:
        assert "logits" not in out
    else:
        _assert_near(out["logits"], model(images))


def _assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= hf.HuggingFace.tolerance * wanted.abs().max()


def _assert_equal(one: VisionMamba, other: VisionMamba) -> None:
    assert one.config == other.config
    assert one.backward == other.backward
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


# ---- opened


@pytest.mark.slow
def test_transformers_opens_it_in_a_fresh_process_without_vimscale(tmp_path: Path) -> None:
    model = _export(tmp_path / "all/case", {"registers": 2})
    _run_child(tmp_path / "all", "outputs")
    _assert_outputs(tmp_path / "all/case", model)


@pytest.mark.slow
def test_all_kinds_of_layers_give_what_our_models_give(tmp_path: Path) -> None:
    models = {name: _export(tmp_path / "all" / name.replace(" ", "_"), changes) for name, changes in CASES.items()}
    models["narrow"] = _export(tmp_path / "all/narrow", {"directions": "bi attn", "mlp": "swiglu"}, half=True)
    models["backward 0.3"] = _export(tmp_path / "all/backward_0.3", {"directions": "bi shared"}, backward=0.3)
    _run_child(tmp_path / "all", "outputs")
    for name, model in models.items():
        _assert_outputs(tmp_path / "all" / name.replace(" ", "_"), model)


@pytest.mark.slow
def test_it_is_saved_fine_tuned_and_loaded_in_bf16_by_transformers(tmp_path: Path) -> None:
    here = tmp_path / "all/case"
    model = _export(here, {"directions": "bi cross", "registers": 2, "drop_path": 0.1, "layer_scale": 0.5})
    _run_child(tmp_path / "all", "saves,trains,narrow")
    saved, manifest, about = hf.read(here / "saved")
    _assert_equal(saved, model)
    assert (manifest.classes, manifest.mean, manifest.std) == (DATA.classes, DATA.mean, DATA.std)
    assert about == ABOUT
    for name in hf.CODE:
        assert (here / "saved" / name).read_bytes() == (here / "export" / name).read_bytes()

    encoder, manifest, _ = hf.read(here / "saved encoder")
    assert (encoder.head, manifest.classes) == (None, ())
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(encoder(images, features=True), model(images, features=True))

    tuned, manifest, _ = hf.read(here / "trainer/checkpoint-3")
    assert tuned.config.num_classes == 3
    assert manifest.classes == ()
    assert not torch.equal(tuned.norm.weight, model.norm.weight)


@pytest.mark.slow
def test_with_vimscale_its_kernels_run_the_scans(tmp_path: Path) -> None:
    from vimscale.export.portable.modeling_vimscale import VimscaleForImageClassification

    for name in ("cross, concat", "gate", "shared", "pair, sum", "orders", "backward gate", "layer norm of the scans"):
        model = _export(tmp_path / name, CASES[name], backward=0.5)
        opened = VimscaleForImageClassification.from_pretrained(tmp_path / name / "export").eval()
        assert opened.model.inner is not None
        images = torch.randn(2, 3, *model.config.size)
        with torch.no_grad():
            _assert_near(opened(images).logits, model(images))
        opened(images, labels=torch.tensor([0, 1])).loss.backward()
        assert all(parameter.grad is not None for parameter in opened.parameters())


def test_what_is_written_opens_again(tmp_path: Path) -> None:
    model = _export(tmp_path, {"directions": "bi cross"})
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        _assert_near(hf.HuggingFace().reopen(tmp_path / "export")(images)["logits"], model(images))


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.delitem(sys.modules, "vimscale.export.portable.modeling_vimscale", raising=False)
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer, and here is 4\.57\.6"):
        importlib.import_module("vimscale.export.portable.modeling_vimscale")


def test_what_was_loaded_is_not_drawn_again(tmp_path: Path) -> None:
    """transformers 5.0 has every module drawn after loading, with marks on the parameters that a file gave."""
    from vimscale.export.portable.modeling_vimscale import VimscaleForImageClassification

    _export(tmp_path, {"directions": "ssd attn", "mlp": "swiglu", "registers": 2})
    model = VimscaleForImageClassification.from_pretrained(tmp_path / "export")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = not name.startswith("model.head.")
    for module in model.modules():
        model._init_weights(module)
    drawn = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert drawn == {"model.head.weight", "model.head.bias"}


def test_the_file_that_transformers_opens_names_all_that_it_needs() -> None:
    """transformers 5.0 copies only those to its cache, not what they import."""
    folder = Path(limits.__file__).parent
    named = set(re.findall(r"^from \.(\w+) import", (folder / "modeling_vimscale.py").read_text(), re.MULTILINE))
    own = {"modeling_vimscale", "image_processing_vimscale"}
    assert named == {name.removesuffix(".py") for name in hf.CODE} - own


# ---- preprocessing


@pytest.mark.slow
def test_the_processor_gives_the_pixels_of_our_evaluation() -> None:
    pytest.importorskip("PIL")
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
    from PIL import Image
    from transformers import ViTImageProcessor

    from vimscale.export.portable.image_processing_vimscale import VimscaleImageProcessor

    mean, std = torch.tensor(DATA.mean), torch.tensor(DATA.std)
    for size in ((224, 224), (96, 64), (427, 640)):
        model = VisionMamba(dataclasses.replace(new({}).config, image_size=size, patch_size=1, pos_embed=False))
        tree = hf.preprocessor(Source(model, DATA, ABOUT))
        ours = [for_evaluation(torch.from_numpy(photo.copy()).permute(2, 0, 1), size) for photo in photos]
        wanted = torch.stack([normalise(each, mean, std) for each in ours])
        processor = VimscaleImageProcessor(**tree)
        for images in ([Image.fromarray(photo) for photo in photos], list(photos)):
            assert torch.equal(processor(images, return_tensors="pt").pixel_values, wanted)
    # Without our code, transformers' own processor is close where the crop's corner is a whole pixel: 256 x 384 here.
    even = [photo[:420, :630] for photo in photos]
    tree = hf.preprocessor(Source(VisionMamba(dataclasses.replace(model.config, image_size=224)), DATA, ABOUT))
    exact = VimscaleImageProcessor(**tree)(even, return_tensors="pt").pixel_values
    theirs = ViTImageProcessor(**tree)(even, return_tensors="pt").pixel_values
    steps = (theirs - exact).mul(std[:, None, None] * 255).abs()
    assert steps.max() < 1.5
    assert steps.mean() < 0.05


# ---- read back


@pytest.mark.parametrize("half", [False, True])
def test_it_is_read_back_bit_for_bit(tmp_path: Path, half: bool) -> None:
    changes = {"registers": 2, "directions": "bi@snake attn", "image_size": (16, 28), "backward_gate": True}
    model = _export(tmp_path, changes, half=half, backward=0.25)
    found, manifest, about = hf.read(tmp_path / "export")
    _assert_equal(found, model)
    assert (manifest.classes, manifest.mean, manifest.std) == (DATA.classes, DATA.mean, DATA.std)
    assert about == ABOUT
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "export/model.safetensors").values()}
    assert dtypes == ({torch.float32, torch.bfloat16} if half else {torch.float32})


def test_an_encoder_and_unnamed_classes_are_read_back(tmp_path: Path) -> None:
    model = _export(tmp_path / "a", {"num_classes": 0})
    found, manifest, _ = hf.read(tmp_path / "a/export")
    _assert_equal(found, model)
    assert manifest.classes == ()
    source = Source(new({}), dataclasses.replace(DATA, classes=()), {})
    (tmp_path / "b").mkdir()
    hf.HuggingFace().write(tmp_path / "b", source)
    assert json.loads((tmp_path / "b/config.json").read_text())["id2label"]["4"] == "LABEL_4"
    assert hf.read(tmp_path / "b")[1].classes == ()


def test_tensors_in_several_files_are_read(tmp_path: Path) -> None:
    model = _export(tmp_path, {})
    folder = tmp_path / "export"
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _assert_equal(hf.read(folder)[0], model)
    index["weight_map"][names[0]] = "../model-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names files elsewhere"):
        hf.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "not that of a model with model_type vimscale"),
        ({"model": 3}, "model is 3, not a mapping"),
        ({"mean": [0, 1]}, "mean"),
        ({"backward": 7}, "backward is 7"),
        ({"id2label": {"0": "a"}}, "id2label names 1 classes, and the head has 5"),
        ({"id2label": [1]}, "id2label"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _export(tmp_path, {})
    path = tmp_path / "export/config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, **change}))
    with pytest.raises(CheckpointError, match=message):
        hf.read(tmp_path / "export")
    path.write_text(json.dumps({**tree, "model": {**tree["model"], "d_model": 4096}}))
    with pytest.raises(CheckpointError, match="tensors do not fit the config"):
        hf.read(tmp_path / "export")
    shutil.rmtree(tmp_path / "export")
    with pytest.raises(CheckpointError, match="does not hold a model for transformers"):
        hf.read(tmp_path / "export")


# ---- written


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    _export(tmp_path, {"registers": 2})
    text = (tmp_path / "export/README.md").read_text()
    for part in (
        "AutoModelForImageClassification",
        "24 x 24 pixels",
        "| Weights: run | first |",
        "## Licence\n\nNot stated",
    ):
        assert part in text
    assert "license:" not in text


def test_what_it_cannot_hold_is_refused_by_name() -> None:
    form = hf.HuggingFace()
    tiles = {"tiles": 8, "image_size": 8, "pos_embed": "coordinates"}
    with pytest.raises(CheckpointError, match=r"bags of tiles \(model.tiles 8\): use --to safetensors"):
        form.check(Source(new(tiles), DATA, {}))
    arguments = complete(
        {
            "img_size": 16,
            "patch_size": 4,
            "stride": 4,
            "depth": 2,
            "embed_dim": 16,
            "if_rope": True,
            "pt_hw_seq_len": 4,
            "if_cls_token": True,
        }
    )
    with pytest.raises(CheckpointError, match="published model's if_rope: use --to hustvl"):
        form.check(Source(PublishedVim(arguments), DATA, {}))
    cut = new({})
    cut.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    with pytest.raises(CheckpointError, match="last norm was removed"):
        form.check(Source(cut, DATA, {}))
    own = new({})
    own.config = dataclasses.replace(own.config, kinds=(OwnKind(name="gate", kind="mine.py:Gate"),))
    with pytest.raises(CheckpointError, match=r"your own kinds \(gate\)"):
        form.check(Source(own, DATA, {}))
