"""Check the tensors that public functions are given; errors name the argument, what it is and what it must be."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Size, Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Named = Mapping[str, tuple[Tensor | None, str]]
_Facts = tuple[str, str, Size, torch.dtype, torch.device, bool]
"""Of a tensor: its name and axes, its shape, dtype and device, and whether it must be bool."""


def check_tensors(op: str, floating: _Named, boolean: _Named | None = None, *, alike: tuple[str, ...] = ()) -> None:
    """Check each tensor against its axes, e.g. {"x": (x, "b l e"), "weight": (weight, "e k")}.

    A letter stands for the same size everywhere, which the first tensor with that letter sets, "2e" for twice that
    size, "..." for any number of leading axes, and a number for itself. None passes. All tensors must be on one device,
    none may be empty, and those named in `alike` must have the same dtype.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    facts = [(name, axes, t.shape, t.dtype, t.device, False) for name, (t, axes) in floating.items() if t is not None]
    if boolean is not None:
        facts += [
            (name, axes, t.shape, t.dtype, t.device, True) for name, (t, axes) in boolean.items() if t is not None
        ]
    traced = torch.compiler.is_compiling() or {*map(type, facts[0][2])} - {int}  # symbols
    (_check if traced else _check_once)(op, tuple(facts), alike)


def _check(op: str, facts: tuple[_Facts, ...], alike: tuple[str, ...]) -> None:
    sizes: dict[str, int | Size] = {}
    first, _, _, _, expected_device, _ = facts[0]
    common = None
    for name, text, shape, dtype, device, boolean in facts:
        axes = text.split()
        dtypes = (torch.bool,) if boolean else _FLOATING
        if name in alike:
            dtypes = (common or dtype,) if dtype in _FLOATING else _FLOATING
            common = dtypes[0]
        if not _fits(shape, axes, sizes):
            known = [sizes.get(axis, axis) for axis in axes]
            here = ", ".join(", ".join(map(str, size)) if isinstance(size, Size) else str(size) for size in known)
            rule = f"({', '.join(axes)})" + (f", here ({here})" if here != ", ".join(axes) else "")
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}; it must be {rule}")
        if 0 in shape:
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}; none of ({', '.join(axes)}) may be 0")
        if dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op}: {name} is {str(dtype).removeprefix('torch.')}; it must be {wanted}")
        if device != expected_device:
            raise ValueError(f"{op}: {name} is on {device}; it must be on {expected_device}, where {first} is")


_check_once = lru_cache(maxsize=4096)(_check)
"""Training passes the same shapes again and again. The compiler traces `_check`: it warns about caches."""


def _fits(shape: Size, axes: list[str], sizes: dict[str, int | Size]) -> bool:
    """Whether `shape` has these axes. Adds the sizes of axes that it sees for the first time to `sizes`."""
    found: list[int | Size] = list(shape)
    if axes[0] == "...":
        leading = len(shape) - len(axes) + 1
        found = [shape[: max(leading, 0)], *shape[max(leading, 0) :]]
    if len(found) != len(axes):
        return False
    for axis, size in zip(axes, found, strict=True):
        if axis[0] == "2" and axis[1:].isalpha() and not isinstance(size, Size):
            axis, size = axis[1:], size // 2
        if size != (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)):
            return False
    return True


def wide(t: Tensor, x: Tensor) -> Tensor:
    """A parameter or state in the dtype of sums over x, fp32 (fp64 if x is fp64), and contiguous for the kernels."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of tensors of x's dtype stay in that dtype."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def images_of(reset: Tensor | None) -> Tensor | None:
    """(b, l) int32: the number of the image that each token belongs to, from the marks on first tokens."""
    return None if reset is None else reset.cumsum(1, dtype=torch.int32)
