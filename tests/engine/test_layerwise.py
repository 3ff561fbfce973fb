"""Fine-tuning: rates by layer equal another AdamW's, and frozen parameters stay as they are, at every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support import forks
from vimscale.engine import layerwise
from vimscale.errors import RecipeError
from vimscale.model import VisionMamba
from vimscale.objectives.base import Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Recipe

PLAIN = ("batch=4", "optim.clip=null", "optim.weight_decay=0.1", "optim.eps=1e-3", "objective.label_smoothing=0")
STEPS, RATE = 4, 1e-2


def _recipe(*changes: str) -> Recipe:
    return recipe.load("vim_digits_cpu", [*PLAIN, *changes])


def _learner(chosen: Recipe) -> Learner:
    config = chosen.model.shape(10)
    with torch.device("meta"):
        return Learner(build(chosen.objective, config), VisionMamba(config))


def _frozen(patterns: str) -> Learner:
    chosen = _recipe(f"optim.freeze={patterns}")
    learner = _learner(chosen)
    layerwise.freeze(learner, chosen.optim.freeze)
    return learner


# ---- which layer a parameter is in


def _expected(name: str, depth: int) -> int:
    """MAE's number of a parameter's layer, written down again."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed", "registers") else depth + 1


def test_rates_fall_from_the_head_to_the_stem() -> None:
    chosen = _recipe("optim.layer_decay=0.5", "optim.head_lr=3", "model.registers=2")
    found = layerwise.factors(_learner(chosen), chosen.optim)
    assert {name: found[name] for name in ("norm.weight", "head.weight", "head.bias")} == {
        "norm.weight": 1,
        "head.weight": 3,
        "head.bias": 3,
    }
    assert [found[f"blocks.{i}.mixer.D"] for i in range(4)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert {found[name] for name in ("patch_embed.weight", "cls_token", "registers", "pos_embed")} == {1 / 32}


def test_two_layers_can_count_as_one() -> None:
    """The exponents are those of FastVim's fine-tuning: half of MAE's, rounded up."""
    chosen = _recipe("optim.layer_decay=0.5", "optim.layer_decay_group=2")
    found = layerwise.factors(_learner(chosen), chosen.optim)
    assert [found[f"blocks.{i}.mixer.D"] for i in range(4)] == [1 / 4, 1 / 4, 1 / 2, 1 / 2]
    assert (found["norm.weight"], found["patch_embed.weight"]) == (1, 1 / 8)


def test_a_merge_counts_with_the_layer_that_follows() -> None:
    chosen = recipe.load("vim_digits_cpu", ["model.cls_token=none", "optim.layer_decay=0.5", *STAGES])
    found = layerwise.factors(_learner(chosen), chosen.optim)
    assert {factor for name, factor in found.items() if name.startswith(("merges.1.", "blocks.1."))} == {1 / 2}


STAGES = ["model.stages=[{depth: 1, d_model: 32}, {depth: 1, d_model: 64}]", "model.patch_size=4"]


# ---- what is frozen


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ("[encoder]", {"head"}),
        ("[patch_embed, cls_token, pos_embed, 'blocks.*']", {"norm", "head"}),
        ("['blocks.[01].*', head]", {"blocks.2", "blocks.3", "norm", "patch_embed", "cls_token", "pos_embed"}),
        ("[blocks.0, 'blocks.1.mixer.*']", None),
    ],
)
def test_patterns_name_parameters_and_modules(patterns: str, trained: set[str] | None) -> None:
    learner = _frozen(patterns)
    names = {name for name, _ in learner.trained()}
    assert names | {name for name, _ in learner.frozen()} == {name for name, _ in learner.every()}
    if trained is None:
        assert not [name for name in names if name.startswith(("blocks.0.", "blocks.1.mixer"))]
        assert "blocks.1.norm.weight" in names
    else:
        assert {".".join(n.split(".")[: 2 if n.startswith("blocks") else 1]) for n in names} == trained


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("[blocks.7]", r"optim\.freeze 'blocks\.7' matches no parameter"),
        ("[patch_embd]", "'patch_embd' matches no parameter; did you mean patch_embed\\?"),
        ("[encoder, head]", "optim.freeze encoder, head leaves nothing to train; freeze fewer parameters"),
        ("['*']", r"optim.freeze \* leaves nothing to train"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(patterns: str, said: str) -> None:
    chosen = _recipe(f"optim.freeze={patterns}")
    with pytest.raises(RecipeError, match=said):
        layerwise.freeze(_learner(chosen), chosen.optim.freeze)


def test_a_rate_for_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"optim\.head_lr 2: objective masked trains no head; leave it out"):
        recipe.load("digits_masked", ["optim.head_lr=2"])


def test_the_backward_pass_reaches_the_lowest_trained_layer() -> None:
    below = "[patch_embed, cls_token, pos_embed, 'blocks.[01].*']"
    for patterns, lowest in (("[encoder]", 4), (below, 2), ("[patch_embed]", 0), ("[]", 0)):
        assert layerwise.lowest(_frozen(patterns)) == lowest


# ---- engines

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

rank, world, folder, steps, rate, *changes = sys.argv[1:]
rank, world = int(rank), int(world)
base = recipe.load("vim_digits_cpu", changes)
spec = RankSpec(base, Path(folder), rank, world, "cpu", 1, f"file://{folder}/meet", "lo")
distributed.prepare(spec)
distributed.join(spec)

from vimscale.engine.deepspeed_engine import Average, Engine
from vimscale.objectives.base import Inputs

found = {}
for stage in range(4):
    chosen = recipe.load("vim_digits_cpu", [*changes, f"parallel.zero={stage}"])
    torch.manual_seed(0)
    engine = Engine(chosen.model.shape(10), chosen, torch.device("cpu"))
    engine.encoder.recompute = (chosen.parallel.recompute,) * 4
    engine.load(torch.load(f"{folder}/start", weights_only=True))
    average = Average(engine.fragments)
    for step in range(int(steps)):
        g = torch.Generator().manual_seed(step)
        images, targets = torch.randn(4, 3, 32, 32, generator=g), torch.randint(10, (4,), generator=g)
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        engine.backward(engine.loss(Inputs(images[mine], targets[mine]))[0])
        engine.step(float(rate))
        average.update(torch.tensor(0.5))
    with engine.weights(average.fragments):
        pass
    moments = {f.name for f in engine.fragments if engine.moment(f, "exp_avg") is not None}
    pieces = [
        (f.name, f.start, f.weight.clone(), average.fragments[i].clone())
        for i, f in enumerate(engine.fragments)
        if f.owned
    ]
    every = [None] * world
    dist.all_gather_object(every, (pieces, moments))
    found[stage] = {
        "weights": {}, "average": {}, "moments": sorted(set().union(*(names for _, names in every)))
    }
    for name, shape in engine.shapes.items():
        own = sorted((p for pieces, _ in every for p in pieces if p[0] == name), key=lambda p: p[1])
        for key, at in (("weights", 2), ("average", 3)):
            found[stage][key][name] = torch.cat([p[at] for p in own]).view(shape)
if rank == 0:
    torch.save(found, f"{folder}/found")
distributed.leave()
"""


def _start(chosen: Recipe) -> VisionMamba:
    torch.manual_seed(3)
    return VisionMamba(chosen.model.shape(10))


def _found(folder: Path, world: int, *changes: str) -> dict[int, dict[str, Any]]:
    folder.mkdir()
    torch.save(_start(_recipe()).state_dict(), folder / "start")
    arguments = (folder, STEPS, RATE, *PLAIN, *changes)
    ranks = forks.run_together(SCRIPT, [(rank, world, *arguments) for rank in range(world)])
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(rank.stderr for rank in ranks)
    return torch.load(folder / "found", weights_only=True)


def _independent(factor: Any, frozen: Any) -> dict[str, torch.Tensor]:
    """The same steps with torch alone: a group for each parameter."""
    model = _start(_recipe())
    groups = []
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen(name))
        decay = 0.0 if name in model.no_weight_decay() else 0.1
        groups += [] if frozen(name) else [{"params": [p], "lr": RATE * factor(name), "weight_decay": decay}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        images, targets = torch.randn(4, 3, 32, 32, generator=g), torch.randint(10, (4,), generator=g)
        adamw.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        adamw.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def _named(stage: int, name: str) -> Callable[[str], str]:
    return lambda message: f"{name} at stage {stage}: {message}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_rates_by_layer_equal_those_of_another_adamw_at_every_stage(tmp_path: Path, world: int) -> None:
    def factor(name: str) -> float:
        return 0.6 ** (-(-(5 - _expected(name, 4)) // 2)) * (2.0 if name.startswith("head.") else 1.0)

    changes = ("optim.layer_decay=0.6", "optim.layer_decay_group=2", "optim.head_lr=2")
    found = _found(tmp_path / "run", world, *changes)
    expected = _independent(factor, lambda name: False)
    for stage in range(4):
        assert found[stage]["weights"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[stage]["weights"][name],
                value,
                rtol=1e-6,
                atol=1e-6,
                msg=_named(stage, name),
            )


FROZEN = ("patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "blocks.3.mixer")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "recompute"), [(1, "block"), (2, "none")])
def test_frozen_parameters_stay_and_the_others_train_as_without_their_gradients(
    tmp_path: Path, world: int, recompute: str
) -> None:
    def frozen(name: str) -> bool:
        return name.startswith(FROZEN)

    changes = (f"optim.freeze=[{', '.join(FROZEN)}]", f"parallel.recompute={recompute}", "parallel.persist=500")
    found = _found(tmp_path / "run", world, *changes)
    expected = _independent(lambda name: 1.0, frozen)
    start = _start(_recipe()).state_dict()
    for stage in range(4):
        weights, average = found[stage]["weights"], found[stage]["average"]
        assert found[stage]["moments"] == sorted(name for name in expected if not frozen(name))
        for name, value in expected.items():
            if frozen(name):
                assert torch.equal(weights[name], start[name]), (stage, name)
                assert torch.equal(average[name], start[name]), (stage, name)
            else:
                torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-6, msg=_named(stage, name))
                assert not torch.equal(average[name], weights[name])
