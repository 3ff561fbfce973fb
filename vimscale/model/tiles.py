"""Very large images as bags of tiles: one sequence per image, with positions from coordinates.

Axes: t tiles of a bag, s side of a tile in pixels, l tokens, d model width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimscale.model.presets import VimConfig

AT_ONCE = 64
"""Tiles that are embedded at once: the embedding's activations take memory for this many."""
_LONGEST = 10_000
"""Longest wavelength of a position, in patches, divided by 2 pi (arXiv:1706.03762)."""


class Bag(NamedTuple):
    """Tiles of one large image, as one sequence."""

    tiles: Tensor  # (t, 3, s, s), uint8 from the data plane, fp32 normalised on the device
    at: Tensor  # (t, 2) int32, the (row, column) of each tile's upper left corner, in pixels of the level


def blank(config: VimConfig, device: torch.device | None = None) -> Bag:
    """Return a black bag of the config's size."""
    assert config.tiles is not None
    tiles = torch.zeros(config.bag_size, 3, config.tiles, config.tiles, device=device)
    return Bag(tiles, torch.zeros(config.bag_size, 2, dtype=torch.int32, device=device))


class Coordinates(nn.Module):
    """Positions of patches from their coordinates in the image: fixed sines and cosines of the row in the first half of
    the channels and of the column in the second, times a learned factor per channel.
    """

    def __init__(self, config: VimConfig, d: int):
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.empty(d))

    def init_weights(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, at: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Return fp32 (t, l, d) for tiles of `grid` patches each, in row order, whose upper left corners are `at`
        (t, 2), in pixels; (1, l, d) for images, whose corners are (0, 0): None.
        """
        if at is None:
            at = self.scale.new_zeros(1, 2)
        patch, step, d = self.config.patch_size, self.config.step, len(self.scale)
        exponents = torch.arange(d // 4, device=at.device, dtype=torch.float32) / (d // 4)
        frequencies = _LONGEST**-exponents
        sides = []
        for axis, count in enumerate(grid):
            inside = torch.arange(count, device=at.device) * step
            angles = ((at[:, axis, None] + inside) / patch)[..., None] * frequencies  # (t, count, d / 4)
            sides.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
        rows = sides[0][:, :, None].expand(-1, -1, grid[1], -1)
        columns = sides[1][:, None].expand(-1, grid[0], -1, -1)
        return (torch.cat([rows, columns], dim=-1) * self.scale.float()).flatten(1, 2)


def grid_of(bag: Bag, config: VimConfig, tile: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of a bag's tokens, if each tile has the grid `tile`: they are in the order of an image in
    which the tiles are one below the other.

    Raises:
        ValueError: the model takes no bags, or the bag is empty.
    """
    if config.tiles is None:
        raise ValueError("the model takes images, not bags: to train it on bags, set tiles to the side of their tiles")
    if not len(bag.tiles):
        raise ValueError("a bag has no tiles; leave such images out")
    return len(bag.tiles) * tile[0], tile[1]


def embed(embedded: Callable[[Tensor, Tensor], Tensor], bag: Bag) -> Tensor:
    """Return the tokens of a bag (1, l, d), tile after tile. `embedded` makes those of some tiles (t, l / t, d) from
    the tiles and their corners; the backward pass calls it again where there are many, instead of keeping activations.
    """
    parts = list(zip(bag.tiles.split(AT_ONCE), bag.at.split(AT_ONCE), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        tokens = [embedded(*part) for part in parts]
    else:
        tokens = [checkpoint(embedded, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(tokens).flatten(0, 1)[None]
