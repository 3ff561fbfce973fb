"""What a rank's process does, whoever started it: join the other ranks, train, and report how that ended."""

import ctypes
import faulthandler
import logging
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vimscale.errors import RunFailed, UserError, WorkerDied
from vimscale.runtime.heartbeat import heartbeat
from vimscale.storage import files
from vimscale.storage.addresses import masked

from . import output
from .temporary import SOCKETS, private_folder, use

if TYPE_CHECKING:
    import torch.distributed as dist

    from vimscale.runtime.distributed import RankSpec

log = logging.getLogger(__name__)

Event = dict[str, Any]
Cause = Literal["died", "memory", "device", "hung", "user", "run", "error", "lost"]
"""Why a rank failed, in this order: the process died, memory ran out, the device failed, no progress, wrong input, the
run cannot continue, a bug, another rank went away.
"""


@dataclass(frozen=True)
class Ending:
    """How one rank ended."""

    rank: int
    status: Literal["done", "stopped", "failed"]
    result: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    message: str = ""
    exception: str = ""
    """The type of the exception, if there was one."""
    traceback: str = ""
    step: int | None = None
    """For a failure: the last step that the rank finished."""
    host: str = field(default_factory=platform.node)
    time: float = field(default_factory=time.time)


def before_torch() -> None:
    """Configure OpenMP and glibc for computing on CPUs. Call this before the process loads torch.

    Let OpenMP's idle threads sleep: they would spin for milliseconds after each of torch's operations, on cores that
    the CPU kernels' own threads need (a forward and backward scan took 25 ms instead of 14 on two cores). Let glibc
    keep freed memory: otherwise large temporaries go back to the system and are faulted in again, page by page, in
    every layer of every step (4 to 15 % of a training step of Vim-Ti on two cores; peak memory grew by 1 to 2 %).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def killed_for_memory() -> int:
    """Return how many processes the kernel has killed since boot because memory ran out."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def run(
    spec: "RankSpec", emit: Callable[[Event], None], stop: Callable[[], bool], store: "dist.Store | None" = None
) -> Ending:
    """Train; never raises. Only rank 0 emits events. `store`: rank 0's end of the rendezvous, if it is open already."""
    if spec.rank > 0:
        emit = _silent
    killed = killed_for_memory()
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    problem = redirect_output(
        spec.folder / "logs" / f"rank_{spec.rank:05d}.txt",
        f"{started} rank {spec.rank} of {spec.world}: process {os.getpid()} on {platform.node()}",
    )
    _forward_logs(spec, emit)
    if problem is not None:
        log.warning("%s", problem)
    temporary = spec.temporary
    try:
        temporary = temporary or private_folder("vimscale-rank-", SOCKETS)
        use(temporary)

        from vimscale.runtime import distributed

        distributed.prepare(spec)
        if spec.recipe.data.workers:
            from vimscale.data import stream

            stream.start_fork_server()
        from vimscale.training.loop import train  # imports DeepSpeed, which inspects its environment on import

        heartbeat.beat("start")
        distributed.join(spec, store)
        heartbeat.beat("start")
        emit({"kind": "joined"})
        result = train(spec, emit, stop)
        distributed.leave()
        return Ending(spec.rank, result["status"], result)
    except UserError as error:
        return _failed(spec, "user", error, str(error))
    except WorkerDied as error:
        if killed_for_memory() > killed:
            return _failed(spec, "memory", error, f"{error}: its machine ran out of memory")
        return _failed(spec, "died", error, str(error))
    except RunFailed as error:
        return _failed(spec, "run", error, str(error))
    except OSError as error:
        if error.filename is None:
            return _failed(spec, _cause(error), error, f"{type(error).__name__}: {error}")
        return _failed(spec, "run", error, files.refusal(error))
    except Exception as error:  # anything else becomes a report with its traceback
        return _failed(spec, _cause(error), error, f"{type(error).__name__}: {error}")
    finally:
        if temporary is not None and spec.temporary is None:
            shutil.rmtree(temporary, ignore_errors=True)


def _silent(event: Event) -> None:
    pass


def _failed(spec: "RankSpec", cause: Cause, error: Exception, message: str) -> Ending:
    message, trace = masked(message), masked(traceback.format_exc())
    sys.stderr.write(trace)
    sys.stderr.flush()
    name = type(error).__name__
    return Ending(
        spec.rank, "failed", cause=cause, message=message, exception=name, traceback=trace, step=heartbeat.step
    )


def _cause(error: Exception) -> Cause:
    """Return the cause behind an exception. Torch raises plain RuntimeErrors for much: gloo's loss of a peer, an
    allocation that failed.
    """
    import torch
    import torch.distributed as dist

    text = str(error).lower()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "memory"
    if isinstance(error, dist.DistError) or "gloo" in text:
        return "lost"
    return "device" if isinstance(error, torch.AcceleratorError) else "error"


def dump_stacks(spec: "RankSpec") -> None:
    """Append the stack of every thread of this rank to the file that the launcher has written its note into."""
    path = stacks_file(spec.folder, spec.rank)
    try:
        with path.open("a") as file:
            faulthandler.dump_traceback(file)
    except OSError as error:  # the calling thread also answers heartbeats: it must not end
        log.warning("%s could not be written: %s", path, error.strerror)


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"stacks_{rank:05d}.txt"


def redirect_output(path: Path, heading: str) -> str | None:
    """Redirect everything that libraries print to a file of this process, so that the launcher's output stays readable.
    Return why the file cannot be written, or None.
    """
    problem = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        problem = f"{path} could not be written: {error.strerror}"
        descriptor = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None if the launcher was started with it closed
            stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = output.writer(1), output.writer(2)
    sys.stderr.write(f"{heading}\n")
    faulthandler.enable()
    return problem


class _Forward(logging.Handler):
    def __init__(self, emit: Callable[[Event], None]):
        super().__init__()
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit({"kind": "log", "level": record.levelname.lower(), "message": record.getMessage()})


def _forward_logs(spec: "RankSpec", emit: Callable[[Event], None]) -> None:
    logger = logging.getLogger("vimscale")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Forward(emit) if spec.rank == 0 else logging.StreamHandler()]
