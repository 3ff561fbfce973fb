"""How many ranks a run may have: `--workers N`, or MIN:MAX for as many as there is room for."""

from typing import TYPE_CHECKING

from vimscale.errors import LaunchError, RecipeError, shortened

if TYPE_CHECKING:
    from vimscale.recipe.recipe import Recipe


_MOST = 65_536
"""Ranks that can be asked for: each number up to that is tried."""


def sizes(asked: str | None, recipe: "Recipe", cpus: int, gpus: int, where: str) -> list[int]:
    """The numbers of ranks that are allowed, largest first: as asked, else the usual number. Of MIN:MAX only those that
    the recipe's batch can be divided among; MAX may be more than there is now.

    Raises:
        LaunchError: `asked` cannot be read, or `where` has fewer devices.
        RecipeError: the batch cannot be divided among any of them.
    """
    devices, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    least, most = _range(asked) if asked is not None else (usual(cpus, gpus),) * 2
    if least > devices:
        rule = f"a worker takes one {kind} and {where} has {devices}; use 1 to {devices}"
        raise LaunchError(f"--workers {asked}: {rule}")
    if least == most:
        recipe.micro_batch(least)
        return [least]
    allowed = [size for size in range(most, least - 1, -1) if _divides(recipe, size)]
    if not any(size <= devices for size in allowed):
        recipe.micro_batch(min(most, devices))  # says why not
    return allowed


def usual(cpus: int, gpus: int) -> int:
    """One rank a GPU; without GPUs two, if there are as many CPUs."""
    return gpus or min(2, cpus)


def _range(asked: str) -> tuple[int, int]:
    least, colon, most = asked.partition(":")
    try:
        low, high = int(least), int(most if colon else least)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high <= _MOST:
        raise LaunchError(
            f"--workers {shortened(asked, 40)}: write a number from 1 to {_MOST:,}, or MIN:MAX, as 2 or 1:4"
        )
    return low, high


def _divides(recipe: "Recipe", size: int) -> bool:
    try:
        recipe.micro_batch(size)
    except RecipeError:
        return False
    return True
