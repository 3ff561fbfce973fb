"""Autoregressive pretraining computes what ARM's code does, on recorded runs of it, and sees nothing that it predicts.

The recordings are next to the checkout, not in it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.support import forks
from vimscale.errors import RecipeError
from vimscale.model import VimConfig, VisionMamba
from vimscale.objectives.autoregressive import Autoregressive, clusters
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.patches import patchify
from vimscale.objectives.published import arm
from vimscale.recipe import recipe as recipes
from vimscale.recipe.reconstruction import AutoregressiveOptions

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "objectives" / "arm.safetensors"


def _recorded() -> tuple[dict, dict[str, Tensor]]:
    if not GOLDEN.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is not a dict
        return json.loads(file.metadata()["config"]), tensors


def _below(tensors: dict[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {key.removeprefix(folder): value for key, value in tensors.items() if key.startswith(folder)}


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max()
    assert off < bound, f"{what}: error {off:.1e} relative to the largest value"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
def test_outputs_losses_and_gradients_equal_the_original_code(dtype: torch.dtype, bound: float) -> None:
    config, tensors = _recorded()
    state = _below(tensors, "state/")
    model = arm.learner(
        config["constructor"], state, taps=tuple(config["taps"]), decoder_heads=config["decoder_heads"]
    ).to(dtype)
    objective = model.objective
    assert isinstance(objective, Autoregressive)
    seen: dict[str, Tensor] = {}
    decoder = model["decoder"]
    for i, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"dec_block.{i}": out}))
    decoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(queries=given[0]))
    inputs = Inputs(tensors["input/image"].to(dtype), torch.zeros(2, dtype=torch.int64))
    seen["pred"] = objective.predict(model, inputs)
    seen["loss_per_image"] = model.ask("loss_per_sample", inputs)
    seen["loss"], _ = model.ask("loss", inputs)
    seen["loss_elements"] = (seen["pred"] - objective.targets(inputs.images)).square()
    seen["patches"] = patchify(inputs.images, 4)
    for name, value in seen.items():
        _close(value.detach(), tensors[f"output/{name}"], bound, name)

    seen["loss"].backward()
    parameters = dict(model.trained())
    assert all(parameter.grad is not None for parameter in parameters.values())
    gradients = arm.to_published(model, {name: p.grad for name, p in parameters.items()})
    expected = _below(tensors, "grad/")
    assert gradients.keys() == expected.keys() - {"input/image"}
    for key, value in gradients.items():
        _close(value, expected[key], bound, key)


def test_states_convert_to_ours_and_back_bit_for_bit() -> None:
    config, tensors = _recorded()
    state = _below(tensors, "state/")
    model = arm.learner(config["constructor"], state, taps=(1, 2, 3, 4), decoder_heads=2)
    converted = arm.to_published(model)
    assert converted.keys() == state.keys()
    for key, value in state.items():
        if "pos_embed" in key:
            torch.testing.assert_close(converted[key], value, rtol=0, atol=2e-6)
        else:
            assert torch.equal(converted[key], value), key


# ---- what it sees


SHAPE = VimConfig(
    num_classes=0,
    image_size=(32, 48),
    patch_size=8,
    d_model=32,
    depth=3,
    d_state=4,
    directions="fwd*3",
    cls_token="none",
    pos_embed="sincos",
)


def _learner(shape: VimConfig = SHAPE, **options: Any) -> Learner:
    torch.manual_seed(0)
    chosen = AutoregressiveOptions(**{"cluster": 2, "decoder_width": 16, "decoder_depth": 2} | options)
    model = Learner(Autoregressive(chosen, shape), VisionMamba(shape))
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _predicted(model: Learner, images: Tensor) -> Tensor:
    objective = model.objective
    assert isinstance(objective, Autoregressive)
    with torch.no_grad():
        return objective.predict(model, Inputs(images, torch.zeros(len(images), dtype=torch.int64)))


def test_clusters_are_in_row_order_and_so_are_the_patches_of_each() -> None:
    cells = torch.arange(24.0).view(1, 24, 1)
    order = clusters(cells, (4, 6), 2)[0, :, 0].tolist()
    assert order[:8] == [0, 1, 6, 7, 2, 3, 8, 9]
    assert order[12:16] == [12, 13, 18, 19]
    assert sorted(order) == list(range(24))


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_prediction_depends_on_earlier_clusters_only(cluster: int) -> None:
    model = _learner(cluster=cluster)
    images = torch.randn(2, 3, 32, 48)
    before = _predicted(model, images)
    count = cluster**2
    for changed in range(24 // count):  # cluster `changed` of the image gets other pixels
        cells = clusters(torch.arange(24.0).view(1, 24, 1), (4, 6), cluster)[0, :, 0].long()
        other = images.clone()
        for cell in cells[changed * count : (changed + 1) * count].tolist():
            top, left = cell // 6 * 8, cell % 6 * 8
            other[:, :, top : top + 8, left : left + 8] += 1
        after = _predicted(model, other)
        seen = changed * count  # predictions begin with cluster 1: its first row is 0
        assert torch.equal(after[:, :seen], before[:, :seen])
        if seen < before.shape[1]:
            assert (after[:, seen : seen + count] != before[:, seen : seen + count]).any(dim=-1).all()


def test_positions_of_other_sizes_are_those_of_their_grid() -> None:
    model = _learner()
    assert _predicted(model, torch.randn(1, 3, 64, 32)).shape == (1, 28, 192)


def test_every_parameter_has_a_gradient_with_drop_path_and_recomputation() -> None:
    shape = dataclasses.replace(SHAPE, drop_path=0.5)
    images, draws = torch.randn(8, 3, 32, 48), torch.rand(8, 3)
    found = []
    for level in ("none", "scan", "block"):
        model = _learner(shape).train()
        model.encoder.recompute = [level] * 3
        loss, _ = model.ask("loss", Inputs(images, torch.zeros(8, dtype=torch.int64), draws=draws))
        loss.backward()
        found.append({name: p.grad for name, p in model.trained()})
        assert all(grad is not None for grad in found[-1].values())
    for other in found[1:]:
        assert all(torch.equal(grad, found[0][name]) for name, grad in other.items())
    undropped, _ = model.ask("loss", Inputs(images, torch.zeros(8, dtype=torch.int64)))
    assert not torch.equal(undropped, loss)


def test_the_loss_of_a_batch_is_the_mean_of_its_images() -> None:
    model = _learner()
    inputs = Inputs(torch.randn(4, 3, 32, 48), torch.zeros(4, dtype=torch.int64))
    losses = model.ask("loss_per_sample", inputs)
    assert losses.shape == (4,)
    assert torch.equal(model.ask("loss", inputs)[0], losses.mean())
    alone = model.ask("loss_per_sample", Inputs(inputs.images[2:3], inputs.targets[2:3]))
    torch.testing.assert_close(alone, losses[2:3], rtol=1e-5, atol=1e-6)


# ---- the recipe


FORWARD = ("model.directions=fwd*4", "model.cls_token=none", "objective.kind=autoregressive", "objective.cluster=2")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            ["model.directions=bi*4", "model.cls_token=middle", "model.registers=2", "model.stem=conv"],
            r"every layer must scan forward, .* set model\.directions=fwd\*4 model\.cls_token=none model\.registers=0"
            r" model\.stem=patch$",
        ),
        (["model.directions=fwd@column*4"], r"set model\.directions=fwd\*4$"),
        (["model.stride=4"], r"set model\.stride=8$"),
        (["objective.taps=[1,2]"], r"taps \[1, 2\] must end with the last of 4 layers.* use \[1, 2, 3, 4\]"),
        (["objective.taps=[3,2,4]"], r"taps \[3, 2, 4\] must increase"),
        (["objective.cluster=3"], r"model\.image_size 32 x 32 has 4 x 4 patches, .* use 48 x 48 pixels or another"),
        (["objective.cluster=4"], r"is one cluster of 4 x 4 patches, and nothing is left to predict"),
        (["phases=[{step: 5, image_size: 40}]"], r"phase at step 5: image_size 40 x 40 has 5 x 5 patches"),
        (["objective.decoder_width=48", "objective.decoder_heads=5"], r"48 is not a multiple of decoder_heads 5"),
        (["objective.decoder_width=66"], r"decoder_width 66 is not a multiple of 4"),
        (
            ["augment.buckets=4"],
            "augment.buckets 4: objective autoregressive needs images of one shape; use augment.buckets=1",
        ),
        (["augment.mixup=0.8"], "objective autoregressive needs images as they are; leave out mixup and cutmix"),
        (["parallel.context=2"], r"objective autoregressive needs whole images on every rank"),
    ],
)
def test_faults_name_the_value_the_rule_and_the_fix(changes: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=f"(?m){fault}"):
        recipes.load("vim_digits_cpu", [*FORWARD, *changes])


def test_taps_are_the_published_ones_by_default() -> None:
    options = AutoregressiveOptions()
    assert [i + 1 for i in options.layers(12)] == [6, 8, 10, 12]
    assert [i + 1 for i in options.layers(24)] == [12, 16, 20, 24]
    assert [i + 1 for i in options.layers(4)] == [1, 2, 3, 4]
    assert all(options.layers(depth)[-1] == depth - 1 for depth in range(1, 50))
    assert all(len(set(options.layers(depth))) == min(depth, 4) for depth in range(1, 50))


def test_expand_copy_means_grow() -> None:
    chosen = recipes.load("vim_digits_cpu", ["model.weights=here", "model.expand=copy"])
    assert chosen.model.grow == "copy"
    assert chosen.shape(10).expand == 2
    assert recipes.parse(chosen.to_yaml(), "again") == chosen
    with pytest.raises(RecipeError, match="grow: there are no weights to grow from"):
        recipes.load("vim_digits_cpu", ["model.grow=copy"])


def test_the_shipped_recipe_has_the_published_numbers() -> None:
    chosen = recipes.load("vim_base_arm_in1k")
    config = chosen.shape(1000)
    assert (config.depth, config.d_model, config.expand, config.mlp, config.grid) == (12, 768, 1, "swiglu", (12, 12))
    assert chosen.optim.lr == pytest.approx(1.5e-4 * chosen.batch / 256)
    named = arm.PUBLISHED["arm_base_pz16"]
    with torch.device("meta"):
        ours = Learner(Autoregressive(chosen.objective, config), VisionMamba(config))  # type: ignore[arg-type]
    assert ours["decoder"].query.shape == (named["dec_embed_dim"],)


# ---- runs


def _run(folder: Path, world: int, fault: str, *changes: str) -> list[float]:
    small = ["model.directions=fwd*2", "model.cls_token=none", "objective.decoder_width=16"]
    steps = ["steps=6", "checkpoint.every=3", "log.every=1", "optim.warmup=2", "data.val=null"]
    changes = (*FORWARD[2:], *small, *steps, *changes)
    done = forks.run_module("tests.support.injected", folder, world, fault, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(tmp_path: Path) -> None:
    assert _run(tmp_path / "two", 2, "", "steps=3") == pytest.approx(_run(tmp_path / "one", 1, "", "steps=3"), rel=1e-5)
