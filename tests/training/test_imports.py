"""What a rank imports until its first step is done: on a machine that has just started, each module is a file to read
from a cold disk.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, tempfile
from pathlib import Path
from vimscale.launch.processes import on_local, rank
from vimscale.runtime.distributed import RankSpec
from vimscale.recipe import recipe

folder = Path(sys.argv[1])
changes = ["steps=1", "optim.warmup=0", "evaluate.every=0", *sys.argv[2:]]
chosen = recipe.load("vim_digits_cpu", changes)
ended = rank.run(RankSpec(chosen, folder, 0, 1, "cpu", 1, f"file://{folder}/meet", "lo"), print, lambda: False)
(folder / "found").write_text(json.dumps([ended.status, ended.message, sorted(sys.modules)]))
"""
UNUSED = [
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.cpp_extension", "sympy", "networkx"),
    *("deepspeed.ops.op_builder.all_ops", "setuptools", "pkg_resources", "transformers", "datasets", "pandas"),
    *("pyarrow", "matplotlib", "ray", "rich", "typer", "webdataset", "fsspec", "obstore", "aiohttp"),
    "mlflow",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("parallel.zero=1",),
        ("parallel.zero=0",),
        ("parallel.zero=2", "parallel.precision=bf16"),
    ],
    ids=["zero1", "zero0", "zero2"],
)
def test_a_rank_imports_nothing_that_its_first_step_does_not_use(tmp_path: Path, changes: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, *changes], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    status, message, modules = json.loads((tmp_path / "found").read_text())
    assert status == "done", message
    assert [name for name in UNUSED if name in modules] == []


def test_deepspeed_does_not_import_mlflow_and_a_run_still_can(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("")
    code = "import sys, vimscale.engine.deepspeed_engine; print('mlflow' in sys.modules); import mlflow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_command_line_imports_nothing_that_only_ranks_use() -> None:
    code = "import sys, vimscale.launch.commands.app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unused = ["torch", "numpy", "numba", "deepspeed", "triton", "ray", "PIL", "tensorboardX", "ssl", "http.client"]
    assert [name for name in unused if name in done.stdout.split()] == []
