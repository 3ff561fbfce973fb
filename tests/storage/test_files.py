"""Files that cannot be written: one message that names the file, and the file that was there stays."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import later
from tests.support.shell import Shell
from vimscale.storage import files

plots = later.module("vimscale.launch.display.plots", "matplotlib")


@pytest.fixture
def little_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file grow beyond 4 KB: further writes fail, as on a full disk."""
    # Python ignores SIGXFSZ itself
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _picture(path: Path) -> None:
    figure, _ = plots._figure(2)
    plots._save(figure, path)


WRITERS = {
    "bytes": lambda path: files.write(path, bytes(5000)),
    "tensors": lambda path: files.save_tensors(path, {"a": torch.zeros(5000)}),
    "a picture": _picture,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(
    tmp_path: Path, little_space: None, writer: str
) -> None:
    path = tmp_path / "it.png"
    path.write_text("as it was")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        WRITERS[writer](path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert "files may not grow that large there" in files.refusal(caught.value)
    assert path.read_text() == "as it was"
    assert os.listdir(tmp_path) == ["it.png"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_path_that_cannot_exist_is_named(tmp_path: Path, writer: str) -> None:
    (tmp_path / "file").touch()
    for path, fix in (
        (tmp_path / "gone/it.png", "its folder does not exist"),
        (tmp_path / "file/it.png", "a file is where a folder"),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            WRITERS[writer](path)
        assert files.refusal(caught.value).startswith(f"{path}: ")
        assert fix in files.refusal(caught.value)


def test_tensors_are_written_for_everybody_who_may_read_the_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.save_tensors(tmp_path / "tensors", {"a": torch.zeros(3)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


IN_THE_WAY = {
    "a data set": ("data", "digits", "file/set"),
    "a sheet": ("data", "stats", "digits:train", "--sheet", "file/sheet.png"),
    "a run": ("launch", "small.yaml", "--no-ray", "--workers", "1", "--runs", "file"),
    "a job": ("submit", "small.yaml", "--on", "local", "--with", "runs=file"),
    "a picture of a plan": ("plan", "small.yaml", "--on", "local", "--picture", "file/plan.png"),
}


@pytest.mark.parametrize(
    "what", [w if w == "a data set" else pytest.param(w, marks=pytest.mark.slow) for w in IN_THE_WAY]
)
def test_a_file_where_a_folder_should_be_gets_one_message(shell: Shell, what: str) -> None:
    (shell.folder / "file").write_text("in the way")
    output = shell.run(*IN_THE_WAY[what], expect=2)
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    assert (shell.folder / "file").read_text() == "in the way"


def _main(code: str, **options: object) -> subprocess.CompletedProcess:
    code = f"from vimscale.launch.commands import app as cli\n@cli.app.command()\ndef tried():\n    {code}\ncli.main()"
    return subprocess.run([sys.executable, "-c", code, "tried"], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "OSError(28, 'No space left on device', 'there/it')",
            1,
            "error: there/it: No space left on device; free space",
        ),
        (
            "OSError(30, 'Read-only file system', 'there/it')",
            2,
            "error: there/it: Read-only file system; choose another",
        ),
        ("OSError(28, 'No space left on device', 'here/it', None, 'there/it')", 1, "error: there/it: No space left"),
        ("OSError(28, 'No space left on device')", 1, "Traceback"),
        ("OSError('a bug')", 1, "Traceback"),
    ],
)
def test_an_error_that_names_a_file_is_a_message_and_any_other_is_a_bug(error: str, code: int, said: str) -> None:
    done = _main(f"raise {error}")
    assert (done.returncode, done.stderr.startswith(said)) == (code, True), done.stderr
    assert ("Traceback" in done.stderr) == (said == "Traceback")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_reported_in_one_line(shell: Shell) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vimscale.launch.cli", "schema"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=shell.env, check=False)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_command_in_a_removed_folder_gets_one_message(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$1" && rmdir "$1" && exec "$2" -m vimscale.launch.cli recipes'
    done = subprocess.run(["sh", "-c", script, "sh", gone, sys.executable], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no longer exists; cd to another one" in done.stderr
