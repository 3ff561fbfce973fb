"""Where a Vision Mamba's tokens are and in which order its layers scan them: see modeling.py.

Axes: l tokens (class tokens and registers included).
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ---- what a config says


Layer = tuple[str, str]
"""Kind and scan order."""


def parse(directions: str) -> list[Layer]:
    """Return the layers that a text such as "(bi bi@column)*12" names."""
    tokens = re.findall(r"[A-Za-z_]\w*|\d+|[()*@]", directions)[::-1]

    def take() -> list[Layer]:
        layers: list[Layer] = []
        while tokens and tokens[-1] != ")":
            token = tokens.pop()
            if token == "(":
                item = take()
                tokens.pop()
            else:
                item = [(token, _after("@") or "row")]
            layers += item * int(_after("*") or 1)
        return layers

    def _after(mark: str) -> str | None:
        if tokens and tokens[-1] == mark:
            tokens.pop()
            return tokens.pop()
        return None

    return take()


def paths_of(layer: Layer, second: bool) -> list[tuple[str, bool]]:
    """List (order, reverse) of each scan of a layer; `second`: it is the second layer of a pair."""
    kind, order = layer
    if kind == "cross":
        return [("row", False), ("row", True), ("column", False), ("column", True)]
    both = [False, True]
    directions = {"fwd": [False], "bwd": [True], "pair": [second], "bi": both, "shared": both}
    directions |= {"ssd": both, "ssd_fwd": [False], "ssd_bwd": [True]}
    if kind not in directions:
        raise ValueError(f"this file has no layers of the kind {kind!r}")
    return [(order, reverse) for reverse in directions[kind]]


def seconds_of_pairs(layers: list[Layer]) -> set[int]:
    """Return the indices of the second layers of pairs: every second one of a run of layers of this kind."""
    seconds: set[int] = set()
    for i, (kind, _) in enumerate(layers):
        if kind == "pair" and i and layers[i - 1][0] == "pair" and i - 1 not in seconds:
            seconds.add(i)
    return seconds


# ---- positions of tokens, computed in every forward pass: nothing here is kept on a device or in a state dict


class Slots(NamedTuple):
    """Positions in an image's sequence: class tokens, registers and, in row order, the image's tokens."""

    cls: Tensor
    registers: Tensor
    image: Tensor
    visits: Tensor
    """Which token of (class tokens, registers, image) is at each position (l)."""


def slots_of(config: dict[str, Any], length: int, device: torch.device) -> Slots:
    """Lay out a sequence: the class token is in the middle of the `length` tokens of the image or at an end, and one of
    m registers follows each length // (m + 1) of them; a class token precedes a register.
    """
    m = config["registers"]
    cls = {"none": [], "first": [0], "middle": [length // 2], "both": [0, length]}[config["cls_token"]]
    gap = length // (m + 1)
    keys = [torch.full((1,), 3 * at, device=device) for at in cls]
    keys += [(torch.arange(m, device=device) + 1) * (3 * gap) + 1, torch.arange(length, device=device) * 3 + 2]
    visits = torch.cat(keys).argsort(stable=True)
    positions = visits.argsort()
    prefix = len(cls) + m
    return Slots(positions[: len(cls)], positions[len(cls) : prefix], positions[prefix:], visits)


def scan_order(order: str, window: int, grid: tuple[int, int], slots: Slots) -> Tensor:
    """Return the position of the token that a scan visits as its i-th (l). Extra tokens keep their positions."""
    rows, columns = grid
    cells = torch.arange(rows * columns, device=slots.image.device)
    row, column = cells // columns, cells % columns
    if order == "column":
        key = column * rows + row
    elif order == "snake":
        key = row * columns + torch.where(row % 2 == 1, columns - 1 - column, column)
    else:  # windows, row by row within each
        tile = (row // window) * ((columns + window - 1) // window) + column // window
        key = (tile * window + row % window) * window + column % window
    return torch.arange(slots.visits.shape[0], device=cells.device).scatter(0, slots.image, slots.image[key.argsort()])


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Return sines and cosines of each cell's column and row: fp32 (rows x columns, width)."""
    rows, columns = grid
    cells = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    angles = [at.double()[:, None] * frequencies for at in (cells % columns, cells // columns)]
    return torch.cat([wave for each in angles for wave in (each.sin(), each.cos())], 1).float()


class Orders:
    """Permutations of an image's tokens into scan orders, and back."""

    def __init__(self, config: dict[str, Any], grid: tuple[int, int], device: torch.device):
        self.grid = grid
        self.window = config["window"]
        self.slots = slots_of(config, grid[0] * grid[1], device)
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, order: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return (a function that permutes tokens (b, l, d) into `order`, its inverse)."""
        if order == "row":
            return (lambda x: x), (lambda x: x)
        if order not in self._made:
            index = scan_order(order, self.window, self.grid, self.slots)
            self._made[order] = index, index.argsort()
        index, inverse = self._made[order]
        return (lambda x: x.index_select(1, index)), (lambda x: x.index_select(1, inverse))
