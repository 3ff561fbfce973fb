"""Errors that a user sees as one message, and how messages show values. Any other exception is a bug, and shows its
traceback.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from vimscale.storage.addresses import masked

_LINE, _MESSAGE = 450, 1500
"""Characters of one line of a FileFaults' message, and of all its lines."""


class UserError(Exception):
    """The user's input is wrong. The message names the value, the rule and the fix, and hides secrets in addresses.
    Exit code 2.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(masked(message))


class FileFaults(UserError):
    """All faults of a file at once, one per line. The message shortens long lines, and counts faults that it omits."""

    def __init__(self, title: str, faults: list[str]):
        self.title, self.faults = title, faults
        count = f"{len(faults):,} faults" if len(faults) > 1 else "a fault"
        lines = [f"{shortened(title, _LINE)} has {count}"]
        left = _MESSAGE
        for number, fault in enumerate(faults):
            new = ["  " + shortened(line, _LINE) for line in fault.split("\n")]
            left -= sum(map(len, new))
            if left < 0 and number:
                lines.append(f"  and {len(faults) - number:,} more")
                break
            lines += new
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple:
        return type(self), (self.title, self.faults)


class RecipeError(FileFaults):
    """A recipe is faulty, or asks for what the machines that run it do not have."""


class ClusterError(FileFaults):
    """A cluster file is faulty."""


class DataError(UserError):
    """A data set is missing, incomplete, or not what its manifest says."""


CAUSES = ("image", "pixels", "tiles", "no image", "no label", "label", "no caption")
"""Why a sample cannot be used: its image is damaged or too large, its tiles are not what they should be, or image,
label or caption is missing or unknown.
"""


class BadSample(DataError):
    """One sample of an intact shard cannot be used. The data stream counts it by `cause` and uses another."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple:
        return BadSample, (self.cause, str(self))


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another model."""


class LaunchError(UserError):
    """Workers, addresses or folders are not available."""


class RunFailed(Exception):
    """The run itself failed; the message begins with the reason. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(masked(message))


def shortened(text: str, most: int = 200) -> str:
    """A text of anybody's as one line of at most `most` characters: without its middle if it is longer, and with
    unprintable characters escaped.
    """
    if len(text) > 2 * most:  # no more work than needed
        text = text[:most] + text[-most:]
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= most else f"{text[: most - most // 3 - 3]} … {text[-(most // 3) :]}"


def brief(value: Any, most: int = 80) -> str:
    """A value of a YAML or JSON file as it is written there, shortened; a list or a mapping by its kind."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | tuple):
        return kind_of(value)
    if isinstance(value, str) and len(value) > 2 * most:
        value = value[:most] + value[-most:]
    return shortened(repr(value), most)


def kind_of(value: Any) -> str:
    """What a value of a YAML or JSON file is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "a mapping"}
    kinds |= {list: "a list", tuple: "a list", type(None): "nothing"}
    return kinds.get(type(value), type(value).__name__)


class WorkerDied(RunFailed):
    """A process that reads data for a rank was killed or ran out of memory; restarting the run may help."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, if any is close."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown word: the nearest known word, or all of them."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(known)}"
