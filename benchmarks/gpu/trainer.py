"""The trainer itself on one rank: `vimscale launch --no-ray` in a subprocess, on JPEGs in tars."""

import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RECIPE: Row = {
    "steps": 100,
    "batch": 128,
    "model": {"preset": "vim_small"},
    "data": {"workers": 12},
    "augment": {"crop_min": 0.08, "flip": 0.5, "mixup": 0.8, "cutmix": 1.0, "erase": 0.25},
    "objective": {"kind": "classification", "label_smoothing": 0.1},
    "optim": {"lr": 1e-3, "weight_decay": 0.05, "warmup": 20, "clip": 1.0, "ema": 0.9999},
    "parallel": {"zero": 1, "precision": "bf16"},
    "checkpoint": {"every": 50, "keep": 2},
    "evaluate": {"every": 0},
    "log": {"every": 10},
}
PHOTOS = 5120
SKIPPED = 2
"""Logged ranges that contain the first steps, and so imports and compilers."""
NAMES = {"vim_tiny": "Vim-Ti", "vim_small": "Vim-S", "vim_base": "Vim-B"}


def photo(number: int) -> bytes:
    """A JPEG of 375 x 500 pixels and about 77 KB: smooth noise with grain, tinted by its class."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-18, 18, (375, 500, 1))
    pixels[:, :, number % 3] += 12 * (number % 10)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photos(folder: Path, count: int) -> None:
    """A data set of `count` photos in ten classes."""
    from vimscale.data.shards.manifest import write_set

    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        images = pool.map(photo, range(count), chunksize=64)
        samples = ({"__key__": f"{i:06d}", "jpg": image, "cls": i % 10} for i, image in enumerate(images))
        about: Row = {"classes": tuple(map(str, range(10))), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        write_set(folder, samples, per_shard=320, name="photos", source="", licence="", **about)


def trained(recipe: Row = RECIPE, photos: int = PHOTOS) -> Iterator[Row]:
    """Images/s, step time and data wait of the logged ranges after the first, and the seconds to the first step.

    Raises:
        RuntimeError: the launch failed; carries the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "set", photos)
        data = recipe["data"] | {"train": str(folder / "set")}
        (folder / "photos.yaml").write_text(json.dumps(recipe | {"name": "photos", "data": data}))  # JSON is YAML
        code = "from vimscale.launch.cli import main; main()"
        command = [sys.executable, "-c", code, "launch", str(folder / "photos.yaml"), "--no-ray", "--workers", "1"]
        done = subprocess.run([*command, "--runs", str(folder / "runs")], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"vimscale launch exited with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        lines = (folder / "runs" / "photos" / "metrics.jsonl").read_text().splitlines()
    row = summary(recipe, [json.loads(line) for line in lines], done.stdout)
    print(
        f"vimscale launch: {row['images_per_s']:.0f} images/s, {row['step_ms']:.1f} ms per step,"
        f" data wait {row['data_wait']:.1%}, first step after {row['first_step_s']} s",
        flush=True,
    )
    yield row


def summary(recipe: Row, metrics: list[Row], output: str) -> Row:
    """One row from the metrics and the output of a run."""
    logged = [row for row in metrics if row["kind"] == "train" and "images_per_s" in row][SKIPPED:]
    if not logged:
        raise RuntimeError(f"the run logged no range after its first {SKIPPED}; give it more steps")
    speed = statistics.median(row["images_per_s"] for row in logged)
    first = re.search(r"first step after ([\d.]+) s: (.*)", output)
    preset = recipe["model"]["preset"]
    return {
        "model": NAMES.get(preset, preset),
        "image_size": recipe["model"].get("image_size", 224),
        "batch": recipe["batch"],
        "zero": recipe["parallel"]["zero"],
        "ema": "ema" in recipe["optim"],
        "clip": recipe["optim"].get("clip"),
        "workers": recipe["data"]["workers"],
        "steps": recipe["steps"],
        "step_ms": recipe["batch"] / speed * 1e3,
        "images_per_s": speed,
        "data_wait": statistics.median(row["data_wait"] for row in logged),
        "peak_memory_gb": max((row["memory_gb"] for row in logged if "memory_gb" in row), default=None),
        "first_step_s": float(first[1]) if first else None,
        "until_first_step": first[2] if first else None,
        "parameter_tensors": _parameter_tensors(preset),
        "last_loss": [row["loss"] for row in metrics if row["kind"] == "train"][-1],
    }


def _parameter_tensors(preset: str) -> int:
    import torch

    from vimscale.model import PRESETS, VisionMamba

    with torch.device("meta"):
        return len(list(VisionMamba(PRESETS[preset]).parameters()))
