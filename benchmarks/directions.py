"""What the directions of a Vision Mamba cost, and what the objectives do: `python -m benchmarks.directions`.

Measures a training step (forward, backward, AdamW) of the same model under several schedules, in turn, and lists
parameters, operations and peak memory. fp32 on a CPU, bf16 by autocast on a GPU. Prints a table for each image size;
writes a JSON file and a picture (time and operations, relative to the model that only walks forwards).

`--only objectives` measures the same encoder under each objective instead: the passes of a step, the first one among
them where an objective has one, without the update. In processor time of one thread, since a CPU is often shared.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see scan_cpu.py

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from vimscale.data.images import augment
from vimscale.data.sample import Sample
from vimscale.model import PRESETS, VimConfig, VisionMamba, cost
from vimscale.model.presets import Stage
from vimscale.objectives.base import Inputs, Learner
from vimscale.objectives.build import build
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

Row = dict[str, Any]
PLAIN = "fwd*24"
SCHEDULES = (PLAIN, "(fwd bwd)*12", "fwd*12 bi*12", "bi*24", "shared*24", "pair*24")
SMALL = PRESETS["vim_small"]
PYRAMID = VimConfig(
    patch_size=8,
    stages=(Stage(depth=4, d_model=192), Stage(depth=16, d_model=384), Stage(depth=4, d_model=768)),
    cls_token="none",
)
AGAIN = {"bi*24, recompute scan": "scan", "bi*24, recompute block": "block"}
MODELS = {
    **{text: replace(SMALL, directions=text) for text in SCHEDULES},
    "ssd*24": replace(SMALL, directions="ssd*24"),
    "ssd*24, shared": replace(SMALL, directions="ssd*24", ssd_form="shared"),
    "stages 192/384/768": PYRAMID,
    **dict.fromkeys(AGAIN, replace(SMALL, directions="bi*24")),
}


def one_size(models: dict[str, VimConfig], image_size: int, batch: int, rounds: int) -> Row:
    """Time each model's step in turn; the first model is the baseline."""
    samples = measure.random_batch(image_size, batch)
    configs = {name: replace(config, image_size=image_size) for name, config in models.items()}
    steps = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = VisionMamba(config).to(measure.DEVICE)
        model.recompute = [AGAIN.get(name, "none")] * len(config.layers)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        steps[name] = measure.training_step(model, model.parameters(), samples, optimizer)
    seconds = measure.in_turn(steps, rounds)
    plain = seconds[next(iter(models))]
    rows = {
        name: {
            "step_s": seconds[name],
            "ratio": seconds[name] / plain,
            "peak_extra_bytes": measure.peak_bytes(steps[name]),
            "parameters": cost.parameters(config),
            "flops": cost.flops(config),
        }
        for name, config in configs.items()
    }
    table(rows, f"{image_size} pixels, batch {batch}, median of {rounds} rounds")
    return {"image_size": image_size, "batch": batch, "models": rows}


def table(rows: dict[str, Row], title: str) -> None:
    """Print the rows. `flops` are those of the forward pass for one image; memory excludes parameters and optimizer
    state.
    """
    print(f"\n{title}")
    print(f"{'':24}{'step, ms':>10}{'ratio':>8}{'peak extra':>14}{'parameters':>14}{'flops per image':>17}")
    for name, row in rows.items():
        print(
            f"{name:24}{row['step_s'] * 1e3:10.0f}{row['ratio']:8.2f}{row['peak_extra_bytes'] / 2**20:10.0f} MiB"
            f"{row['parameters'] / 1e6:12.2f} M{row['flops'] / 1e9:15.2f} G"
        )


# ---- objectives

# name: images per step, width, layers, side of DINO's local crops, changes of the digits recipe
ENCODERS: dict[str, tuple[int, int, int, int, tuple[str, ...]]] = {
    "64 patches, 4 layers of 64": (32, 64, 4, 16, ("model.patch_size=4",)),
    "Vim-Ti, 196 patches": (4, 192, 24, 96, ("model.preset=vim_tiny",)),
}


def recipes_of(width: int, layers: int, local: int) -> dict[str, tuple[str, ...]]:
    """Each objective, and supervised training of the same encoder, as changes of a recipe."""
    forward = (f"model.directions=fwd*{layers}", "model.cls_token=none")
    ours = {
        "masked": f"decoder_width: {width}, decoder_depth: {max(layers // 12, 1)}",
        "autoregressive": f"decoder_width: {width}, decoder_heads: 2, cluster: 2",
        "contrastive": f"width: {width}, heads: 2, depth: 4, tokenizer: bytes, caption: class",
        "distillation": f"local_size: {local}, prototypes: 4096, hidden: 512, bottleneck: 128",
    }
    kinds = {kind: f"objective={{kind: {kind}, {options}}}" for kind, options in ours.items()}
    return {
        "supervised": (),
        "masked": (kinds["masked"],),
        "supervised, fwd": forward,
        "autoregressive, fwd": (*forward, kinds["autoregressive"]),
        "contrastive": (kinds["contrastive"],),
        "distillation": (kinds["distillation"],),
    }


def objectives(rounds: int) -> dict[str, dict[str, float]]:
    """Images per second of processor time, for each encoder and objective."""
    torch.set_num_threads(1)
    found = {}
    for encoder, (batch, *shape, changes) in ENCODERS.items():
        steps = {
            name: passes(recipes.load("vim_digits_cpu", [*changes, "model.pos_embed=sincos", *more]), batch)
            for name, more in recipes_of(*shape).items()
        }
        for run in steps.values():
            run()
        seconds = measure.cpu_in_turn(steps, rounds)
        found[encoder] = {name: batch / value for name, value in seconds.items()}
        print(f"\n{encoder}, batch {batch}, median of {rounds} rounds")
        for name, rate in found[encoder].items():
            print(f"{name:24}{rate:10.1f} images/s{rate / found[encoder]['supervised']:8.2f}x supervised", flush=True)
    return found


def passes(chosen: Recipe, batch: int) -> Callable[[], None]:
    """A function that runs the passes of a step on random images."""
    torch.manual_seed(0)
    config = chosen.model.shape(10 if chosen.objective.classifies else 0)
    objective = build(chosen.objective, config)
    learner = Learner(objective, VisionMamba(config))
    objective.begin(learner, 0, 100)
    rng, half = np.random.default_rng(0), torch.full((3,), 0.5)
    views: list[dict[str, Tensor]] = []
    for _ in range(batch):
        image = torch.from_numpy(rng.integers(0, 256, (3, *config.size), dtype=np.uint8))
        views.append(objective.views(Sample(image, 0, "", {"cls": b"0"}, config.size, "a class"), rng))
    stacked = {name: torch.stack([each[name] for each in views]) for name in views[0]}
    images = torch.randn(batch, 3, *config.size) if chosen.objective.reads_images else torch.empty(batch, 3, 0, 0)
    inputs = Inputs(images, torch.arange(batch) % 10, augment.normalised_views(stacked, half, half))

    def run() -> None:
        shared: dict[str, Tensor] = {}
        if objective.looks_ahead:
            with torch.no_grad():
                (shared,) = objective.meet(learner, [learner.ask("ahead", inputs)])
        learner.ask("loss", replace(inputs, shared=shared))[0].backward()
        for parameter in learner.parameters():
            parameter.grad = None

    return run


def draw(sizes: list[Row], title: str, path: Path) -> None:
    """Plot step times as bars, one group per model; a mark shows the time if it were proportional to the operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(sizes[0]["models"])
    height = 0.8 / len(sizes)
    figure, axes = pyplot.subplots(figsize=(8, 0.45 + 0.75 * len(names)))
    for i, size in enumerate(sizes):
        models = size["models"]
        at = [row + (i - (len(sizes) - 1) / 2) * height for row in range(len(names))]
        ratios = [models[name]["ratio"] for name in names]
        operations = [models[name]["flops"] / models[names[0]]["flops"] for name in names]
        label = f"{size['image_size']} pixels, batch {size['batch']}"
        axes.barh(at, ratios, height * 0.92, color=f"C{i}", label=label)
        axes.plot(operations, at, "k|", markersize=0.6 * height * 40, label=None if i else "operations alone")
        for y, ratio, mark in zip(at, ratios, operations, strict=True):
            axes.text(max(ratio, mark) + 0.02, y, f"{ratio:.2f}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names, family="monospace")
    axes.invert_yaxis()
    axes.set(xlabel=f"time of a training step, {names[0]} = 1", title=title)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.06)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=len(sizes) + 1, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512], help="image sizes, in pixels")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="one per size; default: 8 at 224, about the same number of pixels at other sizes",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/directions"),
        help="path of the .json and .png files, without the suffix",
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="the first is the baseline")
    parser.add_argument("--only", choices=["objectives"], help="measure the objectives, into objectives.json")
    options = parser.parse_args()
    if options.only:
        rates = objectives(options.rounds)
        path = options.out.with_name("objectives.json")
        measure.write({"rounds": options.rounds, "images_per_cpu_s": rates}, path)
        return
    batches = options.batch or [measure.batch_at(size) for size in options.sizes]
    if len(batches) != len(options.sizes):
        parser.error(f"--batch has {len(batches)} values for {len(options.sizes)} sizes; give one per size")
    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    models = {name: MODELS[name] for name in options.models}
    sizes = [one_size(models, size, batch, options.rounds) for size, batch in zip(options.sizes, batches, strict=True)]
    measure.write(
        {"d_model": SMALL.d_model, "rounds": options.rounds, "sizes": sizes}, options.out.with_suffix(".json")
    )
    model = f"24 layers, {SMALL.d_model} wide (except the stages)"
    title = f"The cost of directions: {model}, on {measure.device_and_precision()}"
    draw(sizes, title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
