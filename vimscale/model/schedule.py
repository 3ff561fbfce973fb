"""The direction language: which way each layer scans, as a line of text.

schedule := item+            "bi*24"    "fwd*12 bi*12"    "(fwd bwd)*12"    "bi fwd*3 bi"
item     := (kind | "(" schedule ")") ["*" count]
kind     := "bi" | "fwd" | "bwd"
"""

import re
from typing import Literal, get_args

Direction = Literal["bi", "fwd", "bwd"]
"""bi: both ways, each with its own convolution, projections and A (Vim's v2); fwd: first token to last; bwd: back."""

_TOKEN = re.compile(r"\s*(?:(?P<kind>[A-Za-z_]\w*)|(?P<mark>[()*])|(?P<count>\d+))")
_MOST_LAYERS = 10_000


def parse(text: str) -> tuple[Direction, ...]:
    """One direction a layer, first layer first.

    Raises:
        ValueError: the text does not follow the grammar; the message shows it with a caret under the fault.
    """
    tokens = _tokens(text)
    layers, rest = _schedule(text, tokens, 0)
    if rest < len(tokens):
        raise _fault(text, tokens[rest][1], "this ')' closes nothing")
    return tuple(layers)


def _tokens(text: str) -> list[tuple[str, int]]:
    """Every token with the column it starts at."""
    tokens = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise _fault(text, at, f"{text[at]!r} means nothing here")
        tokens.append((match[match.lastgroup], match.start(match.lastgroup)))
        at = match.end()
    return tokens


def _schedule(text: str, tokens: list[tuple[str, int]], at: int) -> tuple[list[Direction], int]:
    layers: list[Direction] = []
    start = at
    while at < len(tokens) and tokens[at][0] != ")":
        token, column = tokens[at]
        if token == "(":
            item, at = _schedule(text, tokens, at + 1)
            if at == len(tokens):
                raise _fault(text, column, "this '(' is never closed")
        elif token in get_args(Direction):
            item = [token]  # type: ignore[list-item]  # membership in the Literal was just tested
        else:
            raise _fault(text, column, f"{token!r} is no direction; known: {', '.join(get_args(Direction))}")
        at += 1
        if at < len(tokens) and tokens[at][0] == "*":
            count = tokens[at + 1][0] if at + 1 < len(tokens) else ""
            if not count.isdigit() or int(count) < 1 or int(count) * len(item) > _MOST_LAYERS:
                column = tokens[at][1] + 1
                raise _fault(text, column, f"'*' takes a count from 1 (and at most {_MOST_LAYERS:,} layers)")
            item *= int(count)
            at += 2
        layers += item
    if at == start:
        column = tokens[at][1] if at < len(tokens) else len(text)
        raise _fault(text, column, f"a direction is missing; known: {', '.join(get_args(Direction))}")
    return layers, at


def _fault(text: str, column: int, why: str) -> ValueError:
    return ValueError(f"{why}\n    {text}\n    {' ' * column}^")
