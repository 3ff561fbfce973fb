"""The process of a job on this machine: it runs the job's command below itself and records how the command ended.

`python -m vimscale.launch.jobs.local_child FOLDER COMMAND...` passes signals on to the command, and writes
FOLDER/ended.json once it has ended. The command stays in this process's group, and dies with this process.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from vimscale.storage import files

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STOPPED = 3
_PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass
class Ended:
    """ended.json"""

    code: int
    at: float
    """Seconds since the epoch."""


def main(folder: Path, command: list[str]) -> int:
    """Run the command; return its exit code, 3 if a signal that was passed on ended it (it had nothing to save yet),
    and 128 plus the signal's number if another signal did.
    """
    received: list[int] = []
    started: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in started:
            process.send_signal(number)

    for each in _PASSED_ON:
        signal.signal(each, pass_on)
    code = 1
    try:
        parent = os.getpid()
        process = subprocess.Popen(command, preexec_fn=lambda: _die_with(parent))
        started.append(process)
        for number in received[:]:  # they came before the command was there
            process.send_signal(number)
        code = process.wait()
        if code < 0:
            code = _STOPPED if -code in received else 128 - code
    finally:
        files.write(folder / "ended.json", json.dumps(asdict(Ended(code, time.time()))) + "\n")
    return code


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, so that no launcher is left that nobody knows of."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
