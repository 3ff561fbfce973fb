"""A data set of noise, for tests of where its bytes are; and functions that damage it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest, Shard
from vimscale.storage.store import Retry

SHARDS, SAMPLES, BYTES = 6, 8, 92_160
TWO_SHARDS = "0.19MB"
SAMPLE = 512 + 512 + 512 + 9216
"""Bytes of one sample: cls, then png."""
HASTY = Retry(tries=4, first=0.01, longest=0.02, stall=20)
ROOT = Path(__file__).resolve().parents[2]


def write_set(folder: Path, seed: int = 0, base: str = "") -> Path:
    """Write a data set whose samples contain only noise; return its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shards = []
    for number in range(SHARDS):
        path = folder / f"{number:05d}.tar"
        offsets = []
        with path.open("wb") as file, TarWriter(file, mtime=0) as tar:
            for i in range(SAMPLES):
                offsets.append(tar.tarstream.offset)
                tar.write({"__key__": f"{number}-{i}", "cls": b"%d" % i, "png": rng.bytes(9000)})
            offsets.append(tar.tarstream.offset)
        data = path.read_bytes()
        assert len(data) == BYTES
        np.array(offsets, dtype="<u8").tofile(f"{path}.idx")
        shards.append(Shard(path.name, SAMPLES, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest("noise", tuple("01234567"), tuple(shards), (0.5,) * 3, (0.2,) * 3, base=base)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def everything(dataset: Dataset) -> list[tuple[str, bytes, bytes]]:
    """Return all samples in a shuffled order, which jumps from shard to shard."""
    order = np.random.default_rng(1).permutation(SHARDS * SAMPLES)
    samples = [dataset.read(int(index) // SAMPLES, int(index) % SAMPLES) for index in order]
    return [(sample["__key__"], sample["png"], sample["cls"]) for sample in samples]


def overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    return harm


def resized(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def moved(number: int, by: int) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        offsets = np.fromfile(path, "<i8")
        offsets[number] += by
        offsets.tofile(path)

    return harm
