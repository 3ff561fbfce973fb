"""The pages name files, anchors and packages that exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.image_sets import image
from tests.test_layout import FLOORS
from vimscale.recipe import markdown as recipe_page

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_FOLDERS = "vimscale|launch|kernels|tests|benchmarks|recipes|cluster|examples|docs"


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`\n]*`", "code", text)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in _anchors(target))):
            missing.append(link)
    paths = re.findall(rf"`((?:{_FOLDERS})/[\w/.\-]*\.(?:py|md|yaml|sh))`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_heading_of_a_page_repeats(page: Path) -> None:
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    # the site and GitHub number repeated anchors differently
    assert [one for one in set(headings) if headings.count(one) > 1] == []


def test_the_tour_lists_the_floors_that_the_layout_test_enforces() -> None:
    text = (ROOT / "docs/one-image.md").read_text()
    block = text.partition("<!-- floors -->\n```\n")[2].partition("\n```\n<!-- /floors -->")[0]
    assert block.splitlines() == [", ".join(floor) for floor in FLOORS]


def test_the_page_of_recipes_says_what_the_classes_say() -> None:
    fix = "run `vimscale schema --markdown > docs/recipe.md`"
    assert (ROOT / "docs/recipe.md").read_text() == recipe_page.page(), fix


def test_every_key_of_a_recipe_is_explained() -> None:
    rows = [line for line in recipe_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.slow
def test_the_examples_of_the_python_page_run_in_order(tmp_path: Path, cache: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    checks = """
assert str(run.path) == "runs/first" and len(losses) == 60
assert logits.shape == (1, 10) and image.shape == (3, 32, 32)
assert table.shape == (359, 64) and keys == [one.key for one in val]
assert y.shape == (b, length, e)
"""
    (tmp_path / "page.py").write_text("\n".join([*blocks, checks]))
    (tmp_path / "photos").mkdir()
    for name, kind in (("one.jpg", "JPEG"), ("two.png", "PNG")):
        (tmp_path / "photos" / name).write_bytes(image(1, kind=kind))
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "page.py"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "recipe first has 2 faults" in done.stdout
