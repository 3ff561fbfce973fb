"""Temporary folders that go when their process ends, also where it is killed and can remove nothing itself."""

import os
import shutil
import subprocess
import tempfile

from vimscale.errors import LaunchError

_SOCKET = 107
"""Bytes that the path of a unix socket may have: Linux's sun_path, less the NUL at its end."""

SOCKETS = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes that multiprocessing adds to the path of a folder for temporary files."""


class Temporary:
    """A `private_folder` of this process; what names it in its command line, or has a file of it open, is swept with
    it.
    """

    def __init__(self, prefix: str, sockets: int):
        self.path = private_folder(prefix, sockets)
        self._broom = _broom(self.path)

    def remove(self) -> None:
        """Remove the folder alone. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.sweep()

    def sweep(self) -> None:
        """Do now what is done if this process is killed: also end what runs there."""
        assert self._broom.stdin is not None
        self._broom.stdin.close()
        self._broom.wait()


def private_folder(prefix: str, sockets: int) -> str:
    """A new folder of this user's alone. `sockets`: the most bytes that paths of sockets add to the folder's own. Where
    TMPDIR leaves them no room, as the scratch folders of batch jobs often do, it is made in /tmp or /var/tmp instead.

    Raises:
        LaunchError: no folder for temporary files can be written into, or each one's path is too long.
    """
    try:
        first = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LaunchError(f"{error.strerror}; set TMPDIR to a folder that can be written into") from None
    longest = _SOCKET - sockets - len(prefix) - 9  # the slash, and eight characters of mkdtemp's
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
        " (sockets lie below it)"
    )


def shorten() -> None:
    """Give multiprocessing's sockets a short folder that goes with this process, where TMPDIR leaves them no room."""
    if len(os.fsencode(tempfile.gettempdir())) > _SOCKET - SOCKETS:
        use(Temporary("vimscale-", SOCKETS).path)


def use(folder: str) -> None:
    """Make temporary files of this process, and of those that it starts, in `folder`."""
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # to be read again


def _broom(folder: str) -> subprocess.Popen:
    """A shell that waits for this process to end, however it does, then ends what is left and removes the folder.

    A launcher that is killed cannot do that, and Ray's agents outlive it by a minute. Some of them overwrite their
    command line, but have a log open. This process may have one open too.
    """
    script = """
        read -r nothing
        [ -d "$1" ] || exit 0
        sleep 1
        named() { grep -lsF "$1" /proc/[0-9]*/cmdline; find /proc/[0-9]*/fd -lname "$1/*" 2>/dev/null; }
        for pid in $(named "$1" | cut -d/ -f3 | sort -u); do
            [ "$pid" = $$ ] || [ "$pid" = "$2" ] || kill -9 "$pid" 2>/dev/null
        done
        rm -rf "$1"
    """
    command = ["sh", "-c", script, "broom", folder, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
