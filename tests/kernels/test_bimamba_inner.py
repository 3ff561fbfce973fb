"""bimamba_inner against its parts combined with flips, and what it keeps for the backward pass."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, assert_close, poison
from vimscale.kernels import bimamba_inner as module
from vimscale.ops import bimamba_inner, causal_conv1d, selective_scan

NAMES = ("xz", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D")
BOTH = (False, True)


def _inputs(
    b: int = 2,
    length: int = 9,
    e: int = 6,
    n: int = 3,
    r: int = 2,
    *,
    directions: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    k, w = directions, 4
    g = torch.Generator().manual_seed(0)
    shapes = [(b, length, 2 * e), (k, e, w), (k, e), (k, r + 2 * n, e), (k, e, r), (k, e), (k, e, n), (k, e)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[3] *= e**-0.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype if i == 0 else wide).requires_grad_() for i, t in enumerate(tensors)]


def _by_parts(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    reverse: Sequence[bool],
) -> Tensor:
    """As in the published code: the reverse direction is the forward one on flipped tokens, flipped back."""
    x, z = xz.chunk(2, dim=-1)
    A = -torch.exp(A_log)
    total = torch.zeros_like(x)
    for i, backwards in enumerate(reverse):
        tokens, gate = (x.flip(1), z.flip(1)) if backwards else (x, z)
        tokens = causal_conv1d(tokens, conv_weight[i], conv_bias[i], activation="silu")
        dt, B, C = F.linear(tokens, x_proj[i]).split([dt_proj.shape[-1], A.shape[-1], A.shape[-1]], dim=-1)
        y = selective_scan(tokens, F.linear(dt, dt_proj[i]), A[i], B, C, D[i], gate, dt_bias[i])
        total = total + (y.flip(1) if backwards else y)
    return total / len(reverse)


def _results(inputs: list[Tensor], y: Tensor) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reverse", [BOTH, (False,), (True,)], ids=str)
def test_bimamba_inner_equals_its_parts(reverse: tuple[bool, ...], recompute: bool) -> None:
    inputs = _inputs(directions=len(reverse))
    ours = _results(inputs, bimamba_inner(*inputs, reverse=reverse, recompute=recompute))
    theirs = _results(inputs, _by_parts(*inputs, reverse))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"fuse": "sum"}, {"gated": False}, {"reset": True}], ids=str)
def test_recompute_gives_the_same_results(options: dict[str, Any]) -> None:
    inputs = _inputs()
    if "reset" in options:
        options = {"reset": torch.zeros(2, 9, dtype=torch.bool).index_fill_(1, torch.tensor([0, 4, 5]), True)}
    kept, rebuilt = (
        _results(inputs, bimamba_inner(*inputs, recompute=recompute, **options)) for recompute in (False, True)
    )
    for name in kept:
        torch.testing.assert_close(rebuilt[name], kept[name], rtol=1e-10, atol=1e-11)


def test_packed_images_do_not_see_each_other() -> None:
    inputs = _inputs(1, 10)
    reset = torch.zeros(1, 10, dtype=torch.bool)
    reset[0, [0, 4]] = True
    packed = bimamba_inner(*inputs, reset=reset)
    alone = [bimamba_inner(inputs[0][:, part], *inputs[1:]) for part in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_equals_the_reference_with_gradients(
    dtype: torch.dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(2, 63, 40, 8, 5, dtype=dtype)
    if dtype != torch.float32:  # products are rounded too, so compare with a reference that has the same roundings
        exact = _results(inputs, bimamba_inner(*inputs, recompute=recompute, backend="reference"))
    else:
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = _results(wide, bimamba_inner(*wide, recompute=recompute))
    poison(monkeypatch)
    ours = _results(inputs, bimamba_inner(*inputs, recompute=recompute, backend="cpu"))
    assert ours["y"].dtype == dtype
    if dtype == torch.float32:
        assert_close(ours, exact, dtype)
    else:
        for name in ours:
            off = (ours[name].double() - exact[name].double()).abs().max() / exact[name].double().abs().max()
            assert off < 2**-5, name  # a projection that is rounded the other way changes everything after it


def test_triton_equals_the_reference_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [t.detach().to(DEVICE["triton"]).requires_grad_() for t in _inputs(1, 11, 24, 4, 3, dtype=torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = _results(wide, bimamba_inner(*wide))
    poison(monkeypatch)
    assert_close(_results(inputs, bimamba_inner(*inputs, backend="triton")), exact, torch.float32)


def test_recompute_keeps_only_the_input_and_the_projections() -> None:
    def kept(recompute: bool) -> float:
        """Saved values per token and channel, in tensors that grow with the number of tokens."""
        inputs, found = _inputs(2, 64, 32, 4, 2, dtype=torch.float32), {}

        def note(t: Tensor) -> Tensor:
            if t.numel() >= 2 * 64 * 20:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            bimamba_inner(*inputs, recompute=recompute)
        return sum(found.values()) / (2 * 64 * 32)

    # xz 2, projections 2 (r + 2n) / e
    assert kept(recompute=True) == 2 + 2 * 10 / 32
    # plus the outputs of the convolution and the scan for both directions; dt is rebuilt
    assert kept(recompute=False) == kept(recompute=True) + 2 * 2


def test_gradients_pass_gradcheck() -> None:
    inputs = _inputs(1, 4, 2, 2, 1)
    assert torch.autograd.gradcheck(bimamba_inner, inputs)


def test_the_op_passes_opcheck() -> None:
    inputs = _inputs(dtype=torch.float32)
    for keep in (False, True):
        torch.library.opcheck(module._inner.registered, (*inputs, None, [False, True], 0.5, True, keep, "cpu"))


def test_bimamba_inner_compiles_into_one_graph() -> None:
    inputs = _inputs(dtype=torch.float32)
    for recompute in (False, True):

        def loss(*tensors: Tensor, recompute: bool = recompute) -> Tensor:
            return bimamba_inner(*tensors, recompute=recompute).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
        eager = loss(*inputs)
        torch.testing.assert_close(compiled, eager)
        pairs = zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_autocast_does_not_apply_inside() -> None:
    inputs = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bimamba_inner(*inputs)
    assert torch.equal(inside, bimamba_inner(*inputs))


def test_errors_name_the_bad_input() -> None:
    xz, *parameters = _inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="bimamba_inner: fuse 'max' is not sum or mean"):
        bimamba_inner(xz, *parameters, fuse="max")
    with pytest.raises(ValueError, match=r"xz \(2, 9, 11\) has an odd last axis; it must be \(b, l, 2e\)"):
        bimamba_inner(xz[..., :11], *parameters)
    with pytest.raises(
        ValueError, match=r"conv_weight has shape \(2, 6, 4\); it must be \(1, e, w\), here \(1, 6, w\)"
    ):
        bimamba_inner(xz, *parameters, reverse=(True,))
    with pytest.raises(ValueError, match=r"x_proj has shape \(2, 7, 6\); it must be \(2, 8, e\), here \(2, 8, 6\)"):
        bimamba_inner(xz, *parameters[:2], parameters[2][:, :7], *parameters[3:])
