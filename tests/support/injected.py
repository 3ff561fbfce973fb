"""A run of two ranks with an injected fault: `python -m tests.support.injected FOLDER WORLD FAULT [KEY=VALUE]...`, or
its `forks.run_module`, from which the ranks inherit their imports.

The package does not help with this: a rank wraps methods in its own process before it trains. stopped_at_STEP is not a
fault but a request to stop after that step; the ranks agree on it in the next one.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.support.shell import SMALL
from vimscale.recipe import recipe as recipes
from vimscale.runtime.distributed import RankSpec
from vimscale.runtime.heartbeat import heartbeat

BAD = range(25, 29)
"""Steps, counted from 1, whose data are bad in the faults of batches; a run that skips them does not see them again."""


def main(folder: Path, world: int, fault: str, changes: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(SMALL)
    (folder / "meet").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, world, folder, fault, changes)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def _rank(rank: int, world: int, folder: Path, fault: str, changes: list[str]) -> None:
    from vimscale.errors import RunFailed
    from vimscale.runtime import distributed

    chosen = recipes.load(str(folder / "small.yaml"), changes)
    spec = RankSpec(chosen, folder / "run", rank, world, "cpu", 1, f"file://{folder}/meet", "lo")
    distributed.prepare(spec)
    distributed.join(spec)
    from vimscale.runtime.run_folder import RunFolder
    from vimscale.training.loop import train

    logging.disable(logging.WARNING)
    if rank == 0:
        RunFolder(spec.folder).claim(chosen)
    dist.barrier()
    stops = [int(name.removeprefix("stopped_at_")) for name in fault.split() if name.startswith("stopped_at_")]
    for name in fault.split():
        if not name.startswith("stopped_at_"):
            FAULTS[name](rank)
    try:
        train(spec, lambda event: None, lambda: heartbeat.step in stops)
    except RunFailed as error:
        if rank == 0:
            print(json.dumps({"failed": str(error)}), flush=True)
        sys.exit(1)
    distributed.leave()


def _in_batches(rank: int, change: Callable[[Any], Any], bad: range = BAD) -> None:
    """Change the last rank's images if they are those that an undisturbed run reads in these steps."""
    from vimscale.data.prefetch import Prefetcher

    prepare = Prefetcher.prepare

    def changed(self: Any, batch: Any) -> Any:
        images, targets = prepare(self, batch)
        here = batch.refs and (bad.start - 1) * 32 <= batch.refs[-1].position < (bad.stop - 1) * 32
        return (change(images) if here else images), targets

    if rank == dist.get_world_size() - 1:
        Prefetcher.prepare = changed  # type: ignore[method-assign]


def _spike_in_batches(rank: int) -> None:
    """In the batches of BAD, make the head's input a thousand times as large."""
    from vimscale.engine.deepspeed_engine import Engine

    seen: list[Any] = []
    _in_batches(rank, lambda images: (seen.append(images), images)[1])
    start = Engine.__init__

    def scaled(module: Any, inputs: Any) -> Any:
        if seen:
            seen.clear()
            return (inputs[0] * 1000,)
        return inputs

    def changed(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        self.encoder.head.register_forward_pre_hook(scaled)

    Engine.__init__ = changed  # type: ignore[method-assign]


def _once(step: int, before_forward: Callable[[Any], None]) -> None:
    """Call `before_forward` once, in the forward of that step, counted from 1."""
    from vimscale.engine.deepspeed_engine import Engine

    backward, calls = Engine.backward, 0

    def changed(self: Any, loss: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            before_forward(self)
        backward(self, loss)

    Engine.backward = changed  # type: ignore[method-assign]


def _nan_in_a_gradient(rank: int) -> None:
    def harm(engine: Any) -> None:
        if rank == 0:
            place = next(place for place in engine._flat.places() if place.name == "head.weight")

            def broken(grad: Tensor) -> Tensor:
                handle.remove()
                grad = grad.clone()
                grad[place.offset : place.offset + place.numel] = math.nan
                return grad

            handle = place.piece.register_hook(broken)

    _once(25, harm)


def _nan_in_a_weight(rank: int) -> None:
    def harm(engine: Any) -> None:
        for fragment in engine.fragments:
            if fragment.name == "head.weight":
                fragment.weight[:1] = math.nan
        engine.publish([fragment.weight for fragment in engine.fragments])

    _once(25, harm)


FAULTS: dict[str, Callable[[int], None]] = {
    "nan_in_batches": lambda rank: _in_batches(rank, lambda images: images * math.nan),
    "spike_in_batches": _spike_in_batches,
    "nan_from_a_step_on": lambda rank: _in_batches(rank, lambda images: images * math.nan, range(25, 1000)),
    "killed_at_35": lambda rank: _once(35, lambda engine: os.kill(os.getpid(), signal.SIGKILL)),
    "killed_at_52": lambda rank: _once(52, lambda engine: os.kill(os.getpid(), signal.SIGKILL)),
    "nan_in_a_gradient": _nan_in_a_gradient,
    "nan_in_a_weight": _nan_in_a_weight,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
