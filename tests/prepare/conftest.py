"""An input of a few images, and the data set made from it."""

from pathlib import Path

import pytest

from tests.support.image_sets import image
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of three classes, one of them damaged and one a BMP, and a file that is not an image."""
    root = tmp_path_factory.mktemp("images")
    for c, name in enumerate(("cat", "dog", "owl")):
        (root / name / "more").mkdir(parents=True)
        for i in range(10):
            folder = root / name / ("more" if i % 2 else ".")
            (folder / f"{name}.{i}.jpg").write_bytes(image(10 * c + i, 40 + 10 * i))
    (root / "cat" / "cat.0.jpg").write_bytes(b"\xff\xd8 no more than that")
    (root / "dog" / "dog.0.jpg").unlink()
    (root / "dog" / "dog.0.bmp").write_bytes(image(10, kind="BMP"))
    (root / "owl" / "README.txt").write_text("not an image")
    return root


@pytest.fixture
def made(tmp_path: Path, images: Path) -> Path:
    prepare(str(images), tmp_path / "set", Options(per_shard=8), Columns())
    return tmp_path / "set"
