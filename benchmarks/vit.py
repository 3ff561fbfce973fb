"""Vim-Ti and its `ssd` models against a transformer of DeiT-Ti's dimensions as images grow: `python -m benchmarks.vit`.

Measures training (forward and backward) with batches of about the same number of pixels, and inference with one image:
time, in turn, and peak memory. At 224 pixels it also measures a training step of the original architecture with
mamba-ssm's reference scan, which is the only one for machines without CUDA. fp32 on a CPU, bf16 by autocast on a GPU.
Prints tables; writes a JSON file and a picture.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see scan_cpu.py

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.scan_cpu import mamba_ssm_reference
from vimscale.model import PRESETS, VisionMamba

Row = dict[str, Any]
SIZES = (224, 384, 512, 768, 1024, 1248, 1536, 2048)
TINY, SSD, SSD_MLP = PRESETS["vim_tiny"], PRESETS["ssd_tiny"], PRESETS["ssd_mlp_tiny"]
SLOW_ROUNDS = 3
"""Most rounds of what takes 20 s per image."""


class Block(nn.Module):
    """Attention and an MLP, each with a norm before it and a residual connection."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (b, heads, l, d / heads)
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """A transformer to compare with (arXiv:2010.11929), with torch's fused attention; by default with the dimensions of
    DeiT-Ti (arXiv:2012.12877).
    """

    def __init__(self, image_size: int, d: int = 192, heads: int = 3, depth: int = 12, patch: int = 16):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros((image_size // patch) ** 2 + 1, d))
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 1000)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "Vim-Ti": lambda image_size: VisionMamba(replace(TINY, image_size=image_size)),
    "ssd-Ti": lambda image_size: VisionMamba(replace(SSD, image_size=image_size)),
    "ssd-Ti, shared": lambda image_size: VisionMamba(replace(SSD, image_size=image_size, ssd_form="shared")),
    "ssd-MLP-Ti": lambda image_size: VisionMamba(replace(SSD_MLP, image_size=image_size)),
    "DeiT-Ti": ViT,
}
BASELINE = "DeiT-Ti"


def compare(
    what: str, runs: dict[str, Callable[[], object]], image_size: int, batch: int, rounds: int, shared: bool
) -> Row:
    """Seconds and peak memory of the models at one size, and their ratios to the transformer's."""
    if shared:
        for run in runs.values():
            run()
    seconds = (measure.cpu_in_turn if shared else measure.in_turn)(runs, rounds)
    peaks = {name: measure.peak_bytes(run) for name, run in runs.items()}
    row = {"what": what, "image_size": image_size, "batch": batch, "seconds": seconds, "peak_extra_bytes": peaks}
    times, memory = ({name: of[name] / of[BASELINE] for name in MODELS} for of in (seconds, peaks))
    for name in MODELS:
        print(f"{what:10}{image_size:8}{batch:7}  {name:16}{seconds[name] * 1e3:10.0f}", end="")
        print(f"{peaks[name] / 2**20:10.0f} MiB{times[name]:9.2f}{memory[name]:9.2f}", flush=True)
    return row | {"time_ratio": times, "memory_ratio": memory}


def sizes(image_sizes: list[int], rounds: int, memory_gib: float, shared: bool) -> list[Row]:
    """Compare the models at each size; `shared`: in processor time of one thread. Skips a training step that is likely
    to take more than `memory_gib`, judged by the previous size: with fused attention, memory grows in proportion to the
    pixels.
    """
    print(f"\nmedian of {rounds} rounds; ratios: to {BASELINE}")
    print(f"{'':10}{'pixels':>8}{'batch':>7}  {'model':16}{'ms':>10}{'memory':>14}{'time':>9}{'memory':>9}")
    rows: list[Row] = []
    bytes_per_pixel = 0.0
    for image_size in image_sizes:
        torch.manual_seed(0)
        models = {name: make(image_size).to(measure.DEVICE) for name, make in MODELS.items()}
        batch = measure.batch_at(image_size)
        pixels = batch * image_size**2
        if bytes_per_pixel * pixels <= memory_gib * 2**30:
            samples = measure.random_batch(image_size, batch)
            steps = {name: measure.training_step(model, model.parameters(), samples) for name, model in models.items()}
            rows.append(compare("training", steps, image_size, batch, rounds, shared))
            bytes_per_pixel = max(rows[-1]["peak_extra_bytes"].values()) / pixels
        else:
            likely = bytes_per_pixel * pixels / 2**30
            print(f"{'training':10}{image_size:8}{batch:7}   skipped: likely {likely:.1f} GiB")
        for batch in (8, 1) if image_size == 224 else (1,):
            images, _ = measure.random_batch(image_size, batch)
            runs = {name: measure.inference(model.eval(), images) for name, model in models.items()}
            rows.append(compare("inference", runs, image_size, batch, rounds, shared))
    return rows


def original(rounds: int, size: int, image_size: int = 224) -> Row:
    """Time a training step on `size` images, ours and that of the original architecture with mamba-ssm's reference
    scan.
    """
    from benchmarks import published
    from vimscale.model.published.weights import published_config, to_published

    torch.manual_seed(0)
    model = VisionMamba(replace(TINY, image_size=image_size)).to(measure.DEVICE)
    state = {name: tensor.requires_grad_() for name, tensor in to_published(model).items()}
    arguments, scan = published_config(model), mamba_ssm_reference()

    def theirs(images: Tensor) -> Tensor:
        return published.forward(state, arguments, images, scan=scan)

    batch = measure.random_batch(image_size, size)
    with torch.no_grad():
        difference = float((theirs(batch[0]) - model(batch[0])).abs().max())
    runs = {
        "vimscale": measure.training_step(model, model.parameters(), batch),
        "original, reference scan": measure.training_step(theirs, state.values(), batch),
    }
    rounds = min(rounds, SLOW_ROUNDS if size == 1 else 1)
    seconds = measure.in_turn(runs, rounds)
    ours, original = seconds.values()
    print(f"\nVim-Ti, training, {image_size} pixels, batch {size}, median of {rounds} rounds:", end=" ")
    print(f"vimscale {ours:.2f} s, the original with mamba-ssm's reference scan {original:.1f} s,", end=" ")
    print(f"{original / ours:.0f} times as long; logits differ by at most {difference:.0e}")
    return {
        "image_size": image_size,
        "batch": size,
        "rounds": rounds,
        "seconds": seconds,
        "ratio": original / ours,
        "largest_difference": difference,
    }


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Plot the times of inference and training and the peak memory, per image, against the side of the image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (inference, training, memory) = pyplot.subplots(1, 3, figsize=(14, 4.8))

    def lines(axes: Any, what: str, key: str, unit: float, style: str) -> None:
        largest = {row["image_size"]: row for row in rows if row["what"] == what}  # of two batches, the last: one image
        for i, name in enumerate(MODELS):
            points = [(size, row[key][name] / row["batch"] / unit) for size, row in largest.items()]
            if points:
                axes.loglog(*zip(*points, strict=True), style, color=f"C{i}", label=name)

    lines(inference, "inference", "seconds", 1, "o-")
    lines(training, "training", "seconds", 1, "o-")
    lines(memory, "training", "peak_extra_bytes", 2**20, "o-")
    lines(memory, "inference", "peak_extra_bytes", 2**20, "o--")
    inference.set(title="Inference", ylabel="s per image")
    training.set(title="Training (forward and backward)", ylabel="s per image")
    memory.set(title="Peak memory beyond the weights", ylabel="MiB per image")
    ticks = sorted({row["image_size"] for row in rows})
    for axes in (inference, training, memory):
        axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
        axes.minorticks_off()
        axes.set_xlabel("side of the image, pixels")
        axes.grid(visible=True, which="major", alpha=0.3)
    inference.legend()
    memory.legend([Line2D([], [], color="k", ls=style) for style in ("-", "--")], ["training", "inference"])
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="image sizes, in pixels; none: only the original"
    )
    parser.add_argument("--only-sizes", action="store_true", help="leave out the original architecture, which is slow")
    parser.add_argument("--shared", action="store_true", help="processor time of one thread, where others use the CPU")
    parser.add_argument("--memory", type=float, default=16, help="most GiB for a training step")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/vit"),
        help="path of the .json and .png files, without the suffix",
    )
    options = parser.parse_args()
    if options.shared:
        torch.set_num_threads(1)
    print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    result: Row = {"rounds": options.rounds, "processor_time": options.shared}
    if options.only_sizes:
        print("\nthe original architecture is left out")
    elif find_spec("mamba_ssm"):
        result["original"] = [original(options.rounds, size) for size in (1, 8)]
    else:
        print("\nmamba-ssm is not installed: skipping the original architecture")
    result["rows"] = sizes(sorted(options.sizes), options.rounds, options.memory, options.shared)
    measure.write(result, options.out.with_suffix(".json"))
    unit = ", processor time" if options.shared else ""
    where = f"{measure.device_and_precision()}{unit}, patches of {TINY.patch_size} pixels"
    title = f"Vim-Ti, ssd-Ti and a transformer of DeiT-Ti's dimensions on {where}"
    draw(result["rows"], title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
