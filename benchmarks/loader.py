"""What a sample costs on its way into a batch, compared with peers in the same run: `python -m benchmarks.loader`.

    image    decode, random resized crop to 224, flip; one thread. Peers: Pillow's own crop and resize; torchvision's
             published steps on Pillow images (crop, flip, to float, normalize), written out here, because no
             torchvision runs with a CPU build of torch
    loader   JPEGs on disk to batches, no workers. Peers: webdataset's own pipeline with our decoder; an image folder
             with those steps under torch's DataLoader
    start    open sets of 1,000 shards, and find a position of a run, for shards of 10 and of 10,000 samples
    views    the loader with what each objective makes of an image, against crop and flip, and against the published
             supervised augmentation; images of 500 x 375

Other images are 415 x 355. All are JPEGs of smooth noise and grain, 64 and 80 KiB. Times are medians of CPU seconds of
the process.
"""

import argparse
import gc
import io
import json
import math
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch
import torch.utils.data
import webdataset
from PIL import Image

from benchmarks import measure
from vimscale.data import stream
from vimscale.data.images import augment, decode
from vimscale.data.order import Order, generator
from vimscale.data.shards.manifest import MANIFEST, Manifest, Shard, write_set
from vimscale.data.training_set import TrainingSet
from vimscale.objectives.build import build
from vimscale.recipe import model_section, recipe, sections

_SIZE = (224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 64


def jpegs(count: int, width: int = 415, height: int = 355) -> list[bytes]:
    """Smooth noise with detail on top; compresses like photographs."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 22, (height, width, 1)).astype(np.float32)
        file = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=82)
        made.append(file.getvalue())
    return made


# ---- one image


def ours(data: bytes, number: int) -> torch.Tensor:
    image, _ = decode.decode({"__key__": "k", "jpg": data, "cls": b"0"}, "benchmark", 1)
    return augment.for_training(image, _SIZE, sections.Augment(), generator(0, 1, number))


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    """The box of a random resized crop as torchvision documents it: (left, top, right, bottom)."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def _pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop(_box(*image.size)).resize(_SIZE, Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def pillow(data: bytes, number: int) -> np.ndarray:
    return np.array(_pillow(data))


def torchvision_style(data: bytes, number: int) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(_pillow(data))).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return pixels.sub_(mean).div_(std)


# ---- the complete loader


class ImageFolder(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path = self.files[number]
        return torchvision_style(path.read_bytes(), number), int(path.parent.name)


def loaders(folder: Path, images: list[bytes]) -> dict[str, Callable[[], Iterator[Any]]]:
    """For each loader, a function that makes one pass over the same images."""
    samples = [{"__key__": f"{i:06d}", "jpg": image, "cls": i % 10} for i, image in enumerate(images)]
    about: dict[str, Any] = {"classes": tuple(map(str, range(10))), "mean": _MEAN, "std": _STD}
    write_set(folder / "set", samples, per_shard=100, name="benchmark", source="", licence="", **about)
    for i, image in enumerate(images):
        path = folder / "images" / str(i % 10) / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    steps = len(images) // _BATCH
    data = sections.Data(train=str(folder / "set"))
    chosen = recipe.Recipe(
        name="benchmark", steps=steps, batch=_BATCH, data=data, model=model_section.Model(preset="vim_tiny")
    )
    config = chosen.model.shape(10)

    def vimscale() -> Iterator[stream.Batch]:
        return stream.training(chosen, TrainingSet.open(data), config, rank=0, world=1, start=0, steps=steps)

    def of_webdataset(sample: dict) -> tuple[torch.Tensor, int]:
        image, label = decode.decode(sample, "benchmark", 10)
        rng = generator(0, 1, int(sample["__key__"]))
        return augment.for_training(image, _SIZE, chosen.augment, rng), label

    def of_tars() -> Iterator[Any]:
        tars = sorted(str(path) for path in (folder / "set").glob("*.tar"))
        pipeline = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000)
        return iter(pipeline.map(of_webdataset).batched(_BATCH, partial=False))

    def of_folder() -> Iterator[Any]:
        return iter(torch.utils.data.DataLoader(ImageFolder(folder / "images"), _BATCH, shuffle=True, drop_last=True))

    return {"vimscale": vimscale, "webdataset": of_tars, "image folder + PIL": of_folder}


# ---- views of objectives

_NOTHING_ELSE = ("policy=null", "jitter=0", "erase=0", "mixup=0", "cutmix=0", "repeats=1", "crop_min=0.2")
VIEWS: dict[str, tuple[str, ...]] = {
    "crop and flip": ("vim_tiny_in1k", *(f"augment.{change}" for change in _NOTHING_ELSE)),
    "supervised, published": ("vim_tiny_in1k",),
    "masked": ("vim_base_mae_in1k",),
    "autoregressive": ("vim_base_arm_in1k", "model.image_size=224", "objective.cluster=2"),
    "contrastive": ("vim_base_siglip", "augment={crop_min: 0.2, flip: 0.5}", f"parallel.micro_batch={_BATCH}"),
    "distillation": ("vim_small_dino_in1k",),
}
"""Recipes and changes."""
_CAPTION = b"A brown dog and a small child run over wet sand next to the sea, under a grey sky."


def views(count: int, rounds: int) -> dict[str, Any]:
    """CPU us per image of the loader for each of VIEWS, and of the decoder alone."""
    images = jpegs(count, 500, 375)
    steps = count // _BATCH
    samples = [{"__key__": f"{i:06d}", "jpg": image, "cls": i % 10, "txt": _CAPTION} for i, image in enumerate(images)]
    about: dict[str, Any] = {"classes": tuple(map(str, range(10))), "mean": _MEAN, "std": _STD}
    runs: dict[str, Callable[[], object]] = {"decoding alone": lambda: [decode.pixels(image) for image in images]}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "set"
        write_set(source, samples, per_shard=100, name="benchmark", source="", licence="", **about)
        for name, (published, *changes) in VIEWS.items():
            same = (f"batch={_BATCH}", "epochs=null", f"steps={steps}", f"data.train={source}", "data.workers=0")
            chosen = recipe.load(published, [*same, "data.val=null", "evaluate.every=0", "optim.warmup=0", *changes])
            runs[name] = partial(_read, chosen, TrainingSet.open(chosen.data))
        for run in runs.values():
            run()
        seconds = measure.cpu_in_turn(runs, rounds)
    us = {name: value / (steps * _BATCH) * 1e6 for name, value in seconds.items()}
    plain = us["crop and flip"]
    for name, value in us.items():
        print(f"views   {name:24}{value:8,.0f} us{value / plain:8.2f}x crop and flip")
    return {"machine": measure.machine(), "rounds": rounds, "images": count, "us": us}


def _read(chosen: recipe.Recipe, data: TrainingSet) -> None:
    config = chosen.model.shape(10)
    objective = build(chosen.objective, config)
    reads = chosen.objective.reads_images
    options: dict[str, Any] = {"rank": 0, "world": 1, "start": 0, "steps": chosen.steps}
    for batch in stream.training(chosen, data, config, views=objective.views, augmented=reads, **options):
        assert len(batch.refs) == _BATCH


# ---- starting


def start(per_shard: int) -> dict[str, float]:
    """Open a set of 1,000 shards, and find the positions after one far into a run."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for i in range(1000):
            name = f"{i:05d}.tar"
            size = 512 * 115 * per_shard
            for path, length in ((name, size), (f"{name}.idx", 8 * (per_shard + 1))):
                with (Path(folder) / path).open("wb") as file:
                    file.truncate(length)  # sparse: only the sizes are read
            parts.append(Shard(name, per_shard, size, "0" * 64))
        manifest = Manifest("synthetic", ("0",), tuple(parts), _MEAN, _STD)
        (Path(folder) / MANIFEST).write_text(manifest.to_json())
        data = sections.Data(train=folder)
        chosen = recipe.Recipe(name="benchmark", steps=10, batch=1000, data=data)
        gc.collect()
        tracemalloc.start()
        began = time.perf_counter()
        opened = TrainingSet.open(data)
        seconds = time.perf_counter() - began
        state = len(json.dumps(opened.state(chosen, 10**6)))
        began = time.perf_counter()
        order = Order(chosen, [dataset.counts for dataset in opened.datasets])
        list(order.at(10**6, range(1)))  # position 1e9
        found = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()
        list(order.at(10**6, range(1000)))
        each = (time.perf_counter() - began) / 1000
    return {
        "samples": 1000 * per_shard,
        "open_ms": seconds * 1e3,
        "position_1e9_ms": found * 1e3,
        "peak_mb": peak / 1e6,
        "locate_us": each * 1e6,
        "state_bytes": state,
    }


def picture(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.2))
    titles = {"image": "decode, crop to 224, flip", "loader": "JPEGs on disk to batches, no workers"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        names = list(result[kind])[::-1]
        values = [result[kind][name] for name in names]
        bars = axis.barh(names, values, color=["C0" if name == "vimscale" else "0.7" for name in names])
        least = result[kind]["vimscale"]
        axis.bar_label(bars, [f" {value:,.0f} us, {least / value:.2f}x" for value in values], fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("CPU us per image; ours relative to the peer")
        axis.set_xlim(0, max(values) * 1.4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/loader"),
        help="path of the .json and .png files, without the suffix",
    )
    parser.add_argument("--only", choices=["views"], help="measure this part alone, and keep the file's other results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out.with_suffix(".json")
    if options.only:
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(kept | {"views": views(options.images, options.rounds)}, indent=1) + "\n")
        return
    machine = measure.machine() | {"webdataset": webdataset.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    images = jpegs(options.images)
    print(f"{len(images)} images of {np.mean([len(image) for image in images]) / 1024:.0f} KiB, 415 x 355\n")
    result: dict[str, Any] = {"machine": machine, "rounds": options.rounds, "images": options.images}

    some = images[:200]
    of_image = {"vimscale": ours, "Pillow": pillow, "torchvision's steps": torchvision_style}
    every = {name: (lambda f=f: [f(data, i) for i, data in enumerate(some)]) for name, f in of_image.items()}
    for run in every.values():
        run()
    seconds = measure.cpu_in_turn(every, options.rounds)
    result["image"] = {name: value / len(some) * 1e6 for name, value in seconds.items()}

    with tempfile.TemporaryDirectory() as folder:
        steps = options.images // _BATCH
        runs: dict[str, Callable[[], object]] = {
            name: (lambda load=load: sum(1 for _ in islice(load(), steps)))
            for name, load in loaders(Path(folder), images).items()
        }
        for name, run in runs.items():  # also brings the files into memory
            # webdataset's shuffle can leave a partial batch
            assert run() in (steps, steps - 1), name
        seconds = measure.cpu_in_turn(runs, options.rounds)
    result["loader"] = {name: value / (steps * _BATCH) * 1e6 for name, value in seconds.items()}

    for kind in ("image", "loader"):
        least = result[kind]["vimscale"]
        for name, value in result[kind].items():
            print(f"{kind:8}{name:24}{value:8,.0f} us{least / value:8.2f}x")
        print()
    result["start"] = [start(per_shard) for per_shard in (10, 10_000)]
    for row in result["start"]:
        print("start   " + ", ".join(f"{key} {value:,.1f}" for key, value in row.items()))
    result["views"] = views(options.images, options.rounds)
    path.write_text(json.dumps(result, indent=1) + "\n")
    picture(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
