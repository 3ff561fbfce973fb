"""How long a launch takes to its first step, and what Ray and DeepSpeed cost in memory: `python -m benchmarks.startup`.

Launches the digits recipe with and without Ray, a few rounds each, in turn; prints medians. Memory is the proportional
set size (PSS) of every process of a launch, in the middle of the run, so that pages in common are counted once.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_STEPS = 400
_LOOK_AT = 40


def descendants(pid: int) -> list[int]:
    """The process and all its descendants."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    below = [int(child) for file in children for child in file.read_text().split()]
    return [pid, *(d for child in below for d in descendants(child))]


def pss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1000


def role(pid: int, launcher: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    if pid == launcher:
        return "launcher"
    is_rank = "ray::_Rank" in command or "on_local.child" in command
    return "ranks" if is_rank else "Ray"


def launch(*options: str) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds of each phase until the first step, MB by role in the middle of the run)."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"steps={_STEPS}", f"evaluate.every={_STEPS}", "log.every=5"]
        command = [sys.executable, "-m", "vimscale.launch.cli", "launch", "vim_digits_cpu", *overrides, *options]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdout is not None
        phases, memory = {}, {}
        for line in process.stdout:
            if found := re.match(r"first step after ([\d.]+) s: (.*)", line):
                phases = {name: float(s) for name, s in re.findall(r"([a-zA-Z ]+?) ([\d.]+)(?:,|$) ?", found[2])}
                phases["total"] = float(found[1])
            if line.startswith(f"step {_LOOK_AT}/"):
                for pid in descendants(process.pid):
                    name = role(pid, process.pid)
                    memory[name] = memory.get(name, 0.0) + pss_mb(pid)
                process.terminate()
        process.wait()
    return phases, memory


def imports() -> dict[str, float]:
    """MB of a bare process after importing torch, and after importing torch and DeepSpeed."""
    code = "import os\n{}\nprint('PSS', open('/proc/self/smaps_rollup').read().split('Pss:')[1].split()[0])"
    result = {}
    for name, lines in {"torch": "import torch", "torch and deepspeed": "import torch, deepspeed"}.items():
        out = subprocess.run([sys.executable, "-c", code.format(lines)], capture_output=True, text=True, check=True)
        result[name] = int(out.stdout.split("PSS")[1]) / 1000
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ways = {"Ray": ("--workers", "2"), "--no-ray": ("--workers", "2", "--no-ray")}
    measured: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, options in ways.items():
            measured[name].append(launch(*options))
            time.sleep(1)
    for name, results in measured.items():
        for what, unit, part in (("time to the first step", "s", 0), ("memory in the middle of the run", "MB", 1)):
            keys = results[0][part]
            medians = {key: statistics.median(result[part][key] for result in results) for key in keys}
            figures = ", ".join(f"{key} {value:,.1f}" for key, value in medians.items())
            sys.stdout.write(f"{name}: {what}, {unit}, median of {rounds}: {figures}\n")
    figures = ", ".join(f"{name} {value:,.0f} MB" for name, value in imports().items())
    sys.stdout.write(f"a bare process after importing: {figures}\n")


if __name__ == "__main__":
    main()
