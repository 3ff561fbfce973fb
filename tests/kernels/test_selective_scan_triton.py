"""The Triton scan against the recurrence in fp64 with autograd; without a GPU, Triton's interpreter runs it."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import kernel_checks
from tests.kernels.kernel_checks import poison, record_launches
from vimscale.kernels import selective_scan_bwd_triton
from vimscale.kernels import selective_scan_triton as kernels
from vimscale.kernels.cases import TOLERANCE
from vimscale.kernels.scan_inputs import ScanInputs
from vimscale.kernels.selective_scan import split_parameters

DEVICE = kernel_checks.DEVICE["triton"]
GRADIENTS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@dataclass(frozen=True)
class Case:
    """One call: sizes, directions, and whether the optional tensors are given. With `log_A`, A is given as its
    logarithm, and the gradients of B and C are written into slices of one tensor, as a mixer does.
    """

    b: int = 1
    length: int = 11
    e: int = 24
    n: int = 4
    reverse: tuple[bool, ...] = (False, True)
    dtype: torch.dtype = torch.float32
    optional: bool = True
    log_A: bool = False

    def tensors(self) -> dict[str, Tensor | None]:
        g = torch.Generator().manual_seed(0)
        k, b, length, e, n = len(self.reverse), self.b, self.length, self.e, self.n

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=g)

        tensors: dict[str, Tensor | None] = {
            "x": draw(k, b, length, e).to(self.dtype),
            "dt": draw(k, b, length, e).to(self.dtype),
            "A": draw(k, e, n) if self.log_A else -F.softplus(draw(k, e, n) + 1),
            # as a projection returns them: adjacent in memory, no row aligned
            "B": draw(k, b, length, 3 + 2 * n).to(self.dtype)[..., 3 : 3 + n],
            "C": draw(k, b, length, 3 + 2 * n).to(self.dtype)[..., 3 + n :],
            "D": draw(k, e),
            "dt_bias": draw(k, e) - 2 if self.optional else None,
            "initial": draw(k, b, e, n) if self.optional else None,
        }
        return {name: None if t is None else t.to(DEVICE) for name, t in tensors.items()}

    def image(self) -> Tensor | None:
        """Borders inside chunks, on the first token of a chunk, and (in the last sequence of the batch) on token 0."""
        if not self.optional:
            return None
        border = torch.zeros(self.b, self.length, dtype=torch.int32)
        border[:, [t for t in (3, 8, 9) if t < self.length]] = 1
        border[-1, 0] = 1
        return border.cumsum(1, dtype=torch.int32).to(DEVICE)


def _recurrence(case: Case, tensors: dict[str, Tensor | None], image: Tensor | None) -> tuple[Tensor, Tensor]:
    """s and the last state, token by token."""
    x, dt, A, B, C, D, dt_bias, initial = tensors.values()
    A = -A.exp() if case.log_A else A
    outputs, finals = [], []
    for k, backward in enumerate(case.reverse):
        step = F.softplus(dt[k] if dt_bias is None else dt[k] + dt_bias[k])
        h = x.new_zeros(case.b, case.e, case.n) if initial is None else initial[k]
        tokens = range(case.length)
        s = {}
        before = None
        for t in reversed(tokens) if backward else tokens:
            if image is not None:
                last = image[:, t] if backward and before is None else 0 if before is None else image[:, before]
                h = torch.where((image[:, t] != last)[:, None, None], 0.0, h)
            decay = torch.exp(step[:, t, :, None] * A[k])
            h = decay * h + (step[:, t] * x[k][:, t])[..., None] * B[k][:, t, None, :]
            s[t] = (h * C[k][:, t, None, :]).sum(-1) + D[k] * x[k][:, t]
            before = t
        outputs.append(torch.stack([s[t] for t in tokens], 1))
        finals.append(h)
    return torch.stack(outputs), torch.stack(finals)


def _assert_close(name: str, ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape, name
    error = (ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}"


def _check(case: Case) -> None:
    tensors, image = case.tensors(), case.image()
    g = torch.Generator().manual_seed(1)
    # all directions have the same gate, so ds is the same tensor for all
    ds = torch.randn(case.b, case.length, case.e, generator=g).to(DEVICE, case.dtype).expand_as(tensors["x"])
    dfinal = torch.randn(tensors["A"][:, None].expand(-1, case.b, -1, -1).shape, generator=g).to(DEVICE)
    dfinal = dfinal if case.optional else None

    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in tensors.items()}
    s, final = _recurrence(case, exact, image)
    wanted = [t for t in exact.values() if t is not None]
    loss = (s * ds).sum() + (0 if dfinal is None else (final * dfinal).sum())
    gradients = dict(
        zip((k for k, t in exact.items() if t is not None), torch.autograd.grad(loss, wanted), strict=True)
    )

    chunk = kernels.CHUNK
    inputs = ScanInputs(*tensors.values(), image)
    first = kernels.forward(inputs, case.reverse, chunk, log_A=case.log_A)

    def gradients_of() -> tuple[Tensor, ...]:
        n = case.n
        dB = dC = None
        if case.log_A:
            slices = torch.full((len(case.reverse), case.b, case.length, 3 + 2 * n), 7.0).to(inputs.B)
            dB, dC = slices[..., 3 : 3 + n], slices[..., 3 + n :]
        dx, ddt, dparameters, *rows, dinitial = kernels.backward(
            inputs, first[2], ds, dfinal, case.reverse, chunk, log_A=case.log_A, dB=dB, dC=dC
        )
        if case.log_A:
            assert rows[0] is dB
            assert rows[1] is dC
            assert (slices[..., :3] == 7).all()
        dA, dD, dbias = split_parameters(dparameters, inputs.A)
        if inputs.dt_bias is None:
            assert not dbias.any()
        return dx, ddt, dA, *rows, dD, dbias, dinitial

    ours, again = gradients_of(), gradients_of()
    tolerance = TOLERANCE[case.dtype]
    _assert_close("s", first[0], s, tolerance)
    _assert_close("final", first[1], final, TOLERANCE[torch.float32])
    for name, mine, mine_again in zip(GRADIENTS, ours, again, strict=True):
        assert torch.equal(mine, mine_again), f"d{name} differs between two runs"
        if tensors[name] is None:
            assert name == "dt_bias" or mine.shape == (0,), name
            continue
        assert mine.dtype == tensors[name].dtype, name
        _assert_close(f"d{name}", mine, gradients[name], tolerance if name in ("x", "dt", "B", "C") else 2e-5)

    without_states = kernels.forward(inputs, case.reverse, 0, log_A=case.log_A)
    assert without_states[2].shape == (0,)
    assert torch.equal(without_states[0], first[0])
    assert torch.equal(without_states[1], first[1])


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(optional=False),
        Case(length=1, n=8),
        Case(length=8, e=64, n=16, reverse=(True,)),
        pytest.param(Case(b=2, length=17, e=72, n=16, reverse=(False,)), marks=pytest.mark.slow),
        pytest.param(Case(length=9, n=3), marks=pytest.mark.slow),
        Case(b=2, length=9, e=40, n=3, log_A=True),
        pytest.param(Case(length=9, e=40, n=20, reverse=(True,)), marks=pytest.mark.slow),
        Case(dtype=torch.bfloat16, n=16),
        Case(dtype=torch.float16, n=8, optional=False),
    ],
    ids=str,
)
def test_outputs_and_every_gradient_equal_the_recurrence(case: Case) -> None:
    _check(case)


def test_a_launch_of_many_programs_equals_the_recurrence_and_gives_the_bits_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of 64 channels add channels for dB and dC in another order; nothing else depends on the launch."""
    case = Case(length=17, e=64, n=16, dtype=torch.bfloat16, optional=False, log_A=True)
    inputs = ScanInputs(*case.tensors().values(), None)
    ds = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(1)).to(inputs.x)

    def results() -> list[Tensor]:
        forward = kernels.forward(inputs, case.reverse, kernels.CHUNK, log_A=True)
        dx, ddt, dparameters, *_ = kernels.backward(
            inputs, forward[2], ds, None, case.reverse, kernels.CHUNK, log_A=True
        )
        return [*forward, dx, ddt, dparameters]

    small = results()
    monkeypatch.setattr(selective_scan_bwd_triton, "MANY", 0)
    monkeypatch.setattr(kernels, "CHANNELS", 64)
    launches = record_launches(monkeypatch)
    results()
    assert {launch.constants["CHANNELS"] for launch in launches if "CHANNELS" in launch.constants} == {64}
    monkeypatch.undo()
    poison(monkeypatch)
    monkeypatch.setattr(selective_scan_bwd_triton, "MANY", 0)
    monkeypatch.setattr(kernels, "CHANNELS", 64)
    _check(case)
    for ours, theirs in zip(results(), small, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("b", "length", "e", "n"), [(2, 63, 80, 8), (3, 197, 384, 16), (1, 1000, 96, 16)])
def test_outputs_and_every_gradient_on_a_device(b: int, length: int, e: int, n: int, dtype: torch.dtype) -> None:
    _check(Case(b, length, e, n, dtype=dtype))


def test_a_nan_in_an_input_reaches_the_output_and_stops_at_an_image_border() -> None:
    case = Case(length=11, reverse=(False,))
    tensors, image = case.tensors(), case.image()
    tensors["x"][0, 0, 4, 7] = float("nan")
    s, final, _ = kernels.forward(ScanInputs(*tensors.values(), image), case.reverse, 0)
    # borders at 3, 8 and 9: tokens 4 to 7 share an image
    assert s[0, 0, 4:8, 7].isnan().all()
    assert not s[0, 0, :4].isnan().any()
    assert not s[0, 0, 8:].isnan().any()
    assert not final.isnan().any()


def test_the_step_is_exact_over_the_full_range_of_dt() -> None:
    """With A = 0, B = C = 1 and D = 0, one token gives softplus(dt) x, and the gradient of dt is the sigmoid."""
    dt = torch.cat([torch.linspace(-15, 30, 1000), torch.tensor([-1e-6, 0.0, 1e-6, 100.0])]).to(DEVICE)
    dt = dt[None, None, None]
    ones, e = torch.ones_like(dt), dt.shape[-1]
    A, row, D = dt.new_zeros(1, e, 4), dt.new_ones(1, 1, 1, 1), dt.new_zeros(1, e)
    inputs = ScanInputs(ones, dt, A[..., :1].contiguous(), row, row, D, None, None, None)
    s, _, states = kernels.forward(inputs, (False,), kernels.CHUNK)
    _, ddt, *_ = kernels.backward(inputs, states, ones, None, (False,), kernels.CHUNK)
    # the error of `softplus` at -15; small steps are nearly as exact as large ones
    torch.testing.assert_close(s.double(), F.softplus(dt.double(), threshold=1000), rtol=1.1e-6, atol=0)
    torch.testing.assert_close(ddt.double(), torch.sigmoid(dt.double()), rtol=1.1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_combine_sums_the_directions_under_one_gate(k: int, gated: bool) -> None:
    g = torch.Generator().manual_seed(0)
    b, length, e, scale = 2, 35, 72, 0.5
    s = torch.randn(k, b, length, e, generator=g).to(DEVICE)
    # the gate is the second half of a projection
    z = torch.randn(b, length, 2 * e, generator=g).to(DEVICE)[..., e:] if gated else None
    dy = torch.randn(b, length, e, generator=g).to(DEVICE)

    exact_s = s.double().requires_grad_()
    exact_z = None if z is None else z.double().requires_grad_()
    exact = scale * exact_s.sum(0) * (1.0 if exact_z is None else F.silu(exact_z))
    exact.backward(dy.double())
    ds, dz = kernels.combine_backward(dy, s, z, scale)
    _assert_close("y", kernels.combine(s, z, scale), exact, 2e-6)
    _assert_close("ds", ds, exact_s.grad[0], 2e-6)
    if exact_z is None:
        assert dz.shape == (0,)
    else:
        _assert_close("dz", dz, exact_z.grad, 2e-6)


def test_an_unsupported_chunk_is_refused() -> None:
    tensors = Case(length=1).tensors()
    with pytest.raises(ValueError, match="chunk is 5; it must be 8, the tokens between kept states, or 0"):
        kernels.forward(ScanInputs(*tensors.values(), None), (False, True), 5)
