"""The engine in a separate process: how DeepSpeed holds the model's parameters."""

import json
from pathlib import Path

import pytest

from tests.support import forks

SETUP = """
import json, sys, tempfile
from pathlib import Path
import torch
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

chosen = recipe.load("vim_digits_cpu", ["parallel.precision=bf16", "parallel.zero=3", "parallel.persist=0"])
folder = Path(tempfile.mkdtemp())
spec = RankSpec(chosen, folder, 0, 1, "cpu", 1, f"file://{folder}/meet", "lo")
distributed.prepare(spec)
distributed.join(spec)

from deepspeed.accelerator import get_accelerator
from vimscale.engine.deepspeed_engine import Engine
from vimscale.errors import RunFailed
from vimscale.objectives.base import Inputs

cpu = torch.device("cpu")
"""

SCRIPT = """
from vimscale.model import mixer

seen = set()
inner = mixer.bimamba_inner

def watched(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, **settings):
    seen.update({("xz", str(xz.dtype)), ("dt_bias", str(dt_bias.dtype)), ("A", str(A.dtype)), ("D", str(D.dtype))})
    return inner(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, **settings)

mixer.bimamba_inner = watched

found = {}
for fp16 in (True, False):  # what the CPU can do must not show
    get_accelerator().is_fp16_supported = lambda: fp16
    for stage in range(4):
        for precision, persist in (("bf16", 0), ("fp32", 100_000)):
            seen.clear()
            changes = [f"parallel.zero={stage}", f"parallel.precision={precision}", f"parallel.persist={persist}"]
            torch.manual_seed(0)
            engine = Engine(chosen.model.shape(10), recipe.load("vim_digits_cpu", [*changes, "batch=4"]), cpu)
            engine.backward(engine.loss(Inputs(torch.randn(4, 3, 32, 32), torch.arange(4)))[0])
            engine.step(1e-3)
            parameters = list(engine.model.parameters())
            shards = [p.ds_tensor for p in parameters] if stage == 3 else []
            found[f"fp16={fp16} zero={stage} {precision}"] = {
                "parameters": sorted({str(p.dtype) for p in parameters + shards}),
                "updated": sorted({str(f.weight.dtype) for f in engine.fragments}),
                "moments": sorted({str(engine.moment(f, "exp_avg").dtype) for f in engine.fragments}),
                "scan": sorted(seen),
                "sharded": sum(p.numel() for p in parameters) == 0,
                "weights": [float(f.weight.double().sum()) for f in engine.fragments],
            }
print(json.dumps(found))
"""


def _run(script: str, folder: Path) -> "forks.Done[str]":
    return forks.run(f"{SETUP}{script}\ndistributed.leave()\n", cwd=folder)


def test_parameters_states_and_scans_are_fp32_at_every_stage_whether_the_cpu_has_fp16_or_not(tmp_path: Path) -> None:
    done = _run(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 16
    single = "torch.float32"
    for case, what in found.items():
        assert what["parameters"] == what["updated"] == what["moments"] == [single], case
        # the activations are what bf16 is for
        activations = "torch.bfloat16" if case.endswith("bf16") else single
        assert what["scan"] == [["A", single], ["D", single], ["dt_bias", single], ["xz", activations]], case
        assert what["sharded"] == case.endswith("zero=3 bf16"), case  # small parameters persist otherwise
        other = case.replace("fp16=False", "fp16=True")
        assert what["weights"] == found[other]["weights"], case


def test_segments_change_no_bit(tmp_path: Path) -> None:
    script = """
from vimscale.engine import flat

found = []
for segment in (flat.SEGMENT, 20_000):
    flat.SEGMENT = segment
    for stage in range(3):
        torch.manual_seed(0)
        changes = [f"parallel.zero={stage}", "batch=8", "parallel.micro_batch=4", "optim.clip=0.5"]
        engine = Engine(chosen.model.shape(10), recipe.load("vim_digits_cpu", changes), cpu)
        pieces = len(list(engine._engine.module.parameters()))
        for step in range(3):
            for part in range(2):
                images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2 * step + part))
                engine.backward(engine.loss(Inputs(images, torch.arange(4)))[0])
                engine.step(1e-3)
        weights = {name: p.detach().double().sum().item() for name, p in engine.model.trained()}
        found.append((segment, stage, pieces, engine.grad_norm(), weights))
print(json.dumps(found))
"""
    done = _run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole, cut = found[:3], found[3:]
    for (_, stage, few, norm, weights), (_, _, many, *others) in zip(whole, cut, strict=True):
        assert [norm, weights] == others, stage
        assert many > few + 3


def test_an_engine_with_a_parameter_that_is_not_fp32_is_refused(tmp_path: Path) -> None:
    """The argument `dtype` makes DeepSpeed fall back to bf16 on a CPU without fp16."""
    script = """
import deepspeed, functools

get_accelerator().is_fp16_supported = lambda: False
deepspeed.zero.Init = functools.partial(deepspeed.zero.Init, dtype=torch.float32)
try:
    Engine(chosen.model.shape(10), chosen, cpu)
except RunFailed as error:
    print(error)
"""
    done = _run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "holds cls_token in bfloat16 at ZeRO stage 3" in done.stdout


@pytest.mark.slow
def test_bags_give_the_same_gradients_at_every_stage(tmp_path: Path) -> None:
    """At stage 3 parameters are sharded between passes, also while the embedding of a large bag is recomputed."""
    script = """
from vimscale.model import tiles

tiles.AT_ONCE = 2
found = {}
for stage in range(4):
    torch.manual_seed(0)
    changes = [f"parallel.zero={stage}", "parallel.persist=0", "batch=2", "model.tiles=32", "augment.crop_min=1"]
    of_bags = recipe.load("vim_digits_cpu", changes)
    engine = Engine(of_bags.model.shape(10), of_bags, cpu)
    draw = torch.Generator().manual_seed(1)
    for count in ((3, 5), (4,)):
        bags = [
            tiles.Bag(torch.randn(n, 3, 32, 32, generator=draw), torch.randint(4000, (n, 2), generator=draw).int())
            for n in count
        ]
        loss, _ = engine.loss(Inputs(bags, torch.arange(len(bags))))
        engine.backward(loss)
        engine.step(1e-3)
    found[stage] = [engine.grad_norm(), loss.item()]
print(json.dumps(found))
"""
    done = _run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for stage in "123":
        assert found[stage] == pytest.approx(found["0"], rel=1e-5)  # fp32 sums in another order
