"""The engine in a process of its own: what DeepSpeed makes of the model's parameters."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import torch
from vimscale import distributed, recipe
from vimscale.distributed import RankSpec

chosen = recipe.load("vim_digits_cpu", ["parallel.precision=bf16", "parallel.zero=3", "parallel.persist=0"])
folder = Path(tempfile.mkdtemp())
spec = RankSpec(chosen, folder, 0, 1, "cpu", 1, f"file://{folder}/meet", "lo")
distributed.prepare(spec)
distributed.join(spec)

from vimscale.engine import Engine
from vimscale.model import mixer

seen = set()
inner = mixer.bimamba_inner

def watched(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, **settings):
    seen.update({("xz", str(xz.dtype)), ("dt_bias", str(dt_bias.dtype)), ("A", str(A.dtype)), ("D", str(D.dtype))})
    return inner(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, **settings)

mixer.bimamba_inner = watched
found = {}
for stage in range(4):
    seen.clear()
    changes = [f"parallel.zero={stage}", "parallel.precision=bf16", "parallel.persist=0", "batch=4"]
    torch.manual_seed(0)
    engine = Engine(chosen.model.shape(10), recipe.load("vim_digits_cpu", changes), torch.device("cpu"))
    engine.backward(engine.forward(torch.randn(4, 3, 32, 32)).square().mean())
    engine.step(1e-3)
    found[stage] = {
        "parameters": sorted({str(p.dtype) for p in engine.module.parameters()}),
        "updated": sorted({str(f.weight.dtype) for f in engine.fragments}),
        "moments": sorted({str(engine.moment(f, "exp_avg").dtype) for f in engine.fragments}),
        "scan": sorted(seen),
        "sharded": sum(p.numel() for p in engine.module.parameters()) == 0,
    }
print(json.dumps(found))
"""


def test_parameters_states_and_scans_are_fp32_under_bf16_at_every_stage(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    single = "torch.float32"
    for stage, what in found.items():
        assert what["parameters"] == what["updated"] == what["moments"] == [single], stage
        # the activations are what bf16 is for
        wanted = [["A", single], ["D", single], ["dt_bias", single], ["xz", "torch.bfloat16"]]
        assert what["scan"] == wanted, stage
    assert [found[stage]["sharded"] for stage in "0123"] == [False, False, False, True]
