"""A folder is replaced completely or stays as it was, whatever fails in between."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vimscale.errors import CheckpointError
from vimscale.export import staging


def _write(target: Path, text: str, name: str = "model.safetensors") -> None:
    with staging.replacing(target) as made:
        (made.folder / name).write_text(text)


def _interrupted(target: Path, error: BaseException) -> None:
    with staging.replacing(target) as made:
        (made.folder / "model.safetensors").write_text("two")
        raise error


def _read(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir()}


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    _write(target, "one")
    _write(target, "two", "config.json")
    assert _read(target) == {"config.json": "two"}
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_a_system_without_exchange_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    test_a_folder_is_made_and_replaced(tmp_path)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_was_there_stays_if_writing_fails(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    target = tmp_path / "export"
    _write(target, "one")
    for error in (ValueError("no"), CheckpointError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _interrupted(target, error)
    with pytest.raises(OSError, match="disk") as caught, staging.replacing(target) as made:
        raise OSError(errno.ENOSPC, "disk", str(made.folder / "sub" / "a.bin"))
    assert caught.value.filename == str(target / "sub" / "a.bin"), "not the temporary name"
    assert _read(target) == {"model.safetensors": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_rename_that_fails_gives_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    target, rename = tmp_path / "export", Path.rename
    _write(target, "one")

    def failing(path: Path, to: Path) -> Path:
        if path.parent.name.startswith(".export.partial") and path.name == "export":
            raise OSError(errno.EBUSY, "busy", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="busy"):
        _write(target, "two")
    assert _read(target) == {"model.safetensors": "one"}


KILLED = """
import os, signal, sys
from pathlib import Path
from vimscale.export import staging
target, between = Path(sys.argv[1]), sys.argv[2] == "between renames"
if between:
    staging._exchange = lambda one, other: False
    rename = Path.rename
    def once(path, to):
        rename(path, to)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = once
with staging.replacing(target) as made:
    (made.folder / "model.safetensors").write_text("two")
    if not between:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["writing", "between renames"])
def test_a_killed_export_leaves_what_the_next_one_removes(tmp_path: Path, when: str) -> None:
    target = tmp_path / "export"
    _write(target, "one")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if ".partial-" in path.name]) == 1
    if when == "writing":
        assert _read(target) == {"model.safetensors": "one"}
    with pytest.raises(ValueError, match="no"), staging.replacing(target):
        raise ValueError("no")
    assert _read(target) == {"model.safetensors": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_under_way_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with staging.replacing(target) as made:
        (made.folder / "model.safetensors").write_text("one")
        other = made.folder.parent
        os.rename(other, other.with_name(".export.partial-1"))  # as if it were another process's
        _write(target, "two")
        os.rename(other.with_name(".export.partial-1"), other)
    assert _read(target) == {"model.safetensors": "one"}


def test_only_exports_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "export"
    target.mkdir()
    staging.check(target)
    (target / "model.pth").touch()
    staging.check(target)
    (target / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"export holds thesis\.tex, which no export wrote"):
        _write(target, "two")
    (target / staging.REPORT).write_text('{"files": ["model.pth", "thesis.tex"]}')
    staging.check(target)
    (target / staging.REPORT).write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds model\.pth, parity\.json, thesis\.tex, which"):
        staging.check(target)
    with pytest.raises(CheckpointError, match=r"thesis\.tex is a file"):
        staging.check(target / "thesis.tex")
    monkeypatch.chdir(target)
    with pytest.raises(CheckpointError, match="is the current folder, or holds it"):
        staging.check(Path("."))


def test_a_link_keeps_pointing_to_the_new_folder(tmp_path: Path) -> None:
    _write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert _read(tmp_path / "real") == {"model.safetensors": "two"}
