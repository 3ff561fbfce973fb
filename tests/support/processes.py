"""Processes of this machine, read from /proc. None and pids that do not exist count as processes that have ended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def _stat(pid: int | None) -> list[str]:
    """Return state, parent and so on."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return ["Z", "0"]


def is_running(pid: int | None) -> bool:
    return _stat(pid)[0] != "Z"


def parent(pid: int) -> int:
    return int(_stat(pid)[1])


def with_descendants(pid: int) -> Iterator[int]:
    """Yield a process, its children, their children and so on."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            yield from with_descendants(int(child))


def command(pid: int) -> str:
    """Return a process's command line, with NUL between its words."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text() if file.exists() else ""


def program(pid: int) -> str:
    """Return the name of the file that a process runs."""
    return command(pid).split("\0")[0].rsplit("/")[-1]
