"""The watchdog: when a rank without progress is a hang, and which rank the others wait for."""

from collections.abc import Callable

from vimscale.launch.processes.rank import Ending, Event
from vimscale.launch.supervise.watchdog import Watchdog


def _heartbeat(step: int, rank: int = 0, beats: int = 1) -> Event:
    return {"rank": rank, "beats": beats, "doing": "step", "step": step, "step_s": 0.1, "host": "a"}


def _time_to_notice(watchdog: Watchdog, heartbeats: Callable[[int], list[Event]]) -> tuple[int, list[Ending]]:
    """Return the second in which the watchdog reports a hang, and the report. `heartbeats`: those of each second."""
    for second in range(1, 2000):
        for heartbeat in heartbeats(second):
            watchdog.heard(heartbeat["rank"], heartbeat)
        if found := watchdog.hung(float(second)):
            return second, found
    return 0, []


def test_a_hang_is_judged_by_the_time_of_the_runs_own_steps() -> None:
    def stands(step_s: float) -> Callable[[int], list[Event]]:
        return lambda second: [_heartbeat(7, beats=9) | {"step_s": step_s}]

    assert _time_to_notice(Watchdog(1, None, 0.0), stands(0.1))[0] == 61
    assert _time_to_notice(Watchdog(1, None, 0.0), stands(10.0))[0] == 201
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), stands(10.0))[0] == 6
    saving = lambda second: [_heartbeat(7, beats=9) | {"doing": "save"}]  # noqa: E731
    assert _time_to_notice(Watchdog(1, None, 0.0), saving)[0] == 301
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), lambda second: [])[0] == 301, "it has not finished a step"
    assert _time_to_notice(Watchdog(1, 5.0, 0.0), lambda second: [_heartbeat(second, beats=second)])[0] == 0


def test_a_hang_names_the_rank_that_the_others_wait_for() -> None:
    silent = lambda second: [_heartbeat(7), *([_heartbeat(7, rank=1)] if second < 3 else [])]  # noqa: E731
    _, (found,) = _time_to_notice(Watchdog(2, 5.0, 0.0), silent)
    assert found.rank == 1
    assert "does not answer" in found.message

    behind = lambda second: [_heartbeat(7), _heartbeat(6, rank=1)]  # noqa: E731
    _, (found,) = _time_to_notice(Watchdog(2, 5.0, 0.0), behind)
    assert (found.rank, found.step, found.host) == (1, 6, "a")
    assert "does not answer" not in found.message


def test_no_rank_is_blamed_for_time_in_which_the_launcher_was_stopped() -> None:
    watchdog = Watchdog(1, 5.0, 0.0)
    watchdog.heard(0, _heartbeat(7))
    assert watchdog.hung(1.0) == []
    assert watchdog.hung(1000.0) == []
    assert watchdog.hung(1002.0) == []
    assert watchdog.hung(1004.0)
