"""The GPU benchmark's pieces on a CPU: what it measures, keeps, draws and refuses."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import published
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import ops, original, picture, steps, times, trainer
from benchmarks.gpu.fit import RESULTS
from benchmarks.vit import ViT
from vimscale.model import PRESETS, VisionMamba
from vimscale.model.published.weights import published_config, to_published

RECORD = RESULTS / "gpu_h100.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_device_it_says_so_in_one_line_and_exits_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA or ROCm device" in done.stderr


def test_parts_run_in_the_order_of_their_worth() -> None:
    assert list(command.PARTS) == list(command.LIMITS)
    assert next(iter(command.LIMITS)) == "trainer"


def test_a_part_that_fails_or_hangs_keeps_its_finished_rows(tmp_path: Path) -> None:
    code = 'import sys, time; f = open(sys.argv[1], \'a\'); f.write(\'{"a": 1}\\n{"a": 2}\\n{"a"\'); f.close(); '
    for number, (end, fault) in enumerate(
        {"sys.exit(3)": "exited with 3", "time.sleep(600)": "took more than 4 s"}.items()
    ):
        rows = tmp_path / f"rows{number}"
        found, said = command.collected([sys.executable, "-c", code + end, str(rows)], rows, 4)
        assert (found, said) == ([{"a": 1}, {"a": 2}], fault)


def test_a_late_part_ends_with_what_it_started(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True);"
    code += "open(sys.argv[1], 'a').write(f'{p.pid}\\n'); p.wait()"
    (child,), fault = command.collected([sys.executable, "-c", code, str(rows)], rows, 3)
    assert fault
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the part's child still runs")


def test_rows_of_an_earlier_run_are_kept_for_the_same_commit_only(tmp_path: Path) -> None:
    about = {"device": "h100", "commit": "abc", "torch": "2.11", "date": "2026-11-27"}
    file = tmp_path / "run.json"
    assert command.earlier(file, about) == {}
    file.write_text(json.dumps(about | {"date": "2026-11-26", "parts": {"scans": [{"b": 1}]}}))
    assert command.earlier(file, about) == {"scans": [{"b": 1}]}
    assert command.earlier(file, about | {"commit": "def"}) == {}


def test_times_without_a_gpu_are_those_of_the_clock() -> None:
    calls = []
    found = times.of(lambda: calls.append(1), 5)
    assert len(calls) == 5 + times.WARM
    assert found.kernels_ms == found.wall_ms > 0
    assert (found.host_ms, found.launches, found.by_kernel) == (None, None, ())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models under the names of the table."""
    digits = dataclasses.replace(PRESETS["vim_digits"], num_classes=1000)
    dual = dataclasses.replace(digits, depth=2, directions="ssd*2", d_head=32, ssd_state=16)
    monkeypatch.setattr(steps, "PRESETS", {"vim_tiny": digits, "ssd_small": dual})
    monkeypatch.setattr(steps, "ViT", lambda size, d, heads: ViT(size, d=32, heads=2, depth=1))


@pytest.mark.parametrize(
    "case",
    [steps.Case("Vim-Ti", 32, 2, recompute="scan"), steps.Case("SSD-S", 32, 2), steps.Case("ViT-S", 32, 2)],
    ids=lambda case: case.model,
)
def test_a_step_is_measured_and_described(case: steps.Case, small: None) -> None:
    (row,) = steps.rows((case,), "cpu", 1)
    assert {key: row[key] for key in dataclasses.asdict(case)} == dataclasses.asdict(case)
    assert row["images_per_s"] == pytest.approx(2 / row["wall_ms"] * 1e3)
    assert row["kinds_ms"] == {}


def test_a_step_changes_every_weight_and_leaves_no_gradient(small: None) -> None:
    torch.manual_seed(0)
    model = steps.model_of(steps.Case("ViT-S", 32, 2))
    before = [p.clone() for p in model.parameters()]
    steps.step_of(model, list(model.parameters()), (torch.randn(2, 3, 32, 32), torch.tensor([1, 2])))()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_kernels_are_sorted_into_kinds_by_their_names() -> None:
    names = {
        "selective_scan_fwd_kernel": "scan forward",
        "selective_scan_bwd_kernel": "scan backward",
        "selective_scan_unpack_kernel": "scan backward",
        "ssd_mix_kernel": "scan forward",
        "ssd_pairs_kernel": "scan backward",
        "scan_gate_bwd_kernel": "gate",
        "causal_conv1d_fwd_kernel": "convolution",
        "add_norm_bwd_kernel": "norm",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products",
        "nvjet_tst_128x256_64x4": "products",
        "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": "attention",
        "void at::native::vectorized_elementwise_kernel<4>": "other",
    }
    for name, kind in names.items():
        assert steps.kinds(((name, 2.0, 1.0),)) == {kind: 2.0}, name
    assert steps.kinds((("scan_gate_fwd_kernel", 1.0, 1.0), ("scan_gate_bwd_kernel", 2.0, 1.0))) == {"gate": 3.0}


def test_the_original_on_other_kernels_is_the_published_model() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["vim_tiny"], depth=2, directions="bi*2", image_size=64)
    model = VisionMamba(config).eval()
    images = torch.randn(2, 3, 64, 64)
    found = original.OnCuda(model, original.in_torch())(images)
    said = published.forward(to_published(model), published_config(model), images)
    assert torch.allclose(found, said, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found, model(images), rtol=1e-3, atol=1e-4)
    found.sum().backward()


def test_ops_are_timed_one_row_per_implementation() -> None:
    scans = list(ops.scans("cpu", 1, [(1, 9, 64, 4)]))
    assert [(row["name"], row["directions"]) for row in scans] == [("vimscale", 1), ("vimscale, both directions", 2)]
    layers = list(ops.layers("cpu", 1, (1, 9, 64), (1, 9, 64)))
    assert [(row["op"], row["name"]) for row in layers] == [
        ("convolution", "vimscale, both directions"),
        ("add_norm", "vimscale"),
        ("add_norm", "torch"),
    ]
    assert all(row["both_ms"] > 0 and row["forward_ms"] > 0 for row in scans + layers)
    (ceiling,) = ops.ceilings("cpu", 1, elements=1024, side=32)
    assert ceiling["copy_bytes_per_s"] > 0
    assert ceiling["bf16_flops_per_s"] > 0


def test_the_dual_part_runs_from_its_command_to_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """All but the kernels: on a CPU, with small shapes."""
    on_cpu = functools.partial(ops.dual_scans, "cpu", shapes=[(1, 9, 2, 4, 4)])
    monkeypatch.setattr(ops, "dual_scans", lambda device, calls: on_cpu(calls))
    monkeypatch.setattr(ops, "_mamba_dual", lambda: None)
    cases = steps.Case("SSD-S", 32, 2), steps.Case("ViT-S", 32, 2)
    monkeypatch.setattr(steps, "DUAL", cases)
    monkeypatch.setattr(steps, "rows", lambda cases, device, calls, rows=steps.rows: rows(cases, "cpu", calls))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--parts", "dual", "--calls", "1"])
    options = command._options()
    assert (options.parts, options.calls) == (["dual"], 1)
    assert command.main() == 2
    command.append(command.PARTS["dual"](options.calls), tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    scans = [(row["name"], row["directions"]) for row in rows[:3]]
    assert scans == [("vimscale", 1), ("vimscale, both directions", 2), ("vimscale, both share x, B, C", 2)]
    assert all(row["both_ms"] > 0 and row["forward_ms"] > 0 for row in rows[:3])
    assert [row["model"] for row in rows[3:]] == ["SSD-S", "ViT-S"]


@pytest.mark.parametrize("case", steps.DUAL, ids=lambda case: case.title)
def test_scans_of_the_dual_part_have_the_sizes_of_its_models(case: steps.Case) -> None:
    if case.model != "SSD-S":
        assert dataclasses.replace(case, model="SSD-S") in steps.DUAL
        return
    config = dataclasses.replace(PRESETS["ssd_small"], image_size=case.image_size)
    heads = config.expand * config.d_model // config.d_head
    tokens = (case.image_size // config.patch_size) ** 2 + 1
    assert (case.batch, tokens, heads, config.d_head, config.ssd_state) in ops.DUAL_SCANS


def test_the_trainers_row_leaves_the_first_ranges_out() -> None:
    metrics: list[dict[str, Any]] = []
    for step, speed in ((1, 5.0), (10, 300.0), (20, 600.0), (30, 620.0), (40, 640.0)):
        metrics.append(
            {"kind": "train", "step": step, "loss": 7.0 - step / 10, "images_per_s": speed, "data_wait": 0.02}
        )
        metrics.append({"kind": "train", "step": step + 1, "loss": 6.0})
    row = trainer.summary(trainer.RECIPE, metrics, "first step after 20.5 s: imports 8.0, data 12.5\nstep 1/100\n")
    assert (row["model"], row["images_per_s"], row["first_step_s"]) == ("Vim-S", 620.0, 20.5)
    assert row["step_ms"] == pytest.approx(128 / 620 * 1e3)
    assert row["parameter_tensors"] == 247
    with pytest.raises(RuntimeError, match="give it more steps"):
        trainer.summary(trainer.RECIPE, metrics[:4], "")


@pytest.mark.slow
def test_the_trainer_runs_on_photos_in_tars() -> None:
    small = {
        "steps": 12,
        "batch": 4,
        "model": {"preset": "vim_tiny", "depth": 2, "image_size": 32, "patch_size": 8},
        "data": {"workers": 1},
        "optim": {"lr": 1e-3, "warmup": 2, "clip": 1.0, "ema": 0.99},
        "parallel": {"precision": "fp32"},
        "log": {"every": 2},
    }
    (row,) = trainer.trained(trainer.RECIPE | small | {"parallel": {"zero": 1, "precision": "fp32"}}, photos=64)
    assert row["images_per_s"] > 0
    assert row["step_ms"] == pytest.approx(4 / row["images_per_s"] * 1e3)
    assert row["first_step_s"] > 0


def test_a_failed_launch_shows_the_end_of_its_output() -> None:
    with pytest.raises(RuntimeError, match=r"exited with 2: .*\n.*steps: -1"):
        list(trainer.trained(trainer.RECIPE | {"steps": -1}, photos=10))


def test_the_recorded_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = json.loads(RECORD.read_text())
    picture.draw(record, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 50_000
    picture.draw(record | {"parts": {"steps": record["parts"]["steps"][:1]}}, tmp_path / "part.png")
    assert (tmp_path / "part.png").exists()
