"""Masked autoencoding: the original's outputs, losses, gradients; masks, decoders, recipes; any number of ranks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.support import forks
from tests.support.shell import Shell
from vimscale.checkpoint.compare import Pair
from vimscale.data.sample import Sample
from vimscale.data.stream import training
from vimscale.data.training_set import TrainingSet
from vimscale.engine import optim, zero_layout
from vimscale.errors import CheckpointError, RecipeError
from vimscale.estimate import activations
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.tokens import sincos
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.objectives.masked import Decoder
from vimscale.objectives.patches import norm_pix, patchify
from vimscale.objectives.published import mae
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.reconstruction import MaskedOptions, kept_patches

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "objectives"
SMALL = VimConfig(num_classes=0, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
OPTIONS = MaskedOptions(decoder_width=8, decoder_depth=2)


def _learner(config: VimConfig = SMALL, options: MaskedOptions = OPTIONS) -> Learner:
    torch.manual_seed(0)
    return Learner(build(options, config), VisionMamba(config))


def _inputs(config: VimConfig = SMALL, b: int = 3) -> Inputs:
    g = torch.Generator().manual_seed(1)
    noise = torch.rand(b, config.patches, generator=g)
    return Inputs(torch.randn(b, 3, *config.size, generator=g), torch.zeros(b, dtype=torch.int64), {"noise": noise})


# ---- against the original


def _recorded(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = GOLDEN / f"{case}.safetensors"
    if not path.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(path, "pt") as golden:
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118  safe_open is not a dict
        return json.loads(golden.metadata()["config"]), tensors


@pytest.mark.parametrize("case", ["mae", "mae_plain"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
def test_outputs_losses_and_gradients_equal_the_original_code(case: str, dtype: torch.dtype, bound: float) -> None:
    about, tensors = _recorded(case)

    def check(key: str, ours: Tensor) -> None:
        theirs = tensors[key].double()
        assert ours.shape == theirs.shape, key
        off = (ours.detach().double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)
        assert off < bound, f"{key}: error {off:.1e} relative to the largest value"

    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    model = mae.learner(about["constructor"], state, about["mask_ratio"]).to(dtype)
    objective: Any = model.objective
    images = tensors["input/image"].to(dtype)
    inputs = Inputs(images, torch.zeros(len(images)), {"noise": tensors["mask/noise"]})
    kept = objective.kept(tensors["mask/noise"])
    assert torch.equal(kept, tensors["output/ids_keep"].long())
    seen: dict[str, Tensor] = {}
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, into: seen.update(encoder_tokens=into[0]))
    model.encoder.norm.register_forward_hook(lambda _, __, out: seen.update(latent=out[0]))
    decoder: Any = model["decoder"]
    decoder.blocks[0].register_forward_pre_hook(lambda _, into: seen.update(decoder_tokens=into[0]))
    decoder.embed.register_forward_hook(lambda _, __, out: seen.update(decoder_embed=out))
    check("output/pred", objective.reconstruct(model, inputs, kept))
    for name in ("encoder_tokens", "latent", "decoder_embed", "decoder_tokens"):
        check(f"output/{name}", seen[name])
    check("output/patches", patchify(images, model.encoder.config.patch_size))
    check("output/loss_per_image", model.ask("loss_per_sample", inputs))
    loss, _ = model.ask("loss", inputs)
    check("output/loss", loss)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = mae.published_state(model, gradients)
    assert {f"grad/{key}" for key in ours} == {key for key in tensors if key.startswith("grad/")}
    for key, value in ours.items():
        check(f"grad/{key}", value)
    for key, value in mae.published_state(model).items():
        assert torch.equal(value, state[key].to(dtype)), key


@pytest.mark.parametrize(
    ("arguments", "state", "fault"),
    [
        ({"embed_dim": 24}, {}, r"pos_embed is \(1, 65, 32\), not \(1, 65, 24\)"),
        ({"depth": 3}, {}, r"layers\.3\.mixer\.A_b_log is unexpected"),
        ({"use_norm_after_ssm": False}, {}, r"decoder_blocks\.0\.mixer\.layernorm\.bias is unexpected"),
        ({"rms_norm": False}, {}, r"layers\.0\.norm\.bias is missing"),
        ({}, {"decoder_pred.weight": torch.zeros(3, 24)}, r"decoder_pred\.weight is \(3, 24\), not \(192, 24\)"),
        ({"stride": 4}, {}, "stride 4: patches of 8 pixels would overlap"),
        ({"ssm_cfg": {"use_fast_path": False}}, {}, r"ssm_cfg\.use_fast_path: only d_state, d_conv, expand"),
        ({"pooled": True}, {}, "pooled: there is no such argument"),
    ],
)
def test_states_and_arguments_of_other_models_are_refused(arguments: Any, state: Any, fault: str) -> None:
    about, tensors = _recorded("mae")
    theirs = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    with pytest.raises(CheckpointError, match=fault):
        mae.learner(about["constructor"] | arguments, theirs | state)


# ---- pixels and masks


def test_patches_are_rows_columns_and_colors_and_normalized_by_the_unbiased_variance() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    expected = [images[1, color, 2 + row, 4 + column] for row in (0, 1) for column in (0, 1) for color in range(3)]
    assert patches[1, 5].tolist() == [float(value) for value in expected]
    normed = norm_pix(patches)
    torch.testing.assert_close(normed.std(dim=-1), torch.ones(2, 6))
    assert norm_pix(torch.ones(1, 12)).abs().max() == 0


def test_the_number_of_kept_patches_is_that_of_the_original() -> None:
    assert [kept_patches(*pair) for pair in ((196, 0.75), (100, 0.9), (16, 0.75), (3, 0.5))] == [49, 9, 4, 1]


def test_masks_keep_the_patches_with_the_least_noise_in_order() -> None:
    objective: Any = _learner().objective
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.1, 0.1, 0.0, 0.7, 0.8]])
    assert objective.kept(noise).tolist() == [[1, 5]]  # of equal numbers, the first


def test_hidden_patches_change_neither_the_prediction_nor_what_is_kept_the_loss() -> None:
    model, inputs = _learner(), _inputs()
    objective: Any = model.objective
    kept = objective.kept(inputs.views["noise"])
    before = objective.reconstruct(model, inputs, kept)
    patch = int(next(i for i in range(16) if i not in kept[0]))
    row, column = divmod(patch, 4)
    images = inputs.images.clone()  # type: ignore[union-attr]
    images[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    other = dataclasses.replace(inputs, images=images)
    assert torch.equal(objective.reconstruct(model, other, kept), before)
    raw = _learner(options=OPTIONS.model_copy(update={"norm_pix": False}))
    losses = [raw.ask("loss_per_sample", one) for one in (inputs, other)]
    assert (losses[0] != losses[1]).tolist() == [True, False, False]


def test_views_are_noise_for_every_patch_of_the_images_size() -> None:
    objective = _learner().objective
    blank = Sample(torch.zeros(3, 9, 9, dtype=torch.uint8), 0, "", {}, (8, 12))
    noise = objective.views(blank, np.random.default_rng(0))["noise"]
    assert (noise.shape, noise.dtype) == ((6,), torch.float32)


def test_masks_depend_on_seed_and_position_alone() -> None:
    def noise(world: int, *changes: str) -> Tensor:
        chosen = _recipe("batch=32", *changes)
        config = chosen.shape(10)
        data, views = TrainingSet.open(chosen.data), build(chosen.objective, config).views
        streams = [
            training(chosen, data, config, rank=r, world=world, start=2, steps=3, views=views) for r in range(world)
        ]
        return torch.cat([batch.views["noise"] for stream in streams for batch in stream])

    whole = noise(1)
    assert whole.shape == (32, 16)
    assert len(whole.unique(dim=0)) == 32
    assert torch.equal(noise(4), whole)
    assert torch.equal(noise(2, "parallel.micro_batch=4"), whole)
    assert not torch.equal(noise(1, "seed=1"), whole)


# ---- the model

MEMBERS: dict[str, dict[str, Any]] = {
    "registers": {"registers": 3},
    "registers without class token": {"registers": 2, "cls_token": "none", "pool": "registers"},
    "class tokens at both ends": {"cls_token": "both"},
    "learned positions": {"pos_embed": True},
    "sines and cosines": {"pos_embed": "sincos"},
    "coordinates": {"pos_embed": "coordinates"},
    "LayerNorm before the gate": {"ssm_norm": "layer", "norm": "layer", "layer_scale": 0.1},
    "other kinds": {"directions": "fwd bwd shared attn pair*2", "depth": 6, "d_head": 8},
    "not square": {"image_size": (8, 24)},
    "an MLP": {"mlp": "swiglu", "expand": 1},
    "drop path": {"drop_path": 0.5},
}


@pytest.mark.parametrize("member", MEMBERS)
def test_every_parameter_of_encoder_and_decoder_gets_a_gradient(member: str) -> None:
    config = dataclasses.replace(SMALL, **MEMBERS[member])
    model, inputs = _learner(config), _inputs(config)
    loss, _ = model.ask("loss", dataclasses.replace(inputs, draws=torch.ones(3, len(config.layers)) * 0.99))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_the_decoder_reads_registers_and_class_tokens_after_the_patches() -> None:
    config = dataclasses.replace(SMALL, registers=2)
    decoder = _learner(config)["decoder"]
    assert isinstance(decoder, Decoder)
    encoded = torch.randn(1, 7, 16)  # four patches, of which the class token is in the middle; registers after each
    kept = torch.tensor([[2, 3, 9, 15]])
    tokens = decoder.tokens(encoded, kept, (4, 4))
    assert tokens.shape == (1, 19, 8)
    slots = layout(config, (1, 4))
    embedded = decoder.embed(encoded)
    assert torch.equal(tokens[0, 16], embedded[0, slots.cls[0]])
    assert torch.equal(tokens[0, 17:], embedded[0, list(slots.registers)])
    without_positions = tokens[0, :16] - sincos(decoder.config, (4, 4), tokens)
    hidden = [i for i in range(16) if i not in kept[0]]
    torch.testing.assert_close(without_positions[hidden], decoder.mask_token.expand(12, -1))
    torch.testing.assert_close(without_positions[kept[0]], slots.image_tokens(embedded)[0])


@pytest.mark.parametrize("level", ["scan", "block"])
def test_recomputation_changes_no_bit(level: Any) -> None:
    found = []
    for chosen in ("none", level):
        model = _learner()
        model.encoder.recompute = [chosen] * 2
        loss, _ = model.ask("loss", _inputs())
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_image_sizes_are_masked_and_predicted() -> None:
    model, config = _learner(), dataclasses.replace(SMALL, image_size=(8, 24))
    assert model.ask("loss_per_sample", _inputs(config)).isfinite().all()


def test_weight_decay_leaves_the_decoders_scans_alone_unless_everything_decays() -> None:
    learner, settings = _learner(), _recipe().optim
    spared = learner.no_decay()
    assert {f"objective.decoder.blocks.0.mixer.{name}" for name in ("A_log", "D", "dt_bias", "conv_bias")} <= spared
    assert "objective.decoder.mask_token" in spared
    assert not {"objective.decoder.pixels.weight", "objective.decoder.blocks.0.mixer.x_proj"} & spared
    everything = settings.model_copy(update={"decay": "all"})
    assert {optim.kind(name, spared, everything) for name, _ in learner.trained()} == {"decayed"}


# ---- recipes, plans


def _recipe(*changes: str) -> Recipe:
    base = ("objective={kind: masked, decoder_width: 32, decoder_depth: 1}", "model.d_model=32", "model.depth=2")
    return recipes.load("vim_digits_cpu", [*base, *changes])


FAULTS = {
    "stages merge tokens of a grid that has gaps": [
        "model={preset: vim_digits, stages: [{depth: 1, d_model: 8}], cls_token: none}"
    ],
    r"bags of tiles \(model.tiles\) have no grid": ["model.tiles=32", "augment.crop_min=1", "data.max_tiles=4"],
    "bi@column needs a complete grid": ["model.directions=bi bi@column"],
    "cross needs a complete grid": ["model.directions=cross*2"],
    "stride 4 shows pixels of hidden patches": ["model.stride=4"],
    "stem conv mixes pixels": ["model.stem=conv"],
    "register_reduce 2 projects": ["model.registers=4", "model.pool=registers", "model.register_reduce=2"],
    "augment.buckets 3: objective masked needs images of one shape": ["augment.buckets=3"],
    "objective masked needs images as they are; leave out mixup and cutmix": ["augment.mixup=0.8"],
    "mask_ratio 0.99 keeps 0 of the 16 patches of model.image_size 32 x 32": ["objective.mask_ratio=0.99"],
    "mask_ratio 0.9 keeps 1 of the 16 .* 3 registers": ["objective.mask_ratio=0.9", "model.registers=3"],
    "keeps 0 of the 1 patches of phase at step 5: image_size 8 x 8": ["phases=[{step: 5, image_size: 8}]"],
    "objective.mask_ratio: 1 must be below 1": ["objective.mask_ratio=1"],
    "objective.decoder_width: .*multiple of 4": ["objective.decoder_width=30"],
    "objective masked needs whole images on every rank": ["parallel.context=2"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_masked_is_refused_before_anything_starts(fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _recipe(*FAULTS[fault])


def test_plans_count_the_decoder_and_fewer_tokens() -> None:
    masked, plain = _recipe(), recipes.load("vim_digits_cpu", ["model.d_model=32", "model.depth=2"])
    names = {p.name for p in zero_layout.parameters(masked.shape(10), masked, 3, 1)}
    assert "objective.decoder.blocks.0.mixer.in_proj.weight" in names
    assert not any("head" in name for name in names)
    levels: Any = ["none"] * 2
    scans = [
        activations.passes(one.shape(10), levels, 8, "fp32", "triton", one.objective).work.scans
        for one in (masked, plain)
    ]
    assert [scan.tokens for scan in scans[0] if not scan.backward] == [5, 5, 17]
    assert [scan.tokens for scan in scans[1] if not scan.backward] == [17, 17]


@pytest.mark.parametrize("name", ["vim_base_mae_in1k", "vim_large_mae_in1k"])
def test_published_recipes_have_the_published_shape_and_schedule(name: str) -> None:
    chosen = recipes.load(name)
    config = chosen.shape(1000)
    assert (config.num_classes, config.ssm_norm, config.pos_embed, config.cls_token) == (0, "layer", "sincos", "middle")
    assert (chosen.batch, chosen.epochs, chosen.optim.lr, chosen.optim.min_lr) == (4096, 1600, 2.4e-3, 0)
    objective: Any = chosen.objective
    assert (objective.mask_ratio, objective.decoder_width, objective.decoder_depth, objective.norm_pix) == (
        (0.75, 512, 2, True)
    )
    assert not chosen.augment.mixes


# ---- ranks, restarts, and what follows


@pytest.mark.parametrize("parts", [2, 4])
def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_parts(parts: int) -> None:
    model, inputs = _learner(), _inputs(b=8)
    assert isinstance(inputs.images, Tensor)
    loss, _ = model.ask("loss", inputs)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for images, noise in zip(inputs.images.chunk(parts), inputs.views["noise"].chunk(parts), strict=True):
        part, _ = model.ask("loss", Inputs(images, inputs.targets[: len(images)], {"noise": noise}))
        (part / parts).backward()
        losses.append(part.detach() / parts)
    torch.testing.assert_close(sum(losses), loss.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


CHANGES = (
    "objective={kind: masked, decoder_width: 32, decoder_depth: 1}",
    "data.workers=1",
    "model.ssm_norm=layer",
    "model.pos_embed=sincos",
    "steps=6",
    "checkpoint.every=3",
    "log.every=1",
    "optim.warmup=2",
)


def _run(folder: Path, world: int, fault: str, *changes: str) -> list[dict[str, Any]]:
    done = forks.run_module("tests.support.injected", folder, world, fault, *CHANGES, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_that_is_stopped_continues_bit_for_bit(tmp_path: Path, zero: int) -> None:
    changes = (f"parallel.zero={zero}", "parallel.micro_batch=8", "parallel.precision=bf16")
    calm = _run(tmp_path / "calm", 2, "", *changes)
    _run(tmp_path / "hit", 2, "stopped_at_4", *changes)
    again = _run(tmp_path / "hit", 2, "", *changes)
    assert [row["loss"] for row in again] == [row["loss"] for row in calm]
    pair = Pair(*(tmp_path / name / "run/checkpoints/step_00000006" for name in ("calm", "hit")))
    assert pair.only_in == [[], []]
    differences = list(pair.differences())
    assert all(found.same_bits for found in differences)
    assert "objective.decoder.mask_token" in {found.parameter for found in differences}


@pytest.mark.slow
def test_a_run_survives_a_kill_and_its_encoder_starts_a_classifier(shell: Shell) -> None:
    smaller = ("model.d_model=32", "model.depth=2", "objective.decoder_width=32", "epochs=null", "optim.warmup=5")
    smaller += ("log.every=1", "checkpoint.every=5", "evaluate.every=0", "steps=30")
    ranks = ("--workers", "2", "--no-ray")
    process = shell.popen("launch", "digits_masked", *smaller, *ranks)
    shell.reaches(process, "digits_masked", 8)
    process.kill()
    process.communicate()
    shell.nothing_is_left()
    before = shell.rows("digits_masked")
    assert "resumed from" in shell.run("launch", "digits_masked", *smaller, *ranks)
    rows = shell.rows("digits_masked")
    assert len(rows) == 30
    assert [row["loss"] for row in rows[: len(before)]] == [row["loss"] for row in before]
    assert "loss" in shell.run("evaluate", "digits_masked")
    tuned = ("model.d_model=32", "model.depth=2", "steps=4", "epochs=null", "optim.warmup=1", "evaluate.every=0")
    said = shell.run("launch", "digits_masked_finetune", *tuned, "--workers", "1", "--no-ray")
    assert "head: starts from random values, because the weights have none" in said
