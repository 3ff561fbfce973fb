"""Labels as people write them, names or numbers, to the whole numbers that a model learns."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vimscale.data.images.decode import whole_number
from vimscale.errors import DataError, nearest

Label = str | int | None
_NUMBER = re.compile(r"[+-]?(\d+[.]?\d*|[.]\d+)(e[+-]?\d+)?|[+-]?inf", re.ASCII | re.IGNORECASE)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of their labels.

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
        raise DataError(f"--classes {path}: {line}; it wants a class a line, in the order of the labels")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"--classes {path}: {twice} is there twice; each class has one line")
    return tuple(names)


def class_map(
    labels: Sequence[str | int],
    names: tuple[str, ...] | None,
    where: str,
    row: Callable[[int], str],
    *,
    counted: bool = False,
) -> tuple[tuple[str, ...], list[int]]:
    """(class names, label of each row). Labels are names, or numbers counted from 0. `row` says where one is from.

    Without `names`, numbers are taken as they are and names in alphabetical order. Of `names`, a text is one if it can
    be, and else a number that counts them; a number is one only where it cannot count them, and never if `counted`.

    Raises:
        DataError: a label that is none of `names`, numbers of which one is odd, or numbers that could be both.
    """
    distinct = set(labels)
    whole = {label: number for label in distinct if (number := _whole(label)) is not None and number >= 0}
    if names is not None:
        return names, _among(labels, names, whole, where, row, counted)
    odd = distinct - whole.keys()
    if odd and (whole or any(_NUMBER.fullmatch(str(label)) for label in odd)):
        first, count, more = _first(labels, odd, row)
        others = f", as {len(labels) - count:,} others are" if whole else ""
        raise DataError(
            f"{where}: {first} is not a whole number from 0 on{others}{more}; leave such rows out, or, if labels are"
            " names, give all of them with --classes FILE, one a line"
        )
    if whole:
        check_dense(whole.values(), where)
        names = tuple(map(str, range(max(whole.values()) + 1)))
        return names, [whole[label] for label in labels]
    names = tuple(sorted(map(str, distinct)))
    known = {name: number for number, name in enumerate(names)}
    return names, [known[str(label)] for label in labels]


def _among(
    labels: Sequence[str | int],
    names: tuple[str, ...],
    whole: dict[str | int, int],
    where: str,
    row: Callable[[int], str],
    counted: bool,
) -> list[int]:
    """The label of each row, where the classes have names."""
    distinct = set(labels)
    known = {name: number for number, name in enumerate(names)}
    by_number = {label: number for label, number in whole.items() if number < len(names)}
    by_name = {}
    for label in distinct:
        name = str(label) if str(label) in known else str(whole.get(label))
        if name in known:
            by_name[label] = known[name]
    numbers = by_name if by_name and not counted else by_number
    if all(isinstance(label, int) for label in distinct) and len(by_number) == len(distinct):
        if numbers is by_name and len(by_name) == len(distinct) and by_name != by_number:
            label = min(label for label in distinct if by_name[label] != by_number[label])
            raise DataError(
                f"{where}: labels are numbers, and so are names of classes: {label} may be the class of that name,"
                f" number {by_name[label]}, or the one that counts to {label}, {names[by_number[label]]!r}; give the"
                " classes other names, such as class_0"
            )
        numbers = by_number
    if strange := distinct - numbers.keys():
        first, _, more = _first(labels, strange, row)
        label = next(label for label in labels if label in strange)
        fix = (
            "leave such rows out"
            if _NUMBER.fullmatch(str(label))
            else "give all of them with --classes FILE, one a line"
        )
        hint = suggestion(str(label), names)
        raise DataError(f"{where}: {first} is none of the {len(names)} classes{hint}{more}; {fix}")
    return [numbers[label] for label in labels]


def _first(labels: Sequence[str | int], odd: set[str | int], row: Callable[[int], str]) -> tuple[str, int, str]:
    """(the first row with an odd label, how many such rows there are, a word on the others)."""
    rows = [i for i, label in enumerate(labels) if label in odd]
    other = [repr(label)[:40] for label in dict.fromkeys(labels[i] for i in rows)][1:]
    more = f"; nor is {other[0]}" + (f" and {len(other) - 1:,} more" if len(other) > 1 else "") if other else ""
    return f"label {repr(labels[rows[0]])[:40]} of {row(rows[0])} ({len(rows):,} rows)", len(rows), more


def _whole(label: str | int) -> int | None:
    return label if isinstance(label, int) else whole_number(label)


def check_dense(numbers: Iterable[int], where: str) -> None:
    """A typo of 10 million would become a head of 10 million classes."""
    distinct = set(numbers)
    highest = max(distinct)
    if highest >= 10 * len(distinct) + 1000:
        raise DataError(
            f"{where}: labels go up to {highest:,}, and only {len(distinct):,} of them occur; number them from 0 on,"
            " or give their names with --classes FILE"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Behind a word of which there may be thousands."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""
