"""Ranks of a context as threads of one process: they share sequences as processes would, without a network.

One thread runs at a time, and the others wait where ranks meet: Triton's interpreter and random numbers are global.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class ThreadContext:
    """One rank of a `vimscale.ops.Context`."""

    def __init__(self, rank: int, size: int, turn: threading.Lock, barrier: threading.Barrier, board: dict[int, Any]):
        self.rank, self.size = rank, size
        self._turn, self._barrier, self._board = turn, barrier, board

    def _all(self, mine: Any) -> list[Any]:
        self._board[self.rank] = mine
        self._meet()
        found = [self._board[rank] for rank in range(self.size)]
        self._meet()
        return found

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def exchange(self, to_left: Tensor | None, to_right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        sent = self._all(tuple(None if t is None else t.clone() for t in (to_left, to_right)))
        from_left = sent[self.rank - 1][1] if self.rank > 0 else None
        from_right = sent[self.rank + 1][0] if self.rank + 1 < self.size else None
        return from_left, from_right

    def gather(self, t: Tensor) -> Tensor:
        return torch.stack(self._all(t.clone()))

    def add(self, t: Tensor) -> Tensor:
        return self.gather(t).sum(0)


def on_ranks(size: int, work: Callable[[ThreadContext], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks; raises what one of them raises."""
    turn, barrier, board = threading.Lock(), threading.Barrier(size), dict[int, Any]()

    def run(rank: int) -> Any:
        with turn:
            try:
                return work(ThreadContext(rank, size, turn, barrier, board))
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
    first = [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
    if first:
        raise first[0]
    return [future.result() for future in futures]
