"""`vimscale top` shows what becomes of runs: those that train, end, are killed or stall, however long they are."""

import fcntl
import io
import json
import os
import platform
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.recorded import START, append, write_run
from tests.support.shell import Shell
from vimscale.errors import LaunchError
from vimscale.launch import cluster as clusters
from vimscale.launch.display.runs_table import RunsTable, spark
from vimscale.launch.jobs import overview
from vimscale.launch.jobs.backend import Job
from vimscale.report import glance
from vimscale.report.glance import Glance, Runs
from vimscale.runtime.run_folder import RunFolder


def _only(folder: Path) -> Glance:
    (found,) = Runs(folder).read()
    return found


def _rendered(runs: list[Glance], width: int, *, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(RunsTable("runs", runs, height=height))
    return console.export_text()


def _save(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")


# ---- one run


def test_a_run_shows_its_figures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 100)
    append(folder, {"kind": "eval", "step": 50, "images": 10, "top1": 0.75, "loss": 0.9})
    (folder / "failures.json").write_text(json.dumps([{"time": "2026-11-27T07:39:19+0000", "cause": "died"}]))
    (folder / "guard" / "step_00000060").mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"ranks": 2, "steps": 400}))
    found = _only(tmp_path)
    assert (found.name, found.step, found.steps, found.ranks) == ("mine", 100, 400, 2)
    assert (found.restarts, found.guard, found.trend) == (1, 1, "falling")
    assert found.evaluation is not None
    assert found.evaluation["top1"] == 0.75
    assert found.loss == pytest.approx(0.5 + 2 * 2.718281828 ** -(100 / 50))
    assert found.memory_gb == 0.5


def test_how_a_run_ended_is_told_from_what_it_left(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 20)
    (folder / "environment.json").write_text(json.dumps({"host": platform.node()}))
    assert (_only(tmp_path).state, _only(tmp_path).note) == ("died", "nothing saved")
    _save(folder, 10)
    assert _only(tmp_path).note == "resumes from 10"
    _save(folder, 20)
    assert _only(tmp_path).state == "stopped"
    failed = {"message": "rank 0: the loss is nan", "exit_code": 1}
    (folder / "environment.json").write_text(json.dumps({"host": platform.node(), "failed": failed}))
    assert (_only(tmp_path).state, _only(tmp_path).note) == ("failed", "rank 0: the loss is nan; resumes from 20")
    (folder / "environment.json").write_text(json.dumps({"host": platform.node(), "failed": {"message": ["x"]}}))
    assert _only(tmp_path).state == "stopped", "what no launcher wrote does not count"
    (folder / "result.json").write_text(json.dumps({"status": "done", "step": 20, "steps": 20}))
    assert _only(tmp_path).state == "finished"


def test_a_run_that_writes_nothing_any_more_stalls(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 60)
    environment = {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.gmtime(START))}
    (folder / "environment.json").write_text(json.dumps(environment))
    held = RunFolder(folder)
    held.hold("end that one")
    stalled = _only(tmp_path)
    assert stalled.state == "stalled"
    assert stalled.step_s == pytest.approx(0.5)
    append(folder, {"kind": "train", "step": 70, "loss": 1.0, "lr": 0.1, "images_per_s": 9.0, "time": time.time()})
    assert _only(tmp_path).state == "running"
    environment["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.gmtime(time.time() + 60))
    (folder / "environment.json").write_text(json.dumps(environment))
    assert _only(tmp_path).state == "starting"
    held.release()


def test_only_the_end_of_a_long_file_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "long", 200)
    append(folder, {"kind": "eval", "step": 200, "images": 10, "top1": 0.5, "loss": 0.9})
    row = {"kind": "train", "loss": 1.0, "lr": 0.1}
    append(folder, *({**row, "step": step} for step in range(201, 100_001)))
    parsed = 0
    read_row = glance.read_row

    def counted(line: bytes) -> dict | None:
        nonlocal parsed
        parsed += 1
        return read_row(line)

    monkeypatch.setattr(glance, "read_row", counted)
    monkeypatch.setattr(glance, "_PIECE", 100_000)
    runs = Runs(tmp_path)
    (found,) = runs.read()
    assert found.step == 100_000
    assert found.evaluation is not None
    assert found.evaluation["step"] == 200, "far before the rows that are read"
    assert parsed < 12_000
    before = parsed
    runs.read()
    assert parsed == before, "nothing has changed"
    append(folder, {**row, "step": 100_001})
    (found,) = runs.read()
    assert (found.step, found.evaluation["step"] if found.evaluation else 0) == (100_001, 200)


def test_damaged_files_hide_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "torn", 20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 21, "lo')
    (folder / "environment.json").write_text("{")
    (folder / "failures.json").write_text('[1, {"time": 3}]')
    (folder / "recipe.yaml").write_text("\t")
    found = _only(tmp_path)
    assert (found.step, found.steps, found.restarts) == (20, None, 1)


# ---- jobs


@pytest.mark.parametrize(
    ("job", "run", "expected"),
    [
        (Job("a", "waiting", None, None, "queued"), None, ("waiting", "queued")),
        (Job("a", "running", 1.0, None), Glance("a", "stopped", step=5), ("stalled", "")),
        (Job("a", "running", 1.0, None), Glance("a", "running"), ("running", "")),
        (Job("a", "stopping", 1.0, None), Glance("a", "running"), ("stopping", "")),
        (Job("a", "failed", 1.0, 2.0, "no GPU"), Glance("a", "died", "nothing saved"), ("failed", "no GPU")),
        (Job("a", "finished", 1.0, 2.0), Glance("a", "finished"), ("finished", "")),
    ],
)
def test_a_job_adds_what_its_run_cannot_know(job: Job, run: Glance | None, expected: tuple[str, str]) -> None:
    found = overview._joined(job, run)
    assert (found.state, found.note) == expected


def test_a_folder_that_does_not_exist_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="nope is not a folder"):
        overview.Overview(clusters.load("local"), tmp_path / "nope")


# ---- the table


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_and_keeps_the_most_important_columns(width: int) -> None:
    losses = tuple(2 / (1 + i / 20) for i in range(300))
    run = Glance(
        "vim_small_in1k", "running", "", 3200, 30_000, 0.11, 3600.0, 2310.0, 0.43, "falling", losses,
        {"kind": "eval", "step": 3000, "images": 9, "top1": 0.61, "loss": 1.2}, 2, 1, 8, 16.6, time.time(),
    )  # fmt: skip
    text = _rendered([run, Glance("b" * 60, "died", "resumes from 40", step=57)], width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("run", "state", "running", "died", "10%" if width > 40 else ""):
        assert part in text
    if width == 200:
        for part in (
            "9.1 steps/s",
            "2,310",
            "1:00:00",
            "0.4300 ↘",
            "█▅",
            "top-1 61.00% @3,000",
            "resumes from 40",
            "16.60",
        ):
            assert part in text


def test_runs_beyond_the_height_are_counted() -> None:
    text = _rendered([Glance(f"run{i}", "finished") for i in range(100)], 80, height=24)
    assert len(text.splitlines()) <= 24
    assert "and 81 more" in text


def test_why_runs_failed_is_below_the_table_at_any_width() -> None:
    runs = [Glance(f"run{i}", "failed", f"rank 0: the loss is nan {i}; " + "x" * 400) for i in range(30)]
    for width in (40, 140):
        text = _rendered(runs, width, height=24)
        assert "run4 failed: rank 0: the loss is nan 4" in text
        assert "run5 failed" not in text
        assert max(map(len, text.splitlines())) <= width
        assert len(text.splitlines()) <= 24


def test_a_name_cannot_control_the_terminal() -> None:
    assert "\x1b" not in _rendered([Glance("a\x1b[2Jb", "finished")], 80)


def test_a_sparkline_goes_from_its_smallest_to_its_largest_value() -> None:
    assert spark([float(i) for i in range(120)])[::11] == "▁█"
    assert spark([1.0] * 30) == "▁" * 12
    assert spark([1.0]) == ""


# ---- as a user runs it


@pytest.mark.slow
def test_a_killed_run_is_shown_as_such_and_then_as_it_resumes(shell: Shell) -> None:
    launch = shell.popen("launch", "small.yaml", "--no-ray", "--workers", "1", "steps=100000", "checkpoint.every=50000")
    shell.reaches(launch, "small", 6)
    (found,) = json.loads(shell.run("top", "--json"))
    assert (found["name"], found["state"], found["steps"], found["ranks"]) == ("small", "running", 100_000, 1)
    assert found["step"] >= 6
    os.kill(launch.pid, signal.SIGKILL)
    launch.communicate()
    shell.nothing_is_left()
    assert "died" in shell.run("top", "--once")
    devices = json.loads((shell.folder / "runs/small/environment.json").read_text())["devices"]
    assert [(device["ranks"], device["hosts"]) for device in devices] == [(1, [platform.node()])]
    assert "is not a folder" in shell.run("top", "elsewhere", expect=2)


@pytest.mark.parametrize("end", [b"q", pytest.param(b"\x03", marks=pytest.mark.slow)])
def test_top_refreshes_in_a_terminal_and_ends_on_q_and_ctrl_c(tmp_path: Path, end: bytes) -> None:
    folder = write_run(tmp_path / "runs" / "mine", 50)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "vimscale.launch.cli", "top"]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=tmp_path, env=os.environ | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    said = ""

    def until(text: str) -> None:
        nonlocal said
        while text not in said:
            assert select.select([ours], [], [], 60)[0], said
            try:
                said += os.read(ours, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"it ended: {said}")

    until("50/60")
    until("q: quit")
    append(folder, {"kind": "train", "step": 57, "loss": 1.0, "lr": 0.1})
    until("57/60")
    os.write(ours, end)
    until("\x1b[?1049l")  # leaves the alternate screen, and prints the table once more
    assert process.wait(60) == 0
    os.close(ours)
