"""The scripts in examples/ run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from vimscale.data.shards.manifest import Manifest
from vimscale.export import safetensors
from vimscale.model import PRESETS, VisionMamba

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


def test_scan_agrees_with_the_reference() -> None:
    assert "largest difference from the reference" in _run("scan.py")
