"""The plan: bytes and traffic match a real engine, refusals say what would fit, and it is fast."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from benchmarks import plan as measuring
from benchmarks.measure import peak_bytes
from vimscale.engine import zero_layout
from vimscale.errors import ClusterError, LaunchError, RecipeError
from vimscale.estimate import activations, roofline
from vimscale.estimate.devices import DEVICES, key_of
from vimscale.estimate.planner import Planner, Target, lanes_and_shards
from vimscale.estimate.roofline import Fabric
from vimscale.launch import cluster as clusters
from vimscale.launch import hardware
from vimscale.launch.commands import plan
from vimscale.launch.commands.app import app
from vimscale.launch.processes import preflight
from vimscale.model import PRESETS, VisionMamba, tiles
from vimscale.model.cost import flops
from vimscale.recipe import recipe as recipes

HELD = ("parameters", "weights", "optimizer", "ema", "gradients")
SMALL = ["model.preset=vim_tiny", "model.depth=2", "model.image_size=96", "model.patch_size=16", "steps=60"]


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Any]]]:
    """Stages 0 to 3, two micro-batches per step, two ranks; stage 3 also in bf16, with small parameters gathered."""
    shape = ["batch=8", "parallel.micro_batch=2"]
    cases = [[*shape, f"parallel.zero={zero}", "parallel.persist=0"] for zero in range(4)]
    return measuring.both([*cases, [*shape, "parallel.zero=3", "parallel.precision=bf16"]], 2)


@pytest.fixture(scope="module")
def one_rank() -> list[list[dict[str, Any]]]:
    rules = [("none", 1), ("scan", 2), ("block", 3)]
    return measuring.both(
        [[*SMALL, "batch=4", f"parallel.recompute={rule}", f"parallel.zero={zero}"] for rule, zero in rules], 1
    )


@pytest.mark.parametrize("measured", ["one_rank", pytest.param("two_ranks", marks=pytest.mark.slow)])
def test_predicted_states_match_a_real_engine_to_the_byte(request: pytest.FixtureRequest, measured: str) -> None:
    for case in request.getfixturevalue(measured):
        for row in case:
            assert {key: row["predicted"][key] for key in HELD} == {key: row["measured"][key] for key in HELD}


@pytest.mark.slow
def test_predicted_communication_matches_two_ranks(two_ranks: list[list[dict[str, Any]]]) -> None:
    for case in two_ranks:
        for row in case:
            for kind in measuring.COLLECTIVES:
                assert row["predicted"][kind] == pytest.approx(row["measured"][kind], rel=0.05), kind


def test_predicted_peak_is_within_a_tenth_of_the_measured_one(one_rank: list[list[dict[str, Any]]]) -> None:
    for case in one_rank:
        for row in case:
            guess, real = (row[kind]["peak"] - row["predicted"]["buckets"] for kind in ("predicted", "measured"))
            assert guess == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("directions", ["pair*8", "(fwd bi)*4"])
def test_a_deep_model_repeats_its_kinds_of_layers(directions: str) -> None:
    """Compare a short trace, repeated, with a trace of every layer."""
    config = dataclasses.replace(PRESETS["vim_tiny"], depth=8, directions=directions, image_size=64)
    levels: Any = ("none", "none", "scan", "scan", "block", "block", "none", "none")
    short = activations.passes(config, levels, 2, "fp32", "cpu")
    whole = activations._added_up(*activations._entries(config, levels, 2, "fp32", "cpu"), None)
    assert short.kept == pytest.approx(whole.kept, rel=0.01)
    assert short.peak == pytest.approx(whole.peak, rel=0.01)
    assert short.with_gradients == pytest.approx(whole.with_gradients, rel=0.01)


def test_estimates_from_two_batch_sizes_are_near_the_exact_count() -> None:
    config = dataclasses.replace(PRESETS["vim_tiny"], depth=3, directions="bi*3")
    for batch in (2, 12, 48):
        exact = activations.passes(config, ["scan"] * 3, batch, "bf16", "triton")
        near = activations.estimate(config, ["scan"] * 3, batch, "bf16", "triton")
        assert near.peak == pytest.approx(exact.peak, rel=0.02)
        for kind, amount in exact.work.as_json().items():
            if kind != "scans":
                assert getattr(near.work, kind) == pytest.approx(amount, rel=0.02), kind
        assert near.work.scans == exact.work.scans


def test_more_ranks_hold_less_and_recomputation_keeps_less() -> None:
    recipe = recipes.load("vim_base_in1k", ["parallel.precision=bf16"])
    place = Target("h100", DEVICES["h100"], DEVICES["h100"].memory, Fabric(8, 450e9, 400e9), 2.0)
    planner = Planner(recipe, recipe.model.shape(1000), place, 0)
    options = {(option.zero, option.recompute): option.need for option in planner.options(8)}
    for rule in ("none", "scan", "block"):
        states = [options[zero, rule].held.between_steps for zero in range(4)]
        assert states[0] > states[1] == states[2] > states[3]
    assert options[1, "none"].activations > options[1, "scan"].activations > options[1, "block"].activations
    first, second = planner.outlook(8), planner.outlook(16)
    assert first.kernels_s > second.kernels_s > first.kernels_s / 2  # AdamW does not shrink
    # it launches as much for fewer images; the engine has more pieces
    assert first.host_s < second.host_s < 1.1 * first.host_s
    assert first.money == pytest.approx(2.0 * first.rank_hours)


def test_an_all_reduce_takes_as_long_as_scattering_and_gathering() -> None:
    fabric = Fabric(8, 400e9, 50e9)
    reduced, halves = zero_layout.Sent(10**9, 0, 0, 0), zero_layout.Sent(0, 10**9, 10**9, 0)
    assert fabric.seconds(reduced, 8) == fabric.seconds(halves, 8) == pytest.approx(2 * 7 / 8 / 400 / roofline.FABRIC)
    assert fabric.seconds(reduced, 16) > 8 * fabric.seconds(reduced, 8)  # between nodes it is the fabric's


def _plan(tmp_path: Path, *arguments: str, cluster: str = "gpu: h100\nfabric: 3200\nprice: 2\n") -> Any:
    file = tmp_path / "there.yaml"
    file.write_text(f"backend: slurm\nnodes: 64\ngpus: 8\nruns: /shared/runs\n{cluster}")
    return CliRunner().invoke(app, ["plan", *arguments, "--on", str(file)])


SEVEN = ["batch=4096", "phases=[]", "model.preset=vim_7b", "parallel.precision=bf16", "parallel.micro_batch=4"]


def test_seven_billion_parameters_on_512_gpus_are_planned_from_three_layers(tmp_path: Path) -> None:
    short, _, places = activations._shortened(PRESETS["vim_7b"], ("block",) * 64)
    assert (len(short.layers), len(places)) == (3, 64)
    done = _plan(
        tmp_path, "vim_base_in1k", *SEVEN, "parallel.zero=3", "parallel.recompute=block", "--json", "--gpus", "256,512"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["parameters"] == 7_045_841_896
    assert found["here"]["world"] == 512
    assert found["here"]["fits"]
    assert [row["world"] for row in found["counts"]] == [256, 512]


def test_refusals_say_what_would_fit(tmp_path: Path) -> None:
    done = _plan(tmp_path, "vim_base_in1k", *SEVEN, "parallel.zero=0")
    assert isinstance(done.exception, LaunchError)
    assert done.exception.exit_code == 2
    said = str(done.exception)
    assert "does not fit h100 on 512 ranks" in said
    assert "would fit" in said
    assert "parallel.zero=" in said


def test_bad_input_ends_in_one_message(tmp_path: Path) -> None:
    assert "8,64,512" in str(_plan(tmp_path, "vim_base_in1k", "--gpus", "many").exception)
    local = clusters.load("local", ["gpus=2"])
    with pytest.raises(ClusterError, match="needs the model of a node's 2 GPUs"):
        plan.prepare(recipes.load("vim_digits_cpu"), local, 2)


def test_a_cluster_of_cpus_is_planned_without_times() -> None:
    done = CliRunner().invoke(app, ["plan", "vim_digits_cpu", "--on", "local", "--gpus", "1,2,4"])
    assert done.exit_code == 0, done.output
    assert "152,714" in done.output
    assert "MFU" not in done.output.partition("memory per rank, GB")[0]


def test_lanes_and_shards_that_do_not_divide_are_named() -> None:
    recipe = recipes.load("vim_digits_cpu", ["data.lanes=4"])
    assert lanes_and_shards(recipe, [8], 4, remote=True) == []
    (few,) = lanes_and_shards(recipe, [8], 8, remote=True)
    assert "set data.lanes=8" in few
    (odd,) = lanes_and_shards(recipe, [7], 4, remote=False)
    assert "not a multiple" in odd


BAGS = ["model.tiles=256", "augment.crop_min=1", "model.preset=vim_tiny", "model.depth=2", "batch=1", "steps=100"]


@pytest.mark.parametrize("rule", ["none", "block"])
def test_the_peak_of_a_bag_is_that_of_a_step(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "AT_ONCE", 2)
    loaded = recipes.load("vim_digits_cpu", [*BAGS, "data.max_tiles=5"])
    config = loaded.largest(loaded.model.shape(10))
    model = VisionMamba(config)
    model.recompute = levels = [rule] * 2  # type: ignore[assignment]
    bag = tiles.blank(config)

    def step() -> None:
        model([bag]).square().mean().backward()
        model.zero_grad()

    step()
    counted = activations.passes(config, levels, 1, "fp32", "cpu")  # type: ignore[arg-type]
    assert counted.with_gradients == pytest.approx(peak_bytes(step), rel=0.1)


def test_bags_are_planned_by_their_most_tiles(tmp_path: Path) -> None:
    done = _plan(tmp_path, "vim_digits_cpu", *BAGS, "batch=512", "data.max_tiles=16", "--json", "--gpus", "512")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    loaded = recipes.load("vim_digits_cpu", [*BAGS, "data.max_tiles=16"])
    config = dataclasses.replace(loaded.model.shape(10), tiles=None, image_size=1024)
    assert config.tokens == 16 * 256 + 1
    assert found["flops"] == 3 * 512 * flops(config)
    assert found["here"]["need"]["images"] == 16 * 3 * 256 * 256 * 5
    assert found["here"]["need"]["graphs"] == 0
    images = _plan(tmp_path, "vim_digits_cpu", "model.preset=vim_tiny", "batch=512", "--json", "--gpus", "512")
    assert json.loads(images.output)["here"]["need"]["graphs"] > 0


def test_a_plan_of_bags_of_any_size_is_refused_and_a_launch_is_not(
    tmp_path: Path, four_gigabytes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _plan(tmp_path, "vim_digits_cpu", *BAGS, "batch=512")
    assert isinstance(done.exception, RecipeError)
    assert done.exception.exit_code == 2
    (fault,) = done.exception.faults
    assert fault.startswith("data.max_tiles is missing: a plan counts tokens")
    anything: Any = mock.Mock(manifest=mock.Mock(classes=["a", "b"]), samples=4)
    preflight.check_memory(recipes.load("vim_digits_cpu", BAGS), anything, 1, ray=False)
    planned: list[Planner] = []
    monkeypatch.setattr(Planner, "refuse", lambda self, *rest: planned.append(self))
    preflight.check_memory(recipes.load("vim_digits_cpu", [*BAGS, "data.max_tiles=256"]), anything, 1, ray=False)
    assert [planner.config.bag_size for planner in planned] == [256]


@pytest.fixture
def four_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "memory", lambda: hardware.Memory(8 * 10**9, 4 * 10**9, False))
    monkeypatch.setattr(preflight, "gpus", lambda: 0)


@pytest.mark.parametrize("command", [("launch",), ("launch", "--no-ray"), ("lr-range",)])
def test_a_recipe_too_large_for_this_machine_is_refused_before_anything_starts(
    tmp_path: Path, four_gigabytes: None, command: tuple[str, ...]
) -> None:
    changes = ["name=big", "batch=1000000", "steps=100", "epochs=null"]
    done = CliRunner().invoke(app, [*command, "vim_digits_cpu", *changes, "--workers", "1", "--runs", str(tmp_path)])
    assert isinstance(done.exception, LaunchError)
    said = str(done.exception)
    assert "does not fit this machine (4.0 GB available) on 1 rank: one needs" in said
    assert "would fit: parallel.micro_batch=" in said
    assert "--force" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.directions=bi attn pair*2 cross", "model.depth=5"],
        ["model.preset=vim_tiny", "model.depth=4", "batch=8"],
        ["phases=[{step: 0, image_size: 16, batch: 128}, {step: 60, image_size: 64}]"],
        ["parallel.zero=3", "parallel.persist=0", "parallel.micro_batch=2"],
        ["model.tiles=32", "augment.crop_min=1", "data.max_tiles=9", "batch=8"],
    ],
)
def test_the_coarse_estimate_is_above_the_plan(changes: list[str]) -> None:
    recipe = recipes.load("vim_digits_cpu", [*changes, "steps=100", "epochs=null"])
    config = recipe.largest(recipe.model.shape(10))
    planner = Planner(recipe, config, Target("here", None, 0, Fabric(2, 1, 1), None), 0)
    micro, accumulation = recipe.micro_batch(2)
    need = planner.most(recipe.parallel.zero, recipe.parallel.recompute, micro, accumulation, 2, exact=False)
    assert preflight.upper_bound(recipe, config, 2) > need.total


def test_available_memory_respects_the_control_group(tmp_path: Path) -> None:
    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    for folder, limit, used, dropped in ((job, "max", 500, 0), (job.parent, "9000", 4000, 1500)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 12\ninactive_file {dropped}\nactive_file 3\n")
    assert list(hardware._control_groups("0::/slurm/job_7\n", tmp_path)) == [(9000, 2500)]
    assert list(hardware._control_groups("0::/\n", tmp_path)) == []


def test_a_gpu_is_recognized_by_its_drivers_name() -> None:
    assert key_of("NVIDIA H100 80GB HBM3") == "h100"
    assert key_of("NVIDIA A10G") == "a10g"
    assert key_of("NVIDIA A100-SXM4-40GB") == "a100"
    assert key_of("AMD Instinct MI300X") == "mi300x"
    assert key_of("NVIDIA GeForce RTX 4090") is None
