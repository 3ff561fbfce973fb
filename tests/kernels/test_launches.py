"""How many device operations a layer and a step of the trainer take, as `benchmarks.launches` counts them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.device_ops import counted
from vimscale.ops import add_norm, bimamba_inner

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"forward": 9, "backward": 18}
"""The most operations of a `bi` block."""
AROUND = {0: 62, 1: 75, 2: 75}
"""The most operations of the rest of a step but for embedding, pooling, head and loss, by ZeRO stage."""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("counts") / "launches.json"
    options = [
        "--layers",
        "bi",
        "--zero",
        "0",
        "1",
        "2",
        "--accumulation",
        "1",
        "--fast",
        "--name",
        "now",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launches", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["now"]


def test_a_block_takes_no_more_operations_than_before(counts: dict[str, Any]) -> None:
    layer = counts["layers"]["bi"]["layer"]
    assert 0 < layer["forward"] <= LIMITS["forward"]
    assert 0 < layer["backward"] <= LIMITS["backward"]


def test_the_rest_of_a_step_does_not_grow_with_depth_and_waits_for_nothing(counts: dict[str, Any]) -> None:
    assert len(counts["steps"]) == 6
    model = sum(counts["layers"]["bi"]["around"].values())
    for step in counts["steps"]:
        assert 0 < step["outside_blocks"] - model <= AROUND[step["zero"]], step
        assert step["host_reads"] == 0, step


def test_views_casts_accumulations_and_reads_are_counted_as_a_device_sees_them() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    with counted() as counter:
        with counter.phase("forward"):
            y = weight.mT[:2].to(torch.bfloat16)
            new = torch.empty(3)
        with counter.phase("backward"):
            y.sum().backward()
            weight.grad.add_(1)
        with counter.phase("host"):
            new.fill_(1.0).sum().item()
        with counter.phase(None):
            new.add_(1)
    assert dict(counter.ops) == {
        ("forward", "_to_copy"): 1,
        ("backward", "sum"): 1,
        ("backward", "ones_like"): 1,
        ("backward", "_to_copy"): 1,
        ("backward", "slice_backward: zeros"): 1,
        ("backward", "slice_backward: copy_"): 1,
        ("backward", "copy_"): 1,  # the gradient gets the layout of its weight
        ("backward", "add_"): 1,
        ("host", "fill_"): 1,
        ("host", "sum"): 1,
        ("host", "_local_scalar_dense"): 1,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only without a GPU")
@pytest.mark.parametrize("run_kernels", [True, False])
def test_kernels_are_counted_through_the_op_whether_they_run_or_not(run_kernels: bool) -> None:
    x = torch.ones(2, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    with counted(run_kernels=run_kernels) as counter:
        normed, _ = add_norm(x, None, weight, backend="triton")
        normed.sum().backward()
    launches = {name: count for (_, name), count in counter.ops.items() if name.endswith("_kernel")}
    assert launches == {"add_norm_fwd_kernel": 1, "add_norm_bwd_kernel": 1}
    assert bool(normed.any()) == run_kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only without a GPU")
def test_a_long_sequence_adds_two_launches_to_each_pass() -> None:
    def operations(length: int) -> Counter[tuple[str, str]]:
        shapes = [(1, length, 64), (2, 32, 4), (2, 32), (2, 10, 32), (2, 32, 2), (2, 32), (2, 32, 4), (2, 32)]
        with counted(run_kernels=False) as counter:
            with counter.phase("forward"):
                tensors = [torch.empty(shape).requires_grad_() for shape in shapes]
                y = bimamba_inner(*tensors, recompute=False, backend="triton")
            with counter.phase("backward"):
                y.backward(torch.empty_like(y))
        return counter.ops

    assert operations(2048) - operations(1000) == {
        ("forward", "scan_segments_fwd_kernel"): 1,
        ("forward", "scan_segments_chain_kernel"): 1,
        ("backward", "scan_segments_bwd_kernel"): 1,
        ("backward", "scan_segments_chain_kernel"): 1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_convolution_is_one_operation(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 8, 8, dtype=dtype)
    weight = torch.ones(4, 3, 2, 2, dtype=dtype, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, stride=2)
    with counted() as counter:
        y.backward(torch.ones_like(y))
    assert [count for (_, name), count in counter.ops.items() if name.startswith("convolution_backward")] == [1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU's driver")
def test_a_driver_that_launches_nothing_gets_every_launch_of_a_block() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host", "--only", "ops", "--rounds", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    casts = 8  # of four weights to bf16, and of their gradients back; those of an engine need none
    assert 0 < rows["block, bi"]["operations"] <= LIMITS["forward"] + LIMITS["backward"] + casts
    assert all(min(row["forward_us"], row["both_us"]) > 0 for row in rows.values())
