"""What mixers need to know about the tokens of a batch: scan orders, images packed into rows, rows on several ranks.

Axes: b rows of tokens (one image each, or several packed ones), l tokens, d model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vimscale.model.layout import Grid, layout
from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Order
from vimscale.model.stretch import Stretch
from vimscale.ops import Context

# ---- scan orders


@lru_cache(maxsize=256)
def scan_order(order: Order, config: VimConfig, grid: Grid) -> np.ndarray:
    """Return the position of the token that a scan visits as its i-th: (l) int64."""
    rows, columns = grid
    cells = np.arange(rows * columns).reshape(rows, columns)
    if order == "column":
        cells = cells.T
    elif order == "snake":
        cells = np.stack([row[::-1] if i % 2 else row for i, row in enumerate(cells)])
    elif order == "window":
        side = config.window
        tiles = [
            cells[top : top + side, left : left + side].ravel()
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
        cells = np.concatenate(tiles)
    slots = layout(config, grid)
    positions = np.arange(slots.tokens)
    image = np.concatenate([positions[start:end] for start, end in slots.image])
    positions[image] = image[cells.ravel()]
    return positions


class _Permute(torch.autograd.Function):
    """Permute the tokens of x (b, l, d) by index (b or 1, l). The gradient is the inverse permutation, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _gather(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _gather(grads[0], inverse), None, None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# ---- a batch


@dataclass
class Tokens:
    """What mixers need to know about the rows of a batch: where images begin, and the grids of their tokens."""

    config: VimConfig
    rows: tuple[tuple[Grid, ...], ...]
    """Grids of the images of each row; a single tuple holds for all rows."""
    length: int
    """Tokens per row."""
    device: torch.device
    reset: Tensor | None = None
    """Marks the first token of every image where rows hold several images: (b, l) bool."""
    stretch: Stretch | None = None
    """The part of each row that this rank holds, where ranks share images; `length` is that of the part."""
    _orders: dict[Order, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def permuted(self, order: Order) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return (a function that permutes tokens into `order`, its inverse), each from (b, l, d) to (b, l, d)."""
        if order == "row":
            return (lambda x: x), (lambda x: x)
        if order not in self._orders:
            visits = np.stack([self._row_order(order, grids) for grids in self.rows])
            undone = visits.argsort(axis=1)
            self._orders[order] = torch.tensor(visits).to(self.device), torch.tensor(undone).to(self.device)
        index, inverse = self._orders[order]
        return (lambda x: _Permute.apply(x, index, inverse)), (lambda x: _Permute.apply(x, inverse, index))

    def _row_order(self, order: Order, grids: tuple[Grid, ...]) -> np.ndarray:
        """Return the scan order of a row of images; padding at its end keeps its position."""
        if self.stretch is not None:  # snake orders go back and forth inside it
            (grid,), own = grids, self.stretch
            return scan_order(order, self.config, grid)[own.start : own.end] - own.start
        positions = np.arange(self.length)
        start = 0
        for grid in grids:
            within_image = scan_order(order, self.config, grid)
            positions[start : start + len(within_image)] = within_image + start
            start += len(within_image)
        return positions

    @property
    def context(self) -> Context | None:
        """The ranks that share each row, if any."""
        return None if self.stretch is None else self.stretch.context

    def mean_square(self, x: Tensor) -> Tensor:
        """Return the mean of the squares of x (b, l, d), over the tokens of all ranks that share rows: ()."""
        if self.context is None:
            return x.square().mean()
        total, count = self.context.add(torch.stack([x.square().sum(), x.new_tensor(x.numel())]))
        return total / count

    def mask(self) -> Tensor | None:
        """Return which pairs of tokens belong to the same image (b, 1, l, l) bool; None if each row is one image."""
        if self.reset is None:
            return None
        image = self.reset.cumsum(1)
        return (image[:, None, :, None] == image[:, None, None, :]).contiguous()


@dataclass(frozen=True)
class PackedImage:
    """An image in a pack: its row, the range of its tokens in that row, and its grid."""

    row: int
    start: int
    end: int
    grid: Grid


def pack(config: VimConfig, grids: Sequence[Grid], length: int) -> list[PackedImage]:
    """Pack each image into the first row of `length` tokens that has room for it.

    Raises:
        ValueError: an image has more tokens than a row.
    """
    used: list[int] = []
    images = []
    for grid in grids:
        tokens = layout(config, grid).tokens
        if tokens > length:
            raise ValueError(f"an image of {grid[0]} x {grid[1]} patches has {tokens} tokens; a row holds {length}")
        row = next((i for i, start in enumerate(used) if start + tokens <= length), len(used))
        if row == len(used):
            used.append(0)
        images.append(PackedImage(row, used[row], used[row] + tokens, grid))
        used[row] += tokens
    return images


def packed_tokens(config: VimConfig, images: Sequence[PackedImage], length: int, device: torch.device) -> Tokens:
    """Return what mixers need to know about a pack."""
    rows: list[list[Grid]] = [[] for _ in range(max(image.row for image in images) + 1)]
    reset = torch.zeros(len(rows), length, dtype=torch.bool)
    ends = [0] * len(rows)
    for image in images:
        rows[image.row].append(image.grid)
        reset[image.row, image.start] = True
        ends[image.row] = image.end
    for row, end in enumerate(ends):
        if end < length:
            reset[row, end] = True  # the padding is a separate image
    return Tokens(config, tuple(map(tuple, rows)), length, device, reset.to(device))


def tokens_of_parts(config: VimConfig, grids: tuple[Grid, ...], rows: int, device: torch.device) -> Tokens:
    """Return what mixers need to know about rows that all hold parts of the same grids."""
    lengths = [layout(config, grid).tokens for grid in grids]
    starts = list(accumulate(lengths, initial=0))
    reset = torch.zeros(rows, starts[-1], dtype=torch.bool)
    reset[:, starts[:-1]] = True
    return Tokens(config, (grids,), starts[-1], device, reset.to(device))


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of sequences of tokens."""

    tokens: Tensor
    """Normalized (b, l, d), class tokens and registers included."""
    taps: list[Tensor]
    """The residual stream (b, l, d) after each of the layers that were asked for."""
    parts: tuple[tuple[slice, Grid], ...]
    """The positions of each part of a row, and its grid."""


def resized(position: Tensor, config: VimConfig, grid: Grid) -> Tensor:
    """Resize the position embedding (l, d) from the config's grid to another. The image's part is interpolated
    bicubically in two dimensions; class token and registers keep theirs, at their positions in the new sequence.
    """
    if grid == config.grid:
        return position
    old, new = layout(config, config.grid), layout(config, grid)
    plane = old.image_tokens(position[None]).view(1, *config.grid, -1).permute(0, 3, 1, 2)
    plane = torch.nn.functional.interpolate(plane.float(), grid, mode="bicubic", align_corners=False)
    extra = [position[i] for i in (*old.cls, *old.registers)]
    return new.insert(plane.flatten(2).mT.to(position.dtype), torch.stack(extra) if extra else None)[0]


def sincos(config: VimConfig, grid: Grid, x: Tensor) -> Tensor:
    """Return sines and cosines of each token's position (l, d), in the dtype and on the device of x; zeros for class
    tokens and registers. The first half of the channels codes the column, the second the row (arXiv:2111.06377).
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # compilers and fake tensors must not leave theirs
        return torch.tensor(_sincos(config, grid)).to(x)
    return _sincos_on(config, grid, x.device, x.dtype)


@lru_cache(maxsize=64)
def _sincos_on(config: VimConfig, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_sincos(config, grid)).to(device, dtype)


@lru_cache(maxsize=64)
def _sincos(config: VimConfig, grid: Grid) -> np.ndarray:
    table = np.zeros((layout(config, grid).tokens, config.widths[0]))
    image = np.concatenate([np.arange(start, end) for start, end in layout(config, grid).image])
    table[image] = plane_sincos(grid, config.widths[0])
    return table.astype(np.float32)


def plane_sincos(grid: Grid, width: int) -> np.ndarray:
    """As `sincos`, of the cells of a grid in row order: fp64 (rows x columns, width)."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = [np.outer(at, frequencies) for at in (columns, rows)]
    return np.concatenate([wave(each) for each in angles for wave in (np.sin, np.cos)], axis=1)
