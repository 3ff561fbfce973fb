"""The command line as a user runs it, in a folder of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Shell:
    """A folder to work in, and `vimscale` run there as a process of its own."""

    folder: Path
    env: dict[str, str]

    def popen(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "vimscale.launch.cli", *arguments]
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
