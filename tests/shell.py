"""The command line as a user runs it, in a folder of its own with a small recipe."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


@dataclass
class Shell:
    """A folder to work in, and `vimscale` run there as a process of its own."""

    folder: Path
    env: dict[str, str]

    def popen(
        self, *arguments: str, file_limit: int | None = None, memory_limit: int | None = None
    ) -> subprocess.Popen:
        """No file may grow beyond `file_limit` KB, no process beyond `memory_limit` KB of addresses."""
        command = [sys.executable, "-m", "vimscale.launch.cli", *arguments]
        for letter, limit in (("f", file_limit), ("v", memory_limit)):
            if limit is not None:
                command = ["bash", "-c", f'ulimit -{letter} {limit}; exec "$@"', "limited", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, start_new_session=True, **pipes)

    def run(self, *arguments: str, expect: int = 0, timeout: float = 240) -> str:
        """The command's output, stderr after stdout; fails on another exit code than `expect`."""
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
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in map(json.loads, whole) if row["kind"] == kind]

    def losses(self, name: str) -> list[float]:
        rows = self.rows(name)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing or there twice"
        return [row["loss"] for row in rows]


def new_shell(folder: Path, cache: Path) -> Shell:
    (folder / "small.yaml").write_text(SMALL)
    return Shell(folder, os.environ | {"XDG_CACHE_HOME": str(cache)})
