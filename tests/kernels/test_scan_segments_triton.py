"""Triton scans that are cut into segments, against the recurrence; without a GPU, Triton's interpreter runs them."""

from dataclasses import replace
from functools import partial
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import OpRules, assert_close, cut, poison, record_launches
from tests.kernels.test_selective_scan_triton import DEVICE, Case, _check
from vimscale.kernels import large, scan_segments, segment_choice
from vimscale.kernels import scan_segments_triton as kernels
from vimscale.kernels import selective_scan_triton as scans
from vimscale.kernels.backend import Backend
from vimscale.kernels.scan_inputs import ScanInputs
from vimscale.kernels.scan_segments import Ends
from vimscale.kernels.selective_scan import scan_backward_op, scan_op
from vimscale.kernels.torch_op import registered
from vimscale.ops import bimamba_inner

SPAN = 2  # chunks of a segment
TOKENS = SPAN * scans.CHUNK


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    cut(monkeypatch, SPAN)


def _inputs(case: Case) -> ScanInputs:
    return ScanInputs(*case.tensors().values(), case.image())


def _upstream(case: Case) -> Tensor:
    """The gradient of s, the same tensor for all directions."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(case.b, case.length, case.e, generator=g).to(DEVICE, case.dtype).expand_as(case.tensors()["x"])


def _begins(image: Tensor, reverse: bool) -> Tensor:
    """(b, l): whether a state restarts at each slot in scan order."""
    image = image.flip(1) if reverse else image
    before = image[:, :1] if reverse else torch.zeros_like(image[:, :1])
    return image != torch.cat([before, image[:, :-1]], 1)


def _exact(case: Case, inputs: ScanInputs, ds: Tensor | None) -> Ends:
    """The ends, token by token in fp64; those of a backward pass with ds."""
    count = ceil(case.length / TOKENS)
    x, dt, A, B, C, _, dt_bias, _, image = (None if t is None else t.double() for t in inputs)
    A = -A.exp() if case.log_A else A
    end, steps = x.new_zeros(len(case.reverse), case.b, count, case.e, case.n), x.new_zeros(0)
    sums = x.new_zeros(len(case.reverse), case.b, count, case.e)
    for k, reverse in enumerate(case.reverse):
        order = range(case.length - 1, -1, -1) if reverse else range(case.length)
        begins = torch.zeros(case.b, case.length, dtype=torch.bool) if image is None else _begins(image, reverse).cpu()
        steps = F.softplus(dt[k] + (0 if dt_bias is None else dt_bias[k]))
        for segment in range(count):
            slots = list(range(case.length))[segment * TOKENS : (segment + 1) * TOKENS]
            h = end[k, :, segment]
            for slot in slots if ds is None else reversed(slots):
                t = order[slot]
                decay = torch.exp(steps[:, t, :, None] * A[k])
                decay[begins[:, slot]] = 0
                if ds is None:
                    h = decay * h + (steps[:, t] * x[k, :, t])[..., None] * B[k, :, t, None]
                else:
                    h = decay * (h + ds[k, :, t, :, None].double() * C[k, :, t, None])
            end[k, :, segment] = h
            sums[k, :, segment] = steps[:, [order[slot] for slot in slots]].sum(1)
            sums[k, begins[:, slots].any(1), segment] = -1
    return Ends(end, sums)


# 3, 3, 2, 6 and 1 segments
CASES = [
    Case(length=35),
    Case(length=33, optional=False, reverse=(True,), n=3),
    Case(length=20, b=2, n=16, dtype=torch.bfloat16, log_A=True),
    Case(length=81, e=8, reverse=(False,)),
    Case(length=9, e=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ends_of_both_passes_equal_the_recurrence_and_chain_to_the_end_of_the_sequence(case: Case) -> None:
    inputs, ds = _inputs(case), _upstream(case)
    A = -inputs.A.exp() if case.log_A else inputs.A
    for given in (None, ds):
        other = () if given is None else (given,)
        ours, again = (
            (kernels.ends if given is None else kernels.ends_backward)(inputs, *other, case.reverse, log_A=case.log_A)
            for _ in range(2)
        )
        assert_close(ours._asdict(), _exact(case, inputs, given)._asdict(), torch.float32)
        assert all(map(torch.equal, ours, again))
        reference = scan_segments._reference(inputs._replace(A=A, initial=None), case.reverse, given)
        assert reference.end.shape[2] == 1
        backward = given is not None
        first = torch.randn(reference.end[:, :, 0].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        entering, left = scan_segments.chain(ours, A, first, backward=backward)
        _, left_by_reference = scan_segments.chain(reference, A, first, backward=backward)
        assert_close([left], [left_by_reference.double()], torch.float32)
        # the last end of a walk, which the kernel must not read, is garbage
        ours.end[:, :, 0 if backward else -1] = float("nan")
        assert_close([kernels._chain(ours, inputs.A, first, backward, case.log_A)], [entering.double()], torch.float32)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ends_by_any_backend_ignore_the_initial_state(backend: str) -> None:
    case = Case(length=20)
    inputs = _inputs(case)
    ends = partial(scan_segments.ends, reverse=case.reverse, log_A=False, backend=backend)
    for ours, without in zip(ends(inputs), ends(inputs._replace(initial=None)), strict=True):
        assert torch.equal(ours, without)
    assert ends(inputs).end.shape[2] == (2 if backend == "triton" else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(length=35, b=2),
        Case(length=32, optional=False),
        Case(length=19, e=40, n=3, log_A=True),
        Case(length=25, n=20, reverse=(True,)),
        Case(length=25, n=16, dtype=torch.bfloat16, log_A=True),
        Case(length=17, e=64, n=8, dtype=torch.float16, optional=False, reverse=(False,)),
    ],
    ids=str,
)
def test_outputs_and_every_gradient_equal_the_recurrence_over_segments(case: Case) -> None:
    _check(case)


def test_a_cut_scan_equals_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With marks inside a segment and on a border, states passed in and out, and a last segment of one token."""
    cut(monkeypatch, 1)
    _check(Case(length=17))


@pytest.mark.slow
def test_the_large_form_over_segments_equals_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "OFFSETS", 0)
    launches = record_launches(monkeypatch)
    _passes(Case(b=2, length=35))
    assert all(launch.constants["LARGE"] for launch in launches)
    monkeypatch.undo()
    poison(monkeypatch)
    cut(monkeypatch, SPAN)
    monkeypatch.setattr(large, "OFFSETS", 0)
    _check(Case(b=2, length=35))


def _passes(case: Case, ends: Ends | None = None, ends_backward: Ends | None = None) -> list[Tensor]:
    """Everything that the forward and backward pass return, without a gradient of the last state."""
    inputs = _inputs(case)
    forward = scans.forward(inputs, case.reverse, scans.CHUNK, log_A=case.log_A, ends=ends)
    backward = scans.backward(
        inputs, forward[2], _upstream(case), None, case.reverse, scans.CHUNK, log_A=case.log_A, ends=ends_backward
    )
    return [*forward, *backward]


def test_ends_that_are_given_are_not_computed_again_and_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(length=19, log_A=True)
    inputs = _inputs(case)
    given = (
        kernels.ends(inputs, case.reverse, log_A=True),
        kernels.ends_backward(inputs, _upstream(case), case.reverse, log_A=True),
    )
    for ours, theirs in zip(_passes(case, *given), _passes(case), strict=True):
        assert torch.equal(ours, theirs)
    launches = record_launches(monkeypatch)
    _passes(case, *given)
    names = [launch.kernel.removesuffix("_kernel") for launch in launches]
    assert names == [
        "selective_scan_pack", "scan_segments_chain", "selective_scan_fwd",
        "selective_scan_pack", "scan_segments_chain", "selective_scan_bwd", "selective_scan_unpack",
    ]  # fmt: skip


def test_no_nan_crosses_a_mark_into_another_segment() -> None:
    case = Case(length=35, reverse=(False,))
    inputs = _inputs(case)
    inputs.x[0, 0, 4, 7] = float("nan")
    s, final, _ = scans.forward(inputs, case.reverse, scans.CHUNK)
    # images begin at 3, 8 and 9: tokens 4 to 7 share one, in the first segment
    assert s[0, 0, 4:8, 7].isnan().all()
    assert not s[0, 0, 8:].isnan().any()
    assert not final.isnan().any()
    ends = kernels.ends(inputs, case.reverse, log_A=False)
    ends.end[0, 0, 0] = float("nan")
    entering, left = scan_segments.chain(ends._replace(steps=-torch.ones_like(ends.steps)), inputs.A)
    assert entering[0, 0, 1].isnan().all()
    assert not left.isnan().any()


def test_a_nan_passes_through_all_later_segments_of_its_image() -> None:
    case = Case(length=35, reverse=(False,), optional=False)
    inputs = _inputs(case)
    inputs.x[0, 0, 4, 7] = float("nan")
    s, final, _ = scans.forward(inputs, case.reverse, 0)
    assert s[0, 0, 4:, 7].isnan().all()
    assert final[0, 0, 7].isnan().all()
    assert not final[0, 0, :7].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_mixer_of_cut_scans_equals_the_reference_and_keeps_the_rules_of_ops(recompute: bool) -> None:
    b, length, e, n, r = 1, 17, 8, 4, 2
    shapes = [(b, length, 2 * e), (2, e, 4), (2, e), (2, r + 2 * n, e), (2, e, r), (2, e), (2, e, n), (2, e)]
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    reset = torch.zeros(b, length, dtype=torch.bool).index_fill_(1, torch.tensor([0, 9]), True)

    def results(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        device = DEVICE if backend == "triton" else "cpu"
        leaves = [t.to(device, dtype).requires_grad_() for t in drawn]
        y = bimamba_inner(*leaves, reset=reset.to(device), recompute=recompute, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    exact = results(torch.float64, "reference")
    with OpRules(), registered():
        ours = results(torch.float32, "triton")
    assert_close(ours, exact, torch.float32)
    assert all(map(torch.equal, ours, results(torch.float32, "triton")))


@pytest.mark.slow
@pytest.mark.parametrize("log_A", [False, True])
def test_cut_scans_pass_opcheck(log_A: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares outputs, and NaN equals nothing
    cut(monkeypatch, SPAN)
    case = Case(length=19, e=8, reverse=(False, True), log_A=log_A)
    *tensors, image = _inputs(case)
    settings = case.reverse, scans.CHUNK, log_A, "triton"
    torch.library.opcheck(scan_op.registered, (*(t.requires_grad_() for t in tensors), image, *settings))
    tensors = [t.detach() for t in tensors]
    s, final, states = scan_op.registered(*tensors, image, *settings)
    written = torch.zeros_like(tensors[3]), torch.zeros_like(tensors[4])
    torch.library.opcheck(scan_backward_op.registered, (*tensors, image, states, s, final, *written, *settings))


LONG = {(2, 4, 6084, 384, 16): 11, (2, 1, 16384, 768, 16): 22}


@pytest.mark.parametrize(("shape", "count"), LONG.items(), ids=str)
def test_long_scans_of_few_programs_fill_a_large_gpu(
    shape: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    k, b, length, e, n = shape
    x, row, A, D = (
        torch.empty(size, device="meta", dtype=torch.bfloat16 if len(size) == 4 else torch.float32)
        for size in ((k, b, length, e), (k, b, length, n), (k, e, n), (k, e))
    )
    inputs = ScanInputs(x, x, A, row, row, D, D, None, None)
    launches = record_launches(monkeypatch)
    *_, states = scans.forward(inputs, (False, True), scans.CHUNK)
    scans.backward(inputs, states, x, None, (False, True), scans.CHUNK)
    names = [launch.kernel.removesuffix("_kernel") for launch in launches]
    assert names == [
        "selective_scan_pack", "scan_segments_fwd", "scan_segments_chain", "selective_scan_fwd",
        "selective_scan_pack", "scan_segments_bwd", "scan_segments_chain", "selective_scan_bwd",
        "selective_scan_unpack",
    ]  # fmt: skip
    programs = {name: launch.grid[0] * b * k for name, launch in zip(names, launches, strict=True)}
    assert programs["selective_scan_fwd"] == k * b * count * e // 32
    assert programs["scan_segments_fwd"] == programs["scan_segments_bwd"] == k * b * (count - 1) * e // 32
    assert programs["selective_scan_bwd"] == k * b * count * e // 64 >= 2 * 2 * segment_choice.PROCESSORS


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 197, 768, 16), (1, 1, 197, 384, 16), (2, 16, 785, 768, 16), (2, 1, 785, 384, 16), (2, 32, 6084, 384, 16)],
    ids=str,
)
def test_short_scans_and_those_of_many_programs_stay_in_one_piece(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert segment_choice.segments(*shape) == 1


def test_no_segment_is_empty_or_ends_inside_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = set()
    for length in [*range(1024, 1200, 7), *range(6000, 6200, 9), 65_536, 262_145]:
        chunks = ceil(length / segment_choice.CHUNK)
        for b, e in ((1, 24), (1, 384), (3, 768)):
            count = segment_choice.segments(2, b, length, e, 16)
            span = segment_choice.span(length, count)
            assert (count - 1) * span < chunks <= count * span
            found.add(count)
    assert len(found) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_scans_on_a_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case(length=1030, e=96, n=16, dtype=dtype)
    assert segment_choice.segments(2, case.b, case.length, case.e, case.n) > 1
    _check(case)
    _check(replace(case, optional=False, log_A=True))
