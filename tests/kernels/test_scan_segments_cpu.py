"""Segments of a scan on a CPU: what each adds, against the reference, and scans that are cut into them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_checks import assert_close, poison
from tests.kernels.test_selective_scan import MODES, OPTIONS, _agrees_with_fp64, _results
from vimscale.kernels import scan_segments, scan_segments_cpu, selective_scan_cpu
from vimscale.kernels.backend import counted
from vimscale.kernels.cases import ScanCase, scan_case
from vimscale.kernels.checks import images_of
from vimscale.kernels.scan_inputs import ScanInputs
from vimscale.kernels.scan_segments import Ends, chain
from vimscale.ops import bidirectional_scan, bimamba_inner, selective_scan

BOTH = (False, True)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every scan into segments of one or two chunks."""
    monkeypatch.setattr(selective_scan_cpu, "FEW", 10**9)
    monkeypatch.setattr(scan_segments_cpu, "ITEMS", 10**9)
    monkeypatch.setattr(scan_segments_cpu, "SHORTEST", 24)


def _with_marks(case: ScanCase, *tokens: int) -> ScanCase:
    reset = torch.zeros_like(case.reset)
    reset[:, list(tokens)] = True
    return replace(case, reset=reset)


def _inputs(case: ScanCase, *, marked: bool, dtype: torch.dtype | None = None, rank: int = 0) -> ScanInputs:
    """Both directions of a case; dt has `rank` columns if that is above 0."""
    x, dt, B, C = (t.to(dtype) for t in (case.x, case.dt[..., :rank] if rank else case.dt, case.B, case.C))
    A, D, bias, initial = (t.to(dtype) for t in (case.A, case.D, case.dt_bias, case.initial_state))
    return ScanInputs(x, dt, A, B, C, D, bias, initial, images_of(case.reset) if marked else None)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chained_segments_equal_one_reference_segment(
    dtype: torch.dtype, marked: bool, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = scan_case((2, 91, 72, 5), dtype, directions=2)
    ours, exact = _inputs(case, marked=marked), _inputs(case, marked=marked, dtype=torch.float64)
    ds = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    references = (
        scan_segments.ends(exact, BOTH, False, "reference"),
        scan_segments.ends(exact, BOTH, False, "reference", ds=ds.double()),
    )
    poison(monkeypatch)
    found = (
        scan_segments.ends(ours, BOTH, False, "cpu"),
        scan_segments.ends(ours, BOTH, False, "cpu", ds=ds),
    )
    for backward, reference, cut in zip(BOTH, references, found, strict=True):
        assert cut.end.shape == (2, 2, 3, 72, 5)
        assert (cut.steps < 0).any(2).equal((reference.steps < 0).any(2))
        # results are fp32, whatever the dtype of the activations is
        end = chain(cut, ours.A, case.initial_state, backward=backward)[1]
        expected = chain(reference, exact.A, exact.initial, backward=backward)[1]
        assert_close([end], [expected], torch.float32)
        if not marked:
            assert_close([cut.steps.sum(2)], [reference.steps.sum(2)], torch.float32)


@pytest.mark.parametrize("backward", BOTH)
def test_segments_project_dt_themselves(backward: bool, short_segments: None) -> None:
    case = scan_case((2, 91, 72, 5), directions=2)
    low, ds = _inputs(case, marked=True, rank=6), torch.randn(case.x.shape)
    dt_proj = torch.randn(2, 72, 6)
    full = low._replace(dt=torch.einsum("kblr,ker->kble", low.dt, dt_proj))
    upstream = ds if backward else None
    projected = scan_segments.ends(low, BOTH, False, "cpu", ds=upstream, dt_proj=dt_proj)
    plain = scan_segments.ends(full, BOTH, False, "cpu", ds=upstream)
    assert_close(projected, plain, torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_cut_scans_equal_the_reference_with_gradients(
    options: tuple[str, ...], mode: str, short_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, dtype in (
        ((2, 63, 80, 8), torch.float32),
        ((1, 197, 24, 5), torch.float32),
        ((1, 100, 24, 4), torch.bfloat16),
        ((1, 100, 24, 4), torch.float16),
    ):
        assert scan_segments_cpu.segments(1, *shape[:3]) > 1
        with monkeypatch.context() as context:
            _agrees_with_fp64(shape, dtype, mode, options, "cpu", context)


@pytest.mark.parametrize("tokens", [(0,), (15,), (16,), (17,), (31, 32, 33), (63,), (0, 40, 41), (48, 64)], ids=str)
def test_marks_may_be_anywhere_in_a_segment(tokens: tuple[int, ...], short_segments: None) -> None:
    case = _with_marks(scan_case((1, 80, 24, 4), directions=2), *tokens)
    options = ("z", "dt_bias", "initial_state", "reset")
    exact = _results(case, "both", options, "reference", torch.float64)
    assert scan_segments_cpu.segments(2, 1, 80, 24) == 3
    assert_close(_results(case, "both", options, "cpu"), exact, torch.float32)


def test_nan_of_one_image_does_not_reach_the_next_one_of_a_packed_sequence(short_segments: None) -> None:
    case = _with_marks(scan_case((1, 160, 24, 4), directions=2), 0, 70)
    tensors = [t.detach().clone() for t in case.tensors()[:8]]
    tensors[1][:, :, 20] = torch.nan
    y = bidirectional_scan(*tensors, reset=case.reset)
    assert y[:, 20].isnan().all()
    assert y[:, 70:].isfinite().all()


def test_given_segments_are_taken() -> None:
    """With segments from the caller, a scan gives what it gives with its own, and computes none itself."""
    case = scan_case((1, 130, 80, 4), directions=2)
    inputs, ds = _inputs(case, marked=True), torch.randn(case.x.shape)
    s, final, states = selective_scan_cpu.forward(inputs, BOTH, 16)
    exact = {"s": s, "final": final, "states": states}
    names = ("dx", "ddt", "dparameters", "dB", "dC", "dinitial")
    exact |= zip(names, selective_scan_cpu.backward(inputs, states, ds, final, BOTH, 16), strict=True)
    for shortest in (16, 40, 130):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan_segments_cpu, "ITEMS", 10**9)
            patch.setattr(scan_segments_cpu, "SHORTEST", shortest)
            ahead = scan_segments_cpu.ends(inputs, BOTH)
            back = scan_segments_cpu.ends_backward(inputs, ds, BOTH)
        assert ahead.end.shape[2] == 130 // shortest
        s, found_final, states = selective_scan_cpu.forward(inputs, BOTH, 16, ends=ahead)
        ours = {"s": s, "final": found_final, "states": states}
        gradients = selective_scan_cpu.backward(inputs, states, ds, final, BOTH, 16, ends=back)
        assert_close(ours | dict(zip(names, gradients, strict=True)), exact, torch.float32)


def _inner_results() -> list[Tensor]:
    """y and all gradients of a mixer of 3 blocks of 4 vectors, the last of which is not full."""
    g = torch.Generator().manual_seed(0)
    e, n, r = 8 * selective_scan_cpu.LANES + 5, 6, 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    A_log = draw(2, e, n)
    A_log[:, :7] += 4  # in the first vectors, decays underflow
    shapes = [(2, e, 4), (2, e), (2, r + 2 * n, e), (2, e, r), (2, e)]
    parameters = [*(draw(*shape) for shape in shapes), A_log, draw(2, e)]
    tensors = [t.requires_grad_() for t in (draw(1, 75, 2 * e), *parameters)]
    y = bimamba_inner(*tensors, reset=torch.rand(1, 75, generator=g) < 1 / 30, backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, tensors, torch.randn(y.shape, generator=g))]


@pytest.mark.parametrize("cut", [False, True])
def test_the_number_of_threads_does_not_change_a_bit(cut: bool, request: pytest.FixtureRequest) -> None:
    """5 threads take narrower blocks of channels than one."""
    if cut:
        request.getfixturevalue("short_segments")
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append((_inner_results(), _results(scan_case((1, 90, 40, 8), directions=2), "both", (), "cpu")))
    finally:
        torch.set_num_threads(threads)
    inner, scan = results[0]
    assert all(t.isfinite().all() for t in inner)
    for other_inner, other_scan in results[1:]:
        assert all(map(torch.equal, inner, other_inner))
        assert all(torch.equal(scan[name], other_scan[name]) for name in scan)


class _Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
            self.made.append((made.shape, made.dtype))
        return made


def test_fake_tensors_count_the_buffers_of_a_cut_scan(short_segments: None) -> None:
    """A plan runs the scan on fake tensors; they allocate what real ones do."""

    def run(convert: Callable[[Tensor], Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
        inputs = ScanInputs(*map(convert, given))
        ds = convert(case.x)
        with _Allocations() as allocations:
            s, final, states = selective_scan_cpu.forward(inputs, BOTH, 16)
            gradients = selective_scan_cpu.backward(inputs, states, ds, None, BOTH, 16)
        allocations.made.extend((t.shape, t.dtype) for t in (s, final, states, *gradients))
        return allocations.made

    case = scan_case((1, 90, 40, 8), torch.bfloat16, directions=2)
    given = _inputs(case, marked=True)
    with FakeTensorMode() as mode, counted("cpu"):
        fake = run(mode.from_tensor)
    assert fake == run(lambda t: t)
    assert (torch.Size([2, 1, 3, 40, 8]), torch.float32) in fake  # the ends of segments


def test_only_few_and_long_sequences_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []

    def spy(name: str) -> Callable[..., Ends]:
        real = getattr(scan_segments_cpu, name)

        def called(*arguments: Any) -> Ends:
            cut.append(name)
            return real(*arguments)

        return called

    for name in ("ends", "ends_backward"):
        monkeypatch.setattr(scan_segments_cpu, name, spy(name))
    lanes = selective_scan_cpu.LANES
    for (b, length, e), expected in (
        ((1, 1023, lanes), []),
        ((1, 1024, lanes), ["ends", "ends_backward"]),
        ((1, 1024, 4 * lanes), ["ends_backward"]),  # forward, each vector is a work item
        ((4, 1024, 4 * lanes), []),
    ):
        case = scan_case((b, length, e, 4))
        _results(case, "forward", (), "cpu")
        assert cut == expected
        cut.clear()


@pytest.mark.parametrize("threads", [1, 2])
def test_denormal_numbers_are_zero_inside_kernels_and_stay_outside(threads: int) -> None:
    """A CPU takes a hundred times as long for them, and decays over long sequences are full of them."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormal numbers")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.zeros(1, 64, 16)
        x[:, 0] = 1e-36
        dt, A, BC = torch.full_like(x, 1.0), torch.full((16, 4), -1.0), torch.ones(1, 64, 4)
        y = selective_scan(x, dt, A, BC, BC, torch.zeros(16), backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert y[:, 0].min() > 1e-36
    assert not ((y.abs() > 0) & (y.abs() < torch.finfo(torch.float32).tiny)).any()
    assert (torch.tensor([1e-39]) * 0.5).item() > 0  # as the caller had it
