"""Train schedules of directions on the digits recipe and compare them: `python -m benchmarks.digits`.

Runs every schedule with every seed through the command line, with two ranks as processes of this machine, one run at a
time and schedules in turn. Prints accuracy and speed, and writes them as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from vimscale.model.cost import flops, parameters
from vimscale.recipe import recipe

SCHEDULES = ("bi*4", "fwd*2 bi*2", "(fwd bwd)*2", "shared*4", "pair*4", "fwd*4")


def train(folder: Path, directions: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Accuracy on the held-out images, and images per second as the run itself measured them."""
    name = f"run{len(list(folder.glob('runs/*')))}"
    changes = [f"name={name}", f"model.directions={directions}", f"seed={seed}", "evaluate.every=0", *overrides]
    command = [sys.executable, "-m", "vimscale.launch.cli", "launch", "vim_digits_cpu", *changes]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, "--no-ray", "--workers", "2"], cwd=folder, env=environment, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed\n{done.stdout.decode()}{done.stderr.decode()}")
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(row["images_per_s"] for row in rows if "images_per_s" in row)
    result = json.loads((folder / "runs" / name / "result.json").read_text())
    return {"directions": directions, "seed": seed, "top1": result["top1"], "images_per_s": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    parser.add_argument("overrides", nargs="*", help="changes to the recipe: section.key=value")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for directions in options.schedules:
                runs.append(train(Path(folder), directions, seed, options.overrides))
                print(runs[-1], flush=True)
    print("", f"{'directions':14}{'parameters':>12}{'MFLOPs':>9}{'images/s':>10}  top-1 per seed", sep="\n")
    for directions in options.schedules:
        config = recipe.load("vim_digits_cpu", [f"model.directions={directions}"]).model.shape(10)
        of_schedule = [run for run in runs if run["directions"] == directions]
        speed = statistics.median(run["images_per_s"] for run in of_schedule)
        accuracy = "  ".join(f"{run['top1']:.2%}" for run in of_schedule)
        mean = statistics.mean(run["top1"] for run in of_schedule)
        size, work = parameters(config), flops(config) / 1e6
        print(f"{directions:14}{size:12,}{work:9.2f}{speed:10.0f}  {accuracy}  mean {mean:.2%}")
    measure.write({"runs": runs}, options.out)


if __name__ == "__main__":
    main()
