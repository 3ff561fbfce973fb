"""Count what a device is given to do: operations of torch that write elements, and launches of Triton kernels.

Counts on any machine. Without a GPU, Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1 and
VIMSCALE_BACKEND=triton), and `benchmarks.launches` lists where a CPU's operations differ from a GPU's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, Literal
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

_EMPTY = frozenset(["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"])
_NOTHING_TO_DO = frozenset(
    ["_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "record_stream", "is_pinned", "is_same_size"]
)
"""Operations of aten that are not views and still give the device nothing to do."""

Ops = Counter[tuple[str, str]]
"""How often each operation ran, by (phase, operation)."""


class DeviceOps(TorchDispatchMode):
    """Counts the device operations of this thread, and of the backward passes that it starts. Enter it by `counted`.

    An operation of torch counts as one, even if a GPU needs several kernels for it: fused and `_foreach_` optimizers,
    sorts, products that split a sum, the gradient of a convolution. Casts by autocast, accumulations of gradients,
    collectives and reads by the host count. Views, empty tensors and operations that write no element do not.
    """

    def __init__(self, zeroed: bool) -> None:
        """`zeroed`: new tensors hold zeros, for kernels that are counted and do not run."""
        super().__init__()
        self.ops: Ops = Counter()
        self._zeroed = zeroed
        self._phases: list[str | None] = [""]
        self._parent = ""
        """The operation of torch that is made of those that run now."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, name = _kind(func)
        if kind == "composite":
            device = next(argument.device.type for argument in args if isinstance(argument, Tensor))
            key = torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
            before, parent = self.ops.total(), self._parent
            self._parent = parent or (f"{name}: " if func.namespace == "aten" else "")
            with self:  # calling `func` itself would come back here
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
            self._parent = parent
            if func.namespace == "aten" and self.ops.total() == before:  # it calls a library instead
                self.add(name)
            return result
        result = func(*args, **kwargs)
        if kind == "work" and _gives_work(func, args, kwargs, result):
            self.add(name)
        elif kind == "empty" and self._zeroed:
            result.zero_()
        return result

    def add(self, operation: str) -> None:
        if self._phases[-1] is not None:
            self.ops[self._phases[-1], self._parent + operation] += 1

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Count what follows under `name`; with None, do not count it."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def phased(self, name: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted under `name` whenever it runs."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run


@cache
def _kind(func: Any) -> tuple[Literal["composite", "empty", "nothing", "work"], str]:
    """What an operation is for a device, and its name. composite: it gives the device the operations that it is made
    of, such as zeros and a copy for the gradient of a slice.
    """
    name = func._schema.name.removeprefix("aten::")
    if func.namespace == "vimscale":
        return "composite", name
    if func.namespace not in ("aten", "c10d") or func.is_view or torch.Tag.inplace_view in func.tags:
        return "nothing", name
    if name in _EMPTY or name in _NOTHING_TO_DO:
        return "empty" if name in _EMPTY else "nothing", name
    if name.endswith("_backward") or name == "constant_pad_nd":
        keys = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
        has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
        if any(map(has_kernel, keys)) and not has_kernel("CPU"):
            return "composite", name
    return "work", name


def _gives_work(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if written:
        return any(t.numel() for t in written)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func._schema.returns:  # a number that the host reads
        return bool(given)
    return any(t.numel() for t in given)  # `_foreach_add_` returns nothing


@contextmanager
def counted(*, run_kernels: bool = True) -> Iterator[DeviceOps]:
    """Count device operations inside the context, those of backward passes included.

    Without `run_kernels`, interpreted kernels are counted and not run, which takes milliseconds instead of seconds: all
    new tensors hold zeros, so results are finite, and no count depends on more than that.
    """
    counter = DeviceOps(zeroed=not run_kernels)
    interpreted = GridExecutor.__call__

    def interpret(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        counter.add(executor.fn.__name__)
        if run_kernels:
            with counter.phase(None):  # the interpreter's own operations
                interpreted(executor, *args, **kwargs)

    def launched(metadata: Any) -> None:
        counter.add(metadata.get()["name"])

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(launched)
    try:
        with mock.patch.object(GridExecutor, "__call__", interpret), counter:
            yield counter
    finally:
        hooks.remove(launched)


def profiled(run: Callable[[], object]) -> int:
    """What the profiler of a GPU sees during `run`: kernels, copies and fills."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.self_device_time_total > 0)
