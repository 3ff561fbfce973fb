"""Every command block of the pages is run, or marked `<!-- not run: WHY -->`; both kinds name only what exists."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from launch.cluster import Cluster
from tests.docs.blocks import PAGES, ROOT, SHELL, Block, blocks, command_faults, commands, tree_faults
from tests.support import photos, published, slides
from tests.support.image_sets import image

ALL = [block for page in PAGES for block in blocks(page)]
PAGES_RUN = sorted({block.page for block in ALL if block.language in ("sh", "bash", "python") and not block.mark})
MINE = """\
base: vim_digits_cpu
name: mine
epochs: null
steps: 40
optim: {warmup: 5}
checkpoint: {every: 20}
"""


def _is_command(block: Block) -> bool:
    return block.language in (*SHELL, "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_only_what_exists(page: Path) -> None:
    faults = [
        f"{block.where}: {fault}: {' '.join(words)}"
        for block in blocks(page)
        if block.language in SHELL
        for words in commands(block)
        for fault in command_faults(words)
    ]
    # the block that shows what wrong keys are answered with
    assert [fault for fault in faults if "no key optim.lrr" not in fault] == []


def test_a_wrong_command_is_noticed() -> None:
    block = Block("page", 1, "sh", "vimscale lunch a\nvimscale show a optim.lrr=1 --fast && vimscale jobs --on b", None)
    assert [fault for words in commands(block) for fault in command_faults(words)] == [
        "no command lunch",
        "no key optim.lrr",
        "show: no option --fast",
    ]


def test_recipes_in_pages_have_only_known_keys() -> None:
    faults = []
    for block in ALL:
        if block.language == "yaml" and isinstance(tree := yaml.safe_load(block.text), dict):
            if set(tree) & set(Cluster.model_fields) - {"name"}:
                continue
            faults += [f"{block.where}: {fault}" for fault in tree_faults(tree)]
    assert faults == []


def test_python_in_pages_compiles() -> None:
    for block in ALL:
        if block.language == "python":
            compile(block.text, block.where, "exec")


def test_blocks_of_commands_name_their_language() -> None:
    bare = [block.where for block in ALL if not block.language and re.match(r"\$ vimscale ", block.text)]
    assert bare == [], "give these blocks the language sh or console"


def test_more_blocks_are_to_run_than_are_marked() -> None:
    counts = Counter("marked" if block.mark else "run" for block in ALL if _is_command(block))
    assert counts["run"] > counts["marked"], counts


def _environment(cache: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"XDG_CACHE_HOME": str(cache), "PATH": path, "SPT_NOENV": "1"}


def _shell(text: str, folder: Path, cache: Path) -> str:
    """Run the lines of a block until one fails; return what they print."""
    command = ["bash", "-euxo", "pipefail", "-c", text]  # -x: a failure shows its line
    done = subprocess.run(command, cwd=folder, env=_environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _run(page: str, folder: Path, cache: Path) -> str:
    """Run a page's blocks in order, shell and Python apart, as a reader would; return what they print."""
    here, out, python = [block for block in ALL if block.page == page and not block.mark], "", []
    for block in here:
        if block.language == "python":
            python.append(block.text)
        elif block.language == "yaml" and "name: " in block.text:
            (folder / f"{yaml.safe_load(block.text)['name']}.yaml").write_text(block.text)
        elif block.language in ("sh", "bash"):
            out += _shell(block.text, folder, cache)
    if python and page != "docs/python.md":  # test_pages.py runs these, and says what the figures must be
        (folder / "page.py").write_text("\n".join(python))
        done = subprocess.run(
            [sys.executable, "page.py", "digit.png"],
            cwd=folder, env=_environment(cache) | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"
        out += done.stdout
    return out


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Return a folder with what pages name: two runs (`mine` of mine.yaml, and `tuned`), photos, slides, sets, an
    image, a published file.
    """
    from vimscale.data import digits

    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.yaml").write_text(MINE)
    digits.write(folder / "sets")
    shutil.copytree(folder / "sets/val", folder / "sets/test")
    shutil.copytree(folder / "sets/val", folder / "shards")
    for name in ("manifest.json", *(path.name for path in (folder / "shards").glob("*.idx"))):
        (folder / "shards" / name).unlink()
    for number in range(60):
        path = folder / "photos" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number, kind="PNG"))
    for name, kind in (("one.jpg", "JPEG"), ("two.png", "PNG")):
        (folder / "photos/0" / name).write_bytes(image(1, kind=kind))
    (folder / "digit.png").write_bytes(image(1, kind="PNG"))
    for number in range(6):
        pixels = slides.scene(2048, 1024, 1024, [(number % 2, 0)], seed=number)
        slides.write_pyramid(folder / "slides" / str(number % 2) / f"{number}.tif", pixels)
    torch.save({"model": published.random_state(published.arguments_of("v2")[0])}, folder / "vim_tiny.pth")
    for change in ("seed=0", "name=tuned seed=1"):
        _shell(f"vimscale launch mine.yaml {change} --no-ray", folder, cache)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_guide_works_on_generated_photos(tmp_path: Path, cache: Path) -> None:
    photos.write(tmp_path / "photos")
    out = _run("docs/start.md", tmp_path, cache)
    found = re.search(r"top-1\s+([\d.]+)\s?%", out)
    assert found, out
    assert float(found[1]) > 60  # three classes; a guess is right for 33 %
    assert (tmp_path / "runs/photos/export_onnx/model.onnx").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [page for page in PAGES_RUN if page != "docs/start.md"])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, home: Path, cache: Path) -> None:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    if page == "README.md":
        shutil.rmtree(tmp_path / "runs")  # it trains its own `mine`
    _run(page, tmp_path, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.language == "console" and not block.mark],
    ids=lambda block: block.where,
)
def test_what_pages_print_is_what_commands_print(block: Block, tmp_path: Path, cache: Path) -> None:
    (words,) = commands(block)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}
    command = [sys.executable, "-m", "vimscale.launch.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    printed = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    shown = re.sub(r"\\\n\s*", " ", block.text).splitlines()[1:]
    assert [line for line in shown if line.rstrip() not in printed] == [], printed
