"""Ranks as child processes of the launcher: one machine, no Ray."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from vimscale.runtime.heartbeat import heartbeat

from ..hardware import cpus, gpus
from . import rank
from .rank import Ending, Event
from .temporary import SOCKETS, Temporary

if TYPE_CHECKING:
    from vimscale.recipe.recipe import Recipe


_HEARTBEAT_S = 0.25
"""How often a rank sends a heartbeat."""


_Rank = tuple[subprocess.Popen, Connection]
"""A process, and the launcher's end of its pipe."""


class Spares:
    """Processes that import torch before it is known what they have to do. The group that takes them closes it, too."""

    def __init__(self, count: int):
        self._idle = [_spawn() for _ in range(count)]

    def take(self) -> _Rank:
        """Return one of them that still runs, or else a new process."""
        while self._idle:
            process, pipe = self._idle.pop()
            if process.poll() is None:
                return process, pipe
            pipe.close()
        return _spawn()

    def close(self) -> None:
        for process, pipe in self._idle:
            process.kill()
            process.wait()
            pipe.close()
        self._idle = []


def _spawn() -> _Rank:
    ours, theirs = multiprocessing.Pipe()
    # a separate session: a Ctrl-C in the terminal reaches only the launcher, which then asks the ranks to stop
    code = f"from vimscale.launch.processes import on_local; on_local.child({theirs.fileno()})"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return process, ours


class LocalGroup:
    """Ranks that meet through a file and talk to the launcher through pipes. `threads`: CPU threads per rank, default:
    this machine's CPUs divided by the ranks. `spares`: processes to use first.
    """

    def __init__(
        self,
        recipe: "Recipe",
        folder: Path,
        world: int,
        patience_s: float,
        threads: int | None = None,
        spares: Spares | None = None,
    ):
        self.size = world
        self._spares = spares or Spares(0)
        self._threads = threads or max(1, cpus() // world)
        self._recipe, self._folder, self._patience_s = recipe, folder, patience_s
        self._processes: list[subprocess.Popen] = []
        self._pipes: dict[Connection, int] = {}
        self._temporary = Temporary("vimscale-", SOCKETS)

    def start(self) -> None:
        self._killed_for_memory = rank.killed_for_memory()
        on_gpus = gpus() > 0
        for number in range(self.size):
            process, ours = self._spares.take()
            self._processes.append(process)
            self._pipes[ours] = number
            ours.send(
                {
                    "recipe": self._recipe,
                    "folder": self._folder.absolute(),
                    "rank": number,
                    "world": self.size,
                    "device": f"cuda:{number}" if on_gpus else "cpu",
                    "threads": self._threads,
                    "rendezvous": f"file://{self._temporary.path}/store",
                    "interface": "lo",
                    "temporary": self._temporary.path,
                    "patience_s": self._patience_s,
                }
            )
        self._spares.close()

    def poll(self, timeout: float) -> list[Event | Ending]:
        reports: list[Event | Ending] = []
        for pipe in wait(list(self._pipes), timeout):
            assert isinstance(pipe, Connection)
            number = self._pipes[pipe]
            try:
                report = pipe.recv()
            except (EOFError, ConnectionResetError):  # it died without a report
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
        cause: rank.Cause = "died"
        if code == -signal.SIGKILL and rank.killed_for_memory() > self._killed_for_memory:
            how, cause = f"{how}: this machine ran out of memory", "memory"
        return Ending(number, "failed", cause=cause, message=f"process {process.pid} {how}")

    def request_stop(self) -> None:
        self._send("stop")

    def dump_stacks(self) -> None:
        self._send("stacks")

    def _send(self, command: str) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # poll reports that it died
                pipe.send(command)

    def leaving(self) -> str | None:
        return None  # whoever takes this machine away signals the launcher

    def room(self) -> int:
        return self.size

    def kill(self, *, last: bool = False) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # including its data workers
                process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], {}
        self._temporary.remove()


def child(descriptor: int) -> None:
    """Run a rank's process: train, and answer the launcher in a thread. End if the launcher ends."""
    rank.before_torch()
    from vimscale.runtime.distributed import RankSpec

    pipe = Connection(descriptor)
    try:
        spec = RankSpec(**pipe.recv())
    except EOFError:  # the launcher has ended already
        os._exit(1)
    stop = threading.Event()
    sending = threading.Lock()

    def answer() -> None:
        try:
            while True:
                if pipe.poll(_HEARTBEAT_S):
                    match pipe.recv():
                        case "stop":
                            stop.set()
                        case "stacks":
                            rank.dump_stacks(spec)
                emit(heartbeat.read() | {"rank": spec.rank})
        except (EOFError, ConnectionResetError, BrokenPipeError):
            os._exit(1)

    def emit(report: Event | Ending) -> None:
        with sending:
            pipe.send(report)

    # a scheduler may signal every process of a job: that is a request to stop too, which all ranks agree on
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=answer, daemon=True).start()
    emit(rank.run(spec, emit, stop.is_set))
    os._exit(0)  # skip what libraries do at exit: it may wait for peers that are gone
