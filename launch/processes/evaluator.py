"""Evaluate a checkpoint while the ranks train: in a process on this machine, or a task on the run's Ray.

It has the device that the ranks leave free, else a CPU at a lower priority than theirs.
"""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from vimscale.errors import UserError
from vimscale.storage.addresses import masked

from ..hardware import cpus, gpus
from . import rank, temporary

_NICE = 10


@dataclass(frozen=True)
class Evaluated:
    """How an evaluation ended."""

    figures: dict[str, Any] | None
    """None: it failed."""
    message: str = ""
    curable: bool = True
    """Whether another try may succeed."""
    interrupted: bool = False
    """Whether it ended with the Ray that it ran on."""


class Evaluator(Protocol):
    """Evaluates one checkpoint at a time."""

    def start(self, checkpoint: Path, *, alone: bool) -> None:
        """`alone`: no rank runs any more.

        Raises:
            OSError: this machine cannot start a process.
        """
        ...

    def poll(self) -> Evaluated | None:
        """Return how the evaluation ended; None if it runs. Does not wait."""
        ...

    def kill(self) -> None:
        """End the evaluation, if one runs."""
        ...


def evaluated(checkpoint: Path, device: str, threads: int) -> Evaluated:
    """Compute the figures that a rank's own evaluation would have logged at the checkpoint's step; never raises."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    log = checkpoint.parent.parent / "logs" / "evaluator.txt"
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    rank.redirect_output(log, f"{started} {checkpoint.name}: process {os.getpid()} on {platform.node()}, {device}")
    rank.before_torch()
    temporary.shorten()
    try:
        import torch

        from vimscale.evaluation.probes import Probes
        from vimscale.inference import job
        from vimscale.inference.opened import open_model

        torch.set_num_threads(threads)
        opened = open_model(checkpoint)
        recipe = opened.recipe
        assert recipe is not None
        chosen = recipe.evaluate
        probes = Probes(knn=chosen.knn, k=(chosen.knn_k,), pools=("head",))
        wanted = job.EvaluationJob(recipe.data, probes=probes, precision=recipe.parallel.precision, by_name=False)
        return Evaluated(job.run(wanted, opened.learner, opened.manifest, torch.device(device)))
    except UserError as error:
        return Evaluated(None, masked(str(error)), curable=False)
    except Exception as error:
        sys.stderr.write(masked(traceback.format_exc()))
        return Evaluated(None, masked(f"{type(error).__name__}: {error}"))


class LocalEvaluator:
    """Evaluates in a process on this machine, on the first GPU after those of `world` ranks if there is one."""

    def __init__(self, world: int):
        self._world = world
        self._process: subprocess.Popen | None = None

    def start(self, checkpoint: Path, *, alone: bool) -> None:
        on_gpu = gpus() > self._world
        device, threads = f"cuda:{self._world}" if on_gpu else "cpu", max(1, cpus() // (self._world + 1))
        self._pipe, theirs = multiprocessing.Pipe()
        code = f"from vimscale.launch.processes import evaluator; evaluator.child({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._pipe.send((checkpoint.absolute(), device, threads))

    def poll(self) -> Evaluated | None:
        assert self._process is not None
        if not self._pipe.poll():
            return None
        try:
            found: Evaluated = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            found = Evaluated(None, f"process {self._process.pid} {how}")
        self.kill()
        return found

    def kill(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # including its data workers
            self._process.wait()
        self._pipe.close()
        self._process = None


def child(descriptor: int) -> None:
    """Run an evaluator's process. End if the launcher ends."""
    pipe = Connection(descriptor)

    def watch() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)

    try:
        checkpoint, device, threads = pipe.recv()
    except EOFError:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    pipe.send(evaluated(checkpoint, device, threads))
    os._exit(0)
