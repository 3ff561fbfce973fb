"""Values as text and HTML. Everything that comes from a run passes through `html.escape`."""

import time
from collections.abc import Iterable, Sequence
from html import escape


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    unbroken: Iterable[int] = (),
) -> str:
    """An HTML table; texts are escaped. `numbers`: columns that are aligned to the right; `unbroken`: those whose lines
    are not broken.
    """
    classes = dict.fromkeys(unbroken, " class=unbroken") | dict.fromkeys(numbers, " class=num")

    def cell(tag: str, i: int, text: object) -> str:
        return f"<{tag}{classes.get(i, '')}>{escape(str(text))}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values, escaped."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """What a page lacks, and how to get it."""
    return f'<p class="note">{escape(text)}</p>'


def duration(seconds: float) -> str:
    """A time like 12 s, 3 min 05 s, 2 h 11 min or 4 d 03 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def clock(at: float | None) -> str:
    """A moment in local time; empty if unknown."""
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
