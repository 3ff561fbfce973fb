"""The reference scan against the recurrence written out, in fp64, with the gradient of every input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.ops import selective_scan

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
    """The two lines of the paper, one token after another; backwards by walking the tokens backwards."""
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
def test_gradients_pass_a_numerical_check(reverse: bool) -> None:
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


def test_bf16_comes_out_as_bf16_and_is_summed_in_fp32() -> None:
    exact = _inputs(length=200)
    rounded = [t.detach().to(torch.bfloat16) for t in exact]
    rounded[2] = exact[2].detach().float()
    out = selective_scan(*rounded)
    wide = selective_scan(*(t.double() for t in rounded))
    assert out.dtype == torch.bfloat16
    # one rounding at the end: half a unit in the last of bf16's 8 bits
    torch.testing.assert_close(out.double(), wide, rtol=2**-8, atol=1e-6)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, dt, A, B, C, D, _, _ = _inputs()
    with pytest.raises(ValueError, match=r"B has shape \(2, 6, 5\); x and A ask for \(2, 7, 5\)"):
        selective_scan(x, dt, A, B[:, :6], C, D)


def test_saved_memory_does_not_grow_with_the_square_of_the_length() -> None:
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
