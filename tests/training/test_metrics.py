"""What a run writes besides checkpoints, on full disks and into damaged files."""

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vimscale.errors import CheckpointError, RunFailed
from vimscale.guard import report as guard_report
from vimscale.launch.processes import output
from vimscale.recipe.recipe import load
from vimscale.runtime.run_folder import RunFolder
from vimscale.tracking.trackers import Trackers
from vimscale.training.metrics import Metrics


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """Larger files fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _metrics(run: RunFolder, start: int, *, trained: bool = False) -> Metrics:
    return Metrics(run, start, Trackers(run, load("vim_digits_cpu"), start, "cpu"), trained=trained)


def _close(metrics: Metrics) -> None:
    metrics.close()
    metrics.trackers.close("done")


def _row(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1 / step, "lr": 0.1}


def _steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def _events(folder: RunFolder) -> list[Event]:
    found = []
    for path in sorted(folder.tensorboard.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_figures_wait_for_disk_space_and_the_run_does_not(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    metrics = _metrics(run, 0)
    with _files_of_at_most(2000):
        for step in range(1, 200):
            metrics.write(_row(step))
    assert len(run.rows()) < 40
    metrics.write(_row(200))
    _close(metrics)
    assert _steps(run) == list(range(1, 201))
    scalars = [event for event in _events(run) if event.HasField("summary")]
    assert [(e.step, e.summary.value[0].tag) for e in scalars[-2:]] == [(200, "train/loss"), (200, "train/lr")]
    assert len(scalars) == 400
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert f"{run.metrics} could not be written: File too large" in "\n".join(said)


def test_a_run_that_ends_on_a_full_disk_says_what_is_lost(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    metrics = _metrics(run, 0)
    with _files_of_at_most(100):
        metrics.write(_row(1))
        metrics.write(_row(2))
        _close(metrics)
    assert "metrics.jsonl lacks its last" in caplog.text
    assert [row["step"] for row in run.rows()] == [1]


def _resume(run: RunFolder, step: int) -> None:
    """The first row of a resumed run drops what was written past its start."""
    metrics = _metrics(run, step)
    metrics.write(_row(step + 1))
    _close(metrics)


def test_a_launch_that_writes_no_row_changes_nothing(run: RunFolder) -> None:
    run.path.mkdir()
    run.metrics.write_text("".join(json.dumps(_row(step)) + "\n" for step in (1, 2, 3)) + "cut")
    before = run.metrics.read_bytes()
    _close(_metrics(run, 1))
    assert run.metrics.read_bytes() == before
    assert not run.tensorboard.exists()


def test_repeated_final_evaluations_leave_one_row(run: RunFolder) -> None:
    evaluation = {"kind": "eval", "step": 2, "images": 9, "top1": 0.5, "loss": 1.0}
    for start, trained in ((0, False), (2, True), (2, True)):
        metrics = _metrics(run, start, trained=trained)
        for step in range(start + 1, 3):
            metrics.write(_row(step))
        metrics.write(evaluation)
        _close(metrics)
    assert [(row["kind"], row["step"]) for row in run.rows()] == [("train", 1), ("train", 2), ("eval", 2)]
    metrics = _metrics(run, 2)  # of a longer run: step 2 is not evaluated again
    metrics.write(_row(3))
    _close(metrics)
    assert [row["kind"] for row in run.rows()] == ["train", "train", "eval", "train"]


def test_a_resume_that_cannot_drop_later_rows_changes_nothing_and_says_so(run: RunFolder) -> None:
    metrics = _metrics(run, 0)
    for step in range(1, 101):
        metrics.write(_row(step))
    _close(metrics)
    with (
        _files_of_at_most(2000),
        pytest.raises(RunFailed, match=r"metrics\.jsonl could not be written: File too large"),
    ):
        _metrics(run, 90).write(_row(91))
    assert _steps(run) == list(range(1, 101))
    assert [path.name for path in run.path.iterdir() if path.suffix == ".partial"] == []


def test_tensorboard_knows_where_a_resumed_run_starts(run: RunFolder) -> None:
    for start in (0, 5):
        metrics = _metrics(run, start)
        metrics.write(_row(start + 1))
        _close(metrics)
    (event,) = [event for event in _events(run) if event.HasField("session_log")]
    assert (event.step, event.session_log.status) == (6, SessionLog.START)


ZEROS = b"\0" * 4096


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"kind": "train", "ste\x90": 3, "loss": 0.3, "lr": 0.1}',
        b'{"kind": "train", "loss": 0.3, "lr": 0.1}',
        b'{"kind": "train", "step": "3", "loss": 0.3, "lr": 0.1}',
        b'{"kind": "train", "step": true, "loss": 0.3, "lr": 0.1}',
        b'{"kind": "train", "step": 3, "los3": 0.3, "lr": 0.1}',
        b'{"kind": 1, "step": 3, "loss": 0.3, "lr": 0.1}',
        b"[3]",
        b"3",
        b"[" * 100_000,
        b"",
        ZEROS,
        b"a note of mine",
    ],
    ids=lambda line: line[:50],
)
def test_unreadable_lines_are_kept_and_counted_and_do_not_end_the_run(
    run: RunFolder, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    lines = [json.dumps(_row(step)).encode() for step in range(1, 9)]
    lines[2] = damaged
    run.path.mkdir()
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    _resume(run, 6)
    assert run.metrics.read_bytes() == b"\n".join(lines[:7]) + b"\n"
    assert [row["step"] for row in run.rows()] == [1, 2, 4, 5, 6, 7]
    (record,) = caplog.records
    expected = "1 lines cannot be read and are kept as they are; the losses of 1 of 6 steps are missing"
    assert record.getMessage() == f"{run.metrics}: {expected}"


def test_zeros_before_a_row_do_not_hide_it_and_a_line_cut_by_a_kill_goes(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps(_row(step)).encode() for step in range(1, 5)]
    run.path.mkdir()
    run.metrics.write_bytes(lines[0] + b"\n" + ZEROS + lines[1] + b"\n" + lines[2] + b"\n" + lines[3][:20])
    _resume(run, 3)
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert run.metrics.read_bytes().endswith(lines[2] + b"\n" + lines[3] + b"\n")
    assert caplog.records == []


def test_missing_rows_are_counted(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    run.path.mkdir()
    run.metrics.write_text("".join(json.dumps(_row(step)) + "\n" for step in (1, 2, 6, 7)))
    _resume(run, 6)
    assert "the losses of 3 of 6 steps are missing" in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"status": "done", "st',
        b"[]",
        b"3",
        b"\0" * 151,
        b"\xff\xfe",
        b'{"status": "done", "step": 3, "rteps": 3}',
        b'{"status": "done", "step": 3, "steps": 3, "top1": 0.5, "top5": 0.9, "lo3s": 1.0, "images": 3}',
    ],
)
def test_a_damaged_result_is_none_and_can_be_written_again(
    run: RunFolder, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    run.path.mkdir()
    (run.path / "result.json").write_bytes(damaged)
    assert run.result() is None
    assert run.result() is None
    assert [record.getMessage().partition(" and ")[0] for record in caplog.records] == [
        f"{run.path}/result.json is damaged"
    ]
    result = {"status": "done", "step": 3, "steps": 3}
    for evaluated in ({}, {"top1": 0.5, "loss": 1.0, "images": 9}):  # without top5, as of five classes or fewer
        run.finish(result | evaluated)
        assert run.result() == result | evaluated


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"samples": 3}', '{"samples": [{}]}', '{"samples": [{"rank": 0, "part": 0}]}']
)
def test_a_damaged_report_of_the_guard_is_named(run: RunFolder, text: str) -> None:
    report = run.guard / "step_00000003/report.json"
    report.parent.mkdir(parents=True)
    report.write_text(text)
    (report.parent / "rank_00000.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(CheckpointError, match=r"report .*step_00000003 cannot be read: .*; remove it"):
        guard_report.read(run)


# ---- output


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("where", [_closed_pipe, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["pipe", "disk"])
def test_output_that_nobody_reads_ends_nothing(where: object, capfd: pytest.CaptureFixture[str]) -> None:
    descriptor = where()
    stream = output.writer(descriptor)
    for _ in range(3):
        print("é" * 10_000, file=stream, flush=True)
    stream.close()
    os.close(descriptor)
    assert capfd.readouterr().err.count("standard output cannot be written") == 1


def test_a_program_whose_output_nobody_reads_keeps_its_exit_code() -> None:
    code = """
import sys
from vimscale.launch.processes import output
from vimscale.launch.supervise import progress
sys.stdout, sys.stderr = output.writer(1), output.writer(2)
shown = progress.Progress(progress.console())
for number in range(1000):
    shown.note("warning", f"{number}")
sys.exit(3)
"""
    with open("/dev/full", "wb") as full:
        for streams in ({"stdout": full, "stderr": full}, {"stdout": full, "stderr": subprocess.PIPE}):
            done = subprocess.run([sys.executable, "-c", code], check=False, **streams)
            assert done.returncode == 3
    assert done.stderr.decode().splitlines() == [
        "standard output cannot be written (No space left on device); the run continues, and what it prints is lost"
    ]
