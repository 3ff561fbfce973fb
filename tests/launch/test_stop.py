"""Ctrl-C and SIGTERM before there is anything to save, and commands that have nothing left to do."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.group import StubGroup
from tests.support.shell import Shell
from vimscale.launch.processes.rank import Ending, Event
from vimscale.launch.processes.signals import Stopped, StopSignal
from vimscale.launch.supervise.progress import Progress
from vimscale.launch.supervise.supervisor import supervise
from vimscale.recipe import recipe
from vimscale.runtime import manifest, run_folder
from vimscale.runtime.run_folder import RunFolder

PROCESSES = ("launch", "small.yaml", "--no-ray", "--workers", "2")
RAY = ("launch", "small.yaml", "--workers", "2")


def _state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file below a folder, with its content and when it was written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _trained(shell: Shell) -> RunFolder:
    """Make a folder that looks like a run of 20 steps."""
    run = RunFolder(shell.folder / "runs/small")
    checkpoint = run.checkpoints / run_folder.checkpoint_name(20)
    checkpoint.mkdir(parents=True)
    manifest.write(checkpoint, [])
    chosen = recipe.load(shell.folder / "small.yaml")
    (run.path / "recipe.yaml").write_text(chosen.to_yaml())
    (run.path / "environment.json").write_text('{"started": "then"}\n')
    run.metrics.write_text('{"step": 20, "kind": "train", "loss": 2.0}\n')
    return run


# ---- when a stop comes


def _handles_sigterm(process: subprocess.Popen, shell: Shell) -> bool:
    """Return whether our first line of code has run; nothing is imported yet."""
    caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _has_claimed(process: subprocess.Popen, shell: Shell) -> bool:
    return (shell.folder / "runs/small/environment.json").exists()


def _has_started_ray(process: subprocess.Popen, shell: Shell) -> bool:
    return any("gcs_server" in command for command in shell.processes().values())


def _has_started_ranks(process: subprocess.Popen, shell: Shell) -> bool:
    return (shell.folder / "runs/small/logs/rank_00001.txt").exists()


MOMENTS: dict[str, tuple[tuple[str, ...], Callable[[subprocess.Popen, Shell], bool]]] = {
    "importing": (PROCESSES, _handles_sigterm),
    "starting ranks": (PROCESSES, _has_claimed),
    "ranks importing": (PROCESSES, _has_started_ranks),
    "starting Ray": (RAY, _has_started_ray),
    "Ray's ranks importing": (RAY, _has_started_ranks),
}
SLOW = ("starting ranks", "Ray's ranks importing")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MOMENTS])
def test_a_stop_before_the_first_step_leaves_nothing_behind(shell: Shell, moment: str, number: signal.Signals) -> None:
    command, has_come = MOMENTS[moment]
    process = shell.popen(*command)
    while not has_come(process, shell):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, number)
    output = shell.finish(process, expect=3)
    assert output.strip().splitlines()[-1].startswith("stopped on request")
    assert "Traceback" not in output
    assert not (shell.folder / "runs").exists()
    shell.nothing_is_left(within=20)


def test_a_stop_before_the_first_step_leaves_an_earlier_run_unchanged(shell: Shell) -> None:
    run = _trained(shell)
    before = _state(run.path)
    process = shell.popen(*PROCESSES)
    while not (run.path / "logs/rank_00001.txt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes from step_00000020" in shell.finish(process, expect=3)
    assert _state(run.path) == before


def test_other_commands_end_in_one_line_too(shell: Shell) -> None:
    process = shell.popen("data", "order", "small.yaml", "--steps", "100000")
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (3, "stopped on request\n")


class _Group(StubGroup):
    """One rank that reports `steps`; after these, the user requests a stop."""

    def __init__(self, steps: list[int], stop: StopSignal):
        super().__init__()
        self._steps, self._stop = list(steps), stop

    def poll(self, timeout: float) -> list[Event | Ending]:
        if self.stop_requested:
            return [Ending(0, "stopped")]
        if self._steps:
            step = self._steps.pop(0)
            return [{"kind": "heartbeat", "rank": 0, "beats": step, "doing": "step", "step": step, "step_s": 0.1}]
        self._stop.count = 1
        return []


@pytest.mark.parametrize("steps", [[], [1]], ids=["before the first step", "after it"])
def test_ranks_are_asked_to_save_only_after_they_have_trained(tmp_path: Path, steps: list[int]) -> None:
    stop = StopSignal()
    group = _Group(steps, stop)
    progress = Progress(Console(file=io.StringIO()))
    assert supervise(lambda: group, RunFolder(tmp_path), stop, progress) == 3
    assert (group.stop_requested, group.killed) == (bool(steps), True)


def test_a_signal_interrupts_only_while_there_is_nothing_to_save() -> None:
    stop = StopSignal()
    with stop.installed():
        with pytest.raises(Stopped), stop.at_once():
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("a stop was requested before")


def test_c_code_cannot_delay_a_stop() -> None:
    code = """
import hashlib, sys, threading
from vimscale.launch.processes.signals import StopSignal
stop = StopSignal()
hashing = threading.Event()
threading.Thread(target=lambda: hashing.wait() and print("busy", flush=True), daemon=True).start()
sys.setswitchinterval(60)  # the thread prints no sooner than C code releases the interpreter
with stop.installed(), stop.at_once(lambda: print("cleaned", flush=True)):
    hashing.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "cleaned\n"
    assert process.returncode == 3


# ---- what a launch may touch


def test_a_finished_run_is_not_touched(shell: Shell) -> None:
    run = _trained(shell)
    run.finish({"status": "done", "step": 50, "steps": 50})
    (run.checkpoints / "step_00000020/manifest.json").touch()
    folders = {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]}
    for changes in ((), ("data.train=gone", "data.val=gone")):
        expect = 2 if changes else 0
        output = shell.run(*PROCESSES, *changes, expect=expect)
        assert ("is finished: 50 steps" in output) if not changes else ("holds a run of another recipe" in output)
    assert {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]} == folders


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "a folder with a job"])
def test_a_withdrawn_claim_leaves_what_was_there_before(shell: Shell, there: bool) -> None:
    run = RunFolder(shell.folder / "deep/runs/small")
    if there:
        (run.path / "job").mkdir(parents=True)
    run.claim(recipe.load(shell.folder / "small.yaml"))
    (run.path / "logs").mkdir()
    (run.path / "logs/rank_00000.txt").write_text("here\n")
    assert run.withdraw()
    assert sorted(path.name for path in shell.folder.rglob("*")) == (
        ["deep", "job", "runs", "small", "small.yaml"] if there else ["small.yaml"]
    )


def test_a_claim_is_not_withdrawn_once_a_step_is_recorded(shell: Shell) -> None:
    run = RunFolder(shell.folder / "runs/small")
    run.claim(recipe.load(shell.folder / "small.yaml"))
    run.metrics.write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')
    assert not run.withdraw()
    assert (run.path / "recipe.yaml").exists()
