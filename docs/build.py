"""Build the site: `python docs/build.py [FOLDER]` (`make docs`) writes HTML for every page, without a network.

Pages link to source files with paths that work in a checkout. The site gets a page for each such file, so that these
links work there too. zensical then renders everything as mkdocs.yml says; a broken link or anchor is an error.
"""

import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
_LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".json": "json", "": "text"}
_CODE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1 *$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!https?:)[^)#\s]+")


def stage(pages: Path) -> None:
    """Copy all pages, with what they link to, to the folder `pages`, which mirrors the checkout."""
    shutil.rmtree(pages, ignore_errors=True)
    linked: set[str] = set()
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        _write(pages / name, "".join(_with_links(path.read_text(), posixpath.dirname(name), linked)))
    for name in sorted(linked):
        source = ROOT / name
        if source.is_dir():
            _write(pages / f"{name}.md", _folder(source, name))
        elif source.suffix in _LANGUAGES:
            fence = f"~~~~ {_LANGUAGES[source.suffix]}\n{source.read_text().rstrip()}\n~~~~"
            _write(pages / f"{name}.md", _page(name, fence))
        else:
            _write(pages / name, source.read_bytes())


def _with_links(text: str, folder: str, linked: set[str]) -> Iterator[str]:
    """Yield the page's parts, where links to sources lead to their pages; note these sources in `linked`."""

    def target(link: re.Match) -> str:
        name = posixpath.normpath(posixpath.join(folder, link[0]))
        if not (ROOT / name).exists() or name.endswith(".md"):
            return link[0]  # zensical reports what is missing
        linked.add(name)
        is_page = (ROOT / name).is_dir() or (ROOT / name).suffix in _LANGUAGES
        return f"{link[0].rstrip('/')}.md" if is_page else link[0]

    end = 0
    for code in _CODE.finditer(text):
        yield _LINK.sub(target, text[end : code.start()])
        yield code[0]
        end = code.end()
    yield _LINK.sub(target, text[end:])


def _page(name: str, text: str) -> str:
    return f"---\nsearch: {{exclude: true}}\n---\n# `{name}`\n\n{text}\n"


def _folder(source: Path, name: str) -> str:
    """The page of a folder: what its `__init__.py` says, and its files."""
    about = source / "__init__.py"
    words = about.read_text().partition('"""')[2].partition('"""')[0] if about.exists() else ""
    tracked = sorted(path.name for path in source.iterdir() if not path.name.startswith(("_", ".")))
    return _page(name, "\n".join([words.strip(), "", *(f"- `{name}/{each}`" for each in tracked)]))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def build(site: Path) -> None:
    """Write the site to the folder `site`, which is replaced.

    Raises:
        subprocess.CalledProcessError: a link or an anchor is broken, or a docstring cannot be found.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder, "pages"))
        shutil.copy(ROOT / "mkdocs.yml", folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", f"{folder}/mkdocs.yml"]
        subprocess.run(command, cwd=ROOT, check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(Path(folder, "site"), site)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
