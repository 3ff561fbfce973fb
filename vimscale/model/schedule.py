"""The direction language: a line of text that says how each layer mixes tokens, and in which order it scans them.

schedule := item+                      "bi*24"    "fwd*12 bi*12"    "(fwd bwd)*12"    "(bi bi@column)*12"
item     := (layer | "(" schedule ")") ["*" count]
layer    := kind ["@" order]
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

Kind = Literal["fwd", "bwd", "bi", "shared", "pair", "cross", "ssd", "ssd_fwd", "ssd_bwd", "attn"]
"""fwd: one scan from the first token to the last. bwd: one scan from the last to the first. bi: both, each with its own
parameters (Vim's v2). shared: both over one convolution and one set of projections, each with its own A (Vim's v1).
pair: two adjacent layers in parallel on the same input, one forward and one backward. cross: four scans, forward and
backward over rows and over columns (ARM). ssd: both directions of Mamba-2's scan; ssd_fwd, ssd_bwd: one of them.
attn: softmax attention, for hybrids.
"""
Order = Literal["row", "column", "snake", "window"]
"""Order in which a scan visits the image's tokens: row by row, column by column, rows in alternating direction, or
square windows one after the other. Class token and registers keep their positions in the sequence.
"""


@dataclass(frozen=True)
class Layer:
    """One layer of a schedule."""

    kind: Kind | str
    """A `Kind`, or the name of a user's own kind."""
    order: Order = "row"

    @property
    def paths(self) -> tuple[tuple[Order, bool], ...]:
        """(order, reverse) of each scan with its own A; none for attention and for a user's own kinds. A layer of kind
        `pair` lists the forward scan; its position decides whether it is the backward layer of its pair
        (`second_of_pairs`).
        """
        if self.kind == "attn" or self.is_own:
            return ()
        if self.kind == "cross":
            return ("row", False), ("row", True), ("column", False), ("column", True)
        directions = {"fwd": (False,), "pair": (False,), "bwd": (True,)}.get(
            self.kind.removeprefix("ssd_"), (False, True)
        )
        return tuple((self.order, reverse) for reverse in directions)

    @property
    def is_ssd(self) -> bool:
        """Whether the layer's scans are Mamba-2's."""
        return self.kind in ("ssd", "ssd_fwd", "ssd_bwd")

    @property
    def is_own(self) -> bool:
        """Whether a user's own class mixes the tokens."""
        return self.kind not in get_args(Kind)

    def __str__(self) -> str:
        return self.kind if self.order == "row" else f"{self.kind}@{self.order}"


_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<mark>[()*@])|(?P<count>\d+))")
MOST_LAYERS = 10_000
_MOST_LETTERS = 10_000
_MOST_BRACKETS = 50
"""Levels of nested brackets."""
_SHOWN = 60
"""Characters that a message shows on each side of a fault."""
_Tokens = list[tuple[str, int]]
"""Tokens with the columns they start at."""
_Layers = list[tuple[Layer, int]]
"""Layers with the columns that name them."""


def parse(text: str, depth: int | None = None, own: Collection[str] = ()) -> tuple[Layer, ...]:
    """Parse a schedule into its layers, first to last. With `depth`, there must be exactly that many. `own`: names of
    a user's own kinds.

    Raises:
        ValueError: the text does not follow the grammar, or names more or fewer layers than `depth`; the message shows
            the text with a caret under the fault.
    """
    if len(text) > _MOST_LETTERS:
        raise _fault(
            text, _MOST_LETTERS, f"the text is longer than {_MOST_LETTERS:,} characters; use counts, such as bi*24"
        )
    tokens = _tokens(text)
    layers, rest = _schedule(text, tokens, 0, (*get_args(Kind), *own))
    if rest < len(tokens):
        raise _fault(text, tokens[rest][1], "this ')' closes nothing")
    if depth is not None and len(layers) != depth:
        column = layers[depth][1] if len(layers) > depth else len(text)
        what = f"this is layer {depth + 1}" if len(layers) > depth else f"{depth - len(layers)} more must follow"
        raise _fault(text, column, f"the text names {len(layers)} layers, but depth is {depth}: {what}")
    _check_pairs(text, layers)
    return tuple(layer for layer, _ in layers)


def compact(layers: Iterable[Layer]) -> str:
    """Write layers as a text that parses to them, with a count for each run of equal layers."""
    runs = [(str(layer), len(list(run))) for layer, run in groupby(layers)]
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def second_of_pairs(layers: Sequence[Layer]) -> frozenset[int]:
    """Return the indices of the pair layers that scan backward: every second layer of a run."""
    seconds: set[int] = set()
    for i, layer in enumerate(layers):
        if layer.kind == "pair" and i > 0 and layers[i - 1].kind == "pair" and i - 1 not in seconds:
            seconds.add(i)
    return frozenset(seconds)


def _tokens(text: str) -> _Tokens:
    """Split a text into tokens, each with the column it starts at."""
    tokens = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise _fault(text, at, f"{text[at]!r} has no meaning here")
        tokens.append((match[match.lastgroup], match.start(match.lastgroup)))
        at = match.end()
    return tokens


def _schedule(text: str, tokens: _Tokens, at: int, kinds: Collection[str], level: int = 0) -> tuple[_Layers, int]:
    """Parse a schedule from token `at` on, inside `level` brackets; return its layers and the token after it."""
    if level > _MOST_BRACKETS:
        raise _fault(text, tokens[at - 1][1], f"more than {_MOST_BRACKETS} brackets are open here")
    layers: _Layers = []
    start = at
    while at < len(tokens) and tokens[at][0] != ")":
        token, column = tokens[at]
        if token == "(":
            item, at = _schedule(text, tokens, at + 1, kinds, level + 1)
            if at == len(tokens):
                raise _fault(text, column, "this '(' is never closed")
            at += 1
        else:
            layer, at = _layer(text, tokens, at, kinds)
            item = [(layer, column)]
        if at < len(tokens) and tokens[at][0] == "*":
            count = tokens[at + 1][0] if at + 1 < len(tokens) else ""
            is_count = count.isdigit() and len(count) <= len(str(MOST_LAYERS))
            if not is_count or not 1 <= int(count) <= MOST_LAYERS // len(item):
                column = tokens[at][1] + 1
                raise _fault(text, column, f"'*' takes a count of 1 or more (at most {MOST_LAYERS:,} layers in all)")
            item *= int(count)
            at += 2
        if len(layers) + len(item) > MOST_LAYERS:
            raise _fault(text, column, f"there are more than {MOST_LAYERS:,} layers")
        layers += item
    if at == start:
        column = tokens[at][1] if at < len(tokens) else len(text)
        raise _fault(text, column, f"a layer is missing; known: {', '.join(kinds)}")
    return layers, at


def _layer(text: str, tokens: _Tokens, at: int, kinds: Collection[str]) -> tuple[Layer, int]:
    """Parse a layer at token `at`; return it and the token after it."""
    kind, column = tokens[at]
    if kind not in kinds:
        raise _fault(text, column, f"{kind[:40]!r} is not a kind of layer; known: {', '.join(kinds)}")
    if at + 1 == len(tokens) or tokens[at + 1][0] != "@":
        return Layer(kind), at + 1
    order, column = tokens[at + 2] if at + 2 < len(tokens) else ("", len(text))
    if order not in get_args(Order):
        raise _fault(text, column, f"'@' takes an order: {', '.join(get_args(Order))}")
    if (kind in ("attn", "cross") or kind not in get_args(Kind)) and order != "row":
        raise _fault(text, column, f"{kind} takes no order; it has its own")
    return Layer(kind, order), at + 3  # type: ignore[arg-type]  # membership in the Literal was just tested


def _check_pairs(text: str, layers: _Layers) -> None:
    """Raise a fault unless every run of pair layers has an even length."""
    for is_pair, run in groupby(layers, key=lambda item: item[0].kind == "pair"):
        members = list(run)
        if is_pair and len(members) % 2:
            raise _fault(text, members[-1][1], f"pair layers come in twos, but here are {len(members)} in a row")


def _fault(text: str, column: int, why: str) -> ValueError:
    """Build an error that shows the text around the fault at `column`."""
    start, end = max(column - _SHOWN, 0), column + _SHOWN
    left, right = "… " if start else "", " …" if end < len(text) else ""
    window = "".join(letter if letter.isprintable() else " " for letter in text[start:end])
    return ValueError(f"{why}\n    {left}{window}{right}\n    {' ' * (len(left) + column - start)}^")
