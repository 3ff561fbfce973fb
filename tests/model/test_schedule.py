"""The direction language."""

import pytest

from vimscale.model import schedule
from vimscale.model.schedule import Layer


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("bi*3", ["bi"] * 3),
        ("fwd*2 bi", ["fwd", "fwd", "bi"]),
        ("(fwd bwd)*2", ["fwd", "bwd"] * 2),
        ("bi fwd*2 bi", ["bi", "fwd", "fwd", "bi"]),
        ("((fwd*2 bwd)*2 bi)*2", ["fwd", "fwd", "bwd", "fwd", "fwd", "bwd", "bi"] * 2),
        ("  bi * 2  ", ["bi", "bi"]),
        ("(bi bi@column)*2", ["bi", "bi@column"] * 2),
        ("pair*4 shared cross attn bwd @ snake", ["pair"] * 4 + ["shared", "cross", "attn", "bwd@snake"]),
    ],
)
def test_a_schedule_names_every_layer(text: str, layers: list[str]) -> None:
    assert list(map(str, schedule.parse(text))) == layers
    assert list(map(str, schedule.parse(text, len(layers)))) == layers


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("bi*24 fdw", 6, "'fdw' is not a kind"),
        ("bi*", 3, "takes a count"),
        ("bi*0", 3, "takes a count"),
        ("bi*100000", 3, "takes a count"),
        ("(fwd bwd", 0, "never closed"),
        ("fwd) bi", 3, "closes nothing"),
        ("", 0, "a layer is missing"),
        ("()", 1, "a layer is missing"),
        ("bi, fwd", 2, "',' has no meaning"),
        ("*3", 0, "'*' is not a kind"),
        ("bi@diagonal", 3, "'@' takes an order"),
        ("bi@", 3, "'@' takes an order"),
        ("bi attn@column", 8, "attn takes no order"),
        ("fwd pair*3 bi", 4, "come in twos"),
    ],
)
def test_a_caret_points_at_the_fault(text: str, column: int, why: str) -> None:
    with pytest.raises(ValueError, match=r"\^$") as caught:
        schedule.parse(text)
    message, shown, caret = str(caught.value).split("\n")
    assert why in message
    assert shown == f"    {text}"
    assert caret.index("^") == 4 + column


@pytest.mark.parametrize(
    ("text", "depth", "column", "why"),
    [("fwd*2 bi*3", 4, 6, "this is layer 5"), ("fwd*2 bi", 3 + 1, 8, "1 more must follow")],
)
def test_a_caret_points_at_the_first_layer_of_a_wrong_depth(text: str, depth: int, column: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}: {why}") as caught:
        schedule.parse(text, depth)
    assert str(caught.value).split("\n")[2].index("^") == 4 + column


def test_a_compact_text_names_the_same_layers() -> None:
    layers = schedule.parse("(bi bi@column)*2 fwd*3 pair*2")
    assert schedule.compact(layers) == "bi bi@column bi bi@column fwd*3 pair*2"
    assert schedule.parse(schedule.compact(layers)) == layers


def test_paths_of_a_layer_are_forward_first() -> None:
    assert Layer("bi", "snake").paths == (("snake", False), ("snake", True))
    assert Layer("cross").paths == (("row", False), ("row", True), ("column", False), ("column", True))
    assert (Layer("bwd").paths, Layer("attn").paths) == ((("row", True),), ())


def test_every_second_layer_of_a_run_of_pairs_scans_backward() -> None:
    assert schedule.second_of_pairs(schedule.parse("fwd pair*4 bi pair*2")) == {2, 4, 7}
