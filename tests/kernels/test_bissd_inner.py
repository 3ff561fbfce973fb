"""bissd_inner against its parts combined with flips, and what it keeps for the backward pass."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, assert_close, poison
from vimscale.kernels import scan_gate_triton
from vimscale.ops import bissd_inner, causal_conv1d, ssd_scan

NAMES = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
BOTH, W = (False, True), 3
WAYS = [
    pytest.param(BOTH, BOTH, id="separate"),
    pytest.param(BOTH, (False,), id="one convolution"),
    pytest.param((True,), (True,), id="reverse"),
    pytest.param((True,), (False,), id="reverse, convolved forward"),
]


def _inputs(
    b: int = 2, length: int = 9, h: int = 3, p: int = 2, n: int = 4, *, scans: int = 2, convolutions: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:  # fmt: skip
    g, e = torch.Generator().manual_seed(0), h * p
    channels = e + 2 * n
    shapes = [(b, length, e + channels + h), (convolutions, channels, W), (convolutions, channels)]
    shapes += [(scans, h)] * 3 + [(e,)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype if i == 0 else wide).requires_grad_() for i, t in enumerate(tensors)]


def _by_parts(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, reverse: Sequence[bool], conv_reverse: Sequence[bool],
) -> Tensor:  # fmt: skip
    """Walks backward by flipping tokens."""
    e, h = len(norm_weight), D.shape[1]
    z, before, dt = zxbcdt.split([e, zxbcdt.shape[-1] - e - h, h], dim=-1)

    def turned(t: Tensor, backwards: bool) -> Tensor:
        return t.flip(1) if backwards else t

    total = torch.zeros_like(z)
    for i, backwards in enumerate(reverse):
        own = min(i, len(conv_reverse) - 1)
        way = conv_reverse[own]
        xbc = turned(causal_conv1d(turned(before, way), conv_weight[own], conv_bias[own], activation="silu"), way)
        n = (xbc.shape[-1] - e) // 2
        x, B, C = turned(xbc, backwards).split([e, n, n], dim=-1)
        x = x.unflatten(-1, (h, -1))
        y = ssd_scan(x, turned(dt, backwards), A_log[i], B, C, D[i], dt_bias=dt_bias[i])
        total = total + turned(y.flatten(2), backwards)
    return F.rms_norm(total / len(reverse) * F.silu(z), (e,), norm_weight, eps=1e-5)


def _results(inputs: list[Tensor], y: Tensor) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("reverse", "conv_reverse"), WAYS)
def test_bissd_inner_equals_its_parts(
    reverse: tuple[bool, ...], conv_reverse: tuple[bool, ...], recompute: bool
) -> None:
    inputs = _inputs(scans=len(reverse), convolutions=len(conv_reverse))
    options: dict[str, Any] = {"reverse": reverse, "conv_reverse": conv_reverse, "recompute": recompute}
    ours = _results(inputs, bissd_inner(*inputs, **options))
    theirs = _results(inputs, _by_parts(*inputs, reverse, conv_reverse))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10)


def test_packed_images_do_not_see_each_other() -> None:
    inputs = _inputs(1, 10)
    reset = torch.zeros(1, 10, dtype=torch.bool)
    reset[0, [0, 4]] = True
    packed = bissd_inner(*inputs, reset=reset)
    alone = [bissd_inner(inputs[0][:, part], *inputs[1:]) for part in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("convolutions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_equals_the_reference_with_gradients(
    dtype: torch.dtype, convolutions: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 x 63 tokens are four items of the norm's backward pass, the last of them incomplete
    inputs = _inputs(2, 63, 5, 9, 12, convolutions=convolutions, dtype=dtype)
    options: dict[str, Any] = {"conv_reverse": BOTH[:convolutions], "recompute": recompute}
    if dtype != torch.float32:  # what the convolution writes is rounded too, so compare with the same roundings
        exact = _results(inputs, bissd_inner(*inputs, **options, backend="reference"))
    else:
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = _results(wide, bissd_inner(*wide, **options))
    poison(monkeypatch)
    ours = _results(inputs, bissd_inner(*inputs, **options, backend="cpu"))
    assert ours["y"].dtype == dtype
    if dtype == torch.float32:
        assert_close(ours, exact, dtype)
    else:
        for name in ours:
            off = (ours[name].double() - exact[name].double()).abs().max() / exact[name].double().abs().max()
            assert off < 2**-5, name  # a number that is rounded the other way changes everything after it


@pytest.mark.parametrize("convolutions", [1, 2])
def test_triton_equals_the_reference_with_gradients(convolutions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_gate_triton, "PROGRAMS", 4)  # three tokens each, the last one less
    inputs = _inputs(1, 11, 3, 8, 4, convolutions=convolutions, dtype=torch.float32)
    inputs = [t.detach().to(DEVICE["triton"]).requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    options: dict[str, Any] = {"conv_reverse": BOTH[:convolutions]}
    exact = _results(wide, bissd_inner(*wide, **options))
    poison(monkeypatch)
    assert_close(_results(inputs, bissd_inner(*inputs, **options, backend="triton")), exact, torch.float32)


def test_recompute_keeps_only_the_input_and_a_number_per_token() -> None:
    b, length, h, p, n = 2, 64, 4, 16, 8
    e = h * p

    def kept(recompute: bool) -> int:
        """Numbers per token, in tensors that have tokens."""
        inputs, found = _inputs(b, length, h, p, n, dtype=torch.float32), {}

        def note(t: Tensor) -> Tensor:
            if (b, length) in zip(t.shape, t.shape[1:], strict=False):
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            bissd_inner(*inputs, recompute=recompute)
        return sum(found.values()) // (b * length)

    assert kept(recompute=True) == 2 * e + 2 * n + h + 1
    # the outputs of two convolutions, and of the scans together
    assert kept(recompute=False) == kept(recompute=True) + 2 * (e + 2 * n) + e


def test_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(bissd_inner, _inputs(1, 4, 2, 2, 1))


@pytest.mark.slow
def test_bissd_inner_compiles_into_one_graph() -> None:
    inputs = _inputs(dtype=torch.float32)

    def loss(*tensors: Tensor) -> Tensor:
        return bissd_inner(*tensors, recompute=False).square().sum()

    compiled, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(compiled, eager)
    pairs = zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_autocast_does_not_apply_inside() -> None:
    inputs = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bissd_inner(*inputs)
    assert torch.equal(inside, bissd_inner(*inputs))


def test_errors_name_the_bad_input() -> None:
    zxbcdt, *parameters = _inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="bissd_inner: fuse 'max' is not sum or mean"):
        bissd_inner(zxbcdt, *parameters, fuse="max")
    with pytest.raises(ValueError, match=r"zxbcdt \(2, 9, 22\) and 2 convolutions of 14 channels, with 2 directions"):
        bissd_inner(zxbcdt[..., :22], *parameters)
    with pytest.raises(ValueError, match=r"D has shape \(2, 2\); it must be \(2, h\), here \(2, 3\)"):
        bissd_inner(zxbcdt, *parameters[:4], parameters[4][:, :2], parameters[5])
