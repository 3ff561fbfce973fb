"""What can be said to a user in one message. Anything else that is raised is a bug, and shows its traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong: the message names the value, the rule and the way out. Exit code 2."""

    exit_code = 2


class FileFaults(UserError):
    """Every fault of a file at once, one a line."""

    def __init__(self, title: str, faults: list[str]):
        self.faults = faults
        count = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        super().__init__(f"{title} has {count}\n" + "\n".join("  " + fault.replace("\n", "\n  ") for fault in faults))


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


class WorkerDied(RunFailed):
    """A process that reads data for a rank was killed or ran out of memory; started again, the run may succeed."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was perhaps meant."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """What to put behind a word that is not known: the nearest that is, or all."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(known)}"
