"""The scripts in examples/ run as their docstrings say."""

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vimscale.data.shards.manifest import Manifest
from vimscale.export import safetensors
from vimscale.model import PRESETS, VisionMamba
from vimscale.model.tiles import Bag

ROOT = Path(__file__).resolve().parent.parent


def _run(script: str, *arguments: str) -> str:
    """What an example prints, in its own process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _images(folder: Path) -> list[str]:
    paths = [str(folder / f"{shade}.png") for shade in (0, 100, 200)]
    for shade, path in zip((0, 100, 200), paths, strict=True):
        Image.new("RGB", (40, 30), (shade, 50, 255 - shade)).save(path)
    return paths


def test_features_come_from_a_preset(tmp_path: Path) -> None:
    printed = _run("features.py", "vim_digits", *_images(tmp_path))
    assert printed.startswith("features (3, 64), map of the last layer (3, 64, 4, 4)\n")
    assert len(printed.splitlines()) == 4


def test_features_come_from_an_exported_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    manifest = Manifest("ten", tuple("0123456789"), shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    safetensors.write(tmp_path / "export", VisionMamba(PRESETS["vim_digits"]), manifest, {})
    printed = _run("features.py", str(tmp_path / "export"), *_images(tmp_path))
    assert printed.startswith("features (3, 64)")
    assert printed.splitlines()[1].split()[1] == "1.000", "an image is like itself"


def test_tile_features_are_those_of_the_model_from_shards_and_from_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    manifest = Manifest("ten", tuple("0123456789"), shards=(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    config = replace(PRESETS["vim_digits"], tiles=32, image_size=32, pos_embed="coordinates")
    model = VisionMamba(config).eval()
    safetensors.write(tmp_path / "export", model, manifest, {})
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)  # two rows of three tiles fit
    Image.fromarray(pixels).save(tmp_path / "large.png")
    tissue = [(32, 64), (0, 32)]  # the order in the shard is not that of the corners
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for row, column in tissue:
            file = io.BytesIO()
            Image.fromarray(pixels[row : row + 32, column : column + 32]).save(file, "PNG")
            member = tarfile.TarInfo(f"some/slide.r{row:06d}c{column:06d}.png")
            member.size = file.tell()
            file.seek(0)
            shard.addfile(member, file)
    sources = [str(tmp_path / name) for name in ("large.png", "shard.tar")]
    printed = _run("tile_features.py", str(tmp_path / "export"), str(tmp_path / "features"), *sources)
    assert printed.splitlines() == ["large: features (6, 64)", "slide: features (2, 64)"]

    mean, std = (torch.tensor(values)[:, None, None] for values in (manifest.mean, manifest.std))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    every = [(row, column) for row in (0, 32) for column in (0, 32, 64)]
    for name, corners in (("large", every), ("slide", sorted(tissue))):
        written = load_file(tmp_path / "features" / f"{name}.safetensors")
        assert written["at"].tolist() == [list(at) for at in corners]
        tiles = torch.stack([image[:, row : row + 32, column : column + 32] for row, column in corners])
        expected = model.tile_features(Bag(tiles, torch.tensor(corners))).detach()
        assert torch.allclose(written["features"], expected, atol=1e-5)  # another number of threads


def test_scan_agrees_with_the_reference() -> None:
    assert "largest difference from the reference" in _run("scan.py")
