"""The functions that give the learning rate, the parameter groups and DeepSpeed's configuration."""

import dataclasses

import pytest
import torch

from vimscale.engine import optim
from vimscale.engine.deepspeed_engine import ds_config
from vimscale.model import PRESETS, VisionMamba
from vimscale.recipe import recipe
from vimscale.recipe.sections import Optim
from vimscale.runtime.distributed import backward_parts, draws


def test_the_rate_warms_up_and_follows_a_cosine_to_its_minimum() -> None:
    settings = Optim(lr=1.0, min_lr=0.1, warmup=10)
    rates = [optim.learning_rate(settings, step, 110) for step in range(110)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert optim.learning_rate(Optim(lr=0.5, schedule="constant", warmup=2), 99, 100) == 0.5


def test_the_average_follows_closely_at_first() -> None:
    assert optim.ema_decay(0.999, 0) == 0.1
    assert optim.ema_decay(0.999, 10**6) == 0.999


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = VisionMamba(dataclasses.replace(PRESETS["vim_digits"], depth=1, directions="bi"))
    adamw = optim.optimizer(model.named_parameters(), model.no_weight_decay(), Optim(weight_decay=0.3), fused=False)
    decayed, spared = adamw.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(p.ndim > 1 for p in decayed["params"])


def test_gates_have_a_separate_decay_and_published_decay_includes_A_log() -> None:
    config = dataclasses.replace(PRESETS["vim_digits"], depth=1, directions="bi", backward_gate=True)
    model = VisionMamba(config)
    settings = Optim(weight_decay=0.3, gate_decay=2.0, decay="published")
    decayed, _, gates = optim.optimizer(
        model.named_parameters(), model.no_weight_decay(), settings, fused=False
    ).param_groups
    assert (gates["weight_decay"], [p.numel() for p in gates["params"]]) == (2.0, [1])
    assert any(p is model.blocks[0].mixer.A_log for p in decayed["params"])


def test_updates_of_a_slice_are_scaled_and_others_are_not() -> None:
    torch.manual_seed(0)
    start = torch.randn(12)
    weights = [start.clone().requires_grad_() for _ in range(2)]
    for p, scaled in zip(weights, (False, True), strict=True):
        adamw = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5)
        if scaled:
            optim.scale_updates(adamw, [(p, p.data[4:8])], 0.25)
        p.grad = torch.arange(12.0)
        adamw.step()
    whole, part = (p.detach() - start for p in weights)
    torch.testing.assert_close(part[4:8], whole[4:8] * 0.25)
    assert torch.equal(part[:4], whole[:4])
    assert torch.equal(part[8:], whole[8:])


def test_parameters_of_backward_paths_are_known_by_name_and_slice() -> None:
    config = dataclasses.replace(PRESETS["vim_digits"], depth=6, directions="bi fwd shared pair*2 cross")
    own = VisionMamba(config).backward_slices()
    assert {name.split(".")[1] for name in own} == {"0", "2", "4", "5"}
    assert own["blocks.0.mixer.D"] == [(0.5, 1)]
    assert [name for name in own if name.startswith("blocks.2.")] == ["blocks.2.mixer.A_log"]
    assert own["blocks.4.mixer.x_proj"] == [(0, 1)]
    assert own["blocks.5.mixer.A_log"] == [(0.25, 0.5), (0.75, 1)]


def test_dropped_backward_paths_depend_on_seed_and_step_and_keep_the_mean() -> None:
    config = dataclasses.replace(PRESETS["vim_digits"], backward_drop=0.25, backward_ramp=(0, 10))
    parts = torch.tensor([backward_parts(config, 0, step) for step in range(10, 2010)])
    assert parts.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(parts.mean() - 1) < 0.02
    assert backward_parts(config, 0, 500) == backward_parts(config, 0, 500) != backward_parts(config, 1, 500)
    early = [value for value in backward_parts(config, 0, 5) if value]  # type: ignore[union-attr]
    assert early == pytest.approx([2 / 3] * len(early))
    assert backward_parts(PRESETS["vim_digits"], 0, 5) is None


def test_deepspeeds_configuration_follows_the_recipe() -> None:
    chosen = recipe.load("vim_digits_cpu", ["parallel.micro_batch=8", "parallel.zero=2", "parallel.precision=bf16"])
    config = ds_config(chosen, world=4, numel=10**9)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4 == chosen.batch
    expected = {"stage": 2, "reduce_bucket_size": 500_000_000, "compute_grad_norm": False}
    assert config["zero_optimization"] == expected
    assert config["torch_autocast"]["enabled"]
    assert "bf16" not in config, "that engine casts the parameters themselves"


def test_no_clipping_is_explicit() -> None:
    """DeepSpeed clips to 1.0 by default."""
    assert ds_config(recipe.load("vim_digits_cpu", ["optim.clip=null"]), 1, 10**6)["gradient_clipping"] == 0.0


def test_draws_are_uniform_and_depend_on_seed_and_step() -> None:
    drawn = draws(0, 7, 1000, 10)
    assert drawn.shape == (1000, 10)
    assert abs(drawn.mean() - 0.5) < 0.02
    assert torch.equal(drawn, draws(0, 7, 1000, 10))
    assert not torch.equal(drawn, draws(0, 8, 1000, 10))
    assert not torch.equal(drawn, draws(1, 7, 1000, 10))
