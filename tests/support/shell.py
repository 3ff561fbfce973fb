"""The command line as a user runs it, in its own folder with a small recipe."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import forks

SMALL = """\
name: small
steps: 50
batch: 32
model: {preset: vim_digits, d_model: 32, depth: 2, drop_path: 0.1}
data: {train: "digits:train", val: "digits:val"}
augment: {crop_min: 0.7, flip: 0.0}
optim: {lr: 1e-3, warmup: 5, ema: 0.9}
checkpoint: {every: 20}
log: {every: 5}
"""
EVERYTHING = (
    "data.train=[{data: 'digits:train', weight: 3}, {data: 'digits:val', weight: 1}]",
    "data.reweight=[{step: 10, weights: [1, 1]}]",
    "data.lanes=2",
    "data.workers=1",
    "phases=[{step: 0, image_size: 16, batch: 64}, {step: 15, image_size: 32, batch: 32}]",
    "augment.policy=rand-m9-mstd0.5-inc1",
    "augment.erase=0.25",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.repeats=2",
)
"""Changes to the small recipe that use every part of the data pipeline."""
_FORKED = {
    "checkpoints",
    "data",
    "evaluate",
    "export",
    "features",
    "import",
    "inspect-batch",
    "plan",
    "predict",
    "show",
}
"""Commands that start no ranks."""
_MARK = "VIMSCALE_TEST_FOLDER"


@dataclass
class Shell:
    """A folder to work in; `vimscale` runs there as a separate process."""

    folder: Path
    env: dict[str, str]

    def popen(
        self,
        *arguments: str,
        file_limit: int | None = None,
        memory_limit: int | None = None,
        inside: Sequence[str] = (),
    ) -> subprocess.Popen:
        """Start `vimscale`. Every file is limited to `file_limit` KB, every process to `memory_limit` KB of addresses.
        `inside`: words before the command that run it, such as in a namespace.
        """
        command = [*inside, sys.executable, "-m", "vimscale.launch.cli", *arguments]
        for letter, limit in (("f", file_limit), ("v", memory_limit)):
            if limit is not None:
                command = ["bash", "-c", f'ulimit -{letter} {limit}; exec "$@"', "limited", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, start_new_session=True, **pipes)

    def run(self, *arguments: str, expect: int = 0, timeout: float = 240) -> str:
        """Run `vimscale`; return stdout, then stderr. Fail if the exit code is not `expect`."""
        if expect == 2 or (arguments and arguments[0] in _FORKED):  # imports would be most of their time
            done = forks.run_module("vimscale.launch.cli", *arguments, cwd=self.folder, env=self.env)
            said = done.stdout + done.stderr
            assert done.returncode == expect, f"exit code {done.returncode}, not {expect}\n{said}"
            return said
        return self.finish(self.popen(*arguments), expect, timeout)

    def finish(self, process: subprocess.Popen, expect: int = 0, timeout: float = 240) -> str:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{process.args} did not end within {timeout} s\n{out}\n{err}") from None
        assert process.returncode == expect, f"exit code {process.returncode}, not {expect}\n{out}\n{err}"
        return out + err

    def rows(self, name: str, kind: str = "train") -> list[dict]:
        path = self.folder / "runs" / name / "metrics.jsonl"
        if not path.exists():
            return []
        complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in map(json.loads, complete) if row["kind"] == kind]

    def processes(self) -> dict[int, str]:
        """Return the pid and command of every process of this folder: launchers, ranks, their workers, Ray's own."""
        mark = f"{_MARK}={self.folder}".encode()
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if mark in environ.read_bytes().split(b"\0"):
                    command = environ.with_name("cmdline").read_bytes()
                    found[int(environ.parts[2])] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def nothing_is_left(self, within: float = 90) -> None:
        """Wait until no process of this folder is left. If some stay, kill them and fail.

        Two of Ray's agents take a minute to notice that their Ray was killed with its launcher.
        """
        deadline = time.monotonic() + within
        while left := self.processes():
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"processes outlive their launcher by {within} s: {left}")
            time.sleep(0.05)

    def end(self) -> None:
        """Kill whatever is left after a failed test."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def reaches(self, process: subprocess.Popen, name: str, step: int) -> None:
        """Wait until the run has logged that step."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        while not path.exists() or path.read_text().count('"kind": "train"') < step:
            assert process.poll() is None, f"{name} ended before step {step}: {process.communicate()}"
            time.sleep(0.02)

    def process_of(self, name: str, rank: int) -> int | None:
        """Return the newest pid that a rank has logged; the process may have ended since."""
        path = self.folder / "runs" / name / "logs" / f"rank_{rank:05d}.txt"
        found = re.findall(r"process (\d+) on", path.read_text()) if path.exists() else []
        return int(found[-1]) if found else None

    def world_sizes(self, name: str) -> list[int]:
        """Return the number of ranks of each group that the run has had."""
        log = self.folder / "runs" / name / "logs" / "rank_00000.txt"
        return [int(world) for world in re.findall(r"rank 0 of (\d+)", log.read_text())]

    def losses(self, name: str) -> list[float]:
        rows = self.rows(name)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing or repeated"
        return [row["loss"] for row in rows]


def relative_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def new_shell(folder: Path, cache: Path) -> Shell:
    (folder / "small.yaml").write_text(SMALL)
    # SPT_NOENV: Ray's workers set their process title, and would overwrite their environment with it
    return Shell(folder, os.environ | {"XDG_CACHE_HOME": str(cache), _MARK: str(folder), "SPT_NOENV": "1"})
