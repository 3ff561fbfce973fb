"""Temporary folders that are removed when their process ends, even if it is killed and cannot remove them itself."""

import os
import shutil
import subprocess
import tempfile

from vimscale.errors import LaunchError

_SOCKET = 107
"""Most bytes in the path of a unix socket: Linux's sun_path, minus the NUL at its end."""

SOCKETS = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes that multiprocessing appends to the path of a folder for temporary files."""


class Temporary:
    """A `private_folder` of this process. When it is swept, processes that name it in their command line or have a file
    in it open are killed with it.
    """

    def __init__(self, prefix: str, sockets: int):
        self.path = private_folder(prefix, sockets)
        self._broom = _start_broom(self.path)

    def remove(self) -> None:
        """Remove the folder only. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.sweep()

    def sweep(self) -> None:
        """Do now what happens if this process is killed: also kill the processes that use the folder."""
        assert self._broom.stdin is not None
        if not self._broom.stdin.closed:
            self._broom.communicate(b"now\n")


def private_folder(prefix: str, sockets: int) -> str:
    """Make a new folder that only this user can open. `sockets`: the most bytes that paths of sockets add to its path.
    If TMPDIR leaves no room for them, as the scratch folders of batch jobs often do, make it in /tmp or /var/tmp.

    Raises:
        LaunchError: no folder for temporary files is writable, or their paths are too long.
    """
    try:
        first = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LaunchError(f"{error.strerror}; set TMPDIR to a writable folder") from None
    longest = _SOCKET - sockets - len(prefix) - 9  # the slash, and mkdtemp's eight characters
    faults = []
    for parent in dict.fromkeys((first, "/tmp", "/var/tmp")):
        if (size := len(os.fsencode(parent))) > longest:
            faults.append(f"{parent} has {size} bytes")
            continue
        try:
            return tempfile.mkdtemp(prefix=prefix, dir=parent)
        except OSError as error:
            faults.append(f"{parent}: {error.strerror}")
    raise LaunchError(
        f"no folder for temporary files: {'; '.join(faults)}; set TMPDIR to a writable one of at most {longest} bytes"
        " (sockets are made below it)"
    )


def shorten() -> None:
    """If TMPDIR leaves no room for multiprocessing's sockets, use a short folder that is removed with this process."""
    if len(os.fsencode(tempfile.gettempdir())) > _SOCKET - SOCKETS:
        use(Temporary("vimscale-", SOCKETS).path)


def use(folder: str) -> None:
    """Make the temporary files of this process, and of those that it starts, in `folder`."""
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # tempfile then reads TMPDIR again


def _start_broom(folder: str) -> subprocess.Popen:
    """Start a shell that waits until this process ends in any way, then kills what is left and removes the folder.

    A launcher that is killed cannot do that, and Ray's agents outlive it by a minute. Some of them overwrite their
    command line but have a log open. This process may have one open too, and is spared.
    """
    script = """
        read -r now || sleep 1
        [ -d "$1" ] || exit 0
        named() { grep -lsF "$1" /proc/[0-9]*/cmdline; find /proc/[0-9]*/fd -lname "$1/*" 2>/dev/null; }
        for pid in $(named "$1" | cut -d/ -f3 | sort -u); do
            [ "$pid" = $$ ] || [ "$pid" = "$2" ] || kill -9 "$pid" 2>/dev/null
        done
        rm -rf "$1"
    """
    command = ["sh", "-c", script, "broom", folder, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
