"""The times of a plan: what was measured is repeated, what was not is called so, and what limits a step is named."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from benchmarks.gpu import fit
from benchmarks.gpu import steps as measuring
from vimscale import ops
from vimscale.estimate import activations, calibration, roofline, work
from vimscale.estimate.devices import DEVICES
from vimscale.estimate.planner import Planner, Target
from vimscale.estimate.roofline import Fabric, Step
from vimscale.estimate.work import Scan, Work
from vimscale.kernels.torch_op import registered
from vimscale.launch.commands import plan
from vimscale.model import PRESETS
from vimscale.recipe import recipe as recipes

H100 = DEVICES["h100"]
RECORD = Path(fit.RESULTS / "gpu_h100.json")
WITHIN = 0.15


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def test_the_table_is_what_the_recorded_run_says(record: dict[str, Any]) -> None:
    fitted, stored = fit.fit(record), calibration.RATES["h100"]
    assert fitted.run == stored.run

    def numbers(rates: calibration.Rates) -> list[float]:
        plain = [value for value in vars(rates).values() if isinstance(value, float)]
        return [*plain, *vars(rates.forward).values(), *vars(rates.backward).values()]

    assert numbers(stored) == pytest.approx(numbers(fitted), rel=0.01)


def test_every_measured_step_is_predicted_within_fifteen_percent(record: dict[str, Any]) -> None:
    rows = fit.residuals(record, calibration.RATES["h100"])
    steps = [row for row in rows if row[1] in ("wall", "kernels", "graph")]
    measured = [step.row for step in fit.steps_of(record)]
    assert len(measured) == len(record["parts"]["steps"]) == 13
    walls = sum(row["model"] != "ViT-S" for row in measured)
    graphs = sum("graph_ms" in row for row in measured)
    assert len(steps) == len(measured) + walls + graphs + len(record["parts"]["trainer"])
    assert {(name, what): said / ms for name, what, ms, said in steps if abs(said / ms - 1) > WITHIN} == {}


def test_there_are_fewer_rates_than_measurements(record: dict[str, Any]) -> None:
    rates = calibration.RATES["h100"]
    # without `run` and the shapes of programs, which the kernels' code decides
    free = len(dataclasses.fields(rates)) - 3 + 2 * 2
    assert free < len([row for row in fit.residuals(record, rates) if row[1] in ("wall", "kernels", "graph")])


@pytest.mark.parametrize("part", ["steps", "work", "ceilings", "scans", "layers", "trainer"])
def test_a_run_that_lacks_a_part_is_refused_by_name(record: dict[str, Any], part: str) -> None:
    less = record | {"parts": {name: rows for name, rows in record["parts"].items() if name != part}}
    with pytest.raises(ValueError, match=r"the run"):
        fit.fit(less)


def test_the_fit_finds_the_rates_that_made_the_times(record: dict[str, Any]) -> None:
    true = dataclasses.replace(
        calibration.RATES["h100"], product_bytes=0.7, unaligned_bytes=0.2, attention=0.3, launch_s=120e-6
    )
    made = json.loads(json.dumps(record))
    for step in fit.steps_of(made):
        by_kind = roofline.kernels(H100, true, step.work)
        step.row["kernels_ms"] = 1e3 * sum(by_kind.values())
        host = roofline.host(true, step.work, step.checkpoints)
        step.row["wall_ms"] = 1e3 * max(host, sum(by_kind.values()))
        if "kinds_ms" in step.row:
            step.row["kinds_ms"] = {kind: 1e3 * seconds for kind, seconds in by_kind.items()}
    found = fit.fit(made)
    for name in ("product_bytes", "unaligned_bytes", "attention", "launch_s", "gate_bytes", "other_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02), name
    assert found.backward.shared == pytest.approx(true.backward.shared, rel=0.02)


def test_a_device_that_nobody_measured_says_so() -> None:
    assert "not calibrated" not in calibration.basis(H100)
    assert "ba86e9f" in calibration.basis(H100)
    for name, device in DEVICES.items():
        if name not in calibration.RATES:
            assert calibration.basis(device).startswith(f"predicted, not calibrated: nobody measured {name}")


@pytest.mark.parametrize(("gpu", "said"), [("h100", "calibrated: one H100"), ("a100", "predicted, not calibrated")])
def test_a_plan_prints_what_its_times_come_from(gpu: str, said: str) -> None:
    recipe = recipes.load("vim_tiny_in1k", ["parallel.precision=bf16", "batch=64", "phases=[]", "model.depth=2"])
    target = Target(gpu, DEVICES[gpu], DEVICES[gpu].memory, Fabric(1, 1, 1), None)
    planner = Planner(recipe, recipe.model.shape(10), target, 0)
    table = plan.summary(planner, planner.outlook(1), [])
    names, values = (list(column.cells) for column in table.columns)
    cells = dict(zip(names, values, strict=True))
    assert str(cells["these times"]).startswith(said)
    assert "s without graphs" in str(cells["time per step"])


def test_a_step_is_limited_by_its_kernels_or_by_its_host() -> None:
    waiting = Step(kernels=0.06, host=0.2, engine=0.1, communication=0.01)
    assert waiting.seconds(1, graphs=False) == pytest.approx(0.21)
    assert waiting.seconds(1, graphs=True) == pytest.approx(0.11)
    assert waiting.seconds(3, graphs=False) == pytest.approx(0.2)
    busy = dataclasses.replace(waiting, kernels=0.3)
    assert busy.seconds(1, graphs=False) == busy.seconds(1, graphs=True) == pytest.approx(0.31)


def test_a_scan_with_few_programs_takes_as_long_as_its_tokens() -> None:
    rate = calibration.ScanRate(channels=64, resident=5, alone=400, shared=100)
    few = Scan(False, 1, 1, 1000, 768, 16)
    assert roofline.scan_units(H100, rate, few) == 1000 * 400
    assert roofline.scan_units(H100, rate, dataclasses.replace(few, images=11)) == 1000 * 400
    full = dataclasses.replace(few, images=5 * 132 / 12)
    assert roofline.scan_units(H100, rate, full) == 1000 * 500
    more = dataclasses.replace(few, images=5 * 132 / 12 + 1)
    assert roofline.scan_units(H100, rate, more) == 1000 * (500 + 400)


def test_a_plan_counts_the_work_of_a_bare_step() -> None:
    """The model of a plan has a loss and drop-path that the bare step lacks; its big pieces are equal."""
    case = measuring.Case("Vim-Ti", 64, 4)
    config = dataclasses.replace(PRESETS["vim_tiny"], image_size=64)
    bare = measuring.work_of(case)
    planned = activations.passes(config, ["none"] * len(config.layers), 4, "bf16", "triton").work
    assert sorted(bare.scans, key=str) == sorted(planned.scans, key=str)
    for kind in ("product_flops", "unaligned_bytes", "convolution_bytes", "gate_bytes", "norm_bytes"):
        assert getattr(planned, kind) == pytest.approx(getattr(bare, kind), rel=0.01), kind
    assert planned.launches == pytest.approx(bare.launches, rel=0.05)


def _counted(call: Any) -> Work:
    with measuring.Counting() as counting:
        call()
    return work.total(counting.parts)


def test_products_of_odd_widths_are_counted_apart() -> None:
    for width, aligned in ((56, True), (44, False)):
        x, w = torch.empty(2, 10, 64, dtype=torch.bfloat16), torch.empty(2, 64, width, dtype=torch.bfloat16)
        found = _counted(lambda x=x, w=w: torch.bmm(x, w))
        assert found.product_flops == 2 * 2 * 10 * 64 * width
        assert (found.product_bytes > 0, found.unaligned_bytes > 0) == (aligned, not aligned)
    wide = _counted(lambda: torch.empty(10, 44) @ torch.empty(44, 10))
    assert (wide.fp32_flops, wide.product_flops) == (2 * 10 * 44 * 10, 0)


def test_attention_is_counted_forward_and_backward() -> None:
    q = torch.randn(2, 3, 32, 16, requires_grad=True)
    found = _counted(lambda: nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert found.attention_flops == (2 + 5) * 2 * 2 * 3 * 32 * 32 * 16


def test_work_survives_a_file() -> None:
    scan = Scan(True, 2, 4.0, 197, 384, 16)
    some = Work(product_flops=1e9, launches=7.0, scans=(scan, scan, dataclasses.replace(scan, backward=False)))
    assert Work.of_json(json.loads(json.dumps(some.as_json()))) == some
    assert (some * 3).launches == 21
    assert math.isclose((some + some).product_flops, 2e9)


class _Inside(TorchDispatchMode):
    """Counts the launches of each of our ops under Triton's interpreter: its kernels, and torch's operations in it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0
        self.found: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPDEFS:
            before = self.launched
            with self:
                out = OPDEFS[name]._init_fn(*args, **(kwargs or {}))
            self.found.setdefault(name, set()).add(self.launched - before)
            return out
        out = func(*args, **(kwargs or {}))
        if (done := work.of_operation(func, args, kwargs or {}, out)) is not None:
            self.launched += int(done.launches)
        return out


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> _Inside:
    inside = _Inside()
    run = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.launched += 1
        with _disable_current_modes():  # the interpreter copies tensors with torch's operations
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return inside


def test_our_ops_launch_as_often_as_the_plan_counts(inside: _Inside) -> None:
    k, b, length, e, n, r = 2, 1, 9, 32, 16, 8
    shapes = {"conv_weight": (k, e, 4), "conv_bias": (k, e), "x_proj": (k, r + 2 * n, e), "dt_proj": (k, e, r)}
    shapes |= {"dt_bias": (k, e), "A_log": (k, e, n), "D": (k, e)}
    torch.manual_seed(0)
    parameters = {name: torch.rand(shape) for name, shape in shapes.items()}
    xz = torch.randn(b, length, 2 * e, dtype=torch.bfloat16)
    tensors = [xz, *parameters.values()]
    for tensor in tensors:
        tensor.requires_grad_()
    residual, weight = torch.randn(b, length, e, requires_grad=True), torch.ones(e, requires_grad=True)
    with inside, registered():
        y = ops.bimamba_inner(*tensors, recompute=False, backend="triton")
        out, total = ops.add_norm(y, residual, weight, backend="triton")
        (out.float().sum() + total.sum()).backward()
    single = {name for name in inside.found if not name.startswith("vimscale::bimamba_inner")}
    assert len(single) == 8
    assert {name: inside.found[name] for name in single} == {name: {work.INSIDE.get(name, 1)} for name in single}


@pytest.mark.parametrize("length", [9, 40])
def test_ssd_layers_launch_as_often_as_the_plan_counts(
    inside: _Inside, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vimscale.kernels import ssd_decay_triton

    monkeypatch.setattr(ssd_decay_triton, "CHUNK", 32)
    k, h, p, n = 2, 2, 8, 8
    channels = h * p + 2 * n
    shapes = [(1, length, h * p + channels + h), (k, channels, 4), (k, channels), (k, h), (k, h), (k, h), (h * p,)]
    tensors = [torch.rand(shape, requires_grad=True) for shape in shapes]
    with inside, registered():
        ops.bissd_inner(*tensors, recompute=False, backend="triton").sum().backward()
    each = {"causal_conv1d", "ssd", "gate_norm"}
    names = {f"vimscale::{name}{backward}" for name in each for backward in ("", "_backward")}
    counts = {name: work.INSIDE.get(name, 1) for name in names}
    counts |= {name: launches[length > 32] for name, launches in work.SSD_LAUNCHES.items()}
    assert {name: inside.found[name] for name in names} == {name: {count} for name, count in counts.items()}


def test_a_plan_of_ssd_layers_is_marked_as_not_calibrated() -> None:
    assert calibration.basis(H100, PRESETS["vim_small"]) == calibration.basis(H100)
    assert calibration.basis(H100, PRESETS["ssd_small"]).startswith("predicted, not calibrated: nobody measured ssd")


@pytest.mark.parametrize(
    ("backend", "length", "tokens"), [("cpu", 197, 197), ("cpu", 785, 48), ("triton", 197, 197), ("triton", 785, 256)]
)
@pytest.mark.parametrize("sets", [1, 2])
def test_the_scan_of_ssd_layers_counts_as_products(backend: str, length: int, tokens: int, sets: int) -> None:
    k, b, h, p, n = 2, 3, 6, 64, 32
    with torch.device("meta"):
        x, B, dt = torch.empty(sets, b, length, h, p), torch.empty(sets, b, length, n), torch.empty(k, b, length, h)
        A_log = D = torch.empty(k, h)
    forward = x, dt, A_log, B, B, D, None, None, None
    schema = torch.ops.vimscale.ssd.default
    done = work.of_operation(schema, (*forward, [False, True], False, backend), {}, (x[0], A_log))
    back = work.of_operation(
        torch.ops.vimscale.ssd_backward.default,
        (*forward, x[0], None, x, B, B, [False, True], backend),
        {},
        (dt, A_log),
    )
    scores, weights = 2 * sets * b * length * tokens * n, k * b * length * tokens * h * p
    states = 0 if length == tokens else 2 * k * b * length * h * p * n
    assert done is not None
    assert back is not None
    per_head = k * b * length * tokens * h * n if backend == "triton" else 0
    assert done.product_flops == (per_head or scores) + weights + 2 * states
    assert back.product_flops == 3 * scores + per_head + 2 * weights + 5 * states
    assert done.other_bytes == back.other_bytes == 0


def test_chunks_of_ssd_scans_are_those_of_the_kernels() -> None:
    from vimscale.kernels import ssd_cpu, ssd_decay_triton

    assert (work.SSD_DENSE, work.SSD_DENSE) == (ssd_cpu.DENSE, ssd_decay_triton.CHUNK)
    assert work.SSD_CHUNK == {"cpu": ssd_cpu.CHUNK, "triton": ssd_decay_triton.CHUNK}
