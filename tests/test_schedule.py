"""The direction language."""

import pytest

from vimscale.model import schedule


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("bi*3", ["bi"] * 3),
        ("fwd*2 bi", ["fwd", "fwd", "bi"]),
        ("(fwd bwd)*2", ["fwd", "bwd"] * 2),
        ("bi fwd*2 bi", ["bi", "fwd", "fwd", "bi"]),
        ("((fwd*2 bwd)*2 bi)*2", ["fwd", "fwd", "bwd", "fwd", "fwd", "bwd", "bi"] * 2),
        ("  bi * 2  ", ["bi", "bi"]),
    ],
)
def test_a_schedule_names_every_layer(text: str, layers: list[str]) -> None:
    assert schedule.parse(text) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("bi*24 fdw", 6, "'fdw' is no direction"),
        ("bi*", 3, "takes a count"),
        ("bi*0", 3, "takes a count"),
        ("bi*100000", 3, "takes a count"),
        ("(fwd bwd", 0, "never closed"),
        ("fwd) bi", 3, "closes nothing"),
        ("", 0, "a direction is missing"),
        ("()", 1, "a direction is missing"),
        ("bi, fwd", 2, "',' means nothing"),
        ("*3", 0, "'*' is no direction"),
    ],
)
def test_a_fault_is_shown_where_it_stands(text: str, column: int, why: str) -> None:
    with pytest.raises(ValueError, match=r"\^$") as caught:
        schedule.parse(text)
    message, shown, caret = str(caught.value).split("\n")
    assert why in message
    assert shown == f"    {text}"
    assert caret.index("^") == 4 + column
