"""Labels as people write them: whole numbers stay, names are numbered, and a mix of both is an error."""

from pathlib import Path

import pytest

from vimscale.errors import DataError
from vimscale.prepare.inputs.classes import class_map, read_classes
from vimscale.prepare.inputs.rows import checked_label

DIGITS = tuple(map(str, range(12)))


def _mapped(labels: list, names: tuple[str, ...] | None = None, *, counted: bool = False) -> tuple:
    rows = [label for label in (checked_label(label, "in", names) for label in labels) if label is not None]
    return class_map(rows, names, "in", lambda i: f"row {i}", counted=counted)


@pytest.mark.parametrize(
    "labels",
    [
        range(12),
        map(str, range(12)),
        map(float, range(12)),
        (f"{i}.0" for i in range(12)),
        (f"{i:03d}" for i in range(12)),
        ["\ufeff0", " 1", "2\r\n", "3.", "4.00", 5, 6.0, "+7", *map(str, range(8, 12))],
    ],
)
def test_whole_numbers_keep_their_value_however_they_are_written(labels: list) -> None:
    assert _mapped(list(labels)) == (DIGITS, list(range(12)))
    assert _mapped([5, 0, "1"]) == (DIGITS[:6], [5, 0, 1]), "gaps stay too"


@pytest.mark.parametrize("odd", ["-1", -1, "cat", "3.5", "inf", "1e3", "9" * 5000, "1_0", "٣"])
def test_one_odd_label_among_numbers_is_named(odd: str | int) -> None:
    with pytest.raises(DataError, match=r"of row 2 \(1 rows\) is not a whole number from 0 on, as 11 others are") as e:
        _mapped([*DIGITS[:2], odd, *DIGITS[3:]])
    assert repr(odd)[:40] in str(e.value)
    assert "--classes" in str(e.value)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("labels", [["-1", "1"], [0.5, 1.5], ["0.5", "1.5"], ["inf", "cat"]])
def test_numbers_that_cannot_count_are_not_classes(labels: list) -> None:
    with pytest.raises(DataError, match=r"is not a whole number from 0 on|0\.5 \(a number\)"):
        _mapped(labels)


def test_names_are_numbered_in_alphabetical_order_and_stripped_of_blanks() -> None:
    assert _mapped(["owl", " cat", "cat", "dog "]) == (("cat", "dog", "owl"), [2, 0, 0, 1])
    assert _mapped([None, "", " ", "nan", "NaN", float("nan"), "cat"]) == (("cat",), [0]), "no labels"
    assert _mapped(["nan", "roti"], ("roti", "nan")) == (("roti", "nan"), [1, 0]), (
        "except for a class that the user names"
    )


def test_given_names_define_what_labels_mean() -> None:
    assert _mapped(["-1", "1"], ("-1", "1"))[1] == [0, 1]
    assert _mapped(["7", "A", "10"], ("7", "10", "A"))[1] == [0, 2, 1]
    assert _mapped(["2", "0.0"], ("cat", "dog", "owl"))[1] == [2, 0]
    assert _mapped([2, 1.0], ("cat", "dog", "owl"))[1] == [2, 1]
    assert _mapped([20, "10.0"], ("10", "20"))[1] == [1, 0], "names, because they cannot count"
    assert _mapped([0, 1], ("1", "0"), counted=True)[1] == [0, 1], "a ClassLabel's numbers count its names"
    with pytest.raises(DataError, match=r"0 may be the class with that name, number 1, or .* with that number, '1'"):
        _mapped([0, 1], ("1", "0"))
    with pytest.raises(DataError, match=r"label -1 of row 1 \(2 rows\) is not one of the 2 classes; leave such rows"):
        _mapped([0, -1, -1], ("a", "b"), counted=True)
    with pytest.raises(DataError, match=r"label 'x' of row 0 \(2 rows\) is not one of the 2 classes; nor is 'y'"):
        _mapped(["x", "y", "a"], ("a", "b"))


def test_a_file_of_classes_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n", "utf-8-sig", newline="")
    assert read_classes(tmp_path / "classes.txt") == ("cat", "dog")
