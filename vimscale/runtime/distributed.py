"""The ranks of one run: what each is given, how they form a process group, and how they agree."""

import datetime
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vimscale.errors import CheckpointError, UserError
from vimscale.model.presets import VimConfig
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.heartbeat import heartbeat


@dataclass(frozen=True)
class RankSpec:
    """Everything a rank is given: the same on all ranks, except rank, device and interface."""

    recipe: Recipe
    folder: Path
    """The run's folder, the same for all ranks."""
    rank: int
    world: int
    device: str
    """cpu, or cuda:N with N as this process sees its devices."""
    threads: int
    """CPU threads of this rank."""
    rendezvous: str
    """Where the ranks find each other: file://PATH on one machine, tcp://HOST:PORT across machines."""
    interface: str
    """Network interface for gloo: the one that has the address at which other ranks reach this rank."""
    temporary: str | None = None
    """A folder for sockets and files of data workers, which the launcher removes; default: one that the rank makes."""
    patience_s: float = 300.0
    """How long a rank waits for the others: longer than the launcher's watchdog, which knows more and acts first."""

    @property
    def context(self) -> int:
        """The number of neighboring ranks, this one included, that share each image."""
        return self.recipe.parallel.context

    @property
    def data_rank(self) -> int:
        """The number of this rank's group, all of whose ranks read the same images."""
        return self.rank // self.context


def prepare(spec: RankSpec) -> None:
    """Set this process up. Call it before importing DeepSpeed, which reads its environment at import."""
    device = torch.device(spec.device)
    # left by an MPI job around the launcher: DeepSpeed would take this process for one of that job's ranks
    for name in [name for name in os.environ if name.startswith("OMPI_COMM_WORLD_") or name == "LOCAL_SIZE"]:
        del os.environ[name]
    os.environ.update(
        DS_ACCELERATOR=device.type,
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", spec.interface),
        # DeepSpeed requires all five, although it adopts the existing process group
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world),
        LOCAL_RANK=str(device.index or 0),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    # JIT builds look for ninja on PATH; it is installed next to the interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)\b")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(spec.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def join(spec: RankSpec, store: dist.Store | None = None) -> None:
    """Form the process group. `store`: rank 0's end of a tcp rendezvous, if it has opened one already."""
    patience = datetime.timedelta(seconds=spec.patience_s)
    if store is None:
        if spec.rendezvous.startswith("file://"):
            store = dist.FileStore(spec.rendezvous.removeprefix("file://"), spec.world)
        else:
            host, port = spec.rendezvous.removeprefix("tcp://").rsplit(":", 1)
            store = dist.TCPStore(host, int(port), spec.world, is_master=False, timeout=patience)
    device = torch.device(spec.device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=spec.rank,
        world_size=spec.world,
        timeout=patience,
        device_id=device if device.type == "cuda" else None,
    )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


NOTHING, STOP, SAVE_FAILED = range(3)
"""What a rank may request; the most urgent is the largest."""


class Agreement:
    """Makes any rank's request known to all ranks in the same step: the largest of their numbers wins.

    The numbers travel over gloo, on the host, while the step computes: all ranks know a request of step t after step
    t + 1, and no step waits for a device.
    """

    def __init__(self, patience_s: float) -> None:
        patience = datetime.timedelta(seconds=patience_s)
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __call__(self, request: int) -> int:
        """Call it once per step on every rank; returns the same on all of them."""
        agreed = NOTHING
        if self._pending is not None:
            self._pending.wait()
            agreed = int(self._flag.item())
        self._flag.fill_(request)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        if self._pending is not None:
            self._pending.wait()


_MEET_S = 1.0
"""Seconds between collectives while one rank works alone."""


def together(action: Callable[[], Any] | None, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run `action` on the ranks that pass one, however long it takes; returns what each rank's action returned.

    The action runs in a thread. Meanwhile all ranks meet in a collective every second: none waits longer, and every
    rank's heartbeat continues as long as any rank moves bytes (`Heartbeat.moved`).

    Raises:
        CheckpointError: on all ranks, the first OSError or UserError of any of them.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action() if action is not None else None)
        except BaseException as error:  # raised again below, in the calling thread
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="together").start()
    states: list[Any] = [(False, 0)] * dist.get_world_size(group)
    while not all(done for done, _ in states):
        wait([future], _MEET_S)
        before = states
        states = [None] * len(before)
        dist.all_gather_object(states, (future.done(), heartbeat.moved), group)
        if [moved for _, moved in states] != [moved for _, moved in before]:
            heartbeat.beat(heartbeat.doing)
    problem = future.exception()
    if problem is not None and not isinstance(problem, (OSError, UserError)):
        raise problem
    outcomes: list[Any] = [None] * len(states)
    message = None if problem is None else str(problem)
    dist.all_gather_object(outcomes, (message, None if message is not None else future.result()), group)
    for message, _ in outcomes:
        if message is not None:
            raise CheckpointError(message)
    return [result for _, result in outcomes]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; every rank gets it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest(values: Tensor) -> Tensor:
    """Take the maximum over all ranks, in place; every rank gets it."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gathered(values: Tensor, context: int = 1) -> Tensor:
    """Concatenate what each group of `context` ranks with equal values has, (b, ...) everywhere: (groups b, ...)."""
    if world() == 1:
        return values
    values = values.contiguous()
    everything = values.new_empty(world(), *values.shape)
    dist.all_gather_into_tensor(everything.flatten(0, 1), values)
    return everything[::context].flatten(0, 1)


def counts_images(context: int) -> bool:
    """Whether this rank counts the images that it shares with others: the first of a group of `context` ranks does."""
    return rank() % context == 0


def total_of_groups(values: Tensor, context: int) -> Tensor:
    """Sum over groups of `context` ranks that have equal values; every rank gets it."""
    return total(values if counts_images(context) else torch.zeros_like(values))


def draws(seed: int, step: int, batch: int, width: int) -> Tensor:
    """Draw uniform numbers (batch, width) in [0, 1) for the images of one global batch, which decide drop-path.

    They depend on seed and step only: another number of ranks, or a restart, drops the same layers.
    """
    return torch.from_numpy(_uniform(seed, (1 << 62) + step, (batch, width)))


def backward_parts(config: VimConfig, seed: int, step: int) -> list[float] | None:
    """Factor of each layer's backward path in training, after `step` steps: the ramp, times 0 or
    1 / (1 - backward_drop). None if all factors are 1. All ranks get the same, so dropped paths need not be computed.
    """
    ramp = config.backward_at(step)
    if ramp == 1 and config.backward_drop == 0:
        return None
    kept = _uniform(seed, (3 << 61) + step, (len(config.layers),)) >= config.backward_drop
    return [ramp / (1 - config.backward_drop) if keep else 0.0 for keep in kept]


def _uniform(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, stream])).random(shape, dtype=np.float32)
