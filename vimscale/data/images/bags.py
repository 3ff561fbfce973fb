"""Bags of tiles: how a sample stores a large image in pieces, and how the pieces are read.

A sample holds KEY.cls, KEY.tiles.json, and one image per tile, named after the row and column of its upper left pixel:
KEY.r000512c001024.jpg. Axes: t tiles, s side of a tile.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.data.images import decode
from vimscale.data.images.choice import Choice
from vimscale.errors import BadSample, brief
from vimscale.model.tiles import Bag
from vimscale.storage import untrusted

MEMBER = "tiles.json"
"""The member that describes the tiles; a sample that has it is a bag."""
SIDES = range(8, 4097)
"""Sides that a tile may have, in pixels."""
FARTHEST = 999_999
"""Largest row or column of a pixel: members' names have six digits, so that their order is that of the tiles."""
_LEFT_OUT = 214
"""Grey of what an overview lacks."""
_NAME = re.compile(r"r(\d{6})c(\d{6})\.(?:jpg|jpeg|png|webp)", re.ASCII)


@dataclass(frozen=True)
class Cut:
    """How an image was cut; with the tiles' corners, it is what `tiles.json` holds."""

    size: tuple[int, int]
    """Height and width of the image at this level, in pixels."""
    side: int
    level: int = 0
    """Level of the pyramid; 0 is the full image."""
    downsample: float = 1.0
    """Pixels of the full image per pixel of this level, in one direction."""
    background: int = 0
    """Tiles that were left out."""


class Stored(NamedTuple):
    """A bag's tiles as members of its sample, in the order of their rows, then columns."""

    cut: Cut
    names: list[str]
    at: np.ndarray
    """int32 (t, 2)"""


def name_of(row: int, column: int, extension: str) -> str:
    return f"r{row:06d}c{column:06d}.{extension}"


def description(cut: Cut, at: list[tuple[int, int]]) -> bytes:
    """Write `tiles.json`."""
    return json.dumps({**asdict(cut), "at": at}).encode()


def is_bag(members: dict) -> bool:
    return MEMBER in members


def stored(sample: dict, where: str, side: int | None) -> Stored:
    """Find the tiles of a webdataset sample. `side`: what their sides must be; None: any.

    Raises:
        BadSample: "tiles" if it is not a bag of such tiles, or its members are not those that `tiles.json` lists; names
            `where`.
    """
    try:
        cut, at = _parsed(sample.get(MEMBER, b""))
        found = {name: match for name in sample if (match := _NAME.fullmatch(name))}
        names = sorted(found)
        corners = np.array([found[name].group(1, 2) for name in names], dtype=np.int64).reshape(-1, 2)
        if not np.array_equal(corners, at):
            raise ValueError(f"{MEMBER} does not list its {len(names):,} tiles, sorted by row and column")
        if side is not None and cut.side != side:
            raise ValueError(f"its tiles have {cut.side} pixels per side, not {side}")
    except ValueError as error:
        raise BadSample("tiles", f"{where}: not a bag of tiles: {error}") from None
    return Stored(cut, names, corners.astype(np.int32))


def _parsed(data: bytes) -> tuple[Cut, np.ndarray]:
    """Return (cut, corners (t, 2)) of a `tiles.json`.

    Raises:
        ValueError: it is damaged.
    """
    if not data:
        raise ValueError(f"it has no {MEMBER}")
    tree = untrusted.loads(data)
    at = tree.pop("at", None) if isinstance(tree, dict) else None
    cut = untrusted.build(Cut, tree)
    try:
        corners = np.array(at)
    except ValueError:  # rows of several lengths
        corners = np.array(None)
    if corners.ndim != 2 or corners.shape[1] != 2 or corners.dtype != np.int64:
        raise ValueError(f"{MEMBER}: at is not a list of (row, column)")
    if cut.side not in SIDES or not 0 < min(cut.size) <= max(cut.size) <= FARTHEST + 1:
        raise ValueError(f"{MEMBER}: tiles of {brief(cut.side)} pixels, of an image of {brief(list(cut.size))}")
    if corners.min() < 0 or (corners >= cut.size).any():
        raise ValueError(f"{MEMBER}: a tile begins outside the image of {cut.size[0]} x {cut.size[1]} pixels")
    return cut, corners


def images(sample: dict, found: Stored, where: str, chosen: np.ndarray | None = None) -> Iterator[Tensor]:
    """Decode tiles one by one: uint8 (3, s, s). `chosen`: their indices; None: all.

    Raises:
        BadSample: a tile is damaged, or has another size; names `where` and the tile.
    """
    side = found.cut.side
    for name in found.names if chosen is None else map(found.names.__getitem__, chosen.tolist()):
        try:
            size = decode.size_of(sample[name])
            if size != (side, side):
                raise BadSample("tiles", f"{size[0]} x {size[1]} pixels, not {side} x {side}")
            yield decode.pixels(sample[name])
        except BadSample as error:
            raise BadSample(error.cause, f"{where}, tile {name}: {error}") from None


def read(sample: dict, found: Stored, where: str, chosen: np.ndarray | None = None) -> Bag:
    """Decode tiles into a bag: uint8 (t, 3, s, s). Arguments and errors are those of `images`."""
    at = found.at if chosen is None else found.at[chosen]
    tiles = np.empty((len(at), 3, found.cut.side, found.cut.side), dtype=np.uint8)
    for i, image in enumerate(images(sample, found, where, chosen)):
        tiles[i] = image.numpy()  # numpy copies so little faster than torch, which starts threads
    return Bag(torch.from_numpy(tiles), torch.from_numpy(at.copy()))


def for_training(sample: dict, where: str, choice: Choice, flip: float, rng: np.random.Generator) -> Bag:
    """Read a random choice of a bag's tiles, mirrored with the chance `flip`.

    Raises:
        BadSample: it is not such a bag, or a tile is damaged.
    """
    where = f"{where}, sample {sample.get('__key__')}"
    found = stored(sample, where, choice.side)
    mirror = rng.random() < flip
    bag = read(sample, found, where, drawn(len(found.names), choice.most, rng))
    return mirrored(bag, found.cut) if mirror else bag


def for_evaluation(sample: dict, where: str, choice: Choice) -> Bag:
    """Read a bag's tiles; of too many, evenly spread ones.

    Raises:
        BadSample: it is not such a bag, or a tile is damaged.
    """
    where = f"{where}, sample {sample.get('__key__')}"
    found = stored(sample, where, choice.side)
    return read(sample, found, where, spread(len(found.names), choice.most))


def drawn(count: int, most: int | None, rng: np.random.Generator) -> np.ndarray | None:
    """Draw `most` of `count` tiles, in order; None: all."""
    if most is None or count <= most:
        return None
    return np.sort(rng.choice(count, most, replace=False, shuffle=False))


def spread(count: int, most: int | None) -> np.ndarray | None:
    """Choose `most` of `count` tiles, evenly spread, in order; None: all."""
    if most is None or count <= most:
        return None
    return (2 * np.arange(most) + 1) * count // (2 * most)


def mirrored(bag: Bag, cut: Cut) -> Bag:
    """Flip an image from left to right: each tile, and the tiles' columns within the width of the grid of tiles."""
    side = cut.side
    width = -(-cut.size[1] // side) * side
    at = torch.stack([bag.at[:, 0], width - side - bag.at[:, 1]], dim=1)
    order = torch.from_numpy(np.lexsort((at[:, 1].numpy(), at[:, 0].numpy())))
    return Bag(bag.tiles.flip(-1)[order], at[order])


def overview(bag: Bag, size: tuple[int, int] | None = None, longest: int = 768) -> Tensor:
    """Draw a bag's tiles where they are in their image: uint8 (3, h, w), the longer side `longest` pixels or less.

    `size`: height and width of the image; default: up to the last tiles.
    """
    side = bag.tiles.shape[-1]
    extent = size or (bag.at.amax(dim=0) + side).tolist()
    scale = min(longest / max(extent), 1.0)
    height, width = (max(round(length * scale), 1) for length in extent)
    picture = torch.full((3, height, width), _LEFT_OUT, dtype=torch.uint8)
    small = max(round(side * scale), 1)
    for tile, (row, column) in zip(bag.tiles, bag.at.tolist(), strict=True):
        shown = F.interpolate(tile[None].float(), (small, small), mode="area")[0].round().to(torch.uint8)
        top, left = min(round(row * scale), height - 1), min(round(column * scale), width - 1)
        picture[:, top : top + small, left : left + small] = shown[:, : height - top, : width - left]
    return picture


def blank(side: int) -> Bag:
    """What stands for an image that an evaluation does not count."""
    return Bag(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int32))
