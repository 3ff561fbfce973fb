"""Stretches: the part of every image's sequence that one rank holds, where ranks share images.

Axes: N ranks, b images, L tokens of a sequence, l tokens of a stretch, d model width.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer
from vimscale.model.tokens import Grid, Layout, layout
from vimscale.ops import Context, gathered

_KINDS, _ORDERS = ("fwd", "bwd", "bi", "shared", "pair", "attn"), ("row", "snake")


def faults(config: VimConfig, size: int, grid: Grid | None = None) -> list[str]:
    """Return why `size` ranks cannot share images of a grid (default: the config's own), one line for each reason."""
    if size == 1:
        return []
    found = []
    strange = sorted({str(layer) for layer in config.layers if not _is_shared(layer)})
    if strange:
        found.append(
            f"layers {', '.join(strange)}: ranks can share images in layers of kind {', '.join(_KINDS)} and order"
            f" {' or '.join(_ORDERS)} only"
        )
    if config.stages:
        found.append("stages merge tokens of several ranks: ranks cannot share images of a hierarchical model")
    if config.stem == "conv":
        found.append("stem conv normalizes over a whole image, which no rank has: set model.stem=patch")
    if found:
        return found
    try:
        _cuts(config, config.grid if grid is None else grid, size)
    except ValueError as fault:
        found.append(str(fault))
    return found


def _is_shared(layer: Layer) -> bool:
    return layer.kind in _KINDS and layer.order in _ORDERS


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
            f"{size} ranks cannot share a sequence of {whole} tokens: the shortest stretch would have {shortest}, and"
            f" each needs {least} and a patch; lower parallel.context, or use larger images"
        )
    return tuple(cuts)


@dataclass(frozen=True)
class Stretch:
    """The tokens [start, end) of sequences of `whole` tokens."""

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
        cuts = _cuts(config, grid, context.size)
        return cls(context, config, grid, cuts[context.rank], cuts[context.rank + 1])

    @property
    def slots(self) -> Layout:
        return layout(self.config, self.grid).part(self.start, self.end)

    @property
    def rows(self) -> range:
        """Rows of patches of which some are in the stretch."""
        first, end = self._patches
        return range(first // self.grid[1], -(-end // self.grid[1]))

    @property
    def inside(self) -> slice:
        """The patches of the stretch, among those of `rows`."""
        first, end = self._patches
        skipped = self.rows.start * self.grid[1]
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
