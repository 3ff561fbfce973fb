"""How a run is doing, by its progress lines: how fast it is, how long it still takes, and where its loss is going."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

_LINES = 1000
"""Most progress lines that are remembered."""
_RECENT = 32
"""Progress lines that decide how fast a run is now."""
_WINDOW = (10, 200)
"""Fewest and most losses in each of the two windows that a trend compares."""
_SURE = 3.0
"""A difference of medians beyond this many of its standard errors is a trend."""
_SMALL = 1e-3
"""A smaller relative difference is none."""

Trend = Literal["falling", "flat", "rising"]


class Pace:
    """The speed of a run since its last start."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, float]] = deque(maxlen=_LINES)

    def add(self, step: int, at: float) -> None:
        """Add a progress line: the steps finished, and the time in seconds. After a rollback, begin again."""
        if self._lines and (step < self._lines[-1][0] or at < self._lines[-1][1]):
            self._lines.clear()
        self._lines.append((step, at))

    @property
    def step_s(self) -> float | None:
        """Seconds per step at present, without evaluations and other pauses; None before the second line."""
        return _median(list(self._each())[-_RECENT:])

    def left_s(self, steps: int) -> float | None:
        """Seconds until step `steps`, evaluations, checkpoints and other pauses included: they take as long per step
        as they did so far.
        """
        each = list(self._each())
        now, usual = _median(each[-_RECENT:]), _median(each)
        if now is None or usual is None:
            return None
        (first, begin), (last, end) = self._lines[0], self._lines[-1]
        pauses = max((end - begin) / (last - first) - usual, 0.0)
        return max(steps - last, 0) * (now + pauses)

    def _each(self) -> Iterator[float]:
        """Seconds per step between neighboring lines."""
        for (before, began), (step, at) in pairwise(self._lines):
            if step > before:
                yield (at - began) / (step - before)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def trend(losses: Sequence[float]) -> Trend | None:
    """Compare the newest losses with those before them, by medians: a spike changes nothing. `losses` are those of
    single steps; values that are not finite do not count. None if there are too few.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    each = min(len(finite) // 2, _WINDOW[1])
    if each < _WINDOW[0]:
        return None
    before, after = finite[-2 * each : -each], finite[-each:]
    middles = statistics.median(before), statistics.median(after)
    # the standard error of a median is 1.25 sigma / sqrt(n), and sigma is 1.48 median absolute deviations
    spreads = [
        statistics.median(abs(loss - middle) for loss in window)
        for window, middle in zip((before, after), middles, strict=True)
    ]
    error = 1.25 * 1.48 * math.hypot(*spreads) / math.sqrt(each)
    difference = middles[1] - middles[0]
    if abs(difference) <= max(_SURE * error, _SMALL * abs(middles[0])):
        return "flat"
    return "falling" if difference < 0 else "rising"
