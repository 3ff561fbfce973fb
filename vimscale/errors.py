"""What can be said to a user in one message. Anything else that is raised is a bug, and shows its traceback."""

import difflib
from collections.abc import Iterable
from typing import Any

from vimscale.storage.addresses import masked

_LINE, _MESSAGE = 450, 1500
"""Characters of one line of a FileFaults' message, and of all its lines."""


class UserError(Exception):
    """The user's input is wrong: the message names the value, the rule and the way out, and no secret of an address.
    Exit code 2.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(masked(message))


class FileFaults(UserError):
    """Every fault of a file at once, one a line; the message shortens long lines and leaves out what is too much."""

    def __init__(self, title: str, faults: list[str]):
        self.faults = faults
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


class RecipeError(FileFaults):
    """A recipe, or what it asks for where it is to run."""


class ClusterError(FileFaults):
    """A cluster file."""


class DataError(UserError):
    """A data set that is not there, not whole, or not what its manifest says."""


CAUSES = ("image", "pixels", "no image", "no label", "label")
"""Why a sample cannot be used: its image is damaged or too large, or image or label is missing or unknown."""


class BadSample(DataError):
    """One sample that cannot be used, where its shard is whole: it is counted by `cause`, and replaced."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple:
        return BadSample, (self.cause, str(self))


class CheckpointError(UserError):
    """A checkpoint that is not there, damaged, or of another model."""


class LaunchError(UserError):
    """Workers, addresses or folders that cannot be had."""


class RunFailed(Exception):
    """The run itself failed, for the reason the message gives first. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(masked(message))


def shortened(text: str, most: int) -> str:
    """A text on one line, without its middle where it is longer, and with what cannot be printed escaped."""
    if len(text) > most:
        text = f"{text[: most - most // 3 - 3]} … {text[-(most // 3) :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def brief(value: Any) -> str:
    """A value as a user would write it, shortened; a list or a mapping as what it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return kind_of(value) if isinstance(value, dict | list | tuple) else shortened(repr(value), 80)


def kind_of(value: Any) -> str:
    """What a value of a YAML or JSON file is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "a mapping"}
    kinds |= {list: "a list", tuple: "a list", type(None): "nothing"}
    return kinds.get(type(value), type(value).__name__)


class WorkerDied(RunFailed):
    """A process that reads data for a rank was killed or ran out of memory; started again, the run may succeed."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was perhaps meant."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """What to put behind a word that is not known: the nearest that is, or all."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(known)}"
