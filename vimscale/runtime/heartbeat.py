"""How far this rank has come: told by what trains, read by the thread that answers for the rank."""

import platform
import statistics
import time
from collections import deque
from typing import Any, Literal

Doing = Literal["start", "step", "evaluate", "save"]


class Heartbeat:
    """A counter that stands still when the rank does. One a process; its reader may be another thread."""

    def __init__(self) -> None:
        self.beats = 0
        self.doing: Doing = "start"
        self.step: int | None = None
        """The last step that was finished since the process began."""
        self.moved = 0
        """Bytes of checkpoints that were read, written or sent, by whatever thread. They are no beat: a thread that
        writes says nothing about the loop. Whoever waits for such a thread may beat for them (`distributed.together`).
        """
        self._seconds: deque[float] = deque(maxlen=100)
        self._last = time.monotonic()

    def beat(self, doing: Doing, step: int | None = None) -> None:
        """A piece of work is done, and `doing` goes on; `step`: the step that was finished with it."""
        now = time.monotonic()
        if doing == self.doing == "step":  # what a save or an evaluation took is not a step's
            self._seconds.append(now - self._last)
        self._last = now
        self.doing = doing
        if step is not None:
            self.step = step
        self.beats += 1

    def read(self) -> dict[str, Any]:
        """What the launcher is told; `step_s` is the median time of a step, None before the second one."""
        seconds = list(self._seconds)
        return {
            "kind": "heartbeat",
            "beats": self.beats,
            "doing": self.doing,
            "step": self.step,
            "host": platform.node(),
            "step_s": statistics.median(seconds) if seconds else None,
        }


heartbeat = Heartbeat()
