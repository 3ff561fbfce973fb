"""A tracker that fails or is slow never delays training, and loses no more than it must."""

import threading

import pytest

from vimscale.tracking.base import Ending, Figures, Item, values
from vimscale.tracking.sender import Sender


class Scripted:
    """A tracker that fails while `down` is set, and blocks while `go` is not."""

    id = "1"

    def __init__(self) -> None:
        self.got: list[int] = []
        self.down, self.failed, self.sending, self.go = (threading.Event() for _ in range(4))
        self.go.set()
        self.ending: Ending | None = None

    def send(self, items: list[Item]) -> None:
        self.sending.set()
        assert self.go.wait(60)
        if self.down.is_set():
            self.failed.set()
            raise ConnectionError("https://user:secret@host refuses")
        self.got += [item.step for item in items]

    def close(self, ending: Ending) -> None:
        self.ending = ending


def _figures(step: int) -> Figures:
    return Figures(step, 0.0, {"train/loss": 1.0})


def test_everything_arrives_in_order_and_the_ending_last(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted()
    sender = Sender("scripted", lambda: tracker)
    for step in range(1000):
        sender.add(_figures(step))
    sender.close("done", 60)
    assert tracker.got == list(range(1000))
    assert (tracker.ending, caplog.records) == ("done", [])


def test_a_tracker_that_comes_back_gets_what_waited_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted()
    tracker.down.set()
    sender = Sender("scripted", lambda: tracker, pauses_s=(0.01,))
    for step in range(5):
        sender.add(_figures(step))
        tracker.failed.clear()
        assert tracker.failed.wait(60)
    tracker.down.clear()
    sender.add(_figures(5))
    sender.close("stopped", 60)
    assert tracker.got == list(range(6))
    (record,) = caplog.records
    assert "scripted failed and is tried again; training continues" in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_tracker_that_cannot_be_reached_at_first_is_connected_later() -> None:
    tracker, tried = Scripted(), []

    def connect() -> Scripted:
        tried.append(1)
        if len(tried) < 3:
            raise OSError("no route")
        return tracker

    sender = Sender("scripted", connect, pauses_s=(0.01,))
    sender.add(_figures(1))
    sender.close("done", 60)
    assert (tracker.got, len(tried)) == ([1], 3)


def test_a_slow_tracker_drops_the_oldest_rows_and_says_how_many_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted()
    tracker.go.clear()
    sender = Sender("scripted", lambda: tracker, most=10)
    sender.add(_figures(0))
    assert tracker.sending.wait(60)
    for step in range(1, 31):
        sender.add(_figures(step))
    assert [record.getMessage() for record in caplog.records] == [
        "scripted falls behind by 10 rows: the oldest are dropped; metrics.jsonl has all"
    ]
    tracker.go.set()
    sender.close("done", 60)
    assert tracker.got == [0, *range(21, 31)]
    assert caplog.records[-1].getMessage() == "scripted lacks 20 rows of this run; metrics.jsonl has all"


def test_the_end_of_a_run_waits_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Scripted()
    tracker.go.clear()
    sender = Sender("scripted", lambda: tracker)
    sender.add(_figures(0))
    assert tracker.sending.wait(60)
    sender.close("done", 0.01)
    assert "scripted lacks 1 rows of this run" in caplog.text
    tracker.go.set()


def test_rows_become_numbers_by_tag() -> None:
    row = {"kind": "train", "step": 3, "time": 5.0, "loss": 0.5, "images": 4, "grad_norm": float("nan"), "message": "x"}
    assert values(row) == {"train/loss": 0.5, "train/images": 4.0}
    layers = {"kind": "layers", "step": 3, "layer": [0, 2], "rms": [1.0, None], "dt": [0.1, 0.2]}
    assert values(layers) == {"layers/rms/00": 1.0, "layers/dt/00": 0.1, "layers/dt/02": 0.2}
