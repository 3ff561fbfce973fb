"""Features of layers, and those on disk: equal to what the model computes, and computed once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.published import VIM
from vimscale.data.dataset import Dataset
from vimscale.errors import DataError, RecipeError
from vimscale.evaluation.cache import FeatureCache, key_of
from vimscale.evaluation.embedded import Embedded
from vimscale.evaluation.layers import last_layers, reader
from vimscale.evaluation.probes import Probes, probed
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.presets import Stage
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import PublishedVim
from vimscale.model.published.quirks import build as build_published
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe.objective import ClassificationOptions

SHAPE: dict[str, Any] = {"num_classes": 10, "image_size": 32, "patch_size": 8, "d_model": 16, "depth": 4}
READING: Any = {"size": (32, 32), "choice": None, "batch": 64, "workers": 0, "device": torch.device("cpu")}


def _learner(**changes: Any) -> Learner:
    torch.manual_seed(0)
    config = VimConfig(**({**SHAPE, "directions": "bi*4"} | changes))
    model = VisionMamba(config)
    with torch.no_grad():
        model.norm.weight.normal_()
    return Learner(build(ClassificationOptions(), config), model).eval()


def _inputs() -> Inputs:
    return Inputs(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64))


# ---- layers


@pytest.mark.parametrize(
    ("directions", "changes"),
    [
        ("bi", {}),
        ("bi", {"cls_token": "none", "pool": "max"}),
        ("bi", {"registers": 3, "pool": "registers"}),
        ("bwd", {"cls_token": "both"}),
        ("pair", {"cls_token": "none", "pool": "last"}),
    ],
)
@torch.no_grad()
def test_features_after_a_layer_are_those_of_a_model_that_ends_there(directions: str, changes: dict[str, Any]) -> None:
    learner, inputs = _learner(directions=f"{directions}*4", **changes), _inputs()
    assert isinstance(inputs.images, Tensor)
    found = reader(learner, ["head", "mean", "head.1", "mean.1"])(inputs)
    assert torch.equal(found["head"], learner.ask("embedding", inputs))
    config = learner.encoder.config
    half = VisionMamba(replace(config, depth=2, directions=f"{directions}*2"))
    half.load_state_dict(learner.encoder.state_dict(), strict=False)
    torch.testing.assert_close(found["head.1"], half.eval()(inputs.images, features=True))
    (encoded,) = [half.encode([(half.patches(inputs.images), (4, 4))])]
    mean = layout(config, (4, 4)).image_tokens(encoded.tokens).mean(dim=1)
    torch.testing.assert_close(found["mean.1"], mean)


@torch.no_grad()
def test_only_layers_of_the_last_stage_and_second_ones_of_pairs_can_be_read() -> None:
    stages = (Stage(depth=2, d_model=16), Stage(depth=3, d_model=24))
    learner = _learner(stages=stages, cls_token="none", pool="last")
    assert last_layers(learner.encoder.config, 4) == [4, 3, 2]
    inputs = _inputs()
    found = reader(learner, ["head", "mean.2"])(inputs)
    assert torch.equal(found["head"], learner.ask("embedding", inputs))
    assert found["mean.2"].shape == (3, 24)
    assert last_layers(_learner(directions="pair*4").encoder.config, 2) == [3, 1]


@torch.no_grad()
def test_of_a_published_model_with_quirks_only_what_the_head_reads_can_be_read() -> None:
    model = build_published(complete({**VIM, "if_rope": True, "if_cls_token": True}))
    assert isinstance(model, PublishedVim)
    learner = Learner(build(ClassificationOptions(), model.config), model).eval()
    inputs = Inputs(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(reader(learner, ["head"])(inputs)["head"], model(inputs.images, features=True))
    with pytest.raises(ValueError, match="only head can be read, not mean"):
        reader(learner, ["head", "mean"])


@torch.no_grad()
def test_features_under_autocast_have_one_dtype_and_are_near_those_in_fp32() -> None:
    learner, inputs, names = _learner(), _inputs(), ["head", "mean", "head.1"]
    exact = reader(learner, names)(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reader(learner, names)(inputs)
        asked = learner.ask("embedding", inputs)
    assert {t.dtype for t in rounded.values()} == {asked.dtype}
    for name in names:
        torch.testing.assert_close(rounded[name].float(), exact[name], atol=0.05, rtol=0.02)
    torch.testing.assert_close(rounded["head"], asked, atol=0.05, rtol=0.02)


# ---- on disk


class Counted:
    """An encoder that counts its forward passes: pixels at an eighth of their size."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, inputs: Inputs) -> Tensor:
        self.passes += 1
        assert isinstance(inputs.images, Tensor)
        return torch.nn.functional.avg_pool2d(inputs.images, 8).flatten(1)


@pytest.fixture
def found(digits: Path, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Return a function that probes digits with `Probes` of the given options, and keeps features in tmp_path."""
    val = Dataset.open(str(digits / "val"))

    def probe(embed: Any, identity: str | None = "weights", **options: Any) -> dict[str, float]:
        wanted = Probes(features=tmp_path / "features", **options)
        return probed(embed, val, val.manifest, wanted, identity=identity, **READING)

    return probe


def test_another_k_or_method_computes_no_forward_pass(found: Any, digits: Path) -> None:
    embed, bank = Counted(), str(digits / "val")
    first = found(embed, knn=bank, k=(5,))
    passes = embed.passes
    assert passes > 0
    assert found(embed, knn=bank, k=(5, 20))["knn5_top1"] == first["knn_top1"]
    linear = found(embed, linear=bank, method="sgd", steps=5)
    assert embed.passes == passes
    assert linear == found(embed, identity=None, linear=bank, method="sgd", steps=5)
    assert embed.passes > passes


def test_other_weights_are_not_taken_for_these(found: Any, digits: Path) -> None:
    embed, bank = Counted(), str(digits / "val")
    found(embed, knn=bank)
    passes = embed.passes
    found(embed, identity="others", knn=bank)
    assert embed.passes == 2 * passes


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_features_are_computed_again(
    found: Any, digits: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    embed, bank = Counted(), str(digits / "val")
    first, passes = found(embed, knn=bank), embed.passes
    (file,) = (tmp_path / "features").iterdir()
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes({"cut": content[:-100], "changed": content, "empty": b""}[damage])
    assert found(embed, knn=bank) == first
    assert embed.passes == 2 * passes
    assert str(file) in caplog.text
    caplog.clear()
    assert found(embed, knn=bank) == first
    assert (embed.passes, caplog.text) == (2 * passes, "")


def _some(seed: int, count: int = 50) -> Embedded:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 8, generator=rng).bfloat16()
    return Embedded({"head": features}, torch.arange(count), torch.arange(count))


def test_features_come_back_as_they_were(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "new" / "folder", 10**6)
    assert cache.read("a", ["head"]) is None
    cache.write("a", _some(0))
    back = cache.read("a", ["head"])
    assert back is not None
    assert back.head.dtype == torch.bfloat16
    assert torch.equal(back.head, _some(0).head)
    assert torch.equal(back.numbers, torch.arange(50))
    assert cache.read("a", ["head", "mean"]) is None


def test_the_least_recently_used_features_make_room(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 5000)
    for i, name in enumerate("abc"):
        cache.write(name, _some(i))
        assert cache.read("a", ["head"]) is not None
    assert cache.read("b", ["head"]) is None
    assert cache.read("c", ["head"]) is not None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000


def test_features_that_exceed_the_limit_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FeatureCache(tmp_path, 100).write("a", _some(0))
    assert "raise the limit" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    FeatureCache(tmp_path / "file", 10**6).write("a", _some(0))
    assert "features are not kept" in caplog.text


def test_a_key_depends_on_every_part() -> None:
    assert len({key_of(model="a", size=(1, 2)), key_of(model="b", size=(1, 2)), key_of(model="a", size=(2, 1))}) == 3


# ---- probes of a model


def test_a_model_is_read_once_for_all_probes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passes = []
    encode = VisionMamba.encode

    def counted(self: VisionMamba, *args: Any, **options: Any) -> Any:
        passes.append(1)
        return encode(self, *args, **options)

    monkeypatch.setattr(VisionMamba, "encode", counted)
    val, bank = Dataset.open(str(digits / "val")), str(digits / "val")
    wanted = Probes(knn=bank, linear=bank, method="sgd", steps=3, layers=2, features=tmp_path, choose="published")
    found = probed(_learner(), val, val.manifest, wanted, identity="a", **READING)
    assert len(passes) == -(-val.manifest.samples // 64)  # the bank is the validation set, and is read from disk
    assert {"knn_top1", "knn200_top5", "mean_knn_top1", "linear_top1", "linear_top5", "linear_lr"} < found.keys()
    assert (found["linear_layers"], found["linear_mean"]) in {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert "chosen on" in caplog.text
    passes.clear()
    again = replace(wanted, method="lbfgs", choose="held-out", knn=None)
    lbfgs = probed(_learner(), val, val.manifest, again, identity="a", **READING)
    assert passes == []
    assert lbfgs.keys() == {f"{p}linear_{x}" for p in ("", "mean_") for x in ("top1", "top5", "l2")}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"k": (0, 3)}, "k 0: nearest neighbors are counted from 1"),
        ({"k": ()}, "k: there is none"),
        ({"pools": ("cls",)}, "pool cls: it is head or mean"),
        ({"pools": ()}, "pool: there is none"),
        ({"steps": 0}, "steps 0: it is at least 1"),
        ({"limit": "much"}, "features limit 'much' is not a size"),
    ],
)
def test_probes_that_mean_nothing_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        Probes(**options)


def test_layers_that_do_not_exist_are_refused(digits: Path) -> None:
    val = Dataset.open(str(digits / "val"))
    wanted = Probes(linear=str(digits / "train"), method="sgd", layers=9)
    with pytest.raises(RecipeError, match="layers 9: features of 4 layers can be read; give 4 or fewer"):
        probed(_learner(), val, val.manifest, wanted, **READING)
    with pytest.raises(RecipeError, match="pool mean: of this model only head can be read"):
        probed(Counted(), val, val.manifest, replace(wanted, pools=("mean",)), **READING)
    others = Dataset.open(str(digits / "val"))
    others.manifest = replace(val.manifest, classes=tuple("abcdefghij"))
    with pytest.raises(DataError, match="no class in common"):
        probed(Counted(), others, val.manifest, Probes(knn=str(digits / "train")), **READING)


def test_the_choice_of_layers_is_left_out_where_it_makes_no_difference(digits: Path) -> None:
    val, bank = Dataset.open(str(digits / "val")), str(digits / "val")
    wanted = Probes(linear=bank, method="sgd", steps=2)
    found = probed(_learner(cls_token="none", pool="mean"), val, val.manifest, wanted, **READING)
    assert found["linear_mean"] == 0
    found = probed(Counted(), val, val.manifest, wanted, **READING)
    assert (found["linear_layers"], found["linear_mean"]) == (1, 0)
