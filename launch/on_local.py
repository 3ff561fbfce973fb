"""Ranks as child processes of the launcher: one machine, no Ray."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from vimscale.errors import LaunchError

from . import rank
from .rank import Ending, Event

if TYPE_CHECKING:
    from vimscale.recipe import Recipe


def cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container."""
    usable = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        granted, period = quota.read_text().split()
        if granted != "max":
            usable = min(usable, max(1, int(granted) // int(period)))
    return usable


def gpus() -> int:
    """CUDA or ROCm devices of this machine, without importing torch where there is no driver."""
    if not (Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch

    return torch.cuda.device_count()


def workers(asked: int | None, cpus: int, gpus: int, where: str) -> int:
    """How many ranks to start: as asked; else one a GPU; without GPUs two, if there are as many CPUs.

    Raises:
        LaunchError: more than `where` has devices for.
    """
    devices, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    if asked is None:
        return gpus or min(2, cpus)
    if not 1 <= asked <= devices:
        raise LaunchError(f"--workers {asked}: a worker takes one {kind} and {where} has {devices}; use 1 to {devices}")
    return asked


class LocalGroup:
    """Ranks that meet through a file and talk to the launcher through pipes."""

    def __init__(self, recipe: "Recipe", folder: Path, world: int):
        self.size = world
        self._recipe, self._folder = recipe, folder
        self._processes: list[subprocess.Popen] = []
        self._pipes: dict[Connection, int] = {}
        self._meeting = tempfile.TemporaryDirectory(prefix="vimscale-")

    def start(self) -> None:
        on_gpus = gpus() > 0
        for number in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            # a session of its own: a Ctrl-C in the terminal reaches the launcher alone, which then asks the ranks
            code = f"from vimscale.launch import on_local; on_local.child({theirs.fileno()})"
            command = [sys.executable, "-c", code]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True))
            theirs.close()
            self._pipes[ours] = number
            ours.send(
                {
                    "recipe": self._recipe,
                    "folder": self._folder.absolute(),
                    "rank": number,
                    "world": self.size,
                    "device": f"cuda:{number}" if on_gpus else "cpu",
                    "threads": max(1, cpus() // self.size),
                    "rendezvous": f"file://{self._meeting.name}/store",
                    "interface": "lo",
                }
            )

    def poll(self, timeout: float) -> list[Event | Ending]:
        reports: list[Event | Ending] = []
        for pipe in wait(list(self._pipes), timeout):
            assert isinstance(pipe, Connection)
            number = self._pipes[pipe]
            try:
                report = pipe.recv()
            except (EOFError, ConnectionResetError):  # gone without a word
                del self._pipes[pipe]
                reports.append(self._died(number))
                continue
            if isinstance(report, Ending):
                del self._pipes[pipe]
            reports.append(report)
        return reports

    def _died(self, number: int) -> Ending:
        process = self._processes[number]
        code = process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return Ending(number, "failed", cause="died", message=f"process {process.pid} {how}")

    def request_stop(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # that it died is for poll to say
                pipe.send("stop")

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], {}
        self._meeting.cleanup()


def child(descriptor: int) -> None:
    """A rank's process: train, and listen to the launcher in a thread; without a launcher it ends."""
    rank.before_torch()
    from vimscale.distributed import RankSpec

    pipe = Connection(descriptor)
    spec = RankSpec(**pipe.recv())
    stop = threading.Event()
    sending = threading.Lock()

    def listen() -> None:
        try:
            while pipe.recv() == "stop":
                stop.set()
        except (EOFError, ConnectionResetError):
            os._exit(1)

    def emit(report: Event | Ending) -> None:
        with sending:
            pipe.send(report)

    threading.Thread(target=listen, daemon=True).start()
    emit(rank.run(spec, emit, stop.is_set))
    os._exit(0)  # nothing is left to do, and what libraries do at exit may wait for peers that are gone
