"""Faults for runs to survive: drawn from a seed, done to real processes and files at moments that are watched for."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.shell import Shell
from vimscale import run_folder

SCHEDULED = ("steps=36", "checkpoint.every=6", "evaluate.every=9", "log.every=1")
"""What a run must ask for that the schedules are made for: every step is written down when it is done."""
LAUNCHES = 8
"""Times that a command may be given."""
_PATIENCE_S = 600
"""How long one launch may take, on a machine that others use as well."""

What = Literal["kill rank", "stop rank", "fill disk", "kill launcher", "kill Ray", "damage"]
When = Literal["step", "save", "evaluation", "start", "load"]


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    kill rank      SIGKILL; the launcher starts a new group
    stop rank      SIGSTOP, and SIGCONT a second or two later
    fill disk      no file that the rank writes may grow beyond 100 KB any more, as on a full disk
    kill launcher  SIGKILL
    kill Ray       SIGKILL for gcs_server, raylet or both, of the launcher's own Ray
    damage         the launcher is killed, and a bit flipped in a file of the newest checkpoint, or its end cut off

    A moment is the first of its kind from `step` on: a step (somewhere in the one after it), a save, an evaluation;
    or the next group's start (a rank says which process it is), or load (a rank has a checkpoint open).
    """

    what: What
    when: When
    step: int = 0
    rank: int = 0
    luck: float = 0.5
    """Decides in [0, 1) whatever else is left open: how far into the step, for how long, which byte."""


def schedule(seed: int, *, ray: bool) -> list[Fault]:
    """The same faults for the same seed, one to four of them, for a run of 36 steps that saves every 6."""
    draw = random.Random(seed)
    lasting: list[What] = ["kill rank", "kill rank", "stop rank", "fill disk", "kill launcher"]
    deadly: list[What] = ["kill rank", "kill launcher"]
    if ray:
        lasting.append("kill Ray")
    faults = []
    # damage comes late: there is to be a checkpoint before the newest
    for low, high, all_ in ((3, 11, lasting), (20, 28, [*lasting, "damage", "damage"])):
        what = draw.choice(all_)
        when: When = draw.choice(["step", "step", "save", "save", "evaluation"])
        rank, luck = draw.randrange(2), draw.random()
        faults.append(Fault(what, when, draw.randint(low, high), rank, luck))
        if what not in ("stop rank", "fill disk") and draw.random() < 0.5:
            # what has just begun again is hit again
            when = draw.choice(["start", "load", "load"])
            faults.append(Fault(draw.choice(deadly), when, 0, draw.randrange(2), draw.random()))
    return faults


def survive(shell: Shell, name: str, command: tuple[str, ...], faults: list[Fault]) -> list[str]:
    """Give the command again until it ends well, while `faults` happen in their order; what each launch said.

    The only thing done by hand is to give the command again, and that at once.

    Raises:
        AssertionError: it never ended well, or some fault found no moment to happen in.
    """
    disturbed = _Disturbed(shell, name)
    waiting, said = list(faults), []
    for _ in range(LAUNCHES):
        process = shell.popen("launch", *command)
        deadline = time.monotonic() + _PATIENCE_S
        hit = None
        while process.poll() is None and time.monotonic() < deadline:
            if waiting and disturbed.is_at(waiting[0]):
                hit = waiting.pop(0)
                disturbed.strike(hit, process)
            time.sleep(0.001)
        in_time = process.poll() is not None
        process.kill()
        said.append("".join(process.communicate()))
        assert in_time, f"hung after {hit}; launches so far:\n{'---'.join(said)}"
        if process.returncode == 0:
            break
        if hit is not None and hit.what == "damage":
            shell.nothing_is_left()
            disturbed.damage(hit.luck)
    assert process.returncode == 0, f"{LAUNCHES} launches came to no end:\n{'---'.join(said)}"
    assert not waiting, f"the run ended before {waiting}"
    return said


class _Disturbed:
    """A run seen from outside: its folder, and the processes that its ranks say they are."""

    def __init__(self, shell: Shell, name: str):
        self._shell, self._name = shell, name
        self._folder = shell.folder / "runs" / name
        self._before: tuple[int | None, ...] = (None, None)
        self._metrics_before: int | None = None

    def is_at(self, fault: Fault) -> bool:
        """Whether the moment is there; `step` and `evaluation` return some way into it."""
        ranks = tuple(self._shell.process_of(self._name, rank) for rank in (0, 1))
        target = ranks[fault.rank]
        if target is None or target == self._before[fault.rank] or not _runs(target):
            return False
        if fault.when == "start":
            return True
        if fault.when == "load":
            # past it the figures are written to a new file; whoever looks too late strikes right after the load
            return self._metrics() != self._metrics_before or any(_has_open(pid, "checkpoints/step_") for pid in ranks)
        if fault.when == "save":
            partial = (self._folder / "checkpoints").glob(".step_*.partial")
            return any(int(path.name[len(".step_") :].split(".")[0]) >= fault.step for path in partial)
        step = fault.step if fault.when == "step" else -(-fault.step // 9) * 9
        if self._metrics() == self._metrics_before or len(self._shell.rows(self._name)) < step:
            return False
        # not a wait for something: the fault itself comes this late
        time.sleep(fault.luck * (0.04 if fault.when == "step" else 0.2))
        return True

    def strike(self, fault: Fault, launcher: subprocess.Popen) -> None:
        rank = self._shell.process_of(self._name, fault.rank)
        assert rank is not None
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, which the next launch or group will show
            if fault.what == "kill rank":
                os.kill(rank, signal.SIGKILL)
            elif fault.what == "stop rank":
                os.kill(rank, signal.SIGSTOP)
                time.sleep(0.5 + 1.5 * fault.luck)
                os.kill(rank, signal.SIGCONT)
            elif fault.what == "fill disk":
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (100 << 10, resource.RLIM_INFINITY))
            elif fault.what == "kill Ray":
                wanted = (["gcs_server"], ["raylet"], ["gcs_server", "raylet"])[int(fault.luck * 3)]
                for pid, command in self._shell.processes().items():
                    if command.split()[0].rsplit("/")[-1] in wanted:
                        os.kill(pid, signal.SIGKILL)
            else:
                launcher.kill()
        if fault.what not in ("stop rank", "fill disk"):
            self._before = tuple(self._shell.process_of(self._name, rank) for rank in (0, 1))
            self._metrics_before = self._metrics()

    def damage(self, luck: float) -> None:
        """Flip one bit in some file of the newest checkpoint, or cut it off there."""
        draw = random.Random(luck)
        path = draw.choice(sorted(run_folder.checkpoints(self._folder / "checkpoints")[0].iterdir()))
        data = bytearray(path.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data if draw.random() < 0.5 else data[:at])

    def _metrics(self) -> int | None:
        """Which file holds the figures: a group that goes on from a checkpoint writes a new one."""
        path = self._folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def _has_open(pid: int | None, name: str) -> bool:
    with contextlib.suppress(OSError):
        return name in Path(f"/proc/{pid}/maps").read_text()
    return False
