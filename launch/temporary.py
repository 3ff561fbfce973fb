"""Temporary folders that go when their process ends, also where it is killed and can remove nothing itself."""

import os
import shutil
import subprocess
import tempfile


class Temporary:
    """A folder of this process; what names it in its command line, or has a file of it open, is swept with it."""

    def __init__(self, prefix: str):
        self.path = tempfile.mkdtemp(prefix=prefix)
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
