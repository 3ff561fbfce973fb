"""The scripts in examples/ run as their docstrings say."""

import io
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_scan_agrees_with_the_reference() -> None:
    assert "largest difference from the reference" in _run("scan.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/digits.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the repository keeps notebooks without outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    assert "first step after" in printed[1], "a cell shows the progress of training"
    found = re.search(r"the same class: ([\d.]+)% of 359 images", "".join(printed))
    assert found is not None
    assert float(found[1]) > 60
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 3
