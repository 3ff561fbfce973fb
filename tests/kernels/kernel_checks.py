"""Helpers for the kernel tests: fused backends, errors relative to the largest value, poisoned buffers, torch's rules
for ops, launches that are recorded instead of run, and tensors larger than the memory.
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vimscale.kernels import segment_choice
from vimscale.kernels.cases import TOLERANCE

FUSED: list[Literal["cpu", "triton"]] = ["cpu", "triton"]
DEVICE = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


Tensors = Sequence[Tensor] | Mapping[str, Tensor]


def assert_close(ours: Tensors, reference: Tensors, dtype: torch.dtype, bound: float | None = None) -> None:
    """Check that each of ours is within TOLERANCE (or `bound`) of its fp64 reference, relative to the reference's
    largest value.
    """
    bound = TOLERANCE[dtype] if bound is None else bound
    ours, reference = (dict(t if isinstance(t, Mapping) else enumerate(t)) for t in (ours, reference))
    assert ours.keys() == reference.keys()
    for name, a in ours.items():
        b = reference[name].double().cpu()
        assert a.shape == b.shape
        error = (a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error:.1e}"  # NaN fails too


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every buffer that is allocated without values with NaN (integers: -7), so that unwritten values show."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            buffer = make(*args, **kwargs)
            return buffer.fill_(float("nan") if buffer.is_floating_point() else -7)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _layout(t: Tensor) -> tuple[Any, ...]:
    """Ignores strides of axes of size one: they do not matter, not even to a compiler."""
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1]
    return t.dtype, t.shape, strides, t.storage_offset()


class OpRules(TorchDispatchMode):
    """Checks every call of a registered vimscale op while it is active: no output aliases an input or another output,
    not even if it is empty (torch refuses that, on any device); inputs keep their values, unless the op says that it
    writes them; and outputs have the layout that the op's fake implementation promises to a compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        """One op and its arguments for each combination of given tensors and other arguments."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "vimscale":
            return op(*args, **(kwargs or {}))
        assert not kwargs
        combination = tuple(a.ndim if isinstance(a, Tensor) else str(a) for a in args)
        self.calls.setdefault((op._opname, *combination), (op, *args))
        inputs = [t for t in args if isinstance(t, Tensor)]
        read = [a for a, argument in zip(args, op._schema.arguments, strict=True) if not argument.is_write]
        read = [t for t in read if isinstance(t, Tensor)]
        before = [t.clone() for t in read]
        result = op(*args)
        outputs = result if isinstance(result, tuple) else (result,)

        storages = [t.untyped_storage()._cdata for t in outputs]
        assert len({*storages}) == len(storages), f"{op}: two outputs have the same memory"
        assert not {*storages} & {t.untyped_storage()._cdata for t in inputs}, f"{op}: an output is an input"
        for t, value in zip(read, before, strict=True):
            torch.testing.assert_close(t, value, rtol=0, atol=0, equal_nan=True)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for t, promised in zip(outputs, fake if isinstance(fake, tuple) else (fake,), strict=True):
            ours, theirs = _layout(t), _layout(promised)
            assert ours == theirs, f"{op}: {ours} is not {theirs}"
        return result


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid and its compile-time constants."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Record Triton launches in the returned list instead of running them."""
    from vimscale.kernels import selective_scan_triton

    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        launches.append(Launch(kernel.fn.__name__, grid, constants))

    monkeypatch.setattr(type(selective_scan_triton.selective_scan_fwd_kernel), "run", record)
    return launches


def cut(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Cut every Triton scan into segments of that many chunks, as if it were long."""
    monkeypatch.setattr(segment_choice, "segments", lambda k, b, length, e, n: ceil(length / (8 * chunks)))


def untouched(numbers: int, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor that can be larger than the memory: on a CPU, pages that are never written do not exist."""
    if device != "cpu":
        return torch.empty(numbers, dtype=dtype, device=device)
    no_reserve = 0x4000  # MAP_NORESERVE, for which Python's mmap has no name
    pages = mmap.mmap(-1, numbers * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=dtype)
