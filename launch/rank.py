"""What a rank's process does, whoever started it: meet the others, train, and say how that ended."""

import ctypes
import faulthandler
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vimscale.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch.distributed as dist

    from vimscale.distributed import RankSpec

Event = dict[str, Any]
Cause = Literal["died", "user", "run", "error", "lost"]
"""Of a failure: the process died, the input is wrong, the run cannot go on, a bug, another rank went away."""


@dataclass(frozen=True)
class Ending:
    """How one rank ended."""

    rank: int
    status: Literal["done", "stopped", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    message: str = ""
    traceback: str = ""
    time: float = field(default_factory=time.time)


def before_torch() -> None:
    """What a process that computes on CPUs wants settled before it loads torch.

    OpenMP's idle threads sleep: they would spin for milliseconds after each of torch's operations, on the cores that
    the CPU kernels' own threads want (a forward and backward scan took 25 ms instead of 14 on two cores). And glibc
    keeps freed memory: large temporaries would go back to the system and be faulted in anew, page by page, in every
    layer of every step (4 to 15 % of a training step of Vim-Ti on two cores; peak memory grew by 1 to 2 %).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def run(
    spec: "RankSpec", emit: Callable[[Event], None], stop: Callable[[], bool], store: "dist.Store | None" = None
) -> Ending:
    """Train; never raises. Rank 0 alone emits. `store`: its end of the rendezvous, if it has opened one already."""
    if spec.rank > 0:
        emit = _silent
    _redirect_output(spec)
    _forward_logs(spec, emit)
    try:
        from vimscale import distributed

        distributed.prepare(spec)
        from vimscale.train import train  # brings DeepSpeed, which looks around on import

        distributed.join(spec, store)
        emit({"kind": "joined"})
        result = train(spec, emit, stop)
        distributed.leave()
        return Ending(spec.rank, result["status"], result)
    except UserError as error:
        return _failed(spec, "user", str(error))
    except RunFailed as error:
        return _failed(spec, "run", str(error))
    except Exception as error:  # whatever else went wrong becomes a report, with its traceback
        return _failed(spec, "lost" if _peer_lost(error) else "error", f"{type(error).__name__}: {error}")


def _silent(event: Event) -> None:
    pass


def _failed(spec: "RankSpec", cause: Cause, message: str) -> Ending:
    trace = traceback.format_exc()
    sys.stderr.write(trace)
    sys.stderr.flush()
    return Ending(spec.rank, "failed", cause=cause, message=message, traceback=trace)


def _peer_lost(error: Exception) -> bool:
    """gloo reports a peer that went away as a plain RuntimeError; NCCL and the store have types of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _redirect_output(spec: "RankSpec") -> None:
    """Whatever libraries print goes to a file a rank; the launcher speaks with one voice."""
    folder = spec.folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"rank_{spec.rank:05d}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    sys.stderr.write(f"{started} rank {spec.rank} of {spec.world}: process {os.getpid()} on {platform.node()}\n")
    faulthandler.enable()


class _Forward(logging.Handler):
    def __init__(self, emit: Callable[[Event], None]):
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit({"kind": "log", "level": record.levelname.lower(), "message": record.getMessage()})


def _forward_logs(spec: "RankSpec", emit: Callable[[Event], None]) -> None:
    ours = logging.getLogger("vimscale")
    ours.setLevel(logging.INFO)
    ours.handlers = [_Forward(emit) if spec.rank == 0 else logging.StreamHandler()]
