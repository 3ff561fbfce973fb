"""Plans of objectives that do not make one pass over images: their work, memory, parameters and buffers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.measure import peak_bytes
from vimscale.estimate import activations
from vimscale.estimate.planner import Planner, Target
from vimscale.estimate.roofline import Fabric
from vimscale.launch.commands.app import app
from vimscale.model import VisionMamba
from vimscale.model.cost import flops, parameters
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

PASSES = Path(__file__).parents[1] / "objectives/passes.py"
TINY = ["model.d_model=32", "model.depth=8", "model.image_size=64", "batch=32", "model.drop_path=0", "steps=100"]
FLAT = "model.depth=2"


def _recipe(name: str, *changes: str) -> Recipe:
    kind = [] if name == "classification" else [f"objective.kind={PASSES}:{name}"]
    return recipes.load("vim_digits_cpu", [*kind, *TINY, "epochs=null", *changes])


def _planner(name: str, *changes: str) -> Planner:
    chosen = _recipe(name, *changes)
    return Planner(chosen, chosen.shape(10), Target("here", None, 10**12, Fabric(2, 1, 1), None), 0)


@pytest.mark.slow
def test_work_follows_the_tokens_and_passes_of_an_objective() -> None:
    assert _planner("classification").relative_work() == 1
    assert _planner("classification").flops == 3 * 32 * flops(_recipe("classification").shape(10))
    share = {name: _planner(name).relative_work() for name in ("Some", "Tapped", "Taught", "Ahead")}
    assert share["Some"] == pytest.approx(0.28, abs=0.03)  # 16 of 64 patches, and the class token
    assert share["Tapped"] == pytest.approx(1, abs=0.02)
    assert share["Taught"] == pytest.approx(3 + 1 / 3, rel=0.1)  # three passes, and a forward pass
    assert share["Ahead"] == pytest.approx(1 + 1 / 3, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Some", "Tapped", "Taught", "Ahead"])
def test_the_peak_of_an_objective_is_that_of_a_step(name: str) -> None:
    chosen = _recipe(name)
    config = chosen.shape(10)
    torch.manual_seed(0)
    objective = build(chosen.objective, config)
    learner = Learner(objective, VisionMamba(config))
    views = {"crops": torch.randn(4, 2, 3, 64, 64)} if name == "Taught" else {}
    inputs = Inputs(torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64), views)

    def step() -> None:
        asked = inputs
        if objective.looks_ahead:
            with torch.no_grad():
                (shared,) = objective.meet(learner, [learner.ask("ahead", inputs)])
            asked = Inputs(inputs.images, inputs.targets, shared=shared)
        learner.ask("loss", asked)[0].backward()
        learner.zero_grad()

    step()
    levels: Any = ["none"] * len(config.layers)
    counted = activations.passes(config, levels, 4, "fp32", "cpu", chosen.objective)
    assert counted.with_gradients == pytest.approx(peak_bytes(step), rel=0.1)
    assert counted.kept <= counted.peak <= counted.with_gradients


@pytest.mark.slow
def test_estimates_of_an_objective_are_linear_in_images() -> None:
    chosen = _recipe("Taught")
    config = chosen.shape(10)
    levels: Any = ["none"] * len(config.layers)
    exact = activations.passes(config, levels, 24, "fp32", "cpu", chosen.objective)
    near = activations.estimate(config, levels, 24, "fp32", "cpu", chosen.objective)
    assert near.peak == pytest.approx(exact.peak, rel=0.02)
    assert near.work.operations == pytest.approx(exact.work.operations, rel=1e-6)


def test_parameters_buffers_and_views_are_counted() -> None:
    plain, taught = _planner("Some", FLAT), _planner("Taught", FLAT)
    config = _recipe("Taught", FLAT).shape(10)
    assert config.num_classes == 0
    assert taught.buffers == 4 * parameters(config)
    assert plain.buffers == 0
    assert taught.whole == plain.whole + 4096 * (config.features + 1)
    assert taught.checkpoint - plain.checkpoint == 16 * 4096 * (config.features + 1) + taught.buffers
    pixels = 3 * 64 * 64
    assert taught._images(config, 4, 2) == 4 * 3 * pixels * 5
    need = taught.most(1, "none", 4, 8, 1, exact=True)
    assert need.total >= need.held.between_steps + need.activations + taught.buffers


def test_an_objective_that_looks_ahead_holds_the_images_of_a_step() -> None:
    planner = _planner("Ahead", FLAT, "parallel.micro_batch=4")
    config = _recipe("Ahead", FLAT).shape(10)
    assert planner._images(config, 4, 8) == 4 * 3 * 64 * 64 * (8 * 4 + 1)
    levels: Any = ["none"] * len(config.layers)
    few, many = (
        activations.passes(config, levels, 4, "fp32", "cpu", _recipe("Ahead").objective, whole=whole)
        for whole in (4, 4096)
    )
    assert many.kept >= few.kept + 4092 * config.features * 4


@pytest.mark.parametrize("name", ["Some", "Taught"])
def test_the_command_line_says_what_an_objective_costs(name: str) -> None:
    done = CliRunner().invoke(
        app, ["show", "vim_digits_cpu", f"objective.kind={PASSES}:{name}", *TINY, FLAT, "epochs=null"]
    )
    assert done.exit_code == 0, done.output
    assert "times the work of classification" in " ".join(done.output.split())
    assert ("buffers per rank" in done.output) == (name == "Taught")
