"""Detects that a run hangs, from the heartbeats that every rank sends a few times per second."""

from dataclasses import dataclass
from typing import Any

from ..processes.rank import Ending

_SLOWEST_S = 60.0
_STEPS = 20
"""A hang is no progress for 60 s, or for the time of 20 steps if that is longer."""
_START_S = 300.0
"""The limit before the first step, which compiles and loads, and while a checkpoint is written."""
_SILENT_S = 3.0
"""A rank that is silent for this long does not run: it is stopped, or its machine cannot be reached."""
_AT_MOST_S = 2.0
"""Most that one check adds to a rank's time without progress: if the launcher was stopped, no rank is to blame."""


@dataclass
class _Seen:
    heartbeat: dict[str, Any]
    still: float = 0.0
    """Seconds without progress while the launcher was running."""
    silent: float = 0.0
    """Seconds without a heartbeat while the launcher was running."""


class Watchdog:
    """Judges all ranks by their heartbeats.

    `hang_after`: seconds without progress that are a hang; default: derived from the time of the steps.
    """

    def __init__(self, world: int, hang_after: float | None, now: float):
        self._hang_after = hang_after
        self._checked = now
        nothing = {"beats": 0, "doing": "start", "step": None, "step_s": None, "host": ""}
        self._ranks = {rank: _Seen(nothing) for rank in range(world)}

    def heard(self, rank: int, heartbeat: dict[str, Any]) -> None:
        if (seen := self._ranks.get(rank)) is None:
            return
        seen.silent = 0.0
        if heartbeat["beats"] != seen.heartbeat["beats"]:
            seen.still = 0.0
        seen.heartbeat = heartbeat

    def ended(self, rank: int) -> None:
        self._ranks.pop(rank, None)

    def limit(self, heartbeat: dict[str, Any]) -> float:
        """Return the seconds that a rank may make no progress after this heartbeat."""
        if heartbeat["step"] is None:
            return max(_START_S, self._hang_after or 0.0)
        if self._hang_after is not None:
            return self._hang_after
        usual = max(_SLOWEST_S, _STEPS * (heartbeat["step_s"] or 0.0))
        return max(usual, _START_S) if heartbeat["doing"] == "save" else usual

    def hung(self, now: float) -> list[Ending]:
        """Return the ranks that the others wait for, once a rank has made no progress for too long; else none."""
        passed = min(now - self._checked, _AT_MOST_S)
        self._checked = now
        for seen in self._ranks.values():
            seen.still += passed
            seen.silent += passed
        if not any(seen.still > self.limit(seen.heartbeat) for seen in self._ranks.values()):
            return []
        silent = [rank for rank, seen in self._ranks.items() if seen.silent > _SILENT_S]
        behind = min((seen.heartbeat["step"] or 0, seen.heartbeat["beats"]) for seen in self._ranks.values())
        slowest = [
            r for r, seen in self._ranks.items() if (seen.heartbeat["step"] or 0, seen.heartbeat["beats"]) == behind
        ]
        return [
            Ending(
                rank,
                "failed",
                cause="hung",
                message=self.describe(rank),
                step=seen.heartbeat["step"],
                host=seen.heartbeat["host"],
            )
            for rank, seen in self._ranks.items()
            if rank in (silent or slowest)
        ]

    def describe(self, rank: int) -> str:
        seen = self._ranks[rank]
        step, doing = seen.heartbeat["step"], seen.heartbeat["doing"]
        where = "before its first step" if step is None else f"after step {step:,} ({doing})"
        answers = ", and does not answer: it is stopped or out of reach" if seen.silent > _SILENT_S else ""
        return f"no progress for {seen.still:.0f} s {where}{answers}"

    @property
    def watched(self) -> list[int]:
        return sorted(self._ranks)
