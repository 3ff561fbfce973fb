"""Recomputation: the same bits, less memory, and a budget that holds."""

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import peak_bytes
from vimscale.data.images import augment
from vimscale.data.sample import Sample
from vimscale.engine import recompute
from vimscale.errors import RecipeError
from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.block import Recompute
from vimscale.model.presets import Stage
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes
from vimscale.recipe.sections import Parallel

CONFIG = VimConfig(
    num_classes=5,
    image_size=16,
    patch_size=4,
    d_model=16,
    depth=8,
    d_state=4,
    d_head=8,
    drop_path=0.3,
    directions="bi shared pair*2 attn cross bwd@window fwd",
)


def _gradients(config: VimConfig, rule: str, frozen: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = VisionMamba(config)
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_("mixer" in name and ".3." not in name)
    model.recompute = recompute.levels(Parallel(recompute=rule), config, 3, "cpu")
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *config.size, generator=generator)
    draws = torch.rand(3, len(config.layers), generator=generator)
    loss = F.cross_entropy(model(images, draws, [0.5] * len(config.layers)), torch.tensor([0, 1, 2]))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fuse", ["mean", "sum"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all learn", "some frozen"])
@pytest.mark.parametrize("rule", ["scan", "block", "block/2"])
def test_gradients_are_those_without_recomputation_bit_for_bit(rule: str, frozen: bool, fuse: Any) -> None:
    config = dataclasses.replace(CONFIG, fuse=fuse, backward_gate=True)
    loss, wanted = _gradients(config, "none", frozen)
    again, found = _gradients(config, rule, frozen)
    assert torch.equal(again, loss)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_blocks_with_an_mlp_are_recomputed_bit_for_bit() -> None:
    config = dataclasses.replace(CONFIG, depth=3, directions="bi cross attn", mlp="swiglu", norm="layer")
    _, wanted = _gradients(config, "none")
    for rule in ("scan", "block"):
        _, found = _gradients(config, rule)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), rule


@pytest.mark.parametrize("fuse", ["gate", "concat"])
def test_learned_fusions_are_recomputed_bit_for_bit(fuse: Any) -> None:
    config = dataclasses.replace(CONFIG, fuse=fuse, depth=3, directions="bi cross attn")
    _, wanted = _gradients(config, "none")
    for rule in ("scan", "block"):
        _, found = _gradients(config, rule)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), rule


@pytest.mark.parametrize(("rule", "levels"), [("block/3", ["block", "none", "none"] * 2), ("scan", ["scan"] * 6)])
def test_a_rule_names_the_level_of_every_layer(rule: str, levels: list[str]) -> None:
    config = dataclasses.replace(CONFIG, depth=6, directions="bi*6")
    assert list(recompute.levels(Parallel(recompute=rule), config, 2, "cpu")) == levels


def _step(config: VimConfig, rule: str, b: int) -> Any:
    torch.manual_seed(0)
    model = VisionMamba(config)
    model.recompute = recompute.levels(Parallel(recompute=rule), config, b, "cpu")
    images, labels = torch.randn(b, 3, *config.size), torch.zeros(b, dtype=torch.int64)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # a step of a run finds them there
    return lambda: F.cross_entropy(model(images), labels).backward()


def test_peak_memory_falls_as_expected() -> None:
    """At Small's width and 224 pixels; with 6 layers, one layer's workspace weighs four times as much as with 24."""
    config = dataclasses.replace(PRESETS["vim_small"], depth=6, directions="bi*6", num_classes=10)
    peaks = {rule: peak_bytes(_step(config, rule, 2)) for rule in ("none", "scan", "block")}
    assert peaks["scan"] < 0.6 * peaks["none"]
    assert peaks["block"] < 0.45 * peaks["none"]


@pytest.mark.parametrize("directions", ["fwd*4", "bi*4", "shared*4", "pair*4", "cross*4", "bi@column*4"])
def test_layers_keep_what_fake_tensors_count(directions: str) -> None:
    """Compare real tensors saved for the backward pass, each storage once, with the count."""
    config = VimConfig(num_classes=10, image_size=64, d_model=48, depth=4, d_state=8, directions=directions)
    torch.manual_seed(0)
    model = VisionMamba(config)
    images = torch.randn(3, 3, 64, 64)
    for level in ("none", "scan"):
        model.recompute = [level] * 4
        saved: dict[int, int] = {}
        keep = []
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t: torch.Tensor, saved: Any = saved, keep: Any = keep, own: Any = own) -> torch.Tensor:
            keep.append(t)  # so that no address is reused
            if t.untyped_storage().data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x, tokens = model._embed(images)
            residual = torch.zeros_like(x).requires_grad_()
            saved.clear()
            for group in model._groups():
                x, residual = model._step(group, x, residual, tokens, [None] * 4, [1.0] * 4)
        counted = sum(recompute.kept_bytes(config, level, 3, "fp32"))  # type: ignore[arg-type]
        assert abs(counted - sum(saved.values())) <= 0.02 * counted, level


def test_as_few_layers_as_possible_meet_a_budget() -> None:
    config = dataclasses.replace(CONFIG, directions="bi*8")
    kept = {level: recompute.kept_bytes(config, level, 4, "fp32") for level in get_args(Recompute)}
    whole, least = sum(kept["none"]), sum(kept["block"])
    for share in (1.0, 0.8, 0.5, 0.3):
        budget = max(int(whole * share), least)
        chosen = recompute.levels(Parallel(recompute=f"{budget / 1e6:.6f}MB"), config, 4, "cpu")
        assert sum(kept[level][i] for i, level in enumerate(chosen)) <= budget
        eased = list(chosen)
        if share < 1:
            last = max(i for i, level in enumerate(eased) if level != "none")
            eased[last] = "scan" if eased[last] == "block" else "none"
            assert sum(kept[level][i] for i, level in enumerate(eased)) > budget, "one layer too many"
    with pytest.raises(RecipeError, match="even with block in every layer"):
        recompute.levels(Parallel(recompute="0.001MB"), config, 4, "cpu")


SEEN = {
    "masked": ("objective={kind: masked, decoder_width: 16}",),
    "autoregressive": (
        "objective={kind: autoregressive, cluster: 2, decoder_width: 16, decoder_heads: 2}",
        "model.directions=fwd*4",
        "model.cls_token=none",
    ),
    "distillation": ("objective={kind: distillation, local_crops: 3, local_size: 16, prototypes: 8, hidden: 8}",),
    "classification": ("model.registers=2",),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_budget_counts_what_an_objective_encodes_of_an_image(kind: str) -> None:
    chosen = recipes.load("vim_digits_cpu", ["model.patch_size=4", *SEEN[kind]])
    config = chosen.shape(10)
    objective = build(chosen.objective, config)
    learner = Learner(objective, VisionMamba(config))
    objective.begin(learner, 0, 10)
    rng = np.random.default_rng(0)
    views = objective.views(Sample(torch.zeros(3, 32, 32, dtype=torch.uint8), 0, "", {}, (32, 32)), rng)
    inputs = Inputs(
        torch.randn(1, 3, 32, 32),
        torch.zeros(1, dtype=torch.int64),
        augment.normalised_views({name: view[None] for name, view in views.items()}, torch.zeros(3), torch.ones(3)),
    )
    lengths = []
    with learner.encoder.blocks[0].register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1])):
        learner.ask("loss", inputs)
    found = recompute.kept_bytes(config, "block", 5, "fp32", objective=chosen.objective)
    assert found == [5 * lengths[-1] * 64 * (4 + 4)] * 4
    assert sum(recompute.kept_bytes(config, "none", 5, "fp32", objective=chosen.objective)) > 2 * sum(found)


def test_stages_keep_less_as_their_tokens_get_fewer() -> None:
    stages = (Stage(depth=1, d_model=16), Stage(depth=1, d_model=16))
    config = dataclasses.replace(CONFIG, stages=stages, cls_token="none")
    first, second = recompute.kept_bytes(config, "none", 2, "fp32")
    assert 2.5 < first / second <= 4  # states are kept for whole chunks of tokens
