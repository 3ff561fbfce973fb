"""What changes from a run's recipe to another one, and what may."""

from collections.abc import Callable, Iterator
from pathlib import Path

from vimscale.errors import LaunchError
from vimscale.recipe.recipe import Recipe
from vimscale.storage import own_code

MAY_CHANGE = ("parallel", "checkpoint", "guard", "evaluate", "log", "data.workers", "data.cache", "data.max_bad")
"""Sections and keys of a recipe that may change when a run resumes: they decide how it runs, not what it computes."""
LENGTH = ("steps", "epochs")
"""Keys that `--extend` may change, too."""


def check_own_files(recipe: Recipe) -> None:
    """Check that the copies of the user's own files do not replace each other.

    Raises:
        LaunchError: two different files have the same name.
    """
    contents: dict[str, tuple[Path, bytes]] = {}
    for reference in recipe.own_classes:
        path = Path(reference.rpartition(":")[0])
        content = path.read_bytes()
        other, before = contents.setdefault(path.name, (path, content))
        if content != before:
            raise LaunchError(
                f"recipe {recipe.name} names {other} and {path}, and a run keeps copies of both under the name"
                f" {path.name}; rename one of them"
            )


def _portable(recipe: Recipe) -> Recipe:
    """The recipe with the contents of a user's own files in place of the files' paths."""
    return recipe.with_own_classes(own_code.identity)


def between(old: Recipe, new: Recipe, free: Callable[[str], bool] = MAY_CHANGE.__contains__) -> dict[str, str]:
    """What changes from one recipe to another: "before -> after" by key, without keys that are `free` to change."""
    return dict(sorted(_changed(_portable(old).model_dump(), _portable(new).model_dump(), free)))


def _changed(old: dict, new: dict, free: Callable[[str], bool], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key in old.keys() | new.keys():
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if free(name) or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after, free, f"{name}.")
        else:
            yield name, f"{before} -> {after}"
