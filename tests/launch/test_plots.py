"""Plots and contact sheets: text in every language, and plots of plans."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from tests.support import later
from vimscale.errors import LaunchError
from vimscale.launch import cluster as clusters
from vimscale.launch.commands import app, plan
from vimscale.prepare.inspection import contact_sheet, lettering
from vimscale.recipe import recipe

plots = later.module("vimscale.launch.display.plots", "matplotlib")

TEXTS = ("Zoë's ½ naïve Straße", "Ωμέγα кошка", "猫 犬", "한국어", "عربى", "ő", "a\nb\x07\ud800", "\U0010fffe")


LITTLE = ("model.depth=1", "model.image_size=16", "batch=8")


def _drawn(text: str, font: lettering.Font) -> np.ndarray:
    image = Image.new("L", (2000, 60))
    ImageDraw.Draw(image).text((5, 5), text, 255, font)
    return np.asarray(image)


@pytest.mark.parametrize("alone", [True, False], ids=["Pillow's font", "all fonts"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_drawn_as_a_box(text: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if alone:
        monkeypatch.setattr(lettering, "FONTS", ())
        monkeypatch.setattr(lettering, "_shipped", list)
        lettering._fonts.cache_clear()
    try:
        written, font = lettering.lettered(text, 17)
    finally:
        lettering._fonts.cache_clear()
    box = font.getmask("\U0010ffff")
    for letter in set(written) - {" "}:
        assert bytes(font.getmask(letter)) != bytes(box), letter
    assert _drawn(written, font).any()
    if alone and "猫" in text:
        assert written == r"\u732b \u72ac"
    if alone and text == "ő":
        assert written in ("ő", "o")


def test_a_contact_sheet_accepts_any_text_and_shortens_it() -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    samples = [(image, text * 50, text) for text in TEXTS]
    sheet = contact_sheet.grid("猫" * 10_000, "\n", samples, columns=4)
    assert np.asarray(sheet).std() > 10


def test_text_in_plots_is_not_read_as_a_formula_and_has_no_boxes(tmp_path: Path) -> None:
    figure, (axes,) = plots._figure(1)
    axes.set_title(" ".join(map(plots.plain, ("$x$_{", "100 %", *TEXTS))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is a warning
        figure.savefig(tmp_path / "x.png")
    assert plots.plain("$") == r"\$"
    assert plots.plain("кошка") == "кошка"


def test_the_plot_of_a_plan_for_cpus_shows_needed_and_available_memory(tmp_path: Path) -> None:
    cluster = clusters.load("local", ["workers=4"])
    planner, _ = plan.prepare(recipe.load("vim_digits_cpu", LITTLE), cluster, 2)
    assert plan._counts(None, cluster, 4, 1) == [1, 2, 4]
    assert plan._counts(None, cluster, 4, 2) == [2, 4]
    rows = plan.outlooks(planner, [2, 1024])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing positive to draw was one
        plan._plot(planner, rows, tmp_path / "p.png")
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    assert (picture.max(2) - picture.min(2) > 60).mean() > 0.1, "bars fill the plot"
    table = plan._comparison(rows, device=False)
    assert [next(iter(column.cells)) for column in table.columns[4:]] == [""] * 5, (
        "there is no model of the speed of CPUs"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpus", "1024"], "fits on none of these numbers of ranks; give others with --gpus"),
        (["--gpus", "9" * 5000], "is not a list of numbers from 1 to 999,999"),
        (["--picture", "x.jpg"], "the plot is a PNG; give it a name that ends in .png"),
        (["--picture", "nowhere/x.png"], "cannot be written: No such file or directory"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app.app, ["plan", "vim_digits_cpu", "--on", "local", "--picture", "x.png", *LITTLE, *options]
    )
    assert isinstance(done.exception, LaunchError)
    assert says in str(done.exception)
    assert not list(tmp_path.glob("x.*"))
