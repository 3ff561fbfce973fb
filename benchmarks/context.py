"""One image shared between ranks (`parallel.context`), on this machine's CPU: `python -m benchmarks.context`.

A step of Vim-Ti on one image of 4,096 pixels (65,537 tokens) on 1, 2 and 4 ranks, each a process over gloo: the most
bytes that a rank allocates during a step, beyond what it holds between steps; what it sends, next to the plan; the
loss. Ranks share this machine's cores, so their times say nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.plan import RESULTS, both

IMAGE = ("model.preset=vim_tiny", "model.patch_size=16", "batch=1", "steps=100", "optim.warmup=0")


def row(pixels: int, size: int, recompute: str) -> dict[str, Any]:
    """Figures of the one of `size` ranks that needs the most."""
    changes = [*IMAGE, f"model.image_size={pixels}", f"parallel.recompute={recompute}", f"parallel.context={size}"]
    (of_ranks,) = both([changes], size)
    most = max(of_ranks, key=lambda rank: rank["measured"]["peak"])
    return {"pixels": pixels, "ranks": size, "recompute": recompute, **most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--recompute", nargs="+", default=["block"])
    parser.add_argument("--output", type=Path, default=RESULTS / "context.json")
    arguments = parser.parse_args()
    print(
        "| ranks | recompute | peak MB | plan | of one rank's | sent MB | plan |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    found: list[dict[str, Any]] = []
    for recompute in arguments.recompute:
        for size in arguments.ranks:
            found.append(row(arguments.pixels, size, recompute))
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
            real, guess = found[-1]["measured"], found[-1]["predicted"]
            single = next(
                (r["measured"]["peak"] for r in found if (r["ranks"], r["recompute"]) == (1, recompute)), None
            )
            share = "" if single is None else f"{real['peak'] / single:.2f}"
            print(
                f"| {size} | {recompute} | {real['peak'] / 1e6:.0f} | {guess['peak'] / 1e6:.0f} | {share} |"
                f" {real['exchanged'] / 1e6:.2f} | {guess['exchanged'] / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
