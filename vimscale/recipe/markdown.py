"""The page about recipes, key by key: written from the schema, so that it says what the recipe's classes say."""

import json
from collections.abc import Iterator
from typing import Any

from vimscale.recipe.objective import OBJECTIVES
from vimscale.recipe.recipe import Recipe

_HEAD = """\
# Recipes, key by key

`vimscale schema --markdown` writes this page from the classes that read recipes. A recipe is a YAML file; `base: NAME`
builds on another one, and every command that takes a recipe takes changes as `section.key=value`. A key that is not
listed here is an error. `vimscale show RECIPE` prints a recipe with all its defaults.
"""


def page() -> str:
    """Return the page as Markdown: a table of keys for each section, with types, limits, defaults and meaning."""
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    own = {"properties": {}, "description": "What to train."} | schema
    parts = [_HEAD, *_section("The recipe itself", own)]
    for key, about in schema["properties"].items():
        if key == "objective":
            parts += _objectives(sections["ObjectiveOptions"])
        elif (name := about.get("$ref", "").rpartition("/")[2]) in sections:
            parts += _section(f"`{key}`", sections[name])
    for name, where in (
        ("Phase", "an entry of `phases`"),
        ("Source", "an entry of `data.train`, a mixture"),
        ("Reweight", "an entry of `data.reweight`"),
        ("Stage", "an entry of `model.stages`"),
    ):
        parts += _section(where[0].upper() + where[1:], sections[name])
    return "\n".join(parts)


def _objectives(about: dict) -> Iterator[str]:
    yield f"## `objective`\n\n{_text(about)}\n"
    for kind, options in OBJECTIVES.items():
        yield from _section(f"`objective`: {kind}", options.model_json_schema(), level=3)


def _section(title: str, section: dict, level: int = 2) -> Iterator[str]:
    """Yield the heading of a section, what it is, and the table of its keys."""
    yield f"{'#' * level} {title}\n\n{_text(section)}\n\n| key | value | default | meaning |\n|---|---|---|---|"
    required = section.get("required", ())
    for key, about in section["properties"].items():
        if key == "kind" and level == 3:
            continue  # the heading names it
        inner = about.get("$ref", "").rpartition("/")[2]
        default = "" if inner else "required" if key in required else _value(about.get("default"))
        words = f"a section, [below](#{key})" if inner else _text(about)
        yield f"| `{key}` | {_kind(about)} | {default} | {words} |"
    yield ""


def _text(about: dict) -> str:
    return " ".join(about.get("description", "").split()).replace("|", "\\|")


def _value(value: Any) -> str:
    return f"`{json.dumps(value).replace('|', chr(92) + '|')}`"


def _kind(about: dict) -> str:
    """Describe the values that a key takes, with their limits."""
    if members := about.get("anyOf") or about.get("oneOf"):
        return " or ".join(_kind(member) for member in members)
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if "$ref" in about:
        return "section"
    kind = about["type"]
    if kind == "array":
        items = about.get("items") or about["prefixItems"][0]
        size = f"{about['minItems']} " if about.get("minItems") is not None else ""
        return f"list of {size}({_kind(items)})"
    word = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "object": "section",
    }
    words = [word.get(kind, kind)]
    for names, sign in (
        (("minimum", "ge"), "≥"),
        (("exclusiveMinimum",), ">"),
        (("maximum", "le"), "≤"),
        (("exclusiveMaximum",), "<"),
    ):
        words += [f"{sign} {about[name]:,}" for name in names if name in about]
    return " ".join(words)
