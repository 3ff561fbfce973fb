"""Temporary folders that go when their process ends, also where it is killed and can remove nothing itself."""

import shutil
import subprocess
import tempfile


class Temporary:
    """A folder of this process; whatever still runs with its name in the command line is ended with it."""

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

    A launcher that is killed cannot do that, and Ray's agents outlive it by a minute.
    """
    script = """
        read -r nothing
        [ -d "$1" ] || exit 0
        sleep 1
        for process in /proc/[0-9]*; do
            pid=${process#/proc/}
            [ "$pid" != $$ ] && grep -qsF "$1" "$process/cmdline" && kill -9 "$pid"
        done
        rm -rf "$1"
    """
    return subprocess.Popen(["sh", "-c", script, "broom", folder], stdin=subprocess.PIPE, start_new_session=True)
