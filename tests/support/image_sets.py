"""Small images, and what data sets of them hold."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vimscale.data.dataset import Dataset


def image(seed: int, height: int = 40, width: int = 48, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, kind)
    return file.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples_of(folder: Path) -> dict[str, dict]:
    dataset = Dataset.open(str(folder))
    read = [dataset.read(shard, i) for shard, count in enumerate(dataset.counts) for i in range(count)]
    assert len({sample["__key__"] for sample in read}) == len(read)
    return {sample["__key__"]: sample for sample in read}
