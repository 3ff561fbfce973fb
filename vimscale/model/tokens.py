"""Where tokens stand in a sequence: class token and registers among the image's, scan orders, packed images.

Axes: b rows of tokens (an image each, or several packed ones), l tokens, d model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Order

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One image's sequence: every place holds a token of the image, or one of the extra ones."""

    cls: tuple[int, ...]
    """Places of the class tokens."""
    registers: tuple[int, ...]
    image: tuple[tuple[int, int], ...]
    """Runs [start, end) of places that hold the image's tokens, in row order."""

    @property
    def tokens(self) -> int:
        return sum(end - start for start, end in self.image) + len(self.cls) + len(self.registers)

    def put(self, image: Tensor, extra: Tensor | None) -> Tensor:
        """image (b, l, d) in row order and the extra tokens (m, d), class tokens first -> the sequence (b, l + m, d)"""
        if extra is None:
            return image
        places = sorted([*self.cls, *self.registers])
        rank = {place: i for i, place in enumerate([*self.cls, *self.registers])}
        pieces, done = [], 0
        for before, place in enumerate(places):
            pieces.append(image[:, done : place - before])
            pieces.append(extra[rank[place]].to(image.dtype).expand(len(image), 1, -1))
            done = place - before
        return torch.cat([*pieces, image[:, done:]], dim=1)

    def of_image(self, x: Tensor) -> Tensor:
        """The image's tokens (b, l, d) of a sequence, in row order."""
        if not self.cls and not self.registers:
            return x
        return torch.cat([x[:, start:end] for start, end in self.image], dim=1)


@lru_cache(maxsize=256)
def layout(config: VimConfig, grid: Grid) -> Layout:
    """Class token in the middle of the image's tokens (place l // 2) or at the ends, as published; m registers after
    each l // (m + 1) of them (arXiv:2405.14858).
    """
    length = grid[0] * grid[1]
    middle = length // 2
    cls = {"none": [], "first": [0], "middle": [middle], "both": [0, length]}[config.cls_token]
    gap = length // (config.registers + 1)
    # (tokens of the image before it, class token first, number)
    extra = sorted([(at, 0, i) for i, at in enumerate(cls)] + [(gap * (i + 1), 1, i) for i in range(config.registers)])
    places: dict[tuple[int, int], int] = {(kind, i): at + before for before, (at, kind, i) in enumerate(extra)}
    taken = sorted(places.values())
    starts, ends = [0, *(place + 1 for place in taken)], [*taken, length + len(taken)]
    return Layout(
        cls=tuple(places[0, i] for i in range(len(cls))),
        registers=tuple(places[1, i] for i in range(config.registers)),
        image=tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end),
    )


# ---- scan orders


@lru_cache(maxsize=256)
def walk(order: Order, config: VimConfig, grid: Grid) -> np.ndarray:
    """(l) int64: the place in the sequence of the token that is walked as i-th."""
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
    where = layout(config, grid)
    places = np.arange(where.tokens)
    image = np.concatenate([places[start:end] for start, end in where.image])
    places[image] = image[cells.ravel()]
    return places


class _Permute(torch.autograd.Function):
    """x (b, l, d) with its tokens at index (b or 1, l); the gradient is the inverse permutation, not a sum."""

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
    """What mixers must know of the rows they are given: where images begin, and how they lie in the plane."""

    config: VimConfig
    rows: tuple[tuple[Grid, ...], ...]
    """Grids of the images of each row; one tuple alone stands for all rows."""
    length: int
    device: torch.device
    reset: Tensor | None = None
    """(b, l) bool: the first token of every image, where rows hold several."""
    _orders: dict[Order, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def permuted(self, order: Order) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """(into the order, back again), each from (b, l, d) to (b, l, d)."""
        if order == "row":
            return (lambda x: x), (lambda x: x)
        if order not in self._orders:
            index = np.stack([self._walk(order, grids) for grids in self.rows])
            inverse = index.argsort(axis=1)
            self._orders[order] = torch.tensor(index).to(self.device), torch.tensor(inverse).to(self.device)
        there, back = self._orders[order]
        return (lambda x: _Permute.apply(x, there, back)), (lambda x: _Permute.apply(x, back, there))

    def _walk(self, order: Order, grids: tuple[Grid, ...]) -> np.ndarray:
        places = np.arange(self.length)  # what fills a row up stays where it is
        start = 0
        for grid in grids:
            inside = walk(order, self.config, grid)
            places[start : start + len(inside)] = inside + start
            start += len(inside)
        return places

    def mask(self) -> Tensor | None:
        """(b, 1, l, l) bool: which tokens belong to one image; None where each row is one."""
        if self.reset is None:
            return None
        image = self.reset.cumsum(1)
        return (image[:, None, :, None] == image[:, None, None, :]).contiguous()


@dataclass(frozen=True)
class PackedImage:
    """An image in a pack: its row, the first of its tokens, and its grid."""

    row: int
    start: int
    grid: Grid


def pack(config: VimConfig, grids: Sequence[Grid], length: int) -> list[PackedImage]:
    """Each image into the first row of `length` tokens that has room for it.

    Raises:
        ValueError: an image has more tokens than a row.
    """
    filled: list[int] = []
    places = []
    for grid in grids:
        need = layout(config, grid).tokens
        if need > length:
            raise ValueError(f"an image of {grid[0]} x {grid[1]} patches is {need} tokens; rows hold {length}")
        row = next((i for i, used in enumerate(filled) if used + need <= length), len(filled))
        if row == len(filled):
            filled.append(0)
        places.append(PackedImage(row, filled[row], grid))
        filled[row] += need
    return places


def in_rows(config: VimConfig, places: Sequence[PackedImage], length: int, device: torch.device) -> Tokens:
    """What the mixers must know of a pack."""
    rows: list[list[Grid]] = [[] for _ in range(max(place.row for place in places) + 1)]
    reset = torch.zeros(len(rows), length, dtype=torch.bool)
    ends = [0] * len(rows)
    for place in places:
        rows[place.row].append(place.grid)
        reset[place.row, place.start] = True
        ends[place.row] = place.start + layout(config, place.grid).tokens
    for row, end in enumerate(ends):
        if end < length:
            reset[row, end] = True  # what fills the row up is an image of its own
    return Tokens(config, tuple(map(tuple, rows)), length, device, reset.to(device))


def resized(position: Tensor, config: VimConfig, grid: Grid) -> Tensor:
    """The position embedding (l, d), made for the config's grid, for another one: the image's part bicubically in two
    dimensions, those of class token and registers as they are, each at its place in the new sequence.
    """
    if grid == config.grid:
        return position
    old, new = layout(config, config.grid), layout(config, grid)
    plane = old.of_image(position[None]).view(1, *config.grid, -1).permute(0, 3, 1, 2)
    plane = torch.nn.functional.interpolate(plane.float(), grid, mode="bicubic", align_corners=False)
    extra = [position[place] for place in (*old.cls, *old.registers)]
    return new.put(plane.flatten(2).mT.to(position.dtype), torch.stack(extra) if extra else None)[0]
