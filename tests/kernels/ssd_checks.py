"""Inputs of the state-space-dual scan, and its results against the reference."""

from typing import Any

import torch
from torch import Tensor

from tests.kernels.kernel_checks import DEVICE, assert_close
from vimscale.kernels.backend import Backend
from vimscale.ops import bidirectional_ssd_with_state, ssd_scan_with_state

BOUND = {torch.float32: 1e-5}
"""Tighter than TOLERANCE: relative to the largest value of each tensor."""
SHAPE = 2, 9, 3, 5, 4  # b, l, h, p, n


def inputs(
    shape: tuple[int, ...] = SHAPE, k: tuple[int, ...] = (), j: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """Random inputs in fp64 with steps around 0.1; `k` and `j` are the leading axes of directions."""
    b, length, h, p, n = shape
    j = k if j is None else j
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    return {
        "x": draw(*j, b, length, h, p),
        "dt": draw(*k, b, length, h) - 2,
        "A_log": draw(*k, h) / 2 + 0.5,
        "B": draw(*j, b, length, n),
        "C": draw(*j, b, length, n),
        "D": draw(*k, h),
        "dt_bias": draw(*k, h) / 3,
        "initial_state": draw(*k, b, h, p, n),
    }


def with_both(tensors: dict[str, Tensor], dtype: torch.dtype, **arguments: Any) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every input; both outputs contribute to each gradient."""
    activations = {"x", "dt", "B", "C", "z"}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded = {name: t.to(dtype if name in activations else wide).requires_grad_() for name, t in tensors.items()}
    function = bidirectional_ssd_with_state if tensors["dt"].ndim == 4 else ssd_scan_with_state
    y, final = function(**rounded, **arguments)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).bfloat16().to(y)
    dfinal = torch.randn(final.shape, generator=g).to(final)
    found = torch.autograd.grad([y, final], list(rounded.values()), [dy, dfinal])
    named = {f"d{name}": t for name, t in zip(rounded, found, strict=True)}
    return {"y": y.detach(), "final": final.detach(), **named}


def agrees(
    backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, mode: str, left_out: tuple[str, ...] = (),
    packed: bool = False,
) -> None:  # fmt: skip
    """Check y, the final state and every gradient against the reference in fp64. Inputs are numbers of bf16."""
    k, j = {"both": ((2,), (2,)), "alike": ((2,), ())}.get(mode, ((), ()))
    tensors = {name: t for name, t in inputs(shape, k, j).items() if name not in left_out}
    tensors = {name: t.bfloat16().double() if t.ndim > 2 else t for name, t in tensors.items()}
    arguments: dict[str, Any] = {"reverse": mode == "reverse"} if not k else {}
    if packed:
        arguments["reset"] = (
            torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)).to(DEVICE[backend]) < 1 / 20
        )
    tensors = {name: t.to(DEVICE[backend]) for name, t in tensors.items()}
    exact = with_both(tensors, torch.float64, backend="reference", **arguments)
    assert_close(with_both(tensors, dtype, backend=backend, **arguments), exact, dtype, BOUND.get(dtype))
