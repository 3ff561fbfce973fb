"""Faults for runs to survive: drawn from a seed, injected into real processes and files at chosen moments."""

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

from tests.support.processes import is_running, parent
from tests.support.shell import Shell
from vimscale.runtime import run_folder

SCHEDULED = ("steps=36", "checkpoint.every=6", "evaluate.every=9", "log.every=1")
"""Settings of the runs that the schedules are made for: every step is logged when it is done."""
LAUNCHES = 8
"""Most launches of one command."""
_PATIENCE_S = 600
"""Time limit for one launch, on a machine that others use too."""

What = Literal[
    "kill rank", "kill worker", "stop rank", "fill disk", "kill launcher", "kill Ray", "kill helper", "damage"
]
When = Literal["step", "save", "evaluation", "start", "load"]


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    kill rank      SIGKILL; the launcher starts a new group
    stop rank      SIGSTOP, then SIGCONT a second or two later
    fill disk      no file that the rank writes may grow beyond 100 KB, as on a full disk
    kill launcher  SIGKILL
    kill worker    SIGKILL to a process that reads data for the rank: a worker, the server that forks them, its tracker
    kill Ray       SIGKILL to gcs_server, raylet or both, of the launcher's own Ray
    kill helper    SIGKILL to another process of that Ray: an agent, a monitor, an idle worker
    damage         the launcher is killed, and a file of the newest checkpoint gets a flipped bit or is cut off

    The moment is the first of its kind from `step` on: a step (some way into the next one), a save, an evaluation; or
    the next group's start (a rank logs its pid), or a load (a rank has a checkpoint open).
    """

    what: What
    when: When
    step: int = 0
    rank: int = 0
    luck: float = 0.5
    """Decides, in [0, 1), everything else: how far into the step, for how long, which byte."""


_LASTING = ("kill worker", "stop rank", "fill disk", "kill helper")
"""Faults that do not always end the group."""


def schedule(seed: int, *, ray: bool, helpers: bool = False) -> list[Fault]:
    """Draw one to four faults from a seed, for a run of 36 steps that saves every 6. With `helpers`, the processes that
    work for the ranks and for Ray are hit first, and may be hit again later.
    """
    draw = random.Random(seed)
    lasting: list[What] = ["kill rank", "kill rank", "stop rank", "fill disk", "kill launcher"]
    deadly: list[What] = ["kill rank", "kill launcher"]
    if ray:
        lasting.append("kill Ray")
    early = lasting
    if helpers:
        early = ["kill worker", *(["kill helper"] if ray else [])]
        lasting = [*lasting, *early]
    faults = []
    # damage comes late: it needs a checkpoint before the newest
    for low, high, choices in ((3, 11, early), (20, 28, [*lasting, "damage", "damage"])):
        what = draw.choice(choices)
        when: When = draw.choice(["step", "step", "save", "save", "evaluation"])
        rank, luck = draw.randrange(2), draw.random()
        faults.append(Fault(what, when, draw.randint(low, high), rank, luck))
        if what not in _LASTING and draw.random() < 0.5:
            # hit the new group too
            when = draw.choice(["start", "load", "load"])
            faults.append(Fault(draw.choice(deadly), when, 0, draw.randrange(2), draw.random()))
    return faults


def survive(shell: Shell, name: str, command: tuple[str, ...], faults: list[Fault]) -> list[str]:
    """Repeat the command until it succeeds, and inject `faults` in order. Return the output of each launch.

    Nothing else is done by hand: the command is repeated at once.

    Raises:
        AssertionError: it never succeeded, or the moment of some fault never came.
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
            time.sleep(0.005)
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


class SmallDisk:
    """A separate file system for a shell's `runs`, in a mount namespace that a process keeps open."""

    def __init__(self, shell: Shell, megabytes: int = 8):
        """Mount it.

        Raises:
            PermissionError: this user may not make namespaces or mount on this machine.
        """
        mounted = shell.folder / "runs"
        mounted.mkdir()
        script = 'mount -t tmpfs -o size="$2"m none "$1" && echo mounted && exec sleep infinity'
        namespaces = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        command = [*namespaces, "sh", "-c", script, "holder", str(mounted), str(megabytes)]
        try:
            self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError as error:
            raise PermissionError(str(error)) from None
        assert self._holder.stdout is not None
        if (said := self._holder.stdout.readline()) != "mounted\n":
            raise PermissionError(said.strip())
        self.seen = Shell(Path(f"/proc/{self._holder.pid}/root{shell.folder}"), shell.env)
        """The shell's folder as seen in the namespace: read it, but run no commands there."""
        self._filler = self.seen.folder / "runs" / "filler"
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", f"--target={self._holder.pid}", *user, "--mount", "sh", "-c", 'cd "$0" && exec "$@"']
        self.inside = (*enter, str(shell.folder))
        """The words before a command that run it in the namespace."""

    def fill(self, left: int) -> None:
        """Fill the disk but for `left` bytes, in full blocks."""
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        os.truncate(self._filler, max(self._filler.stat().st_size - left, 0))

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


@dataclass(frozen=True)
class Full:
    """A disk that fills up `after` seconds after step `step` (0: the start), and may be emptied again."""

    step: int
    after: float
    left: int
    emptied: bool

    @classmethod
    def drawn(cls, seed: int) -> "Full":
        draw = random.Random(seed)
        left = draw.choice((0, 0, 4 << 10, 64 << 10, 400 << 10))
        return cls(draw.randrange(36), draw.random() * 0.5, left, draw.random() < 0.25)


def run_on(disk: SmallDisk, full: Full, shell: Shell, name: str, command: tuple[str, ...]) -> tuple[int, str]:
    """Run the command once while the disk fills. Return (exit code, output).

    Raises:
        AssertionError: it hung.
    """
    process = shell.popen("launch", *command, inside=disk.inside)
    while process.poll() is None and not (disk.seen.folder / "runs" / name / "logs").exists():
        time.sleep(0.001)
    while process.poll() is None and len(disk.seen.rows(name)) < full.step:
        time.sleep(0.001)
    time.sleep(full.after)  # this waits for nothing: it is the time at which the disk fills
    disk.fill(full.left)
    if full.emptied:
        time.sleep(2 * full.after)
        disk.empty()
    try:
        said = "".join(process.communicate(timeout=_PATIENCE_S))
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"hung on a full disk: {full}\n{''.join(process.communicate())}") from None
    return process.returncode, said


class _Disturbed:
    """A run seen from outside: its folder, and the pids that its ranks log."""

    def __init__(self, shell: Shell, name: str):
        self._shell, self._name = shell, name
        self._folder = shell.folder / "runs" / name
        self._before: tuple[int | None, ...] = (None, None)
        self._metrics_before: int | None = None

    def is_at(self, fault: Fault) -> bool:
        """Return whether the moment has come; for `step` and `evaluation`, return some way into it."""
        ranks = tuple(self._shell.process_of(self._name, rank) for rank in (0, 1))
        target = ranks[fault.rank]
        if target is None or target == self._before[fault.rank] or not is_running(target):
            return False
        if fault.when == "start":
            return True
        if fault.when == "load":
            # after a load, metrics go to a new file; a check that comes too late strikes right after the load
            return self._metrics() != self._metrics_before or any(_has_open(pid, "checkpoints/step_") for pid in ranks)
        if fault.when == "save":
            partial = (self._folder / "checkpoints").glob(".step_*.partial")
            return any(int(path.name[len(".step_") :].split(".")[0]) >= fault.step for path in partial)
        step = fault.step if fault.when == "step" else -(-fault.step // 9) * 9
        if self._metrics() == self._metrics_before or len(self._shell.rows(self._name)) < step:
            return False
        # this waits for nothing: it is how late the fault comes
        time.sleep(fault.luck * (0.04 if fault.when == "step" else 0.2))
        return True

    def strike(self, fault: Fault, launcher: subprocess.Popen) -> None:
        rank = self._shell.process_of(self._name, fault.rank)
        assert rank is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile, which the next launch or group shows
            if fault.what == "kill rank":
                os.kill(rank, signal.SIGKILL)
            elif fault.what == "stop rank":
                os.kill(rank, signal.SIGSTOP)
                time.sleep(0.5 + 1.5 * fault.luck)
                os.kill(rank, signal.SIGCONT)
            elif fault.what == "fill disk":
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (100 << 10, resource.RLIM_INFINITY))
            elif fault.what == "kill worker":
                os.kill(_pick(self._readers(rank), fault.luck), signal.SIGKILL)
            elif fault.what == "kill helper":
                os.kill(_pick(self._helpers(), fault.luck), signal.SIGKILL)
            elif fault.what == "kill Ray":
                wanted = (["gcs_server"], ["raylet"], ["gcs_server", "raylet"])[int(fault.luck * 3)]
                for pid, command in self._shell.processes().items():
                    if command.split()[0].rsplit("/")[-1] in wanted:
                        os.kill(pid, signal.SIGKILL)
            else:
                launcher.kill()
        if fault.what not in _LASTING:
            self._before = tuple(self._shell.process_of(self._name, rank) for rank in (0, 1))
            self._metrics_before = self._metrics()

    def _readers(self, rank: int) -> list[int]:
        """Return the server that forks a rank's data workers, the workers, and the tracker of their shared memory."""
        running = self._shell.processes()
        own = [pid for pid in running if parent(pid) == rank and "multiprocessing" in running[pid]]
        return [*own, *(pid for pid in running if parent(pid) in own)]

    def _helpers(self) -> list[int]:
        """Return Ray's own processes but the two that it cannot work without; ranks are not among them."""
        names = ("log_monitor", "monitor.py", "agent", "ray::IDLE")
        return [pid for pid, command in self._shell.processes().items() if any(name in command for name in names)]

    def damage(self, luck: float) -> None:
        """Flip one bit in a file of the newest checkpoint, or cut the file off there."""
        draw = random.Random(luck)
        path = draw.choice(sorted(run_folder.checkpoints(self._folder / "checkpoints")[0].iterdir()))
        data = bytearray(path.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data if draw.random() < 0.5 else data[:at])

    def _metrics(self) -> int | None:
        """Return the inode of the metrics file: a group that resumes from a checkpoint writes a new one."""
        path = self._folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None


def _pick(pids: list[int], luck: float) -> int:
    assert pids, "no such process runs"
    return sorted(pids)[int(luck * len(pids))]


def _has_open(pid: int | None, name: str) -> bool:
    with contextlib.suppress(OSError):
        return name in Path(f"/proc/{pid}/maps").read_text()
    return False
