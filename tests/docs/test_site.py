"""The site is built without a network, links included, and has every page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import vimscale
from tests.docs.test_pages import _anchors
from vimscale import ops

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; broken links, anchors and names of docstrings fail."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "docs/build.py", folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _nav() -> list[str]:
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text())
    return [
        page
        for section in yaml.safe_load(text)["nav"]
        for pages in section.values()
        for one in pages
        for page in one.values()
    ]


def test_the_navigation_has_every_page_once() -> None:
    pages = [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ]
    assert sorted(_nav()) == sorted(pages), "name each page in the section of `nav` in mkdocs.yml that fits"


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"(?:heading: |^::: )vimscale\.(?:ops\.)?(\w+)", text, re.MULTILINE))
    kernels = {name for name in ops.__all__ if re.search("scan|ssd|conv1d|inner|add_norm", name)} - {"ssd_over"}
    assert (set(vimscale.__all__) | kernels) - {"PRESETS", "conv_over", "scan_over"} <= named


@pytest.mark.slow
def test_anchors_are_those_of_github(site: Path) -> None:
    for page in ("README.md", "docs/model.md", "docs/recovery.md", "docs/exports.md", "docs/pretraining.md"):
        html = site / ("index.html" if page == "README.md" else page.replace(".md", ".html"))
        ids = re.findall(r'<h\d id="([^"]+)"', html.read_text())
        assert sorted(ids) == sorted(_anchors(ROOT / page))


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    load = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preload|preconnect|icon)[^>]*href=["']?(?:https?:)?//|@import|url\(["']?https?:"""
    )
    assert [str(page) for page in [*pages, *site.rglob("*.css")] if load.search(page.read_text())] == []
