"""How many ranks a run has: `--workers N`, or MIN:MAX for as many as there are devices for."""

from typing import TYPE_CHECKING

from vimscale.errors import LaunchError, RecipeError, shortened

if TYPE_CHECKING:
    from vimscale.recipe.recipe import Recipe


_MOST = 65_536
"""The largest number of ranks that can be requested: `sizes` tries every number up to it."""


def usual(cpus: int, gpus: int, nodes: int = 1) -> int:
    """The number of ranks where none is given, for nodes with `cpus` and `gpus` each.

    One rank per GPU. Without GPUs, one per node; a single node gets two if it has two CPUs.
    """
    return nodes * gpus or (nodes if nodes > 1 else min(2, cpus))


def bounds(workers: str) -> tuple[int, int]:
    """(fewest, most) ranks of N or MIN:MAX.

    Raises:
        ValueError: `workers` is neither.
    """
    least, colon, most = workers.partition(":")
    return int(least), int(most if colon else least)


def check(workers: str, recipe: "Recipe") -> None:
    """Check a plain number of ranks before it is known which devices there are. MIN:MAX passes.

    Raises:
        LaunchError: `workers` cannot be parsed.
        RecipeError: the ranks are not a multiple of `parallel.context`, or do not divide the batch.
    """
    least, most = _bounds(workers)
    if least == most:
        recipe.micro_batch(least)


def sizes(workers: str | None, recipe: "Recipe", cpus: int, gpus: int, where: str) -> list[int]:
    """The allowed numbers of ranks, largest first: as `workers` says, else the usual number.

    Of MIN:MAX, only the multiples of `parallel.context` that divide the recipe's batch. MAX may exceed the devices that
    there are now.

    Raises:
        LaunchError: `workers` cannot be parsed, or `where` has fewer devices than its minimum.
        RecipeError: none of the numbers is such a multiple.
    """
    devices, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    least, most = _bounds(workers) if workers is not None else (usual(cpus, gpus),) * 2
    if least > devices:
        rule = f"each rank takes one {kind} and {where} has {devices}; use 1 to {devices}"
        raise LaunchError(f"--workers {workers}: {rule}")
    if least == most:
        recipe.micro_batch(least)
        return [least]
    allowed = [size for size in range(most, least - 1, -1) if _divides(recipe, size)]
    if not any(size <= devices for size in allowed):
        recipe.micro_batch(min(most, devices))  # raises the RecipeError that says why
    return allowed


def largest(allowed: list[int], cpus: int, gpus: int) -> int:
    """The largest of the allowed numbers that there are devices for now."""
    return max(size for size in allowed if size <= (gpus or cpus))


def in_words(count: int) -> str:
    """1 rank, 1,024 ranks."""
    return f"{count:,} rank{'s' if count != 1 else ''}"


def _bounds(workers: str) -> tuple[int, int]:
    try:
        low, high = bounds(workers)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high <= _MOST:
        raise LaunchError(
            f"--workers {shortened(workers, 40)}: write a number from 1 to {_MOST:,}, or MIN:MAX, such as 2 or 1:4"
        )
    return low, high


def _divides(recipe: "Recipe", size: int) -> bool:
    try:
        recipe.micro_batch(size)
    except RecipeError:
        return False
    return True
