"""Printing lines of text as they are."""

from rich.console import Console


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print a line without markup, highlighting, emoji codes and line breaks: it may hold paths and user input."""
    console.print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)
