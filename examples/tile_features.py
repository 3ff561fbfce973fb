"""Write the features of every tile of very large images, one file per image.

    python examples/tile_features.py MODEL features/ slide.png            # cut here, background included
    python examples/tile_features.py MODEL features/ slides/*.tar         # cut by `vimscale data prepare --tiles`

MODEL is the folder of a run (its newest checkpoint) or of an export, of a model with `model.tiles`. Each image becomes
features/NAME.safetensors with `features` fp32 (t, d), the mean of each tile's tokens, which have seen all other tiles,
and `at` int32 (t, 2), the (row, column) of each tile's upper left corner, in pixels.

Axes: t tiles of an image, s side of a tile in pixels, d model width.
"""

import argparse
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import vimscale
from vimscale.inference.preprocessing import Preprocessing
from vimscale.model.tiles import Bag

TILE = re.compile(r"(?:.*/)?(?P<key>[^/.]+)\.r(?P<row>\d+)c(?P<column>\d+)\.(?:jpg|jpeg|png|webp)")
"""A tile in a shard; the members of a sample are adjacent."""
Tiles = list[tuple[np.ndarray, tuple[int, int]]]
"""Pixels, uint8 (s, s, 3), and the corner of each tile, in the order of the corners."""

Image.MAX_IMAGE_PIXELS = None  # these images are large on purpose


def cut(path: Path, side: int) -> Tiles:
    """Cut an image into all tiles that fit."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    corners = [(r, c) for r in range(0, image.height - side + 1, side) for c in range(0, image.width - side + 1, side)]
    if not corners:
        raise SystemExit(f"{path} has {image.height} x {image.width} pixels, less than a tile of {side} x {side}")
    return [(np.asarray(image.crop((c, r, c + side, r + side))), (r, c)) for r, c in corners]


def samples(path: Path, side: int) -> Iterator[tuple[str, Tiles]]:
    """Yield (name, tiles) of each image in a shard, or of an image file."""
    if path.suffix != ".tar":
        yield path.stem, cut(path, side)
        return
    with tarfile.open(path) as shard:
        members = ((match, member) for member in shard if (match := TILE.fullmatch(member.name)))
        for key, group in groupby(members, key=lambda pair: pair[0]["key"]):
            tiles: Tiles = []
            for match, member in group:
                file = shard.extractfile(member)
                assert file is not None
                with Image.open(file) as image:
                    tiles.append((np.asarray(image.convert("RGB")), (int(match["row"]), int(match["column"]))))
            yield key, sorted(tiles, key=lambda tile: tile[1])


def bag_of(tiles: Tiles, preprocessing: Preprocessing, device: torch.device) -> Bag:
    """A bag as the model takes it: normalized, on its device."""
    pixels = torch.from_numpy(np.stack([tile for tile, _ in tiles])).to(device)  # (t, s, s, 3)
    mean, std = (torch.tensor(values, device=device) for values in (preprocessing.mean, preprocessing.std))
    normalized = pixels.float().div_(255).sub_(mean).div_(std)
    return Bag(normalized.permute(0, 3, 1, 2), torch.tensor([at for _, at in tiles], dtype=torch.int32, device=device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a run or of an export")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("images", nargs="+", type=Path, help="shards (.tar) of a set of tiles, or image files")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, preprocessing = vimscale.load(arguments.model, device=device)
    side = model.config.tiles
    if side is None:
        raise SystemExit(f"{arguments.model} takes images, not tiles; `vimscale features` gives their features")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for path in arguments.images:
        for name, tiles in samples(path, side):
            bag = bag_of(tiles, preprocessing, device)
            with torch.inference_mode():
                features = model.tile_features(bag).float()
            written = {"features": features.cpu().contiguous(), "at": bag.at.cpu()}
            save_file(written, arguments.output / f"{name}.safetensors")
            print(f"{name}: features {tuple(features.shape)}")


if __name__ == "__main__":
    main()
