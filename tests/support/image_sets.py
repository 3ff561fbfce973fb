"""Small images, and what data sets of them hold."""

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import write_set


def image(seed: int, height: int = 40, width: int = 48, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, kind)
    return file.getvalue()


def damaged_set(folder: Path, damaged: Collection[int], count: int = 6) -> Path:
    """Write images of two classes, two to a shard, some of which are damaged."""
    samples = [{"__key__": f"sample{i}", "cls": i % 2, "png": image(i, kind="PNG")} for i in range(count)]
    for i in damaged:
        samples[i]["png"] = image(i, kind="PNG")[:200]
    about = {"source": "", "licence": "", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    write_set(folder, samples, per_shard=2, name=folder.name, classes=("even", "odd"), **about)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples_of(folder: Path) -> dict[str, dict]:
    dataset = Dataset.open(str(folder))
    read = [dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    assert len({sample["__key__"] for sample in read}) == len(read)
    return {sample["__key__"]: sample for sample in read}
