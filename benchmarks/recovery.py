"""How long a run stops after it loses a rank or a node, and where that time goes: `python -m benchmarks.recovery`.

Kills (SIGKILL) rank 1 of the digits recipe with and without Ray, and a node of a two-node Ray cluster on this machine,
a few rounds each, in turn; prints medians. The clock runs from the kill to the end of the next step.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_STEPS = 2000
_AT = 60


def recovery(kill: Callable[[Path], None], *options: str) -> dict[str, float]:
    """Seconds of each phase from `kill`, which is passed the run's folder, to the end of the next step."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"steps={_STEPS}", f"evaluate.every={_STEPS}", "checkpoint.every=50", "log.every=5"]
        command = [sys.executable, "-m", "vimscale.launch.cli", "launch", "vim_digits_cpu", *overrides, *options]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdout is not None
        phases: dict[str, float] = {}
        killed = 0.0
        for line in process.stdout:
            if line.startswith(f"step {_AT}/") and not killed:
                killed = time.perf_counter()
                kill(Path(folder) / "runs/vim_digits_cpu")
            if found := re.match(r"resumed after ([\d.]+) s: (.*)", line):
                phases = {name: float(s) for name, s in re.findall(r"([a-zA-Z ]+?) ([\d.]+)(?:,|$) ?", found[2])}
                total = time.perf_counter() - killed
                phases = {"noticing": max(total - float(found[1]), 0.0)} | phases | {"total": total}
                process.terminate()
        process.wait()
    return phases


def _kill_rank(run: Path) -> None:
    text = (run / "logs/rank_00001.txt").read_text()
    os.kill(int(re.findall(r"process (\d+) on", text)[-1]), signal.SIGKILL)


def node_lost() -> dict[str, float]:
    from ray.cluster_utils import Cluster

    limits = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=limits)
    try:
        node = cluster.add_node(num_cpus=1)
        options = ("--address", cluster.address, "--workers", "1:2")
        return recovery(lambda run: cluster.remove_node(node, allow_graceful=False), *options)
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "a rank killed, Ray": lambda: recovery(_kill_rank, "--workers", "2"),
        "a rank killed, --no-ray": lambda: recovery(_kill_rank, "--workers", "2", "--no-ray"),
        "a node lost, 2 -> 1 ranks, Ray": node_lost,
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            measured[name].append(measure())
            time.sleep(1)
    for name, results in measured.items():
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        figures = ", ".join(f"{key} {value:.1f}" for key, value in medians.items())
        worst = max(result["total"] for result in results)
        sys.stdout.write(f"{name}: s, median of {rounds}: {figures} (slowest {worst:.1f})\n")


if __name__ == "__main__":
    main()
