"""From a folder of photos to predictions: the commands that docs/commands.md lists, as a user types them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.shell import Shell

PAGE = Path(__file__).parents[2] / "docs/commands.md"
SHORTER = ("steps=30", "epochs=null", "optim.warmup=5", "checkpoint.every=30", "evaluate.every=30", "batch=16")
SHAPES = ("circle", "cross", "square")


def _photos(folder: Path, count: int, seed: int, shapes: tuple[str, ...] = SHAPES) -> None:
    """JPEGs of several sizes with one shape each, on a background of noise."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        (folder / shape).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(40, 90, size=2).tolist()
            image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
            draw, r = ImageDraw.Draw(image), min(height, width) // 3
            x, y = width // 2, height // 2
            ink = tuple(rng.integers(150, 255, size=3).tolist())
            if shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
            elif shape == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=ink)
            else:
                draw.line((x - r, y - r, x + r, y + r), fill=ink, width=5)
                draw.line((x - r, y + r, x + r, y - r), fill=ink, width=5)
            image.save(folder / shape / f"{i:03d}.jpg")


def _commands() -> list[list[str]]:
    """The commands of the page's block about photos."""
    text = PAGE.read_text()
    (block,) = re.findall(r"```sh\n(vimscale data prepare animals.*?)```", text, flags=re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line]


@pytest.mark.slow
def test_from_photos_to_predictions(shell: Shell) -> None:
    _photos(shell.folder / "animals", 24, seed=0)
    _photos(shell.folder / "others", 6, seed=1, shapes=("cross", "square"))
    said: dict[str, str] = {}
    for program, command, *rest in _commands():
        assert program == "vimscale"
        changes = [*SHORTER, "--no-ray", "--workers", "1"] if command == "launch" else []
        said[command] = said.get(command, "") + shell.run(command, *rest, *changes, timeout=600)
    assert "model.weights: loaded" in said["launch"]
    report = json.loads((shell.folder / "report/report.json").read_text())
    assert report["figures"]["images"] == 12
    assert {name: one["images"] for one in report["classes"] for name in [one["name"]]} == {"cross": 6, "square": 6}
    assert 0 <= report["figures"]["knn_top1"] <= 1
    features = np.load(shell.folder / "features.npy")
    assert features.shape == (12, 64)
    assert np.isfinite(features).all()
    assert len([line for line in said["predict"].splitlines() if ".jpg" in line]) == 12
