"""Work that several processes of this machine do together, with a process group and without a run."""

import datetime
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from vimscale.errors import LaunchError, RunFailed, UserError

from ..hardware import cpus, gpus
from . import rank as ranks
from .temporary import SOCKETS, Temporary, use

_Result = TypeVar("_Result")
_PATIENCE_S = 1800.0
"""How long a rank waits for the others in a collective: for a whole pass over a data set."""

_CLOSING_S = 0.5
"""How long a process may take to end after it has lost its connections."""


@dataclass(frozen=True)
class _Task:
    """What a rank's process is given."""

    work: Callable[..., Any]
    rank: int
    world: int
    device: str
    threads: int
    temporary: str


def run(work: Callable[..., _Result], world: int) -> _Result:
    """Call work(device, rank, world) in `world` new processes, which form a process group; return what rank 0's call
    returns. `work` and its result travel by pickle.

    Raises:
        LaunchError: there are fewer GPUs, or without any, CPUs, than ranks.
        UserError, RunFailed: the first that any rank raises; RunFailed too if a process dies, or meets a bug.
    """
    devices, kind = (gpus(), "GPU") if gpus() else (cpus(), "CPU")
    if world > devices:
        rule = f"each rank takes one {kind} and this machine has {devices}; use 1 to {devices}"
        raise LaunchError(f"--workers {world}: {rule}")
    temporary = Temporary("vimscale-", SOCKETS)
    processes: list[subprocess.Popen] = []
    pipes: dict[Any, int] = {}
    try:
        for number in range(world):
            ours, theirs = multiprocessing.Pipe()
            code = f"from vimscale.launch.processes import plain_ranks; plain_ranks.child({theirs.fileno()})"
            command = [sys.executable, "-c", code]
            # a separate session: a Ctrl-C in the terminal reaches only this process, which then ends the ranks
            processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True))
            theirs.close()
            pipes[ours] = number
            device = f"cuda:{number}" if kind == "GPU" else "cpu"
            task = _Task(work, number, world, device, max(1, cpus() // world), temporary.path)
            ours.send_bytes(pickle.dumps(task))  # `send` would move tensors into shared memory
        return _first_result(processes, pipes)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # including its data workers
            process.wait()
        for pipe in pipes:
            pipe.close()
        temporary.remove()


def _first_result(processes: list[subprocess.Popen], pipes: dict[Any, int]) -> Any:
    """Wait for all ranks; returns rank 0's result, or raises the first error."""
    result, left = None, dict(pipes)
    while left:
        for pipe in wait(list(left)):
            assert isinstance(pipe, Connection)
            number = left.pop(pipe)
            try:
                answer = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[number].wait()
                answer = _death(processes)
            if isinstance(answer, RunFailed):  # perhaps because another rank is gone
                time.sleep(_CLOSING_S)
                answer = _death(processes) or answer
            if isinstance(answer, Exception):
                raise answer
            if number == 0:
                result = answer
    return result


def _death(processes: list[subprocess.Popen]) -> RunFailed | None:
    """How the first process that has ended did; None if all run: ranks end only when they are killed."""
    for number, process in enumerate(processes):
        if (code := process.poll()) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return RunFailed(f"rank {number} of {len(processes)}: its process {how}")
    return None


def child(descriptor: int) -> None:
    """Run a rank's process: do the work, and send its result or its error. End if the launcher ends."""
    ranks.before_torch()
    pipe = Connection(descriptor)
    try:
        task = pickle.loads(pipe.recv_bytes())
    except EOFError:  # the launcher has ended already
        os._exit(1)

    def watch() -> None:
        with suppress(EOFError, ConnectionResetError):
            pipe.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        answer = _joined(task)
    except (UserError, RunFailed) as error:
        answer = error
    except Exception as error:  # a bug, or a rank that lost another
        message = f"rank {task.rank} of {task.world}: {type(error).__name__}: {error}"
        answer = RunFailed(f"{message}\n{traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(answer))
    signal.pause()  # the launcher ends all ranks together: one that exits would look like a lost peer to the others


def _joined(task: _Task) -> Any:
    """Form the process group, and do the work."""
    use(task.temporary)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(f"{task.temporary}/store", task.world),
        rank=task.rank,
        world_size=task.world,
        timeout=datetime.timedelta(seconds=_PATIENCE_S),
        device_id=device if device.type == "cuda" else None,
    )
    return task.work(device, task.rank, task.world)
