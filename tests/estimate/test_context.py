"""Plans of recipes whose ranks share images: memory of a rank, what a group exchanges, and how long that takes."""

import dataclasses
import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import plan as measuring
from vimscale.engine.recompute import kept_bytes
from vimscale.errors import LaunchError
from vimscale.estimate import roofline
from vimscale.estimate.context import Exchanged, exchanged
from vimscale.estimate.devices import DEVICES
from vimscale.estimate.planner import Planner, Target
from vimscale.estimate.roofline import Fabric
from vimscale.launch.commands import plan
from vimscale.launch.commands.app import app
from vimscale.launch.processes import preflight
from vimscale.model import PRESETS, VimConfig
from vimscale.recipe import recipe as recipes

SMALL = ["steps=100", "epochs=null", "batch=8"]
LONG = [*SMALL, "model.image_size=512", "model.depth=2"]
"""4,097 tokens."""
H100 = Target("h100", DEVICES["h100"], DEVICES["h100"].memory, Fabric(8, 450e9, 50e9), None)


def _planner(*changes: str, target: Target | None = None) -> Planner:
    recipe = recipes.load("vim_digits_cpu", changes)
    place = target or Target("here", None, 10**10, Fabric(8, 1, 1), None)
    return Planner(recipe, recipe.model.shape(10), place, 0)


@pytest.mark.parametrize("rule", ["none", "scan", "block"])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_activations_of_a_rank_fall_with_the_number_of_ranks_and_its_states_do_not(zero: int, rule: str) -> None:
    """Four ranks with the same micro-batches: alone, in pairs, and all together."""
    needs = []
    for context in (1, 2, 4):
        planner = _planner(
            *LONG, f"parallel.context={context}", "parallel.micro_batch=2", "model.directions=fwd bi@snake"
        )
        accumulation = planner.recipe.micro_batch(4).accumulation
        assert accumulation == context
        needs.append(planner.most(zero, rule, 2, 2, 4, exact=True))
    alone, pairs, together = needs
    assert alone.held == pairs.held == together.held
    assert alone.images == pairs.images == together.images, "every rank reads complete images"
    assert 0.3 < pairs.activations / alone.activations < 0.62
    assert 0.15 < together.activations / alone.activations < 0.4


def test_kept_bytes_of_a_layer_follow_the_tokens_of_a_rank() -> None:
    config = dataclasses.replace(PRESETS["vim_tiny"], image_size=1024, depth=3, directions="bi attn shared")
    for level in ("none", "scan", "block"):
        bi, attn, shared = kept_bytes(config, level, 2, "fp32")
        cut = kept_bytes(config, level, 2, "fp32", context=4)
        keys_and_values = 0 if level == "block" else 2 * 2 * config.tokens * 192 * 4
        assert 0.9 * bi / 4 < cut[0] <= 1.02 * bi / 4  # scan: nothing but xz
        assert cut[1] == pytest.approx(attn / 4 + keys_and_values, rel=0.02)
        assert 0.9 * shared / 4 < cut[2] <= 1.02 * shared / 4  # shared ranks never write dt


def test_a_budget_for_recomputation_is_that_of_one_rank() -> None:
    budget = "parallel.recompute=40MB"
    alone, shared = (_planner(*LONG, "batch=2", budget, f"parallel.context={n}") for n in (1, 2))
    assert alone._levels("40MB", alone.config, 2) != ("none", "none")
    assert shared._levels("40MB", shared.config, 2) == ("none", "none")


# ---- what is sent


def _config(directions: str, **others: Any) -> VimConfig:
    depth = len(directions.split())
    return dataclasses.replace(PRESETS["vim_tiny"], directions=directions, depth=depth, **others)


STATES = 4 * 2 * 384 * 16
"""Bytes of the states of one scan, of two images, on one rank."""
STEPS = 4 * 2 * 384
HALO = 4 * 2 * 3 * 384


@pytest.mark.parametrize(
    ("kind", "paths", "ways"), [("fwd", 1, 1), ("bwd", 1, 1), ("bi", 2, 2), ("bi@snake", 2, 2), ("shared", 2, 1)]
)
def test_scans_exchange_halos_and_states_whatever_the_number_of_tokens(kind: str, paths: int, ways: int) -> None:
    for side in (224, 1024):
        found = exchanged(_config(kind, image_size=side), ["none"], 2, "fp32", 4)
        assert found == Exchanged(
            halo=2 * ways * 3 * HALO,
            summaries=4 * paths * (2 * STATES + STEPS),
            pooled=(4 + 2) * 4 * 2 * 192,
            calls=6,
        )
    narrow = exchanged(_config(kind), ["none"], 2, "bf16", 4)
    assert narrow.halo == ways * 3 * HALO
    assert narrow.summaries == 4 * paths * (2 * STATES + STEPS), "states stay fp32"
    for level in ("scan", "block"):
        again = exchanged(_config(kind), [level], 2, "fp32", 4)
        assert again.halo == 3 * ways * 3 * HALO
        assert again.summaries == 4 * paths * (3 * STATES + 2 * STEPS)


def test_attention_exchanges_keys_and_values_and_one_rank_nothing() -> None:
    config = _config("attn")
    gathered = 4 * -(-config.tokens // 4) * 2 * 2 * 192 * 2  # the longest stretch of each rank
    assert exchanged(config, ["none"], 2, "bf16", 4).attention == 3 * gathered
    assert exchanged(config, ["block"], 2, "bf16", 4).attention == 4 * gathered
    both = exchanged(_config("attn pair pair"), ["none"] * 3, 2, "bf16", 4)
    assert both.halo == 2 * 2 * (3 * HALO // 2)
    assert exchanged(_config("attn bi"), ["none"] * 2, 2, "bf16", 1) == Exchanged()


def test_gradients_are_reduced_over_all_ranks_whatever_they_share() -> None:
    one, two = (
        _planner(*LONG, f"parallel.context={n}", "parallel.micro_batch=1", "parallel.zero=2").outlook(4) for n in (1, 2)
    )
    assert (one.accumulation, two.accumulation) == (2, 4)
    assert two.sent.all_gather == one.sent.all_gather
    assert two.sent.all_reduce == 2 * one.sent.all_reduce, "stage 2 reduces after every micro-batch"
    assert one.exchanged == Exchanged()
    per_micro = exchanged(_planner(*LONG).config, ["none"] * 2, 1, "fp32", 2)
    assert two.exchanged == per_micro * 4


def test_a_group_inside_a_node_uses_its_links() -> None:
    fabric, states = Fabric(8, 400e9, 50e9), Exchanged(summaries=8 * 10**9)
    inside = 8e9 * 3 / 4 / 400e9 / roofline.FABRIC
    assert fabric.exchange_seconds(states, 4, 16) == pytest.approx(inside)
    assert fabric.exchange_seconds(states, 16, 16) == pytest.approx(8e9 * 15 / 16 / 50e9 / roofline.FABRIC)
    crossing = Fabric(6, 400e9, 50e9).exchange_seconds(states, 4, 12)
    assert crossing == pytest.approx(8 * inside), "6 GPUs per node: some groups of 4 span two nodes"
    assert fabric.exchange_seconds(Exchanged(halo=3 * 10**9), 4, 8) == pytest.approx(1e9 / 400e9 / roofline.FABRIC)
    assert fabric.exchange_seconds(Exchanged(calls=100), 4, 8) == pytest.approx(100 * 2 * roofline.LATENCY)


def test_steps_wait_for_the_exchanges_and_share_the_work() -> None:
    changes = [*SMALL, "model.preset=vim_small", "model.image_size=2048", "model.depth=4", "parallel.micro_batch=2"]
    alone, shared = (_planner(*changes, f"parallel.context={n}", target=H100).outlook(4) for n in (1, 4))
    # 4 times the micro-batches, of a quarter each; and the passes that find what a stretch adds
    assert alone.kernels_s < shared.kernels_s < 1.7 * alone.kernels_s
    exchange = H100.fabric.exchange_seconds(shared.exchanged, 4, 4)
    assert shared.step_s > shared.kernels_s + exchange > shared.kernels_s


@pytest.mark.slow
def test_ranks_send_the_bytes_that_the_plan_says() -> None:
    shape = ["model.depth=5", "model.directions=bi shared attn fwd@snake ssd", "model.d_head=32", "batch=2", "steps=60"]
    cases = [
        ["parallel.recompute=none"],
        ["parallel.recompute=block", "model.registers=2", "model.pool=registers"],
        ["parallel.recompute=scan", "parallel.precision=bf16", "model.pool=mean", "model.cls_token=none"],
        ["parallel.recompute=none", "model.pool=max", "model.cls_token=none", "parallel.micro_batch=1"],
    ]
    for ranks in measuring.both([[*shape, *case, "parallel.context=2"] for case in cases], 2):
        for rank in ranks:
            assert rank["measured"]["exchanged"] == rank["predicted"]["exchanged"] > 0


# ---- what the command prints


@pytest.mark.parametrize("changes", [[], ["model.directions=bi attn pair*2 fwd", "model.depth=5"]])
def test_the_coarse_estimate_is_above_the_plan(changes: list[str]) -> None:
    planner = _planner(*LONG, "parallel.context=4", *changes)
    micro, accumulation = planner.recipe.micro_batch(4)
    need = planner.most(1, "none", micro, accumulation, 4, exact=False)
    assert preflight.upper_bound(planner.recipe, planner.config, 4) > need.total


def test_a_summary_names_what_groups_share_and_send() -> None:
    said = []
    for context in (1, 2):
        planner = _planner(*SMALL, f"parallel.context={context}")
        console = Console(record=True, width=200, file=StringIO())
        console.print(plan.summary(planner, planner.outlook(4), []))
        said.append(console.export_text())
    assert "share" not in said[0]
    assert "within groups" not in said[0]
    assert "17 tokens, 0.006 GFLOPs forward; 2 ranks share it, with 9 tokens each at most" in said[1]
    assert "within groups       halos 98.3 kB, states" in said[1]
    assert "4 images x 1 micro-step on 4 ranks" in said[1]


@pytest.mark.slow
def test_plan_and_show_count_groups() -> None:
    there = ("--on", "local", "--with", "cpus=4", "--with", "memory=8", "--with", "workers=4")
    said = []
    for arguments in (("plan", *there, "--json"), ("show",)):
        done = CliRunner().invoke(app, [*arguments, "vim_digits_cpu", "parallel.context=2"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        said.append(done.output)
    found = json.loads(said[0])
    assert found["here"]["micro"] == 32
    assert found["here"]["exchanged"]["summaries"] > 0
    assert [row["world"] for row in found["counts"]] == [2, 4]
    assert "a rank's tokens of 64 images" in said[1]
    assert "on 2 ranks" in said[1]


@pytest.mark.slow
def test_a_single_image_that_fits_no_device_may_fit_several() -> None:
    tight = dataclasses.replace(H100, memory=18 * 10**8)
    changes = [*SMALL, "model.image_size=4096", "model.depth=4"]
    planner = _planner(*changes, "parallel.context=2", target=tight)
    with pytest.raises(LaunchError, match=r"would fit: parallel\.context=\d+ parallel\.recompute=block") as caught:
        planner.refuse(8)
    more = str(caught.value).split("would fit: ")[1].split()
    _planner(*changes, *more, target=tight).refuse(8)
