"""The causal convolution against its definition, in both directions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.ops import causal_conv1d


def _by_hand(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    taps = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(taps):
            back = taps - 1 - j
            source = t + back if reverse else t - back
            if 0 <= source < x.shape[1]:
                y[:, t] = y[:, t] + weight[:, j] * x[:, source]
    return y + bias


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (9, 4), (5, 3)])
def test_output_and_gradients_equal_the_definition(reverse: bool, length: int, taps: int) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3), (3, taps), (3,)]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours, theirs = causal_conv1d(*inputs, reverse=reverse), _by_hand(*inputs, reverse)
    torch.testing.assert_close(ours, theirs)
    out_grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, out_grad), torch.autograd.grad(theirs, inputs, out_grad), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_token_sees_past_itself(reverse: bool) -> None:
    x = torch.randn(1, 6, 2, requires_grad=True)
    causal_conv1d(x, torch.randn(2, 4), torch.zeros(2), reverse=reverse)[:, 3].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == ([False] * 3 + [True] * 3 if reverse else [True] * 4 + [False] * 2)


def test_silu_is_applied_last() -> None:
    x, w, b = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3)
    torch.testing.assert_close(causal_conv1d(x, w, b, activation="silu"), F.silu(causal_conv1d(x, w, b)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(b, l, e\), \(e, k\), \(e\)"):
        causal_conv1d(torch.randn(1, 5, 3), torch.randn(4, 4), torch.randn(4))
