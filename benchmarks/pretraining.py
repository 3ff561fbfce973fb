"""What pretraining is worth on pictures that no one here drew: `python -m benchmarks.pretraining`.

Emoji in two styles train, a third style tests (benchmarks/emoji.py; needs npm and resvg-py). Each objective trains for
as many steps with each seed, through the command line; then a linear probe and kNN read the frozen features: categories
of the third style, from those of the first two. Next to them stand random weights, and supervised training from scratch
with as many steps. The contrastive model also has to find the name of each picture of the third style among all names.
Writes a JSON file and a picture.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import emoji, measure

Row = dict[str, Any]
MODEL = (
    "model.image_size=64",
    "model.patch_size=8",
    "model.d_model=96",
    "model.depth=6",
    "model.cls_token=none",
    "model.pos_embed=sincos",
)
BOTH, FORWARD = ("model.directions=bi*6",), ("model.directions=fwd*6",)
SSD = ("model.directions=ssd*6", "model.d_head=32")
SSD_MLP = ("model.directions=ssd*3", "model.depth=3", "model.d_head=32", "model.ssd_form=shared", "model.expand=1",
           "model.mlp=swiglu")  # fmt: skip
SUPERVISED = ("objective={kind: classification, label_smoothing: 0.1}", "augment.crop_min=0.4")
KINDS: dict[str, tuple[str, ...]] = {
    "random weights": (*BOTH, "objective.kind=masked", "objective.decoder_width=64"),
    "supervised": (*BOTH, *SUPERVISED),
    "supervised ssd": (*SSD, *SUPERVISED),
    "supervised ssd mlp": (*SSD_MLP, *SUPERVISED),
    "masked": (*BOTH, "objective={kind: masked, decoder_width: 64}", "optim.lr=2e-3"),
    "autoregressive": (
        *FORWARD,
        "objective={kind: autoregressive, cluster: 2, decoder_width: 64, decoder_heads: 2}",
        "optim.lr=2e-3",
    ),
    "distillation": (
        *BOTH,
        "objective={kind: distillation, prototypes: 1024, hidden: 256, bottleneck: 64, local_crops: 4, local_size: 32,"
        " momentum: 0.99, teacher_temperature: 0.04}",
    ),
    "contrastive": (
        *BOTH,
        "objective={kind: contrastive, tokenizer: bytes, caption: txt, context: 64, width: 96, depth: 2, heads: 4,"
        " features: 96, evaluation: retrieval}",
    ),
}
NO_STEP = ("steps=1", "optim.lr=1e-30", "optim.min_lr=0", "optim.warmup=0")


def vimscale(folder: Path, *arguments: str) -> str:
    """Run a command of the command line in `folder`; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "vimscale.launch.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"vimscale {' '.join(arguments)} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(folder: Path) -> None:
    """Make the data sets of both splits, with labels and names."""
    for split, pictures in emoji.make(folder).items():
        if not (folder / "sets" / split / "manifest.json").is_file():
            vimscale(folder, "data", "prepare", str(pictures), f"sets/{split}")


def train(folder: Path, kind: str, seed: int, steps: int) -> Row:
    """Train and measure one model."""
    name = f"{kind.replace(' ', '_')}_{seed}_{steps}"
    length = NO_STEP if kind == "random weights" else (f"steps={steps}", f"optim.warmup={steps // 10}")
    changes = ("data.train=sets/train", "data.val=sets/test", "epochs=null", "batch=64", "augment.flip=0.5")
    changes += ("augment.crop_min=0.4", "evaluate.every=0", "checkpoint.every=100000", "optim.ema=null", *MODEL)
    if not (folder / "runs" / name / "result.json").is_file():
        vimscale(folder, "launch", "vim_digits_cpu", f"name={name}", f"seed={seed}", *changes, *length, *KINDS[kind],
                 "--no-ray", "--workers", "2")  # fmt: skip
    run = folder / "runs" / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
    result = json.loads((run / "result.json").read_text())
    row: Row = {"kind": kind, "seed": seed, "steps": steps, "images_per_s": statistics.median(speeds), "run": result}
    row |= probed(name)
    print({key: value for key, value in row.items() if key != "run"}, flush=True)
    return row


def probed(name: str) -> dict[str, float]:
    """kNN and linear probe of a run's encoder, as `vimscale evaluate --knn SET --linear SET` has them."""
    from vimscale.evaluation.probes import Probes
    from vimscale.inference.opened import restored
    from vimscale.launch.commands.evaluate import evaluated
    from vimscale.runtime.run_folder import RunFolder

    learner, recipe, manifest, _ = restored(RunFolder.of(name), raw=True, step=None)
    probes = Probes(knn="sets/train", k=(20,), linear="sets/train", pools=("head",))
    return evaluated(learner, recipe, manifest, figures=False, probes=probes)


def table(rows: list[Row]) -> None:
    print("", f"{'':16}{'linear probe':>22}{'kNN':>22}", sep="\n")
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        cells = [_cell([row[key] for row in mine]) for key in ("linear_top1", "knn_top1")]
        print(f"{kind:16}{cells[0]:>22}{cells[1]:>22}")
    chance = 1 / rows[0]["run"]["images"]
    for figure in ("recall1", "recall5"):
        found = [row["run"][figure] for row in rows if figure in row["run"]]
        print(f"own names found of the third style, {figure}: {_cell(found)}; one of all by chance: {chance:.2%}")


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    for i, kind in enumerate(KINDS):
        for k, (key, color) in enumerate((("linear_top1", "C0"), ("knn_top1", "C1"))):
            values = [100 * row[key] for row in rows if row["kind"] == kind]
            at = i + 0.36 * (k - 0.5)
            label = {"linear_top1": "linear probe", "knn_top1": "kNN"}[key] if i == 0 else None
            axes.bar(at, statistics.mean(values), 0.34, color=color, alpha=0.6, label=label)
            axes.plot([at] * len(values), values, "k_", markersize=9)
    axes.set_xticks(range(len(KINDS)), list(KINDS))
    axes.set_ylabel("categories of the third style, %")
    axes.set_title("Frozen features of emoji in a style that was not trained on; one mark per seed")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for pictures, sets and runs; finished runs are not repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, help="path of the .json and .png files, without the suffix; default:"
                        " benchmarks/results/pretraining for all kinds, nothing for some")  # fmt: skip
    options = parser.parse_args()
    folder = options.folder.resolve()
    complete = options.kinds == list(KINDS)
    out = (options.out or Path("benchmarks/results/pretraining")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    prepare(folder)
    rows = [train(folder, kind, seed, options.steps) for seed in range(options.seeds) for kind in options.kinds]
    if complete:
        table(rows)
        draw(rows, out.with_suffix(".png"))
    if complete or options.out is not None:
        measure.write({"rows": rows}, out.with_suffix(".json"))


if __name__ == "__main__":
    main()
