"""Check the tensors that public functions are given; errors name the argument, what it is and what it must be."""

from collections.abc import Collection, Mapping

import torch
from torch import Size, Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Named = Mapping[str, tuple[Tensor | None, str]]


def check_tensors(op: str, floating: _Named, boolean: _Named | None = None, *, alike: Collection[str] = ()) -> None:
    """Check each tensor against its axes, e.g. {"x": (x, "b l e"), "weight": (weight, "e k")}.

    A letter stands for the same size everywhere, which the first tensor with that letter sets. "..." stands for any
    number of leading axes, and a number for itself. None passes. All tensors must be on one device, none may be empty,
    and those named in `alike` must have the same dtype.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    given = {name: given for name, given in {**floating, **(boolean or {})}.items() if given[0] is not None}
    sizes: dict[str, int | Size] = {}
    device, common = None, None
    for name, (tensor, text) in given.items():
        assert tensor is not None
        axes = text.split()
        dtypes = (torch.bool,) if boolean and name in boolean else _FLOATING
        if name in alike:
            dtypes = (common or tensor.dtype,) if tensor.dtype in _FLOATING else _FLOATING
            common = dtypes[0]
        device = device or tensor.device
        if not _fits(tensor.shape, axes, sizes):
            known = [sizes.get(axis, axis) for axis in axes]
            here = ", ".join(", ".join(map(str, size)) if isinstance(size, Size) else str(size) for size in known)
            rule = f"({', '.join(axes)})" + (f", here ({here})" if here != ", ".join(axes) else "")
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {rule}")
        if tensor.numel() == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; none of ({', '.join(axes)}) may be 0")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}")
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; it must be on {device}, where {next(iter(given))} is"
            )


def _fits(shape: Size, axes: list[str], sizes: dict[str, int | Size]) -> bool:
    """Whether `shape` has these axes. Adds the sizes of axes that it sees for the first time to `sizes`."""
    found: list[int | Size] = list(shape)
    if axes[0] == "...":
        leading = len(shape) - len(axes) + 1
        found = [shape[: max(leading, 0)], *shape[max(leading, 0) :]]
    if len(found) != len(axes):
        return False
    for axis, size in zip(axes, found, strict=True):
        if size != (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)):
            return False
    return True


def wide(t: Tensor, x: Tensor) -> Tensor:
    """A parameter or state in the dtype of sums over x, fp32 (fp64 if x is fp64), and contiguous for the kernels."""
    return t.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def images_of(reset: Tensor | None) -> Tensor | None:
    """(b, l) int32: the number of the image that each token belongs to, from the marks on first tokens."""
    return None if reset is None else reset.cumsum(1, dtype=torch.int32)
