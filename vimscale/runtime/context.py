"""The neighboring ranks that share every image, over torch.distributed."""

import datetime

import torch
import torch.distributed as dist
from torch import Tensor


class RankContext:
    """A `vimscale.ops.Context`: ranks r N to r N + N - 1 share images."""

    def __init__(self, size: int, patience_s: float = 300.0):
        """All ranks of the process group must call this."""
        self.size = size
        self.rank = dist.get_rank() % size
        timeout = datetime.timedelta(seconds=patience_s)
        self._group, _ = dist.new_subgroups(size, timeout=timeout)
        self._first = dist.get_rank() - self.rank
        self.sent = 0
        """Bytes that this rank has sent, as a ring would send them."""

    def exchange(self, to_left: Tensor | None, to_right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """As `Context.exchange`."""
        operations: list[dist.P2POp] = []
        received: list[Tensor | None] = []
        for sent, step in ((to_right, 1), (to_left, -1)):
            target, source = self.rank + step, self.rank - step  # every rank sends to the same side
            taken = None
            if sent is not None and 0 <= target < self.size:
                operations.append(dist.P2POp(dist.isend, sent, self._first + target, self._group))
                self.sent += sent.nbytes
            if sent is not None and 0 <= source < self.size:
                taken = torch.empty_like(sent)
                operations.append(dist.P2POp(dist.irecv, taken, self._first + source, self._group))
            received.append(taken)
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        from_left, from_right = received
        return from_left, from_right

    def gather(self, t: Tensor) -> Tensor:
        """As `Context.gather`."""
        gathered = t.new_empty(self.size, *t.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), t, self._group)
        self.sent += (self.size - 1) * t.nbytes
        return gathered

    def add(self, t: Tensor) -> Tensor:
        """As `Context.add`."""
        dist.all_reduce(t, group=self._group)
        self.sent += 2 * (self.size - 1) * t.nbytes // self.size
        return t
