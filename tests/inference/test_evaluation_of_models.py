"""`vimscale evaluate` of exports and published files equals an independent evaluation; classes match by name."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import published
from tests.model.test_golden import recorded
from tests.support.published import arguments_of, random_state
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import MANIFEST, Manifest, write_set
from vimscale.errors import UserError
from vimscale.export import safetensors
from vimscale.launch.commands.app import app
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.arguments import complete
from vimscale.model.published.weights import from_published

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = ((60, 45), (45, 61), (33, 90), (37, 37), (20, 31), (64, 64), (101, 40))
"""Heights and widths of the photos."""


def _said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _reported(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _refused(*arguments: str) -> str:
    with pytest.raises(UserError) as refusal:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert refusal.value.exit_code == 2
    return str(refusal.value)


# ---- an independent evaluation


def _photos(classes: int) -> list[tuple[bytes, int]]:
    """PNGs of several shapes, smooth as photos are, with labels."""
    rng, found = np.random.default_rng(0), []
    for number in range(14):
        height, width = SHAPES[number % len(SHAPES)]
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        found.append((file.getvalue(), number % classes))
    return found


def _write(folder: Path, photos: list[tuple[bytes, int]], classes: int) -> str:
    names = tuple(f"class {number}" for number in range(classes))
    samples = [{"__key__": f"{i:04d}", "png": data, "cls": label} for i, (data, label) in enumerate(photos)]
    write_set(
        folder,
        samples,
        per_shard=8,
        name="photos",
        classes=names,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        source="",
        licence="",
    )
    return str(folder)


def _by_torch(image: Image.Image, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _by_pillow(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def _independent(
    forward: Callable[[Tensor], Tensor], size: int, photos: list[tuple[bytes, int]], resize: Any
) -> tuple[float, float, float]:
    """(top-1, top-5, loss), one image at a time: Resize(size / 0.875), CenterCrop(size) and Normalize as torchvision
    does them, with ImageNet's mean and std.
    """
    shorter, top1, top5, nll = int(size / 0.875), 0, 0, 0.0
    for data, label in photos:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        if width <= height:
            width, height = shorter, int(shorter * height / width)
        else:
            width, height = int(shorter * width / height), shorter
        top, left = round((height - size) / 2), round((width - size) / 2)
        pixels = resize(image, height, width)[top : top + size, left : left + size]
        scaled = (pixels.astype(np.float32) / 255 - np.float32(IMAGENET[0])) / np.float32(IMAGENET[1])
        with torch.no_grad():
            logits = forward(torch.from_numpy(scaled).permute(2, 0, 1)[None])[0].double().numpy()
        order = np.argsort(-logits)
        top1 += order[0] == label
        top5 += label in order[:5]
        nll += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return top1 / len(photos), top5 / len(photos), nll / len(photos)


def _check(report: dict[str, Any], forward: Callable[[Tensor], Tensor], size: int, photos: Any) -> None:
    figures = report["figures"]
    top1, top5, loss = _independent(forward, size, photos, _by_torch)
    assert figures["images"] == len(photos)
    assert (figures["top1"], figures["top5"]) == pytest.approx((top1, top5), abs=1e-12)
    assert figures["loss"] == pytest.approx(loss, abs=1e-6)
    # Pillow's resize differs by up to 2/255 per pixel
    assert figures["loss"] == pytest.approx(_independent(forward, size, photos, _by_pillow)[2], abs=2e-2)


@pytest.mark.parametrize("case", ["v2_midcls_div2", pytest.param("v2_stride4", marks=pytest.mark.slow)])
def test_a_published_file_is_evaluated_as_by_the_published_code(case: str, tmp_path: Path) -> None:
    given, tensors = recorded(case)
    state = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
    file = tmp_path / "vim.pth"
    torch.save({"model": state}, file)
    photos = _photos(10)
    data = _write(tmp_path / "photos", photos, 10)
    (tmp_path / "arguments.json").write_text(json.dumps(given))
    _said("import", str(file), "--model", str(tmp_path / "arguments.json"), "--output", str(tmp_path / "vim"))
    report = _reported(str(tmp_path / "vim"), "--data", data)
    _check(report, lambda images: published.forward(state, complete(given), images), 32, photos)
    assert any("matched by position, class 0 to class 0, class 9 to class 9" in note for note in report["notes"])
    named = ("--model", str(tmp_path / "arguments.json"))
    direct = _reported(str(file), "--data", data, *named)
    assert direct["figures"] == report["figures"]
    if case == "v2_midcls_div2":  # keys and shapes do not show a stride
        assert _reported(str(file), "--data", data)["figures"] == report["figures"]
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": zeros, "model_ema": state}, file)
    assert _reported(str(file), "--data", data, *named)["figures"]["loss"] == pytest.approx(np.log(10))
    assert _reported(str(file), "--data", data, *named, "--ema")["figures"] == report["figures"]
    assert "--model and --ema are for those" in _refused("evaluate", str(tmp_path / "vim"), "--ema", "--data", data)


@pytest.mark.parametrize(
    "case",
    ["pairs of v2", *(pytest.param(case, marks=pytest.mark.slow) for case in ("Mamba-R", "ARM", "max of logits"))],
)
def test_an_imported_model_is_evaluated_as_by_the_published_code(case: str, tmp_path: Path) -> None:
    arguments, _ = arguments_of(case)
    state, photos = random_state(arguments), _photos(5)
    names = tuple(map(str, range(5)))
    manifest = Manifest(name="imported", classes=names, shards=(), mean=IMAGENET[0], std=IMAGENET[1])
    about = {"published": arguments, "unnamed": True}
    safetensors.write(tmp_path / "model", from_published(arguments, state), manifest, about)
    data = _write(tmp_path / "photos", photos, 5)
    report = _reported(str(tmp_path / "model"), "--data", data)
    report["figures"]["top5"] = 1.0  # of five classes, which the report leaves out
    _check(report, lambda images: published.forward(state, arguments, images), arguments["img_size"], photos)


# ---- classes


@pytest.fixture
def model(tmp_path: Path, digits: Path) -> Path:
    """An export of random weights for the digits."""
    torch.manual_seed(0)
    network = VisionMamba(VimConfig(image_size=32, patch_size=8, d_model=32, depth=1, directions="bi", num_classes=10))
    assert network.head is not None
    torch.nn.init.normal_(network.head.weight)
    safetensors.write(tmp_path / "model", network, Dataset.open(str(digits / "val")).manifest, {})
    return tmp_path / "model"


def _renamed(folder: Path, digits: Path, *classes: str, **changes: Any) -> str:
    """The validation set with other names of its classes."""
    before = Dataset.open(str(digits / "val")).manifest
    folder.mkdir()
    changed = replace(before, classes=classes, base=str(digits / "val"), **changes)
    (folder / MANIFEST).write_text(changed.to_json())
    return str(folder)


def test_classes_in_another_order_and_missing_ones_are_matched_by_name(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    plain = _reported(str(model), "--data", str(digits / "val"))
    assert plain["notes"] == []
    assert plain["left_out"] == plain["unreadable"] == 0
    assert sum(one["images"] for one in plain["classes"]) == plain["figures"]["images"] == 359
    hits = sum(one["images"] * one["top1"] for one in plain["classes"])
    assert hits / 359 == pytest.approx(plain["figures"]["top1"], abs=1e-12)

    # the same images under names of other digits: what was a 3 is called 7
    names = list("0123456789")
    names[3], names[7] = "7", "3"
    swapped = _reported(str(model), "--data", _renamed(tmp_path / "swapped", digits, *names))
    assert {one["name"]: one["images"] for one in swapped["classes"]}["7"] == plain["classes"][3]["images"]
    assert swapped["figures"]["loss"] != plain["figures"]["loss"]

    # the same model with its head in another order
    config = json.loads((model / "config.json").read_text())
    tensors = safetensors.load(model)
    assert tensors.head is not None
    order = [4, 1, 0, 9, 2, 3, 8, 5, 7, 6]
    for parameter in (tensors.head.weight, tensors.head.bias):
        parameter.data = parameter.data[order]
    classes = tuple(config["classes"][number] for number in order)
    manifest = Manifest(name="x", classes=classes, shards=(), mean=config["mean"], std=config["std"])
    safetensors.write(tmp_path / "other", tensors, manifest, {})
    found = _reported(str(tmp_path / "other"), "--data", str(digits / "val"))["figures"]
    assert found == pytest.approx(plain["figures"], rel=1e-6)

    # one class that the model lacks
    lacking = _renamed(tmp_path / "lacking", digits, *"0123456", "seven", "8", "9")
    part = _reported(str(model), "--data", lacking)
    sevens = plain["classes"][7]["images"]
    assert (part["left_out"], part["figures"]["images"]) == (sevens, 359 - sevens)
    assert part["classes"] == [one for one in plain["classes"] if one["name"] != "7"]
    left_out, without = part["notes"]
    assert f"lacks 1 of the set's 10 classes, so their {sevens} images are left out: seven" in left_out
    assert "1 of the model's 10 classes have no images in the set, and remain possible: 7" in without


def test_a_report_holds_what_was_found_and_overwrites_nothing(model: Path, digits: Path, tmp_path: Path) -> None:
    to = tmp_path / "report"
    arguments = ("evaluate", str(model), "--data", str(digits / "val"))
    output = _said(*arguments, "--to", str(to))
    assert "top-1" in output
    assert "classes, the lowest first:" in output
    assert sorted(path.name for path in to.iterdir()) == [
        "calibration.png",
        "confusion.png",
        "per_class.csv",
        "report.json",
    ]
    rows = (to / "per_class.csv").read_text().splitlines()
    assert len(rows) == 11
    report = json.loads((to / "report.json").read_text())
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout) == report
    assert "is not empty, and nothing is overwritten" in _refused(*arguments, "--to", str(to))


def test_a_model_without_a_head_or_with_other_classes_is_tested_by_its_features(
    model: Path, digits: Path, tmp_path: Path
) -> None:
    val, train = str(digits / "val"), str(digits / "train")
    config = VimConfig(image_size=32, patch_size=8, d_model=32, depth=1, directions="bi", num_classes=0)
    safetensors.write(tmp_path / "headless", VisionMamba(config), Dataset.open(val).manifest, {})
    refusal = _refused("evaluate", str(tmp_path / "headless"), "--data", val)
    assert "no head" in refusal
    assert "--knn SET or --linear SET" in refusal
    output = _said("evaluate", str(tmp_path / "headless"), "--data", val, "--knn", train)
    assert "kNN top-1" in output
    others = _renamed(tmp_path / "others", digits, *"abcdefghij")
    bank = _renamed(tmp_path / "bank", digits, *"abcdefghij")
    assert "no class in common" in _refused("evaluate", str(model), "--data", others)
    output = _said("evaluate", str(model), "--data", others, "--knn", bank, "--k", "1")
    assert "not classified by the model's own head" in output
    assert "kNN top-1 100.00%" in output  # each image is its own nearest neighbor


def test_wrong_input_gets_one_message(model: Path, digits: Path, tmp_path: Path) -> None:
    val, here = str(digits / "val"), str(model)
    assert "a model is a run, the folder of a checkpoint" in _refused("evaluate", "nothing", "--data", val)
    assert "give one with --data SET" in _refused("evaluate", here)
    assert "leave one of them out" in _refused("evaluate", here, f"data.val={val}", "--data", val)
    assert "only a run has an objective" in _refused("evaluate", here, "objective.evaluation=retrieval", "--data", val)
    assert "data.workers" in _refused("evaluate", here, "data.workers=-1", "--data", val)
    assert "is an export, which has one set of weights" in _refused("evaluate", here, "--step", "3", "--data", val)
    assert "is not there" in _refused("evaluate", here, "--data", str(tmp_path / "missing"))
    unlabelled = _renamed(tmp_path / "unlabelled", digits, labels=())
    assert "has no labels, and the accuracy" in _refused("evaluate", here, "--data", unlabelled)
    twice = _renamed(tmp_path / "twice", digits, *"0123456778")
    assert "gives several classes one name" in _refused("evaluate", here, "--data", twice)
    bags = VimConfig(
        image_size=32,
        patch_size=8,
        d_model=32,
        depth=1,
        directions="bi",
        num_classes=10,
        tiles=32,
        pos_embed="coordinates",
    )
    safetensors.write(tmp_path / "bags", VisionMamba(bags), Dataset.open(val).manifest, {})
    assert "takes bags of tiles" in _refused("evaluate", str(tmp_path / "bags"), "--data", val)


@pytest.mark.slow
def test_two_ranks_find_what_one_does(model: Path, digits: Path, tmp_path: Path) -> None:
    names = _renamed(tmp_path / "lacking", digits, *"0123456", "seven", "8", "9")
    arguments = (str(model), "--data", names, "--knn", names)
    one = _reported(*arguments)
    two = _reported(*arguments, "--workers", "2")
    assert two.pop("figures") == pytest.approx(one.pop("figures"), rel=1e-6)
    for report in (one, two):
        for row in report["calibration"]:
            row.pop("probability", None)
    assert two == one
