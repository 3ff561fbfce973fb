"""How our functions become PyTorch ops: registered for compilers, called as plain functions in eager mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import choose

AT_RUN_TIME = "at run time"
"""As an op's last argument: whatever backend it would take for its first one. For programs that run elsewhere."""
_PLAIN = frozenset({Tensor, nn.Parameter, NoneType, bool, int, float, str, tuple, list})
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_registered = False


@contextmanager
def registered() -> Iterator[None]:
    """Inside the context, every op goes through PyTorch's dispatcher; dispatch modes see it as one operation."""
    global _registered
    before, _registered = _registered, True
    try:
        yield
    finally:
        _registered = before


class Op:
    """A function of tensors as the op `vimscale::name`.

    The way through the dispatcher to a Python op and back costs more than small kernels run. So eager calls take the
    function itself, inside one `autograd.Function`. Whatever must not look inside gets the registered op: compilers,
    export, tracers, fake and meta tensors, other subclasses of Tensor, and transforms such as vmap.
    """

    def __init__(self, name: str, function: Callable[..., Any], shown: int, mutates: tuple[str, ...]):
        self.function, self.shown = function, shown

        @wraps(function)
        def resolved(*arguments: Any) -> Any:
            if arguments[-1] == AT_RUN_TIME:
                arguments = (*arguments[:-1], choose(None, name, arguments[0]))
            return function(*arguments)

        self.registered = torch.library.custom_op(f"vimscale::{name}", resolved, mutates_args=mutates)
        self.register_fake = self.registered.register_fake
        self._eager: type[torch.autograd.Function]

    def register_autograd(self, vjp: Callable[..., tuple[Any, ...]], setup: Callable[..., None]) -> None:
        """`setup(ctx, inputs, output)` gets all outputs of the function, `vjp(ctx, *gradients)` the gradients of those
        that are shown. There are no second derivatives.
        """
        shown, function = self.shown, self.function

        def registered_vjp(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return vjp(ctx, *gradients[:shown])

        self.registered.register_autograd(registered_vjp, setup_context=setup)

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                setup(ctx, arguments, output)
                return _first(output, shown)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return once(ctx, *gradients) if torch.is_grad_enabled() else vjp(ctx, *gradients)

        once = once_differentiable(vjp)
        Eager.__name__ = Eager.__qualname__ = self.registered._name
        self._eager = Eager

    def __call__(self, *arguments: Any) -> Any:
        """The shown outputs, with gradients: one tensor, or several."""
        if _needs_dispatcher(arguments):
            return _first(self.registered(*arguments), self.shown)
        if torch.is_grad_enabled():
            return self._eager.apply(*arguments)
        return _first(self.function(*arguments), self.shown)

    def inside(self, *arguments: Any) -> Any:
        """All outputs, for use inside another op or its gradient: without gradients."""
        return (self.registered if _needs_dispatcher(arguments) else self.function)(*arguments)


def torch_op(name: str, *, shown: int = 1, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Make a function an `Op`. Callers see its first `shown` outputs; the others are kept for the gradient. `mutates`
    names the arguments that it writes.
    """
    return lambda function: Op(name, function, shown, mutates)


def _first(output: Any, shown: int) -> Any:
    if isinstance(output, Tensor):
        return output
    return output[0] if shown == 1 else output[:shown]


def _needs_dispatcher(arguments: tuple[Any, ...]) -> bool:
    return (
        torch.compiler.is_compiling()
        or _registered
        or not _PLAIN.issuperset(map(type, arguments))
        or arguments[0].is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(_PROXY) is not None
    )
