"""Sends a run's figures to one tracker from a thread, so that a slow or failing tracker never delays training."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from vimscale.errors import shortened
from vimscale.storage.addresses import masked
from vimscale.tracking.base import Ending, Item, Tracker

log = logging.getLogger(__name__)

_MOST = 5_000
"""Items that wait for a tracker; beyond that, the oldest are dropped."""
_AT_ONCE = 200
"""Items that one call sends."""
_PAUSES_S = (1.0, 2.0, 5.0, 15.0)
"""Pauses after the first failure in a row, the second and so on; after that, the last one."""
_CLOSE_S: dict[Ending, float] = {"done": 20.0, "stopped": 3.0, "failed": 3.0}
"""Seconds that the end of a run waits for its last items to be sent. Whoever stops a run may kill it soon."""


class Sender:
    """A bounded queue and the thread that empties it. `make` connects to the tracker; it is called in the thread, and
    like everything there again after a pause if it raises. One warning says that something failed, one that items were
    dropped.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        *,
        most: int = _MOST,
        pauses_s: tuple[float, ...] = _PAUSES_S,
    ):
        self._name, self._make, self._most, self._pauses_s = name, make, most, pauses_s
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ending: Ending | None = None
        self._dropped = self._sending = 0
        self._warned = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def add(self, item: Item) -> None:
        """Queue an item; never waits for the tracker."""
        with self._changed:
            self._queue.append(item)
            full = len(self._queue) > self._most
            if full:
                self._queue.popleft()
                self._dropped += 1
            first = full and self._dropped == 1
            self._changed.notify()
        if first:
            log.warning(
                "%s falls behind by %d rows: the oldest are dropped; metrics.jsonl has all", self._name, self._most
            )

    def close(self, ending: Ending, wait_s: float | None = None) -> None:
        """Send what waits, and tell the tracker how the run ends; wait up to `wait_s` seconds for it."""
        wait_s = _CLOSE_S[ending] if wait_s is None else wait_s
        with self._changed:
            self._ending = ending
            self._changed.notify()
        self._thread.join(wait_s)
        with self._changed:
            lost = self._dropped + len(self._queue) + self._sending
        if lost:
            log.warning("%s lacks %d rows of this run; metrics.jsonl has all", self._name, lost)
        elif self._thread.is_alive():
            log.warning("%s did not confirm the end of the run within %g s", self._name, wait_s)

    def _run(self) -> None:
        tracker: Tracker | None = None
        items: list[Item] = []
        failures = 0
        while True:
            with self._changed:
                while not (self._queue or items or self._ending):
                    self._changed.wait()
                while self._queue and len(items) < _AT_ONCE:
                    items.append(self._queue.popleft())
                self._sending = len(items)
                ending = self._ending if not self._queue else None
            try:
                tracker = tracker or self._make()
                if items:
                    tracker.send(items)
                    items = []
                    with self._changed:
                        self._sending = 0
                if ending is not None:
                    tracker.close(ending)
                    return
                failures = 0
            except Exception as error:  # of any library: training must not notice
                failures += 1
                self._failed(error)
                self._pause(self._pauses_s[min(failures, len(self._pauses_s)) - 1])

    def _failed(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            why = shortened(masked(f"{type(error).__name__}: {error}"), 300)
            log.warning("%s failed and is tried again; training continues without it meanwhile: %s", self._name, why)

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; a run that ends has little time left, and cuts it short."""
        with self._changed:
            if self._ending is None:
                self._changed.wait_for(lambda: self._ending is not None, seconds)
            else:
                self._changed.wait(self._pauses_s[0])
