"""Add and norm against the definitions."""

from typing import Literal

import pytest
import torch

from vimscale.ops import add_norm


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_output_and_gradients_equal_the_definition(kind: Literal["rms", "layer"], with_residual: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 5), (5,), (5,)]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, residual, weight, bias = inputs
    normed, total = add_norm(x, residual if with_residual else None, weight, bias, kind=kind, eps=1e-3)
    expected = x + residual if with_residual else x + 0
    centred = expected - expected.mean(-1, keepdim=True) if kind == "layer" else expected
    hand = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, hand)
    used = inputs if with_residual else [x, weight, bias]
    out_grad = torch.randn_like(normed)
    ours = torch.autograd.grad((normed * out_grad).sum() + total.pow(2).sum(), used)
    theirs = torch.autograd.grad((hand * out_grad).sum() + expected.pow(2).sum(), used)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_residual_stays_fp32_while_the_output_follows_x() -> None:
    x = torch.randn(2, 3, 8).bfloat16()
    normed, residual = add_norm(x, torch.randn(2, 3, 8), torch.ones(8))
    assert (normed.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
