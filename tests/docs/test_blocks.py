"""Every command block of the pages is run, or marked `<!-- not run: WHY -->`; both kinds name only what exists."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from launch.cluster import Cluster
from tests.docs.blocks import PAGES, ROOT, SHELL, Block, blocks, command_faults, commands, tree_faults
from tests.support import photos

ALL = [block for page in PAGES for block in blocks(page)]
RUN = {"docs/start.md", "docs/python.md", "docs/features.md", "docs/data.md"}
"""Pages whose blocks run in order, in one folder."""


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


def test_every_command_block_is_run_or_says_why_not() -> None:
    unmarked = [
        block.where
        for block in ALL
        if _is_command(block) and block.mark is None and block.page not in RUN and block.language != "console"
    ]
    assert unmarked == [], "mark them (`<!-- not run: WHY -->` on the line before), or add the page to RUN"
    bare = [block.where for block in ALL if not block.language and re.match(r"(\$ )?vimscale [a-z-]+ \S", block.text)]
    assert [where for where in bare if "README.md" not in where] == [], "give these blocks the language sh or console"
    counts = Counter("marked" if block.mark else "run" for block in ALL if _is_command(block))
    assert counts["run"] >= 15


def _run(page: str, folder: Path, cache: Path) -> str:
    """Run a page's blocks in order, shell and Python apart, as a reader would; return what they print."""
    here, out, python = [block for block in ALL if block.page == page and not block.mark], "", []
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for block in here:
        if block.language == "python":
            python.append(block.text)
        elif block.language == "yaml" and "name: " in block.text:
            (folder / f"{yaml.safe_load(block.text)['name']}.yaml").write_text(block.text)
        elif block.language in ("sh", "bash"):
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"
            out += done.stdout
    if python:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(python)],
            cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"
        out += done.stdout
    return out


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
@pytest.mark.parametrize("page", ["docs/features.md", "docs/data.md"])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, cache: Path) -> None:
    _run(page, tmp_path, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in ALL if block.language == "console"], ids=lambda block: block.where
)
def test_what_pages_print_is_what_commands_print(block: Block, tmp_path: Path, cache: Path) -> None:
    (words,) = commands(block)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}
    command = [sys.executable, "-m", "vimscale.launch.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    printed = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    shown = re.sub(r"\\\n\s*", " ", block.text).splitlines()[1:]
    assert [line for line in shown if line.rstrip() not in printed] == [], printed
