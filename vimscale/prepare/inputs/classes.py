"""Labels as people write them, names or numbers, mapped to the class numbers that a model learns."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vimscale.data.images.decode import whole_number
from vimscale.errors import DataError, nearest

Label = str | int | None
_NUMBER = re.compile(r"[+-]?(\d+[.]?\d*|[.]\d+)(e[+-]?\d+)?|[+-]?inf", re.ASCII | re.IGNORECASE)


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, in the order of their labels.

    Raises:
        DataError: the file cannot be read, is empty, or has a name twice.
    """
    try:
        names = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {path} cannot be read: {error}") from None
    while names and not names[-1].strip():
        names.pop()
    names = [name.strip() for name in names]
    if not names or "" in names:
        line = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise DataError(f"--classes {path}: {line}; write one class per line, in the order of the labels")
    if len(set(names)) < len(names):
        duplicate = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"--classes {path}: {duplicate} is listed twice; write each class on one line")
    return tuple(names)


def class_map(
    labels: Sequence[str | int],
    names: tuple[str, ...] | None,
    where: str,
    row: Callable[[int], str],
    *,
    counted: bool = False,
) -> tuple[tuple[str, ...], list[int]]:
    """Return (class names, class number of each row). Labels are names or numbers; `row` describes a row in messages.

    Without `names`, numbers count classes from 0, and names are sorted alphabetically. With `names`:

    - Texts are names if any of them is one; otherwise they are numbers that count the names.
    - Numbers count the names. If some of them cannot, all are read as names, but never if `counted`.

    Raises:
        DataError: a label is not one of `names`, some labels are numbers and some are not, or numbers could be either.
    """
    distinct = set(labels)
    numbers = {label: number for label in distinct if (number := _number(label)) is not None and number >= 0}
    if names is not None:
        return names, _among(labels, names, numbers, where, row, counted)
    odd = distinct - numbers.keys()
    if odd and (numbers or any(_NUMBER.fullmatch(str(label)) for label in odd)):
        first, count, more = _first(labels, odd, row)
        others = f", as {len(labels) - count:,} others are" if numbers else ""
        raise DataError(
            f"{where}: {first} is not a whole number from 0 on{others}{more}; leave such rows out, or, if labels are"
            " names, list all of them in --classes FILE, one per line"
        )
    if numbers:
        check_dense(numbers.values(), where)
        names = tuple(map(str, range(max(numbers.values()) + 1)))
        return names, [numbers[label] for label in labels]
    names = tuple(sorted(map(str, distinct)))
    known = {name: number for number, name in enumerate(names)}
    return names, [known[str(label)] for label in labels]


def _among(
    labels: Sequence[str | int],
    names: tuple[str, ...],
    numbers: dict[str | int, int],
    where: str,
    row: Callable[[int], str],
    counted: bool,
) -> list[int]:
    """Return the class number of each row, for classes with names."""
    distinct = set(labels)
    known = {name: number for number, name in enumerate(names)}
    by_number = {label: number for label, number in numbers.items() if number < len(names)}
    by_name = {}
    for label in distinct:
        name = str(label) if str(label) in known else str(numbers.get(label))
        if name in known:
            by_name[label] = known[name]
    found = by_name if by_name and not counted else by_number
    if all(isinstance(label, int) for label in distinct) and len(by_number) == len(distinct):
        if found is by_name and len(by_name) == len(distinct) and by_name != by_number:
            label = min(label for label in distinct if by_name[label] != by_number[label])
            raise DataError(
                f"{where}: labels are numbers, and so are class names: {label} may be the class with that name, number"
                f" {by_name[label]}, or the class with that number, {names[by_number[label]]!r}; give the classes other"
                " names, such as class_0"
            )
        found = by_number
    if unknown := distinct - found.keys():
        first, _, more = _first(labels, unknown, row)
        label = next(label for label in labels if label in unknown)
        is_number = _NUMBER.fullmatch(str(label))
        fix = "leave such rows out" if is_number else "list all of them in --classes FILE, one per line"
        hint = suggestion(str(label), names)
        raise DataError(f"{where}: {first} is not one of the {len(names)} classes{hint}{more}; {fix}")
    return [found[label] for label in labels]


def _first(labels: Sequence[str | int], odd: set[str | int], row: Callable[[int], str]) -> tuple[str, int, str]:
    """Return (the first row with an odd label, the number of such rows, a phrase about the others)."""
    rows = [i for i, label in enumerate(labels) if label in odd]
    other = [repr(label)[:40] for label in dict.fromkeys(labels[i] for i in rows)][1:]
    more = f"; nor is {other[0]}" + (f" and {len(other) - 1:,} more" if len(other) > 1 else "") if other else ""
    return f"label {repr(labels[rows[0]])[:40]} of {row(rows[0])} ({len(rows):,} rows)", len(rows), more


def _number(label: str | int) -> int | None:
    return label if isinstance(label, int) else whole_number(label)


def check_dense(numbers: Iterable[int], where: str) -> None:
    """Check that most class numbers occur: a typo of 10 million would become a head of 10 million classes.

    Raises:
        DataError: the highest number is far above the count of distinct ones.
    """
    distinct = set(numbers)
    highest = max(distinct)
    if highest >= 10 * len(distinct) + 1000:
        raise DataError(
            f"{where}: labels go up to {highest:,}, but only {len(distinct):,} of them occur; number them from 0 on,"
            " or list their names in --classes FILE"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a did-you-mean hint for a word, or nothing."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""
