"""What is compiled before the first step is what the first step launches, in a separate process: this one interprets
kernels. The compiler's target is a GPU that is not there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import json, os, sys, tempfile, time
from concurrent.futures import Future
from pathlib import Path
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from vimscale.kernels import backend, precompile
from vimscale.recipe import recipe
from vimscale.runtime import distributed
from vimscale.runtime.distributed import RankSpec

driver.set_active(mock.Mock(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda _: 0,
))
backend._obstacle = lambda name, x: None  # Triton on a CPU: the launches are recorded
os.environ["VIMSCALE_BACKEND"] = "triton"
changes = sys.argv[1:]
chosen = recipe.load("vim_digits_cpu", ["batch=4", *changes])
folder = Path(tempfile.mkdtemp())
spec = RankSpec(chosen, folder, 0, 1, "cpu", 1, f"file://{folder}/meet", "lo")
distributed.prepare(spec)
distributed.join(spec)

from vimscale.data.images import augment
from vimscale.engine.compile_ahead import _images, rehearse
from vimscale.engine.deepspeed_engine import Engine
from vimscale.engine import recompute
from vimscale.objectives.base import Inputs
from vimscale.ops import Alone

cpu = torch.device("cpu")
config = chosen.largest(chosen.model.shape(10))


def forget():
    import gc
    from triton.runtime.jit import JITFunction
    for kernel in gc.get_objects():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


def first_step():
    torch.manual_seed(0)
    alone = chosen.model_copy(update={"parallel": chosen.parallel.model_copy(update={"context": 1})})
    engine = Engine(config, alone, cpu)
    if chosen.parallel.context > 1:  # there is one rank
        engine.encoder.context = Alone(0, chosen.parallel.context)
    engine.encoder.recompute = recompute.levels(chosen.parallel, config, 4, "cpu")
    draws = distributed.draws(0, 0, 4, len(config.layers)) if config.drop_path > 0 else None
    backward = distributed.backward_parts(config, chosen.seed, 0)
    images = _images(config, chosen, 4, cpu)
    loss, _ = engine.loss(Inputs(images, torch.arange(4), draws=draws, backward=backward))
    engine.backward(loss)
"""

COMPARE = """
def recorded(action):
    forget()
    precompiler = precompile.Precompiler(1)
    precompiler._share.submit = lambda task: Future()  # compile nothing
    with precompiler.recording():
        action()
    return set(precompiler._mode.future_kernels)

state = torch.random.get_rng_state()
ahead = recorded(lambda: rehearse(config, chosen, chosen.parallel.context, cpu))
untouched = torch.equal(state, torch.random.get_rng_state())
launched = recorded(first_step)
print(json.dumps({
    "untouched": untouched, "ahead": len(ahead), "launched": len(launched),
    "missed": len(launched - ahead), "wasted": len(ahead - launched),
}))
"""

COMPILE = """
precompiler = precompile.Precompiler(2)
with precompiler.recording():
    rehearse(config, chosen, chosen.parallel.context, cpu)
precompiler.compile_own()
count = precompiler.finish()
again = precompile.Precompiler(2)
again._share.submit = lambda task: 1 / 0  # nothing is left to compile
with again.recording():
    first_step()
machine_code = [type(k.result().asm["cubin"]).__name__ for k in precompiler._mode.future_kernels.values()]
print(json.dumps({"count": count, "left": again.finish(), "code": sorted(set(machine_code))}))
"""


def _run(code: str, folder: Path, *changes: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    done = subprocess.run(
        [sys.executable, "-c", f"{SETUP}{code}\ndistributed.leave()\n", *changes],
        capture_output=True, text=True, cwd=folder, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHARED = "model.directions=bi*2 fwd*2 shared attn bwd*2 bi@snake"
MIXED = "model.directions=bi*2 fwd*2 shared cross pair*2 attn bi@column"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(("parallel.precision=bf16",), marks=pytest.mark.slow),
        pytest.param(("parallel.precision=bf16", MIXED, "model.d_head=32"), marks=pytest.mark.slow),
        pytest.param(("parallel.recompute=block/2", "augment.buckets=3", "parallel.zero=3"), marks=pytest.mark.slow),
        pytest.param(("model.backward_drop=0.3", "model.drop_path=0.1", "parallel.zero=0"), marks=pytest.mark.slow),
        pytest.param(("model.tiles=32", "augment.crop_min=1", "data.max_tiles=3"), marks=pytest.mark.slow),
        pytest.param(("parallel.precision=bf16", "model.patch_size=1"), marks=pytest.mark.slow),
        pytest.param(("parallel.context=2", SHARED, "model.d_head=32"), marks=pytest.mark.slow),
    ],
    ids=["bf16", "mixed", "packed", "dropped", "tiles", "long", "shared"],
)
def test_the_rehearsal_launches_what_the_first_step_launches(tmp_path: Path, changes: tuple[str, ...]) -> None:
    found = _run(COMPARE, tmp_path, *changes)
    assert found["ahead"] == found["launched"] > 5
    assert (found["missed"], found["wasted"]) == (0, 0)
    assert found["untouched"], "the rehearsal drew random numbers"


@pytest.mark.slow
def test_nothing_is_left_to_compile_after_the_rehearsal(tmp_path: Path) -> None:
    found = _run(COMPILE, tmp_path, "parallel.precision=bf16")
    assert found["count"] > 5
    assert found["left"] == 0
    assert found["code"] == ["bytes"]
