"""Ranks that share a sequence compute what one rank computes: values, and all gradients."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.thread_ranks import ThreadContext, on_ranks
from vimscale.kernels.bimamba_inner import bimamba_inner

FORWARD, REVERSE = False, True


def _parameters(k: int, e: int, n: int, r: int, w: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)

    def draw(*size: int, scale: float = 0.3) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(dtype)

    A_log = torch.rand(k, e, n, generator=g, dtype=torch.float64).mul(2).to(dtype)
    return [
        draw(k, e, w), draw(k, e), draw(k, r + 2 * n, e), draw(k, e, r), draw(k, e, scale=1.0) - 2, A_log, draw(k, e),
    ]  # fmt: skip


def _stretches(length: int, ranks: int) -> list[slice]:
    return [slice(length * i // ranks, length * (i + 1) // ranks) for i in range(ranks)]


def _outcome(
    xz: Tensor, parameters: list[Tensor], dy: Tensor, reverse: Sequence[bool], recompute: bool, backend: str,
    context: ThreadContext | None = None,
) -> list[Tensor]:  # fmt: skip
    """y and the gradients of xz and of the parameters."""
    leaves = [t.clone().requires_grad_() for t in (xz, *parameters)]
    y = bimamba_inner(*leaves, reverse=reverse, recompute=recompute, backend=backend, context=context)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves)]


def _shared(
    ranks: int, xz: Tensor, parameters: list[Tensor], dy: Tensor, reverse: Sequence[bool], recompute: bool,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    stretches = _stretches(xz.shape[1], ranks)

    def work(context: ThreadContext) -> list[Tensor]:
        own = stretches[context.rank]
        return _outcome(xz[:, own], parameters, dy[:, own], reverse, recompute, backend, context)

    found = on_ranks(ranks, work)
    y, dxz, *of_parameters = (list(each) for each in zip(*found, strict=True))
    return [torch.cat(y, 1), torch.cat(dxz, 1), *(torch.stack(each).sum(0) for each in of_parameters)]


def _check(
    backend: str, dtype: torch.dtype, tolerance: float, ranks: int, reverse: Sequence[bool], recompute: bool,
    shape: tuple[int, int, int] = (2, 41, 24),
) -> None:  # fmt: skip
    (b, length, e), n, r, w = shape, 4, 3, 4
    parameters = _parameters(len(reverse), e, n, r, w, torch.float64 if dtype == torch.float64 else torch.float32)
    g = torch.Generator().manual_seed(0)
    xz = torch.randn(b, length, 2 * e, generator=g).to(dtype)
    dy = torch.randn(b, length, e, generator=g).to(dtype)
    expected = _outcome(xz, parameters, dy, reverse, recompute, backend)
    for found, single in zip(_shared(ranks, xz, parameters, dy, reverse, recompute, backend), expected, strict=True):
        error = (found.double() - single.double()).abs().max() / single.double().abs().max()
        assert error <= tolerance


BOTH = (FORWARD, REVERSE)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("reverse", [BOTH, (FORWARD,), (REVERSE,)], ids=["both", "forward", "reverse"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("cpu", torch.float32, 1e-5), ("cpu", torch.bfloat16, 2e-2)],
)
def test_ranks_compute_what_one_does(
    backend: str, dtype: torch.dtype, tolerance: float, ranks: int, reverse: tuple[bool, ...], recompute: bool
) -> None:
    _check(backend, dtype, tolerance, ranks, reverse, recompute)


@pytest.mark.parametrize("reverse", [BOTH, pytest.param((REVERSE,), marks=pytest.mark.slow)])
def test_triton_ranks_compute_what_one_does(reverse: tuple[bool, ...]) -> None:
    _check("triton", torch.float32, 1e-5, 2, reverse, recompute=False, shape=(1, 19, 8))


def test_one_tap_needs_no_neighbors() -> None:
    parameters = _parameters(2, 8, 4, 2, 1, torch.float64)
    g = torch.Generator().manual_seed(0)
    xz, dy = (torch.randn(1, 9, size, generator=g, dtype=torch.float64) for size in (16, 8))
    arguments = (xz, parameters, dy, (FORWARD, REVERSE), False, "reference")
    for found, single in zip(_shared(3, *arguments), _outcome(*arguments), strict=True):
        torch.testing.assert_close(found, single, rtol=1e-12, atol=1e-12)


def test_a_stretch_shorter_than_the_halo_is_refused() -> None:
    parameters = _parameters(2, 8, 4, 2, 4, torch.float32)

    def work(context: ThreadContext) -> Tensor:
        return bimamba_inner(torch.randn(1, 2, 16), *parameters, context=context)

    with pytest.raises(ValueError, match="a stretch of 2 tokens is too short: a convolution of 4 taps needs 3"):
        on_ranks(2, work)
