"""Which implementation of an op runs: plain torch, numba on a CPU, or Triton on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "cpu", "triton"]

SETTING = "VIMSCALE_BACKEND"
_NUMBA, _TRITON = find_spec("numba") is not None, find_spec("triton") is not None
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_counted: Backend | None = None


@contextmanager
def counted(backend: Backend) -> Iterator[None]:
    """For fake tensors, whose bytes are counted: inside the context every op takes `backend`, wherever its tensors
    are, and CPU kernels allocate but compute nothing.
    """
    global _counted  # torch.compile would stop at a ContextVar
    before, _counted = _counted, backend
    try:
        yield
    finally:
        _counted = before


def counting() -> bool:
    return _counted is not None


def choose(requested: Backend | None, op: str, x: Tensor) -> Backend:
    """The backend for `x`: `requested` if given; otherwise the one that the environment variable VIMSCALE_BACKEND
    names; otherwise the fused backend of x's device, or the reference if that cannot run (fp64, another kind of device,
    no numba).

    Raises:
        ValueError: the requested backend is unknown, or cannot run on x; the message gives the reason.
    """
    if _counted is not None:
        return _counted
    name, source = (requested, "backend") if requested is not None else (os.environ.get(SETTING), SETTING)
    if not name:
        preferred: Backend = "cpu" if x.device.type == "cpu" else "triton"
        return "reference" if _obstacle(preferred, x) else preferred
    if name not in get_args(Backend):
        raise ValueError(f"{op}: {source} {name!r} is not one of {', '.join(get_args(Backend))}")
    if reason := _obstacle(name, x):
        raise ValueError(f"{op}: {source} {name} cannot run here: {reason}; leave it out, or use reference")
    return name  # type: ignore[return-value]


@lru_cache(maxsize=16)
def fused_module(op: str, backend: str) -> Any:
    """The module of an op's fused backend, e.g. add_norm_cpu. It is imported on first use: numba and Triton are
    optional.
    """
    return import_module(f".{op}_{backend}", __package__)


def _obstacle(backend: str, x: Tensor) -> str | None:
    """Why `backend` cannot run on x; None if it can."""
    if backend == "reference":
        return None
    if x.dtype not in _FUSED_DTYPES:
        return f"x is {_name(x.dtype)}; it supports {', '.join(map(_name, _FUSED_DTYPES))}"
    if backend == "cpu":
        if x.device.type not in ("cpu", "meta"):
            return f"x is on {x.device}"
        return None if _NUMBA else "numba is not installed"
    if not _TRITON:
        return "triton is not installed"
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "x is on cpu (TRITON_INTERPRET=1, set before the first import, interprets kernels there)"
    return None if x.device.type in ("cpu", "cuda", "meta") else f"x is on {x.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
