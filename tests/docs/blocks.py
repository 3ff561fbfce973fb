"""The code blocks of the pages, and what their commands name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from launch.cluster import Cluster
from launch.commands.app import app
from vimscale.recipe.objective import OBJECTIVES
from vimscale.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("sh", "bash", "console")
_BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMANDS: Any = typer.main.get_command(app)
_SCHEMA = Recipe.model_json_schema()
_OBJECTIVE_KEYS = {key for kind in OBJECTIVES.values() for key in kind.model_fields}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    mark: str | None
    """Why it is not run."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    return [
        Block(name, text[: found.start(2)].count("\n") + 1, found[2], found[3], found[1])
        for found in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each `vimscale` command of a shell block."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    for line in text.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;>"):
                if "vimscale" in words:
                    yield words[words.index("vimscale") + 1 :]
                words = []
            else:
                words.append(word)


def command_faults(words: list[str]) -> Iterator[str]:
    """Yield what a command names that does not exist: commands, options, recipe keys."""
    command = _COMMANDS
    rest = [word.strip("[]") for word in words]
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            if rest[:1] not in (["--help"], ["--version"], ["COMMAND"]):
                yield f"no command {' '.join(rest[:1])}"
            return
        command = command.commands[rest.pop(0)]
    options = {name: option for option in command.params if option.param_type_name == "option" for name in option.opts}
    takes_recipe = any(param.name == "recipe" for param in command.params)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and word != "--help":
            name, _, value = word.partition("=")
            if name not in options:
                yield f"{command.name}: no option {name}"
            elif not options[name].is_flag and not value:
                value = rest.pop(0) if rest else ""
            if name == "--with":
                yield from key_faults(Cluster.model_json_schema(), value.partition("=")[0])
        elif takes_recipe and re.match(r"[\w.]+=", word):
            yield from key_faults(_SCHEMA, word.partition("=")[0])


def key_faults(schema: dict, key: str) -> Iterator[str]:
    """Yield why the dotted `key` is not one of the schema."""
    node: Any = schema
    for part in key.split("."):
        if node.get("description", "").startswith("What the model is trained for") and part in _OBJECTIVE_KEYS:
            return
        properties = node.get("properties", {})
        if part not in properties:
            yield f"no key {key}"
            return
        node = _resolved(schema, properties[part])


def _resolved(schema: dict, node: dict) -> dict:
    for one in [node, *node.get("anyOf", ())]:
        if "$ref" in one:
            return schema["$defs"][one["$ref"].rpartition("/")[2]]
    return node


def tree_faults(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a recipe, or of a part of one, that do not exist."""
    for key, value in tree.items():
        if f"{prefix}{key}" == "base":
            continue
        faults = list(key_faults(_SCHEMA, f"{prefix}{key}"))
        yield from faults
        own = prefix == "objective." or f"{prefix}{key}" in ("augment.own", "model.kinds")
        if isinstance(value, dict) and not faults and not own and ".py:" not in str(value.get("kind")):
            yield from tree_faults(value, f"{prefix}{key}.")
