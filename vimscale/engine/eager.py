"""Keep out of a process what it does not use: torch's compiler if nothing is compiled, and MLflow.

Optimizers and custom ops mark their functions as "not to be compiled" on first use, which imports torch._dynamo,
torch._inductor, sympy and more: 1,500 modules, and most of the time that an engine takes to build.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.optim import Optimizer

from vimscale.engine.optim import AdamW


def _import_deepspeed() -> Any:
    """DeepSpeed, whose tuner imports MLflow wherever it is installed: 3.5 s of every rank's start, and a thread."""
    modules: dict[str, Any] = sys.modules
    hidden = "mlflow" not in modules
    if hidden:
        modules["mlflow"] = None
    try:
        import deepspeed

        return deepspeed
    finally:
        if hidden:
            del modules["mlflow"]


deepspeed = _import_deepspeed()


def without_compiler() -> None:
    """Let torch call these functions as they are, and DeepSpeed import its unused optimizers uncompiled. Call it before
    `deepspeed.initialize`, once the model's ops are imported. Neither library has a public switch. A function that the
    compiler has marked already stays marked.

    Recomputation and ZeRO-3 import the compiler all the same: torch's checkpoint and DeepSpeed's hooks ask for it by
    name.
    """
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    for function in (
        Optimizer.add_param_group,
        Optimizer.zero_grad,
        Optimizer.state_dict,
        Optimizer.load_state_dict,
    ):
        _take_as_is(function)
    for name, op in OPDEFS.items():
        if name.startswith("vimscale::"):
            for function in op._backend_fns.values():
                _take_as_is(function)

    # Reading the attribute would look for compilers, CUDA's among them, to find out which of 30 extensions could be
    # built. We need one answer: the shared-memory collectives, which DeepSpeed would build at every start, in 40 s and
    # only with ninja. gloo does their work.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False

    if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # DeepSpeed would warn of it
        ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
    before, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = before


def _take_as_is(function: Callable[..., Any]) -> None:
    """Answer in advance what `torch._disable_dynamo` asks the compiler for: the function to call."""
    plain = getattr(function, "__wrapped__", function)
    vars(plain).setdefault("__dynamo_disable", plain)
