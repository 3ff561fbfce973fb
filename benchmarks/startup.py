"""What happens from the command to the first step, and what Ray and DeepSpeed cost in memory:

    python -m benchmarks.startup --against OTHER/.venv/bin/python --json benchmarks/results/startup.json

Two measurements of the digits recipe, a few rounds each, in turn; prints medians. A *rank* alone, in its parts:
seconds, modules imported, and the megabytes of their files, which a cold disk has to read. A *launch* with and without
Ray: seconds of each phase, and memory in the middle of the run, as the proportional set size (PSS) of every process, so
that pages in common are counted once. `--against` measures the checkout of another interpreter in the same rounds.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_STEPS = 400
_LOOK_AT = 40

_RANK = """
import json, os, sys, time
from pathlib import Path

parts, last = {}, (time.perf_counter(), 0, 0)

def mark(name):
    global last
    now = time.perf_counter()
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    read = sum(os.path.getsize(file) for file in files if os.path.exists(file)) / 1e6
    part = parts.setdefault(name, {"seconds": 0, "modules": 0, "megabytes": 0})
    for key, value, before in zip(part, (now, len(sys.modules), read), last):
        part[key] += value - before
    last = time.perf_counter(), len(sys.modules), read

def timed(owner, attribute, name):
    function = getattr(owner, attribute, None)
    def measured(*arguments, **options):
        mark("rest")
        result = function(*arguments, **options)
        mark(name)
        return result
    if function is not None:
        setattr(owner, attribute, measured)

from vimscale.launch.processes import on_local, rank
rank.before_torch()
from vimscale.runtime.distributed import RankSpec
from vimscale.recipe import recipe

folder = Path(sys.argv[1])
chosen = recipe.load("vim_digits_cpu", ["steps=1", "optim.warmup=0", "evaluate.every=0"])
spec = RankSpec(chosen, folder, 0, 1, "cpu", 2, f"file://{folder}/meet", "lo")
from vimscale.runtime import distributed
distributed.prepare(spec)
from vimscale.training import loop, run
mark("imports")
timed(run.TrainingSet, "open", "data")
timed(run.Dataset, "open", "data")
timed(run.Run, "open_stream", "data")
timed(run, "CompileAhead", "kernels")
timed(getattr(run, "CompileAhead", object), "finish", "kernels")
timed(run, "Engine", "engine")
timed(loop, "take_step", "first step")
ended = rank.run(spec, lambda event: mark("report") if event["kind"] == "step" else None, lambda: False)
assert ended.status == "done", ended.message
(folder / "parts.json").write_text(json.dumps(parts))
"""


def rank_parts(python: str) -> dict[str, float]:
    """Seconds, modules and megabytes of their files, of each part of a rank's start, by `part: unit`."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-c", _RANK, folder], cwd=folder, check=True, capture_output=True)
        parts = json.loads((Path(folder) / "parts.json").read_text())
    parts["total"] = {unit: sum(part[unit] for part in parts.values()) for unit in parts["imports"]}
    return {f"{name}: {unit}": value for name, part in parts.items() for unit, value in part.items()}


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


def launch(python: str, *options: str) -> dict[str, float]:
    """Seconds of each phase until the first step, and MB by role in the middle of the run, by `what: unit`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"steps={_STEPS}", f"evaluate.every={_STEPS}", "log.every=5"]
        command = [python, "-m", "vimscale.launch.cli", "launch", "vim_digits_cpu", *overrides, *options]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdout is not None
        figures: dict[str, float] = {}
        for line in process.stdout:
            if found := re.match(r"first step after ([\d.]+) s: (.*)", line):
                phases = re.findall(r"([a-zA-Z ]+?) ([\d.]+)(?:,|$) ?", found[2])
                figures |= {f"{name}: seconds": float(s) for name, s in phases}
                figures["total: seconds"] = float(found[1])
            if line.startswith(f"step {_LOOK_AT}/"):
                for pid in descendants(process.pid):
                    name = f"{role(pid, process.pid)}: MB"
                    figures[name] = figures.get(name, 0.0) + pss_mb(pid)
                process.terminate()
        process.wait()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-ray", action="store_true", help="leave out launches with Ray")
    parser.add_argument("--against", metavar="PYTHON", help="interpreter of another checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the medians to FILE")
    options = parser.parse_args()
    trees = {"before": options.against, "now": sys.executable} if options.against else {"now": sys.executable}
    ways: dict[str, Callable[[str], dict[str, float]]] = {
        "a rank alone": rank_parts,
        "launch --no-ray": lambda python: launch(python, "--workers", "2", "--no-ray"),
    }
    if not options.no_ray:
        ways["launch"] = lambda python: launch(python, "--workers", "2")
    measured: dict[str, dict[str, list[dict[str, float]]]] = {way: {tree: [] for tree in trees} for way in ways}
    for _ in range(options.rounds):
        for way, measure in ways.items():
            for tree, python in trees.items():
                measured[way][tree].append(measure(python))
                time.sleep(1)
    medians = {
        way: {
            tree: {key: round(statistics.median(r[key] for r in results), 2) for key in results[0]}
            for tree, results in by_tree.items()
        }
        for way, by_tree in measured.items()
    }
    for way, by_tree in medians.items():
        print(f"{way}, medians of {options.rounds}: {' / '.join(trees)}")
        for key in dict.fromkeys(key for figures in by_tree.values() for key in figures):
            print(f"  {key:32} {' / '.join(f'{figures.get(key, 0):9,.2f}' for figures in by_tree.values())}")
    if options.json:
        import torch

        about = {"machine": f"{platform.machine()}, {platform.python_version()}", "torch": torch.__version__}
        options.json.write_text(json.dumps(about | {"rounds": options.rounds, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
