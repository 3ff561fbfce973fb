"""The process of a job on this machine: it passes signals on to its command and records how the command ended."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vimscale.launch.jobs.backend import follow_file

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def _child(folder: Path, script: str) -> Iterator[subprocess.Popen]:
    """Run a shell script as the job's command; it prints its pid once it has set its traps."""
    command = [sys.executable, "-m", "vimscale.launch.jobs.local_child", str(folder), "bash", "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 1", 1), ("exit 3", 3), ("kill -KILL $$", 128 + signal.SIGKILL), ("exec /not/there", 127)],
)
def test_the_commands_end_is_recorded(tmp_path: Path, script: str, code: int) -> None:
    with _child(tmp_path, script) as process:
        assert process.wait() == code
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["code"] == code
    assert ended["at"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(("trap", "code"), [("trap 'exit 5' INT TERM USR1;", 5), ("", 3)], ids=["listening", "not yet"])
def test_a_signal_reaches_the_command(tmp_path: Path, number: signal.Signals, trap: str, code: int) -> None:
    with _child(tmp_path, f"{trap} echo $$; read -r never") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait() == code
    assert json.loads((tmp_path / "ended.json").read_text())["code"] == code


def test_a_command_that_cannot_be_started_is_a_failed_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vimscale.launch.jobs.local_child", str(tmp_path), "/not/there"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1
    assert json.loads((tmp_path / "ended.json").read_text())["code"] == 1


def test_the_command_dies_with_the_process_that_watches_it(tmp_path: Path) -> None:
    with _child(tmp_path, "trap '' TERM INT USR1 HUP; echo $$; read -r never < /dev/zero") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert pid != process.pid
        process.kill()
        assert process.stdout.read() == "", "the command holds the other end of this pipe open until it is gone"
    assert not (tmp_path / "ended.json").exists()


def test_a_followed_file_is_read_to_its_end_and_only_in_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"earlier\n")
    seen = 0

    def ended() -> bool:
        nonlocal seen
        seen += 1
        with path.open("ab") as file:
            file.write({1: b"first\nsec", 2: b"ond\n\xff", 3: b" third"}[seen])
        return seen == 3

    assert list(follow_file(path, len("earlier\n"), ended, pause_s=0.0)) == ["first", "second", "\ufffd third"]
    assert list(follow_file(tmp_path / "not there", 0, lambda: True)) == []
