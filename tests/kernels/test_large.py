"""Kernels beyond the limits of 32-bit offsets and of a GPU's grid: far strides, and launches that are only recorded."""

from collections.abc import Callable, Iterable
from math import prod

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, FUSED, assert_close, record_launches, untouched
from vimscale.kernels import (
    causal_conv1d_triton,
    large,
    scan_gate_triton,
    scan_rows_triton,
    selective_scan_bwd_triton,
    selective_scan_triton,
)
from vimscale.kernels.backend import Backend
from vimscale.kernels.scan_inputs import ScanInputs
from vimscale.ops import add_norm, bidirectional_conv1d, bidirectional_scan, bimamba_inner, selective_scan


def _draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class FarTokens:
    """Tensors (b, l, width) with rows 2^28 elements apart: token 8 is 2^31 from token 0. There is room before the first
    row, so that an offset that wraps around reads other numbers instead of other memory.
    """

    STRIDE, TOKENS, WIDTH = 2**28, 9, 256

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.memory = untouched(2**31 + (self.TOKENS - 1) * self.STRIDE + self.WIDTH, dtype, device)
        self.used = 0

    def __call__(self, near: Tensor) -> Tensor:
        b, length, width = near.shape
        assert length == self.TOKENS
        start, self.used = 2**31 + self.used, self.used + b * width
        assert self.used <= self.WIDTH
        far = self.memory.as_strided(near.shape, (width, self.STRIDE, 1), start)
        return far.copy_(near)


@pytest.mark.parametrize("backend", FUSED)
def test_tokens_can_be_2_to_the_31_elements_apart(backend: Backend) -> None:
    """In every tensor that has tokens, including the gradient of the output. CPU kernels read fp32 in place."""
    device, dtype = DEVICE[backend], torch.float32 if backend == "cpu" else torch.bfloat16
    far = FarTokens(dtype, device)
    b, length, e, n = 1, far.TOKENS, 8, 4
    near = [_draw(b, length, width, seed=i).to(device, dtype) for i, width in enumerate((e, e, n, n, e, e))]
    A, D, weight, bias = (t.to(device) for t in (-_draw(e, n).exp(), _draw(e), _draw(2, e, 3), _draw(2, e)))

    def results(tensors: Iterable[Tensor], backend: Backend) -> list[Tensor]:
        x, dt, B, C, z, dy = (t.detach().requires_grad_() for t in tensors)
        both = [t[None].expand(2, *t.shape) for t in (x, dt, A, B, C, D)]
        scanned = bidirectional_scan(*both, backend=backend)
        gated = torch.ops.vimscale.combine(x.detach().contiguous()[None], z, 1.0, backend)
        taps = weight.detach().requires_grad_()
        convolved = bidirectional_conv1d(x, taps, bias, activation="silu", backend=backend)
        outputs = [scanned, gated, *convolved]
        return [*outputs, *torch.autograd.grad(outputs, [x, dt, B, C, z, taps], [dy.detach()] * 4)]

    exact = results((t.double() for t in near), "reference")
    assert_close(results(map(far, near), backend), exact, dtype)


@pytest.mark.slow
def test_the_large_form_of_every_kernel_equals_the_reference_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several images, blocks of channels and tiles of tokens, all numbered along one axis of the grid."""
    monkeypatch.setattr(large, "OFFSETS", 0)
    b, length, e, n, rank = 2, 9, 24, 4, 1
    for module, name, size in (
        (selective_scan_triton, "CHANNELS", 16),
        (selective_scan_bwd_triton, "CHANNELS", 16),
        (selective_scan_bwd_triton, "FEWER_CHANNELS", 16),
        (scan_rows_triton, "ROWS", 8),
        (scan_gate_triton, "TILE", (8, 16)),
        (causal_conv1d_triton, "CHANNELS", 16),
        (causal_conv1d_triton, "FORWARD_GROUPS", 2),
        (causal_conv1d_triton, "FORWARD_ROWS", 4),
        (causal_conv1d_triton, "BACKWARD_GROUPS", 2),
        (causal_conv1d_triton, "BACKWARD_TOKENS", (1, 2)),
        (causal_conv1d_triton, "BACKWARD_ROWS", (2, 1)),
    ):
        monkeypatch.setattr(module, name, size)
    shapes = [(b, length, 2 * e), (1, e, 3), (1, e), (1, rank + 2 * n, e), (1, e, rank), (1, e), (1, e, n), (1, e)]
    inputs = [_draw(*shape, seed=i).to(DEVICE["triton"]) for i, shape in enumerate(shapes)]
    reset = torch.tensor([[True] + 8 * [False], 4 * [False] + [True] + 4 * [False]], device=DEVICE["triton"])

    def results(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = bimamba_inner(*leaves, reset=reset, reverse=(True,), recompute=False, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, _draw(*y.shape).to(y))]

    assert_close(results(torch.float32, "triton"), results(torch.float64, "reference"), torch.float32)


def _mixer(b: int) -> None:
    """A mixer and its norm, forward and backward."""
    device, e, n = DEVICE["triton"], 2, 2
    shapes = [(b, 1, 2 * e), (2, e, 3), (2, e), (2, 1 + 2 * n, e), (2, e, 1), (2, e), (2, e, n), (2, e)]
    y = bimamba_inner(*(torch.zeros(shape, device=device, requires_grad=True) for shape in shapes), backend="triton")
    normed, _ = add_norm(y, y, torch.ones(e, device=device), backend="triton")
    normed.sum().backward()


def _on_meta(length: int, e: int) -> None:
    """Call every launcher whose kernel has token numbers, on one image without memory."""
    k, n, reverse = 2, 2, (False, True)
    x, B, A = (torch.empty(size, device="meta") for size in ((k, 1, length, e), (k, 1, length, n), (k, e, n)))
    D, weight = torch.empty(k, e, device="meta"), torch.empty(k, e, 3, device="meta")
    inputs = ScanInputs(x, x, A, B, B, D, None, None, None)
    _, _, states = selective_scan_triton.forward(inputs, reverse, selective_scan_triton.CHUNK)
    selective_scan_triton.backward(inputs, states, x, None, reverse, selective_scan_triton.CHUNK)
    scan_gate_triton.combine(x, x[0], 1.0)
    scan_gate_triton.combine_backward(x[0], x, x[0], 1.0)
    causal_conv1d_triton.forward(x[0], weight, D, None, reverse, True)
    causal_conv1d_triton.backward(x[0], weight, D, None, x, reverse, True)


@pytest.mark.parametrize(
    "launch", [lambda: _mixer(70_000), lambda: _on_meta(4_200_000, 8)], ids=["70,000 images", "4.2 million tokens"]
)
def test_no_launch_has_more_programs_on_an_axis_than_a_gpu_allows(
    launch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA allows 65,535 on the second and third axis; the interpreter does not check."""
    launches = record_launches(monkeypatch)
    launch()
    allowed = launches.copy()
    launches.clear()
    monkeypatch.setattr(large, "PROGRAMS", 2**31)
    launch()
    assert any(max(usual.grid[1:], default=1) > 65_535 for usual in launches)
    for ours, usual in zip(allowed, launches, strict=True):
        assert max(ours.grid[1:], default=1) <= 65_535, ours
        assert ours.grid[0] < 2**31, ours
        assert prod(ours.grid) == prod(usual.grid), ours
        assert ours.constants.get("LARGE", False) == (ours.grid != usual.grid), ours


def test_offsets_are_64_bit_only_if_an_image_has_2_to_the_31_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dense tensors count too: the outputs and gradients that the launchers allocate."""
    launches = record_launches(monkeypatch)
    for length, e, expected in ((2**20 - 8, 2**11, False), (2**20, 2**11, True)):
        launches.clear()
        _on_meta(length, e)
        # selective_scan_pack_kernel and selective_scan_unpack_kernel read and write rows of states, which are short;
        # scan_segments_chain_kernel has no tokens
        found = {
            launch.kernel: launch.constants["LARGE"]
            for launch in launches
            if not any(word in launch.kernel for word in ("pack", "chain"))
        }
        assert found == dict.fromkeys(
            [
                "scan_segments_fwd_kernel",
                "scan_segments_bwd_kernel",
                "selective_scan_fwd_kernel",
                "selective_scan_bwd_kernel",
                "scan_gate_fwd_kernel",
                "scan_gate_bwd_kernel",
                "causal_conv1d_fwd_kernel",
                "causal_conv1d_bwd_kernel",
            ],
            expected,
        )


@pytest.mark.gpu
def test_a_gpu_runs_batches_larger_than_an_axis_of_its_grid() -> None:
    b, length, e, n = 70_000, 9, 8, 4
    x, dt, z = (_draw(b, length, e, seed=i).cuda() for i in range(3))
    B, C = (_draw(b, length, n, seed=i).cuda() for i in (3, 4))
    A, D, weight, bias = (t.cuda() for t in (-_draw(e, n).exp(), _draw(e), _draw(2, e, 3), _draw(2, e)))

    def results(images: slice) -> list[Tensor]:
        inputs = [t[images].detach().requires_grad_() for t in (x, dt, B, C, z)]
        y = selective_scan(*inputs[:2], A, *inputs[2:4], D, inputs[4])
        outputs = [y, *bidirectional_conv1d(inputs[0], weight, bias), add_norm(inputs[0], None, D)[0]]
        return [*outputs, *torch.autograd.grad([o.sum() for o in outputs], inputs)]

    last = slice(b - 3, b)
    for ours, expected in zip(results(slice(None)), results(last), strict=True):
        assert torch.equal(ours[last], expected)
