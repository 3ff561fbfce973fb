"""Predictions of images of any kind: equal to a plain computation, whatever else is among the files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import vimscale
from tests.support.image_sets import image
from tests.support.models import export
from tests.support.published import arguments_of, random_state
from vimscale.errors import CheckpointError, DataError
from vimscale.inference.predict import image_files
from vimscale.launch.commands.app import app


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and photos of several sizes and formats; one is damaged."""
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "export")
    photos = tmp_path / "photos/more"
    photos.mkdir(parents=True)
    for i, (name, kind) in enumerate(
        (("a.jpg", "JPEG"), ("b.PNG", "PNG"), ("more/c.webp", "WEBP"), ("d.jpeg", "JPEG"))
    ):
        (tmp_path / "photos" / name).write_bytes(image(i, 30 + 20 * i, 100, kind))
    (photos / "broken.png").write_bytes(image(9, kind="PNG")[:100])
    (photos / "notes.txt").write_text("no image")
    return tmp_path


def _by_hand(path: Path) -> list[tuple[str, float]]:
    model, preprocess = vimscale.load("export")
    with torch.no_grad():
        logits = model(preprocess(path)[None])[0].double()
    probabilities = logits.exp() / logits.exp().sum()
    names = vimscale.load("export").classes
    return sorted(zip(names, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])


def _ran(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["predict", "export", *arguments], catch_exceptions=False)


def test_predictions_are_a_plain_computation_and_bad_files_come_with_their_error(site: Path) -> None:
    result = _ran("photos", "--json", "--top", "3", "--batch", "2")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    names = ["photos/a.jpg", "photos/b.PNG", "photos/d.jpeg", "photos/more/broken.png", "photos/more/c.webp"]
    assert [row["image"] for row in rows] == names
    assert rows[3].keys() == {"image", "error"}
    assert "cannot be decoded" in rows[3]["error"]
    for row in rows[:3] + rows[4:]:
        expected = _by_hand(Path(row["image"]))[:3]
        assert [one["class"] for one in row["top"]] == [name for name, _ in expected]
        assert [one["probability"] for one in row["top"]] == pytest.approx([p for _, p in expected], abs=1e-6)


def test_a_line_per_image_says_its_classes(site: Path) -> None:
    result = _ran("photos/a.jpg", "--top", "2")
    assert result.exit_code == 0
    (first, p), (second, q), *_ = _by_hand(Path("photos/a.jpg"))
    assert result.stdout == f"photos/a.jpg: {first} {p:.2%}  {second} {q:.2%}\n"
    result = _ran("missing.jpg", "photos/a.jpg")
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1, "the others are done"
    assert "missing.jpg: No such file or directory" in result.stderr
    assert "1 of 2 images" in result.stderr


def test_files_come_from_names_folders_and_patterns(site: Path) -> None:
    found = image_files(["photos/more", "photos/*.jp*", "photos/more/notes.txt"])
    names = ["more/broken.png", "more/c.webp", "a.jpg", "d.jpeg", "more/notes.txt"]
    assert found == [Path("photos") / name for name in names]
    with pytest.raises(DataError, match="no image in this folder"):
        image_files(["export"])
    with pytest.raises(DataError, match="no file has such a name"):
        image_files(["photos/*.gif"])


def test_python_takes_any_form_of_image_and_keeps_the_order(site: Path) -> None:
    loaded = vimscale.load("export")
    pixels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    given: list[Any] = [pixels, "photos/a.jpg", b"damaged", "nowhere.png", pixels.permute(1, 2, 0).numpy()]
    found = list(vimscale.predict(loaded, given, top=10, batch=3))
    assert all(one.image is image for one, image in zip(found, given, strict=True))
    assert [bool(one.error) for one in found] == [False, False, True, True, False]
    assert dict(found[0].top) == pytest.approx(dict(found[4].top))
    assert sum(p for _, p in found[1].top) == pytest.approx(1)
    assert [name for name, _ in found[1].top] == [name for name, _ in _by_hand(Path("photos/a.jpg"))]


def test_models_without_classes_are_refused(site: Path) -> None:
    export(site / "headless", num_classes=0)
    with pytest.raises(CheckpointError, match="headless has no classes: it was trained without labels"):
        list(vimscale.predict(vimscale.load("headless"), ["photos/a.jpg"]))
    export(site / "tiles", tiles=32, image_size=32, pos_embed="coordinates")
    with pytest.raises(CheckpointError, match="takes bags of tiles"):
        list(vimscale.predict(vimscale.load("tiles"), ["photos/a.jpg"]))


def test_a_published_file_its_import_and_that_exported_again_predict_the_same(site: Path) -> None:
    torch.save({"model": random_state(arguments_of("v2")[0])}, "vim.pth")
    runner = CliRunner()
    for command in (["import", "vim.pth"], ["export", "vim", "--to", "hustvl"], ["export", "vim", "--to", "hf"]):
        done = runner.invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    found = {}
    for source in ("vim.pth", "vim", "vim_hustvl", "vim_hf"):
        loaded = vimscale.load(source)
        (one,) = vimscale.predict(loaded, ["photos/a.jpg"], top=5)
        image = loaded.preprocessing("photos/a.jpg")
        found[source] = (one.top, loaded.model(image[None], features=True).tolist())
    assert all(each == found["vim.pth"] for each in found.values())
