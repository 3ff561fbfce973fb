"""One job after the other in several processes, none of which outlives the command."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from vimscale.errors import RunFailed

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""

_work: Callable[[Any], Any] | None = None


def run(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Result]]:
    """(number, result) of every job, in the order in which they end. `work` is sent to each process once.

    Raises:
        RunFailed: a process was killed. What `work` raises is raised here.
    """
    if min(processes, len(jobs)) <= 1:
        yield from ((number, work(job)) for number, job in enumerate(jobs))
        return
    # spawned: a fork would take over the threads of Arrow and others in whatever state they are
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _begin, (work,))
    try:
        waiting = {pool.submit(_do, job): number for number, job in enumerate(jobs)}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        raise RunFailed(
            "one of the --jobs was killed, perhaps for want of memory; give fewer, and the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself ends its processes
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        # a process that wrote on would meet those of the next command
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _do(job: Any) -> Any:
    assert _work is not None
    return _work(job)
