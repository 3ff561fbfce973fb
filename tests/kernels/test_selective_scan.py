"""The reference scan against the recurrence written out in fp64, and the fused scans against the reference."""

import subprocess
import sys
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, FUSED, assert_close, poison
from vimscale.kernels import selective_scan as module
from vimscale.kernels.backend import fused_module
from vimscale.kernels.cases import ODD_SHAPES, ScanCase, scan_case
from vimscale.ops import (
    bidirectional_scan,
    bidirectional_scan_with_state,
    selective_scan,
    selective_scan_with_state,
)

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def _inputs(b: int = 2, length: int = 7, e: int = 3, n: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(b, length, e), (b, length, e), (e, n), (b, length, n), (b, length, n), (e,), (b, length, e), (e,)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _by_hand(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, *, reverse: bool
) -> Tensor:
    """The two lines of the paper, token by token; in reverse, the loop walks the tokens backwards."""
    step = F.softplus(dt + dt_bias)
    h = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype)
    y = [torch.empty(0)] * x.shape[1]
    tokens = range(x.shape[1])
    for t in reversed(tokens) if reverse else tokens:
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y[t] = (h * C[:, t, None, :]).sum(-1) + D * x[:, t]
    return torch.stack(y, dim=1) * F.silu(z)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_output_and_every_gradient_equal_the_recurrence(reverse: bool, length: int) -> None:
    inputs = _inputs(length=length)
    ours = selective_scan(*inputs, reverse=reverse)
    theirs = _by_hand(*inputs, reverse=reverse)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    out_grad = torch.randn_like(ours)
    our_grads = torch.autograd.grad(ours, inputs, out_grad)
    for name, ours_, theirs_ in zip(NAMES, our_grads, torch.autograd.grad(theirs, inputs, out_grad), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck(reverse: bool) -> None:
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, reverse=reverse), _inputs(1, 3, 2, 2))


def test_reverse_is_the_flipped_scan_of_the_flipped_input() -> None:
    x, dt, A, B, C, D, z, bias = _inputs()
    flipped = selective_scan(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, z.flip(1), bias).flip(1)
    torch.testing.assert_close(selective_scan(x, dt, A, B, C, D, z, bias, reverse=True), flipped)


def test_gate_and_bias_are_optional() -> None:
    x, dt, A, B, C, D, _, _ = _inputs()
    ones = torch.full_like(x, 1.0)
    plain = selective_scan(x, dt, A, B, C, D)
    gated = selective_scan(x, dt, A, B, C, D, ones, torch.zeros_like(D))
    torch.testing.assert_close(plain * F.silu(ones), gated)


def test_bf16_inputs_give_bf16_outputs_with_fp32_sums() -> None:
    exact = _inputs(length=200)
    rounded = [t.detach().to(torch.bfloat16) for t in exact]
    rounded[2] = exact[2].detach().float()
    x, dt, A, B, C, D, z, bias = rounded
    for gate, roundings in ((None, 1), (z, 2)):  # of the output of the scan, and of the gate
        out = selective_scan(x, dt, A, B, C, D, gate, bias)
        wide = selective_scan(*(None if t is None else t.double() for t in (x, dt, A, B, C, D, gate, bias)))
        assert out.dtype == torch.bfloat16
        # one rounding is half a unit in the last place of bf16's 8 bits
        torch.testing.assert_close(out.double(), wide, rtol=roundings * 2**-8, atol=1e-6)


def test_errors_name_a_shape_that_does_not_match() -> None:
    x, dt, A, B, C, D, _, _ = _inputs()
    with pytest.raises(ValueError, match=r"B has shape \(2, 6, 5\); it must be \(b, l, n\), here \(2, 7, 5\)"):
        selective_scan(x, dt, A, B[:, :6], C, D)


def test_saved_memory_grows_linearly_with_the_length() -> None:
    def saved(length: int) -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            selective_scan(*_inputs(length=length))
        return total

    assert saved(64) <= 2.2 * saved(32)


# -- the fused backends against the reference --------------------------------------------------------------------------

OPTIONS: list[tuple[str, ...]] = [
    (),
    ("z", "dt_bias"),
    ("reset", "dt_bias"),
    ("initial_state",),
    ("z", "dt_bias", "initial_state", "reset"),
]
MODES = {
    "forward": (selective_scan, selective_scan_with_state, {"reverse": False}),
    "reverse": (selective_scan, selective_scan_with_state, {"reverse": True}),
    "both": (bidirectional_scan, bidirectional_scan_with_state, {"fuse": "mean"}),
}


def _results(
    case: ScanCase, mode: str, options: tuple[str, ...], backend: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every input; both outputs contribute to each gradient."""
    optional = {"z", "dt_bias", "initial_state"}
    names = [f.name for f in fields(case) if f.name not in optional | {"reset"} or f.name in optional & set(options)]
    device = DEVICE.get(backend, "cpu")
    tensors = {name: getattr(case, name).to(device, dtype).detach().requires_grad_() for name in names}
    _, scan_with_state, arguments = MODES[mode]
    reset = {"reset": case.reset.to(device)} if "reset" in options else {}
    y, final = scan_with_state(**tensors, **reset, **arguments, backend=backend)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).to(case.x.dtype).to(device, y.dtype)
    dfinal = torch.randn(final.shape, generator=g).to(device, final.dtype)
    gradients = torch.autograd.grad([y, final], list(tensors.values()), [dy, dfinal])
    named = {f"d{name}": gradient for name, gradient in zip(tensors, gradients, strict=True)}
    return {"y": y.detach(), "final": final.detach(), **named}


def _agrees_with_fp64(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    mode: str,
    options: tuple[str, ...],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = scan_case(shape, dtype, directions=2 if mode == "both" else 1)
    exact = _results(case, mode, options, "reference", torch.float64)
    poison(monkeypatch)
    ours = _results(case, mode, options, backend)
    assert ours["y"].dtype == dtype
    assert_close(ours, exact, dtype)
    again = _results(case, mode, options, backend)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "two runs differ"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (2, 20, 40, 5)], ids=str)
def test_numba_equals_the_reference_with_gradients(
    shape: tuple[int, int, int, int], options: tuple[str, ...], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _agrees_with_fp64(shape, dtype, mode, options, "cpu", monkeypatch)


@pytest.mark.parametrize(
    "mode", [mode if mode == "both" else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES]
)
def test_triton_equals_the_reference_with_gradients(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public functions; test_selective_scan_triton.py covers shapes and corner cases."""
    _agrees_with_fp64((2, 11, 40, 4), torch.float32, mode, OPTIONS[-1], "triton", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_a_gpu_equals_the_reference_with_gradients(
    shape: tuple[int, int, int, int], options: tuple[str, ...], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _agrees_with_fp64(shape, dtype, mode, options, "triton", monkeypatch)


@pytest.mark.parametrize("backend", FUSED)
def test_the_op_and_its_kernels_agree_on_the_chunk(backend: str) -> None:
    assert module.CHUNK[backend] == fused_module("selective_scan", backend).CHUNK


@pytest.mark.parametrize("reverse", [False, True])
def test_decays_can_underflow(reverse: bool) -> None:
    """Exponents reach -1,000. The CPU kernels use other loops for chunks in which one is below fp32's range."""
    inputs = [t.detach() for t in _inputs(length=50, e=70, dtype=torch.float32)]
    inputs[1], inputs[2] = 3 * inputs[1] + 4, 20 * inputs[2]
    results = []
    for dtype in (torch.float64, torch.float32):
        given = [t.to(dtype).requires_grad_() for t in inputs]
        y = selective_scan(*given, reverse=reverse)
        results.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
    for name, exact, ours in zip(("y", *NAMES), *results, strict=True):
        assert (ours - exact).abs().max() < 2e-6 * exact.abs().max(), name  # a few fp32 ulps at the scale of the sums


def test_the_number_of_threads_does_not_change_results() -> None:
    case, threads = scan_case((3, 50, 200, 8), directions=2), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(_results(case, "both", ("z", "dt_bias"), "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_non_contiguous_inputs_give_the_same_results(backend: str) -> None:
    case = scan_case((2, 30, 48, 4), directions=2)
    plain = _results(case, "both", ("z",), backend)
    scattered = {
        f.name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if (t := getattr(case, f.name)).ndim > 1 else t
        for f in fields(case)
    }
    assert scattered["x"].stride(-1) != 1
    strided = _results(ScanCase(**scattered), "both", ("z",), backend)
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_both_directions_equal_the_sum_of_a_forward_and_a_reverse_scan(backend: str) -> None:
    case = scan_case((2, 30, 48, 4), directions=2)
    parts = [case.x, case.dt, case.A, case.B, case.C, case.D]
    both = bidirectional_scan(*parts, case.z, case.dt_bias, backend=backend)
    one, other = (
        selective_scan(*(t[i] for t in parts), case.z, case.dt_bias[i], reverse=bool(i), backend=backend)
        for i in (0, 1)
    )
    torch.testing.assert_close(both, one + other)
    pairs = [(t[0], t[1]) for t in parts]
    assert torch.equal(both, bidirectional_scan(*pairs, case.z, (case.dt_bias[0], case.dt_bias[1]), backend=backend))
    expanded = bidirectional_scan(case.x[0].expand(2, -1, -1, -1), *parts[1:], backend=backend)
    assert torch.equal(expanded, bidirectional_scan((case.x[0], case.x[0]), *parts[1:], backend=backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_sequence_equals_its_images_scanned_alone(mode: str, backend: str) -> None:
    case = scan_case((1, 40, 24, 4), directions=2 if mode == "both" else 1)
    scan, _, arguments = MODES[mode]
    reset = torch.zeros(1, 40, dtype=torch.bool)
    borders = [0, 13, 14, 40]
    reset[0, borders[:-1]] = True
    images = [slice(a, b) for a, b in pairwise(borders)]

    def run(tokens: slice, marks: Tensor | None) -> Tensor:
        x, dt, B, C, z = (t[..., tokens, :] for t in (case.x, case.dt, case.B, case.C, case.z))
        return scan(x, dt, case.A, B, C, case.D, z, case.dt_bias, reset=marks, backend=backend, **arguments)

    packed = run(slice(None), reset)
    torch.testing.assert_close(packed, torch.cat([run(image, None) for image in images], dim=1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_continues_from_the_final_state_of_another(reverse: bool, backend: str) -> None:
    case = scan_case((2, 40, 24, 4))

    def run(tokens: slice, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, B, C = (t[:, tokens] for t in (case.x, case.dt, case.B, case.C))
        return selective_scan_with_state(
            x, dt, case.A, B, C, case.D, reverse=reverse, initial_state=initial, backend=backend
        )

    y, end = run(slice(None), None)
    parts = [slice(0, 17), slice(17, 40)]
    first, second = reversed(parts) if reverse else parts
    y_first, state = run(first, None)
    y_second, state = run(second, state)
    torch.testing.assert_close(state, end)
    torch.testing.assert_close(y, torch.cat([y_second, y_first] if reverse else [y_first, y_second], dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)])
def test_ops_pass_opcheck(backend: str, dtype: torch.dtype) -> None:
    case = scan_case((2, 20, 24, 4), dtype, directions=2)
    image, reverse, chunk = case.reset.cumsum(1, dtype=torch.int32), [False, True], module.CHUNK[backend]
    scan, scan_backward = module.scan_op.registered, module.scan_backward_op.registered
    combine, combine_backward = module.combine_op.registered, module.combine_backward_op.registered
    for log_A in (False, True):
        tensors = [t.detach() for t in case.tensors() if t is not case.z]
        tensors[2] = tensors[2].neg().log() if log_A else tensors[2]
        torch.library.opcheck(
            scan, (*(t.clone().requires_grad_() for t in tensors), image, reverse, chunk, log_A, backend)
        )
        s, final, states = scan(*tensors, image, reverse, chunk, log_A, backend)
        written = torch.zeros_like(case.B), torch.zeros_like(case.C)
        torch.library.opcheck(
            scan_backward, (*tensors, image, states, s, final, *written, reverse, chunk, log_A, backend)
        )
    for z in (None, case.z.requires_grad_()):
        torch.library.opcheck(combine, (s.requires_grad_(), z, 0.5, backend))
        gate = None if z is None else z.detach()
        dz = None if z is None else torch.zeros_like(z)
        torch.library.opcheck(combine_backward, (s[0].detach(), s.detach(), gate, dz, 0.5, backend))


def test_scans_compile_into_one_graph() -> None:
    case = scan_case((2, 20, 24, 4), directions=2)
    tensors = [t.requires_grad_() for t in case.tensors()[:8]]

    def loss(*tensors: Tensor) -> Tensor:
        return bidirectional_scan(*tensors, reset=case.reset, fuse="mean").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    eager = loss(*tensors)
    assert torch.equal(compiled, eager)
    pairs = zip(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_scans_can_be_exported_for_any_batch_and_length() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
            return selective_scan(x, dt, A, B, C, D, z)

    tokens = {0: torch.export.Dim("b"), 1: torch.export.Dim("l")}
    shapes = (tokens, tokens, None, tokens, tokens, None, tokens)
    program = torch.export.export(Scan(), tuple(scan_case((2, 20, 24, 4)).tensors()[:7]), dynamic_shapes=shapes)
    other = scan_case((3, 33, 24, 4)).tensors()[:7]
    assert torch.equal(program.module()(*other), Scan()(*other))


def test_a_nan_in_one_image_reaches_its_output_and_no_other() -> None:
    x, dt, A, B, C, D, z, bias = (t.detach() for t in scan_case((3, 20, 40, 4)).tensors()[:8])
    dt[1, 5, 7] = torch.nan
    y = selective_scan(x, dt, A, B, C, D, z, bias)
    assert y[1, 5:, 7].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.slow
def test_kernels_run_without_a_writable_cache() -> None:
    code = """
import torch, numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []  # as if no folder were writable
from vimscale.kernels.cases import scan_case
from vimscale.ops import selective_scan
tensors = scan_case((1, 5, 8, 4)).tensors()[:8]
print(torch.allclose(selective_scan(*tensors, backend="cpu"), selective_scan(*tensors, backend="reference"), atol=1e-5))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert done.stderr.count("set NUMBA_CACHE_DIR") == 1


@pytest.mark.slow
def test_peak_memory_has_no_room_for_all_states_at_once() -> None:
    """Compares the peak memory of a forward and backward pass, as the kernel counts it, with the inputs."""
    code = """
import ctypes, pathlib, sys, torch
from vimscale.kernels.cases import scan_case
from vimscale.ops import selective_scan
def status(key):
    return int(pathlib.Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
def run(tensors):
    torch.autograd.grad(selective_scan(*tensors), tensors, torch.ones(tensors[0].shape))
tensors = [t.requires_grad_() for t in scan_case((2, 2000, 384, 16)).tensors()[:8]]
run(tensors)  # compile
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
run(tensors)
print((status("VmHWM") - before) / sum(t.nbytes for t in tensors))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 < float(out.stdout) <= 3


def test_errors_name_the_bad_input() -> None:
    case = scan_case((2, 7, 3, 5))
    good = {name: getattr(case, name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")}
    for changed, message in (
        ({"x": case.x[0]}, r"x has shape \(7, 3\); it must be \(b, l, e\)"),
        ({"x": case.x[:, :0]}, r"x has shape \(2, 0, 3\); none of \(b, l, e\) may be 0"),
        ({"dt": case.dt.bfloat16()}, "dt is bfloat16; it must be float32"),
        ({"A": case.A.int()}, "A is int32; it must be float32 or bfloat16 or float16 or float64"),
        ({"C": case.C[..., :4]}, r"C has shape \(2, 7, 4\); it must be \(b, l, n\), here \(2, 7, 5\)"),
        ({"D": case.D.to("meta")}, "D is on meta; it must be on cpu, where x is"),
        ({"z": case.z[:1]}, r"z has shape \(1, 7, 3\); it must be \(b, l, e\), here \(2, 7, 3\)"),
        ({"reset": case.reset.float()}, "reset is float32; it must be bool"),
        ({"backend": "cuda"}, "backend 'cuda' is not one of reference, cpu, triton"),
    ):
        with pytest.raises(ValueError, match=f"selective_scan: {message}"):
            selective_scan(**good | changed)
    pair = [case.x, case.dt, case.A, case.B, case.C, case.D]
    with pytest.raises(ValueError, match=r"bidirectional_scan: x has shape \(2, 7, 3\); it must be \(2, b, l, e\)"):
        bidirectional_scan(*pair)
    pair[1] = (case.dt, case.dt[:1])
    with pytest.raises(ValueError, match=r"the pair dt is \(2, 7, 3\) torch.float32 on cpu and \(1, 7, 3\)"):
        bidirectional_scan(*pair)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = scan_case((2, 7, 3, 5), torch.float64).tensors()[:8]
    assert selective_scan(*tensors).dtype == torch.float64  # by default, the reference
    with pytest.raises(ValueError, match="backend cpu cannot run here: x is float64; it supports float32, bfloat16"):
        selective_scan(*tensors, backend="cpu")
    monkeypatch.setenv("VIMSCALE_BACKEND", "cpu")
    with pytest.raises(ValueError, match="VIMSCALE_BACKEND cpu cannot run here: x is float64"):
        selective_scan(*tensors)
    monkeypatch.setenv("VIMSCALE_BACKEND", "reference")
    assert selective_scan(*tensors).dtype == torch.float64
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend triton cannot run here: x is on cpu"):
        selective_scan(*(t.float() for t in tensors), backend="triton")
