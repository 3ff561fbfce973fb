"""Ranks that share images, as processes over gloo: the losses and gradients of one rank, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import forks

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

rank, world, folder, *changes = sys.argv[1:]
chosen = recipe.load("vim_digits_cpu", ["batch=4", *changes])
spec = RankSpec(chosen, Path(folder), int(rank), int(world), "cpu", 1, f"file://{folder}/meet", "lo")
distributed.prepare(spec)
distributed.join(spec)

from vimscale.engine.deepspeed_engine import Engine
from vimscale.objectives.base import Inputs

torch.manual_seed(0)
config = chosen.model.shape(10)
engine = Engine(config, chosen, torch.device("cpu"))
g = torch.Generator().manual_seed(1)
images, targets = torch.randn(4, 3, *config.size, generator=g), torch.arange(4)
draws = torch.rand(4, len(config.layers), generator=g)
mine = slice(0, 4)
if chosen.parallel.context < int(world):  # two groups of ranks
    group = int(rank) // chosen.parallel.context
    mine = slice(2 * group, 2 * group + 2)
losses, gradients = [], {}
for step in range(3):
    loss, _ = engine.loss(Inputs(images[mine], targets[mine], {}, draws[mine]))
    engine.backward(loss)
    if step == 0 and engine.stage == 0:
        gradients = {name: grad.clone() for name, grad in engine._flat.gradients()}
    engine.step(1e-2)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(float(mean) / int(world))
sent = 0 if engine.encoder.context is None else engine.encoder.context.sent
if rank == "0":
    torch.save({"losses": losses, "gradients": gradients, "norm": engine.grad_norm(), "sent": sent}, f"{folder}/found")
distributed.leave()
"""


def _found(folder: Path, world: int, *changes: str) -> dict[str, Any]:
    folder.mkdir()
    ranks = forks.run_together(SCRIPT, [(rank, world, folder, *changes) for rank in range(world)])
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr for rank in ranks)
    return torch.load(folder / "found", weights_only=True)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SHAPE = ["model.registers=3", "model.directions=bi shared bi@snake attn", "model.d_head=32"]


def _check(folder: Path, single: dict[str, Any], world: int, context: int, *changes: str) -> dict[str, Any]:
    shared = _found(folder / f"{context}of{world}", world, *SHAPE, *changes, f"parallel.context={context}")
    assert shared["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert shared["gradients"].keys() == single["gradients"].keys()
    for name, gradient in single["gradients"].items():
        assert _relative(shared["gradients"][name], gradient) < 1e-5, name
    assert shared["norm"] == pytest.approx(single["norm"], rel=1e-4)
    return shared


@pytest.mark.parametrize(
    ("world", "context"),
    [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)],
)
def test_losses_and_gradients_are_those_of_one_rank(tmp_path: Path, world: int, context: int) -> None:
    single = _found(tmp_path / "one", 1, *SHAPE, "parallel.zero=0")
    _check(tmp_path, single, world, context, "parallel.zero=0")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage(tmp_path: Path, zero: int) -> None:
    stage = [f"parallel.zero={zero}", "parallel.persist=0"]
    single = _found(tmp_path / "one", 1, *SHAPE, *stage)
    _check(tmp_path, single, 2, 2, *stage)


@pytest.mark.slow
def test_bf16(tmp_path: Path) -> None:
    single = _found(tmp_path / "one", 1, *SHAPE, "parallel.precision=bf16")
    shared = _found(tmp_path / "shared", 2, *SHAPE, "parallel.precision=bf16", "parallel.context=2")
    assert shared["losses"] == pytest.approx(single["losses"], rel=2e-2)
