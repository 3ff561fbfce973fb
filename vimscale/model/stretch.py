"""Stretches: the part of every image's sequence that one rank holds, where ranks share images.

Axes: N ranks, b images, L tokens of a sequence, l tokens of a stretch, d model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.model.layout import Grid, Layout, layout
from vimscale.model.presets import VimConfig
from vimscale.ops import Context, gathered

_KINDS, _ORDERS = ("fwd", "bwd", "bi", "shared", "pair", "ssd", "ssd_fwd", "ssd_bwd", "attn"), ("row", "snake")


def faults(config: VimConfig, size: int, images: Mapping[tuple[int, int], str]) -> list[str]:
    """Return why `size` ranks cannot share images of these heights and widths, which messages call by their names: a
    line for each reason.
    """
    if size == 1:
        return []
    strange = [str(layer) for layer in config.layers if layer.kind not in _KINDS or layer.order not in _ORDERS]
    found = []
    if strange:
        what = f"{', '.join(dict.fromkeys(strange))} layers cannot be cut into ranges of tokens"
        found.append(f"{what}; use {', '.join(_KINDS)} in order {' or '.join(_ORDERS)}, or parallel.context=1")
    if config.ssd_form == "quasiseparable" and any(layer.is_ssd for layer in config.layers):
        found.append("quasiseparable ssd layers cannot be cut; use another ssd_form or parallel.context=1")
    if config.stages:
        found.append("stages merge tokens that several ranks would hold; leave them out or use parallel.context=1")
    if config.stem == "conv":
        found.append("stem conv normalizes over whole images, which no rank has; use stem: patch or parallel.context=1")
    for (height, width), name in images.items() if not found else ():
        grid = config.grid_of(height, width) if config.tiles is None else config.grid
        try:
            _cuts(config, grid, size)
        except ValueError as fault:
            fitting = next(fewer for fewer in range(size - 1, 0, -1) if fewer == 1 or _fits(config, grid, fewer))
            found.append(f"{name} {height} x {width} makes {fault}; use parallel.context={fitting} or larger images")
    return found


def _fits(config: VimConfig, grid: Grid, size: int) -> bool:
    try:
        _cuts(config, grid, size)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=256)
def _cuts(config: VimConfig, grid: Grid, size: int) -> tuple[int, ...]:
    """Return where each rank's stretch begins, and where the last one ends: equal parts of the sequence; where a layer
    scans in the order snake, at the nearest ends of rows, so that no row is on two ranks.

    Raises:
        ValueError: a stretch would be too short.
    """
    slots = layout(config, grid)
    whole = slots.tokens
    cuts = [whole * i // size for i in range(size + 1)]
    if any(layer.order == "snake" for layer in config.layers):
        starts = [position for start, end in slots.image for position in range(start, end)][:: grid[1]]
        cuts[1:-1] = [min(starts, key=lambda start: abs(start - cut)) for cut in cuts[1:-1]]
    least = max(config.d_conv - 1, 1)
    parts = [slots.part(start, end) for start, end in pairwise(cuts)]
    if any(part.tokens < least or not part.image for part in parts):
        shortest = min(part.tokens for part in parts)
        raise ValueError(
            f"{whole:,} tokens, {shortest} on one of {size} ranks; d_conv {config.d_conv} needs at least {least},"
            " one of them a patch"
        )
    return tuple(cuts)


@dataclass(frozen=True)
class Stretch:
    """The tokens [start, end) of every sequence of one grid, which this rank holds."""

    context: Context
    config: VimConfig
    grid: Grid
    start: int
    end: int

    @classmethod
    def of(cls, context: Context, config: VimConfig, grid: Grid) -> "Stretch":
        """Return this rank's stretch of images of a grid.

        Raises:
            ValueError: so many ranks cannot share such images.
        """
        try:
            cuts = _cuts(config, grid, context.size)
        except ValueError as fault:
            raise ValueError(f"ranks cannot share an image of {fault}; share images between fewer ranks") from None
        return cls(context, config, grid, cuts[context.rank], cuts[context.rank + 1])

    @property
    def slots(self) -> Layout:
        return layout(self.config, self.grid).part(self.start, self.end)

    @property
    def rows(self) -> range:
        """Rows of patches of which some are in the stretch."""
        first, end = self._patches
        return range(first // self.grid[1], -(-end // self.grid[1]))

    def tiles(self, rows: int) -> slice:
        """Return the tiles, of so many rows of patches each, of which some patches are in the stretch of a bag."""
        return slice(self.rows.start // rows, -(-self.rows.stop // rows))

    def inside(self, rows: int = 1) -> slice:
        """Return the patches of the stretch, among those of `rows`; of a bag, among those of `tiles(rows)`."""
        first, end = self._patches
        skipped = self.rows.start // rows * rows * self.grid[1]
        return slice(first - skipped, end - skipped)

    @property
    def _patches(self) -> tuple[int, int]:
        before = layout(self.config, self.grid).part(0, self.start)
        first = sum(end - start for start, end in before.image)
        return first, first + sum(end - start for start, end in self.slots.image)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the part of images (b, 3, h, w) that the patches of `rows` cover, overlaps included."""
        step, rows = self.config.step, self.rows
        return images[:, :, rows.start * step : (rows.stop - 1) * step + self.config.patch_size]

    def everywhere(self, x: Tensor) -> Tensor:
        """Return the tokens (b, L, d) of all ranks from this rank's (b, l, d), with gradients."""
        cuts = _cuts(self.config, self.grid, self.context.size)
        lengths = [end - start for start, end in pairwise(cuts)]
        padded = gathered(self.context, F.pad(x, (0, 0, 0, max(lengths) - x.shape[1])))
        return torch.cat([part[:, :length] for part, length in zip(padded, lengths, strict=True)], dim=1)
