"""Jobs in several processes, none of which outlives the command."""

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
"""Called with the amount done and the total."""

_work: Callable[[Any], Any] | None = None


def run_all(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int,
    progress: Progress = lambda done, total: None,
    *,
    size: Callable[[Job], int] = lambda job: 1,
    finish: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Return the results of all jobs in the order of the jobs; report progress in units of `size`.

    `finish` gets each result as soon as it is there, in this process.

    Raises:
        RunFailed: see `run`.
    """
    results: dict[int, Result] = {}
    done, total = 0, sum(map(size, jobs))
    progress(done, total)
    for number, result in run(work, jobs, processes):
        finish(result)
        results[number] = result
        done += size(jobs[number])
        progress(done, total)
    return [results[number] for number in range(len(jobs))]


def run(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) of every job, in the order in which jobs finish. Each process gets `work` once.

    Raises:
        RunFailed: a process was killed. Exceptions of `work` propagate.
    """
    if min(processes, len(jobs)) <= 1:
        yield from ((number, work(job)) for number, job in enumerate(jobs))
        return
    # spawn, because a fork would inherit locks held by threads of Arrow and others
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), _begin, (work,))
    try:
        waiting = {pool.submit(_do, job): number for number, job in enumerate(jobs)}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        raise RunFailed(
            "one of the --jobs was killed, perhaps for lack of memory; run the same command again with fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its processes
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        # a process that kept writing would interfere with those of the next command
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _do(job: Any) -> Any:
    assert _work is not None
    return _work(job)
