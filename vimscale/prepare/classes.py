"""Labels as people write them, names or numbers, to the whole numbers that a model learns."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vimscale.errors import DataError, nearest


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of their labels.

    Raises:
        DataError: the file cannot be read, is empty, or has a name twice.
    """
    try:
        names = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}") from None
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    if not names or "" in names:
        line = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise DataError(f"--classes {path}: {line}; it wants a class a line, in the order of the labels")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"--classes {path}: {twice} is there twice; each class has one line")
    return tuple(names)


def class_map(
    labels: Sequence[str | int], names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """(class names, label of each row). Labels are names, or numbers counted from 0.

    Without `names`, numbers are taken as they are and other labels in alphabetical order.

    Raises:
        DataError: a label that is none of `names`, or a negative one.
    """
    distinct = set(labels)
    if names is None:
        if numbers := _numbers(distinct):
            names = tuple(map(str, range(max(numbers.values()) + 1)))
            _check_dense(numbers, where)
        else:
            names = tuple(sorted({str(label) for label in distinct}))
            known = {name: number for number, name in enumerate(names)}
            numbers = {label: known[str(label)] for label in distinct}
    else:
        known = {name: number for number, name in enumerate(names)}
        by_name = {label: known[str(label)] for label in distinct if str(label) in known}
        by_number = {label: number for label, number in _numbers(distinct).items() if number < len(names)}
        # a column of numbers counts classes, whose names may look like numbers; text is a name if it can be one
        counted = len(by_number) == len(distinct) and all(isinstance(label, int) for label in distinct)
        numbers = by_number if counted else by_name or by_number
        strange = sorted(str(label) for label in distinct - numbers.keys())
        if strange:
            rows = sum(label not in numbers for label in labels)
            more = f" and {len(strange) - 1} others" if len(strange) > 1 else ""
            hint = suggestion(strange[0], names)
            raise DataError(
                f"{where}: label {strange[0]!r}{more} ({rows:,} rows) is none of the {len(names)} classes{hint};"
                " give all of them with --classes FILE, one a line"
            )
    return names, [numbers[label] for label in labels]


def _numbers(labels: Iterable[str | int]) -> dict[str | int, int]:
    """What each label counts to, if all of them are whole numbers from 0 on."""
    numbers = {label: int(label) for label in labels if str(label).isdecimal()}
    return numbers if len(numbers) == len(set(labels)) else {}


def _check_dense(numbers: dict[str | int, int], where: str) -> None:
    """A typo of 10 million would become a head of 10 million classes."""
    highest = max(numbers.values())
    if highest >= 10 * len(numbers) + 1000:
        raise DataError(
            f"{where}: labels go up to {highest:,}, and only {len(numbers):,} of them occur; number them from 0 on,"
            " or give their names with --classes FILE"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Behind a word of which there may be thousands."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""
