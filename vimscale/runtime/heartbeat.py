"""The progress of this rank: the training loop reports it, and the thread that answers the launcher reads it."""

import platform
import statistics
import time
from collections import deque
from typing import Any, Literal

Doing = Literal["start", "step", "evaluate", "save"]


class Heartbeat:
    """A counter that stops when the rank does. One per process; another thread may read it."""

    def __init__(self) -> None:
        self.beats = 0
        self.doing: Doing = "start"
        self.step: int | None = None
        """The last step finished since the process began."""
        self.moved = 0
        """Bytes of checkpoints read, written or sent, by any thread. They are not beats: a thread that writes says
        nothing about the loop. Whoever waits for such a thread may beat on its behalf (`distributed.together`).
        """
        self._seconds: deque[float] = deque(maxlen=100)
        self._last = time.monotonic()

    def beat(self, doing: Doing, step: int | None = None) -> None:
        """Report that a piece of work is done and `doing` comes next; `step`: the step that it finished."""
        now = time.monotonic()
        if doing == self.doing == "step":  # the time of a save or an evaluation is not a step's
            self._seconds.append(now - self._last)
        self._last = now
        self.doing = doing
        if step is not None:
            self.step = step
        self.beats += 1

    def read(self) -> dict[str, Any]:
        """The message for the launcher. `step_s`: median time of a step in seconds, None before the second step."""
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
