"""Very large images: time and memory as a bag of tiles grows, against attention: `python -m benchmarks.long`.

A bag of tiles of 256 pixels is one sequence; blocks of Vim-Ti's width with bidirectional scans (`bi`) or with attention
(`attn`, torch's fused one), each recomputed in the backward pass (`parallel.recompute: block`). Each measurement is a
fresh process: a forward and backward pass on four tiles, then the timed one, and the most memory that the process took.
In every round, the models run one after the other. The time of the CPU, of all threads together, depends less on other
load than seconds do. Writes a JSON file and a picture.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see scan_cpu.py

Row = dict[str, Any]
TOKENS = (4_096, 16_384, 65_536, 262_144)
TILE, PATCH, WIDTH = 256, 16, 192
PER_TILE = (TILE // PATCH) ** 2
SLOW = 10
"""Seconds of CPU; a longer step is measured once."""
MODELS = {"bi": "bidirectional scans", "attn": "attention"}


def measured(kind: str, tokens: int, depth: int) -> Row:
    """Run a step on four tiles to warm up and the one that counts, in this process."""
    import torch
    import torch.nn.functional as F

    from benchmarks import measure
    from vimscale.estimate.activations import passes
    from vimscale.model import PRESETS, VisionMamba
    from vimscale.model.tiles import Bag

    assert measure.DEVICE == "cpu", "this measures the memory of a process"
    torch.manual_seed(0)
    config = replace(
        PRESETS["vim_tiny"],
        tiles=TILE,
        image_size=TILE,
        pos_embed="coordinates",
        depth=depth,
        directions=f"{kind}*{depth}",
    )
    assert (config.d_model, config.patch_size) == (WIDTH, PATCH)
    model = VisionMamba(config)
    model.recompute = ["block"] * depth
    labels = torch.zeros(1, dtype=torch.int64)

    def step(bag: Bag) -> None:
        F.cross_entropy(model([bag]), labels).backward()
        model.zero_grad()

    step(_bag(4))
    before = _most_bytes()
    bag = _bag(tokens // PER_TILE)
    wall, cpu = time.perf_counter(), time.process_time()
    step(bag)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _most_bytes()
    counted = passes(config.with_bag_size(len(bag.tiles)), ["block"] * depth, 1, "fp32", "cpu")
    return {
        "model": kind,
        "tokens": tokens,
        "tiles": len(bag.tiles),
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "before_bytes": before,
        "images_bytes": bag.tiles.nbytes,
        "counted_bytes": counted.with_gradients,
    }


def _bag(count: int) -> Any:
    """Return noise in a square of tiles."""
    import torch

    from vimscale.model.tiles import Bag

    side = max(round(count**0.5), 1)
    corners = [(TILE * (i // side), TILE * (i % side)) for i in range(count)]
    return Bag(torch.randn(count, 3, TILE, TILE), torch.tensor(corners, dtype=torch.int32))


def _most_bytes() -> int:
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(kind: str, tokens: int, depth: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.long", "--one", kind, str(tokens), "--depth", str(depth)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def lengths(tokens: list[int], depth: int, rounds: int, most: float) -> list[Row]:
    """Measure both kinds at each length, what is slow in one round; leave out what would take more than `most` seconds
    of CPU per step, judged by the length before.
    """
    rows: list[Row] = []
    print(f"\n{'tokens':>8} {'model':20}{'s':>8}{'CPU, s':>8}{'us per token':>14}{'peak, MiB':>11}{'per token, B':>14}")
    for length in tokens:
        run = []
        for kind in MODELS:
            last = next((row for row in reversed(rows) if row["model"] == kind), None)
            growth = 0 if last is None else length / last["tokens"]
            likely = 0 if last is None else last["cpu_seconds"] * growth ** (2 if kind == "attn" else 1)
            if likely <= most:
                run.append(kind)
            else:
                print(f"{length:8,} {MODELS[kind]:20}   left out: likely {likely:,.0f} s of CPU", flush=True)
        found: dict[str, list[Row]] = {kind: [] for kind in run}
        for i in range(rounds):
            for kind in run:
                if i == 0 or found[kind][0]["cpu_seconds"] < SLOW:
                    found[kind].append(in_a_process(kind, length, depth))
        for kind, several in found.items():
            row = several[0] | {
                "rounds": len(several),
                **{key: statistics.median(one[key] for one in several) for key in ("seconds", "cpu_seconds")},
                "peak_bytes": max(one["peak_bytes"] for one in several),
            }
            row["extra_bytes"] = row["peak_bytes"] - row["before_bytes"]
            rows.append(row)
            print(
                f"{length:8,} {MODELS[kind]:20}{row['seconds']:8.2f}{row['cpu_seconds']:8.2f}"
                f"{row['cpu_seconds'] / length * 1e6:14.1f}{row['peak_bytes'] / 2**20:11,.0f}"
                f"{row['extra_bytes'] / length:14,.0f}",
                flush=True,
            )
    return rows


def draw(rows: list[Row], depth: int, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (work, memory) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    for i, (kind, name) in enumerate(MODELS.items()):
        mine = [row for row in rows if row["model"] == kind]
        lengths = [row["tokens"] for row in mine]
        work.loglog(lengths, [row["cpu_seconds"] / depth for row in mine], "o-", color=f"C{i}", label=name)
        memory.loglog(lengths, [row["extra_bytes"] / 2**20 for row in mine], "o-", color=f"C{i}", label=name)
    first = rows[0]
    ends = [min(row["tokens"] for row in rows), max(row["tokens"] for row in rows)]
    for axes, start in ((work, first["cpu_seconds"] / depth), (memory, first["extra_bytes"] / 2**20)):
        line = [start * end / first["tokens"] for end in ends]
        axes.loglog(ends, line, "k:", linewidth=1, label="in proportion to the tokens")
        axes.set_xticks(ends := sorted({row["tokens"] for row in rows}), [f"{end:,}" for end in ends])
        axes.minorticks_off()
        axes.set_xlabel("tokens of one image")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
    work.set(title="Forward and backward pass", ylabel="seconds of CPU per layer")
    memory.set(title=f"Peak memory beyond the program and the model, {depth} layers", ylabel="MiB")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help=f"multiples of {PER_TILE}")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--rounds", type=int, default=3, help=f"of steps of less than {SLOW} s of CPU; one of others")
    parser.add_argument("--most", type=float, default=300, help="most seconds of CPU for a step")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "TOKENS"), help="measure this in the process itself")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/long"),
        help="path of the .json and .png files, without the suffix",
    )
    options = parser.parse_args()
    if options.one is not None:
        kind, tokens = options.one
        print(json.dumps(measured(kind, int(tokens), options.depth)))
        return
    from benchmarks import measure

    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    rows = lengths(sorted(options.tokens), options.depth, options.rounds, options.most)
    measure.write({"depth": options.depth, "rows": rows}, options.out.with_suffix(".json"))
    title = f"Blocks of Vim-Ti's width on one image, {measure.device_and_precision()}, tiles of {TILE} pixels"
    draw(rows, options.depth, title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
