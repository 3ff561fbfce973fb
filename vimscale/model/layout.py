"""Positions of tokens in a sequence: class tokens and registers among the image's tokens.

Axes: b images, l tokens of the image, m extra tokens, d model width.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vimscale.model.presets import VimConfig

Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""


@dataclass(frozen=True)
class Layout:
    """The positions of one image's sequence, or of a part of it: each holds a token of the image or an extra token."""

    cls: tuple[int, ...]
    """Positions of the class tokens; those that are not in the part are outside [0, tokens)."""
    registers: tuple[int, ...]
    """Positions of the registers, likewise."""
    image: tuple[tuple[int, int], ...]
    """Ranges [start, end) of positions that hold the image's tokens, in row order."""
    tokens: int
    """Length of the sequence or part."""

    def part(self, start: int, end: int) -> "Layout":
        """Return the layout of the positions [start, end)."""
        ranges = ((max(first, start) - start, min(last, end) - start) for first, last in self.image)
        return Layout(
            cls=tuple(position - start for position in self.cls),
            registers=tuple(position - start for position in self.registers),
            image=tuple((first, last) for first, last in ranges if first < last),
            tokens=end - start,
        )

    def insert(self, image: Tensor, extra: Tensor | None) -> Tensor:
        """Insert the extra tokens (m, d) or (m, b, 1, d), class tokens first, into the image's tokens (b, l, d), in row
        order. Return the sequence (b, l + m, d).
        """
        if extra is None:
            return image
        token_at = {position: extra[i] for i, position in enumerate((*self.cls, *self.registers))}
        here = sorted(position for position in token_at if 0 <= position < self.tokens)
        pieces, done = [], 0
        if len(here) < len(token_at):  # nothing of `extra`, so that it has a gradient whatever the part holds
            pieces.append(extra[:0].to(image.dtype).expand(image.shape[0], -1, -1))
        for inserted, position in enumerate(here):
            pieces.append(image[:, done : position - inserted])
            pieces.append(token_at[position].to(image.dtype).expand(image.shape[0], 1, -1))
            done = position - inserted
        return torch.cat([*pieces, image[:, done:]], dim=1)

    def token(self, x: Tensor, position: int) -> Tensor:
        """Return the token (b, d) at a position of a sequence; zeros if it is not in this part."""
        return x[:, position] if 0 <= position < self.tokens else x[:, :0].sum(dim=1)

    def image_tokens(self, x: Tensor) -> Tensor:
        """Return the image's tokens (b, l, d) of a sequence, in row order."""
        if not self.cls and not self.registers:
            return x
        return torch.cat([x[:, start:end] for start, end in self.image], dim=1)

    def prefix_tokens(self, x: Tensor) -> Tensor:
        """Return the class tokens and then the registers (b, m, d) of a sequence."""
        return torch.cat([x[:, :0], *(x[:, at : at + 1] for at in (*self.cls, *self.registers))], dim=1)

    def sequence(self, x: Tensor) -> Tensor:
        """Return the sequence whose `prefix_tokens` and `image_tokens`, in this order, are x (b, m + l, d)."""
        prefix = len(self.cls) + len(self.registers)
        return self.insert(x[:, prefix:], x[:, :prefix, None].transpose(0, 1) if prefix else None)


@lru_cache(maxsize=256)
def layout(config: VimConfig, grid: Grid) -> Layout:
    """Lay out an image's sequence. The class token is in the middle of the image's l tokens (position l // 2) or at an
    end, as published; m registers follow each l // (m + 1) tokens of the image (arXiv:2405.14858).
    """
    length = grid[0] * grid[1]
    middle = length // 2
    cls = {"none": [], "first": [0], "middle": [middle], "both": [0, length]}[config.cls_token]
    gap = length // (config.registers + 1)
    # (image tokens before it, 0 for a class token or 1 for a register, index): a class token precedes a register
    extra = sorted([(at, 0, i) for i, at in enumerate(cls)] + [(gap * (i + 1), 1, i) for i in range(config.registers)])
    positions: dict[tuple[int, int], int] = {(kind, i): at + before for before, (at, kind, i) in enumerate(extra)}
    taken = sorted(positions.values())
    starts, ends = [0, *(position + 1 for position in taken)], [*taken, length + len(taken)]
    return Layout(
        cls=tuple(positions[0, i] for i in range(len(cls))),
        registers=tuple(positions[1, i] for i in range(config.registers)),
        image=tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end),
        tokens=length + len(taken),
    )
