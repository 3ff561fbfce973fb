"""Generated photographs for the guide: `python -m tests.support.photos FOLDER` writes 300 JPEG files in 3 classes."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square", "triangle")


def write(folder: Path, count: int = 300) -> None:
    """Write `count` photos of sizes from 96 to 240 pixels to FOLDER/CLASS/NUMBER.jpg: a shape of one color, anywhere,
    on a noisy background of another.
    """
    for number in range(count):
        kind = CLASSES[number % len(CLASSES)]
        path = folder / kind / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _photo(kind, np.random.default_rng(number)).save(path, quality=90)


def _photo(kind: str, random: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in random.integers(96, 241, 2))
    back, front = random.integers(0, 100, 3), random.integers(140, 256, 3)
    noise = random.normal(0, 12, (height, width, 3))
    photo = Image.fromarray((back + noise).clip(0, 255).astype(np.uint8))
    radius = int(min(width, height) * random.uniform(0.25, 0.4))
    x, y = (int(random.integers(radius, side - radius)) for side in (width, height))
    box, color = (x - radius, y - radius, x + radius, y + radius), tuple(int(part) for part in front)
    draw = ImageDraw.Draw(photo)
    if kind == "circle":
        draw.ellipse(box, fill=color)
    elif kind == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    return photo


if __name__ == "__main__":
    write(Path(sys.argv[1]))
