"""Read JSON and file names that other people wrote, within limits. A fault is a ValueError with a one-line message."""

import json
import math
import os
import re
import reprlib
import stat
import unicodedata
from collections import Counter
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vimscale.errors import brief

SMALL = 64 << 20
"""Largest manifest, index or state file in bytes: 390,000 shards, or the index of 8 million samples."""
_DIGITS = 40
_DEPTH = 32
_PART, _PATH = 200, 1000
"""Most bytes of a name, and characters of a path. File systems allow 255 bytes; `.NAME.idx.partial-PID` must fit."""

_PLAIN = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


def read(path: Path, most: int = SMALL) -> bytes:
    """Read a small regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `most` bytes, or a pipe or device, which may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def loads(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse JSON; `finite` refuses NaN and infinities.

    Raises:
        ValueError: it is not JSON, has a key twice, a number of too many digits, or is nested too deeply.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_finite if finite else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(key)} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {brief(text)} is not finite")
    return number


def build(kind: Any, value: Any, at: str = "") -> Any:
    """Convert a JSON value to `kind`: a dataclass, or any type that its fields may have. Numbers stay as they are.

    Raises:
        ValueError: it does not fit; the message names the first value that does not, by its position below `at`.
    """
    if type(value) is kind and kind in (int, float, bool, str):
        return _text(value, at) if kind is str else value
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        _check_depth(value, at)
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (kind,) = (each for each in inner if each is not NoneType)
        return build(kind, value, at)
    if is_dataclass(kind):
        return _dataclass(kind, _of(dict, value, at, "a mapping"), at)
    if origin is dict:
        items = _of(dict, value, at, "a mapping").items()
        return {build(str, key, at): build(inner[1], item, f"{at}.{brief(key, 20)}") for key, item in items}
    if origin in (list, tuple):
        items = _of(list, value, at, "a list")
        kinds = inner if origin is tuple and inner[1:] != (Ellipsis,) else inner[:1] * len(items)
        if len(kinds) != len(items):
            raise ValueError(f"{_named(at)} has {len(items):,} values, not {len(kinds)}")
        return origin(build(each, item, f"{at}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True)))
    if kind is float and type(value) is int:
        return value
    raise _misfit(value, at, {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}[kind])


@cache
def _keys(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """(type of each field, those without a default)."""
    hints, given = get_type_hints(kind), [field for field in fields(kind) if field.init]
    needed = {field.name for field in given if field.default is MISSING and field.default_factory is MISSING}
    return {field.name: hints[field.name] for field in given}, needed


def _dataclass(kind: Any, tree: dict[str, Any], at: str) -> Any:
    known, needed = _keys(kind)
    if unknown := tree.keys() - known.keys():
        raise ValueError(f"{_named(at)} has an unknown key {brief(min(unknown))}")
    if missing := needed - tree.keys():
        raise ValueError(f"{_named(at)} has no {min(missing)}")
    return kind(**{name: build(known[name], value, f"{at}.{name}" if at else name) for name, value in tree.items()})


def _of(kind: Any, value: Any, at: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise _misfit(value, at, what)
    return value


def _misfit(value: Any, at: str, what: str) -> ValueError:
    return ValueError(f"{_named(at)} is {brief(value)}, not {what}")


def _named(at: str) -> str:
    return at or "it"


def _text(text: str, at: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_named(at)} is {brief(text)}, which is not Unicode") from None
    return text


def _check_depth(value: Any, at: str, left: int = _DEPTH) -> None:
    if not left:
        raise ValueError(f"{_named(at)} is nested too deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, at, left - 1)


def type_faults(kind: type, values: dict[str, Any]) -> list[str]:
    """List the values, read from a file, that are not a field of the dataclass or not of the field's type."""
    known, _ = _keys(kind)
    return [f"{str(name)[:40]}: no such field" for name in values.keys() - known] + [
        f"{name} is {reprlib.repr(value)}, which has the wrong type {type(value).__name__}"
        for name, value in values.items()
        if name in known and not _fits(value, known[name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is not None:  # a union
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e9
    return type(value) is hint


def file_name(value: object) -> str:
    """Check that a value is a file's name: appended to a folder, it stays in that folder.

    Raises:
        ValueError: it is not; names the rule.
    """
    return _parts(value, 1)


def file_path(value: object) -> str:
    """Check that a value is a relative path that stays below its folder, such as a/00000.tar.

    Raises:
        ValueError: it is not; names the rule.
    """
    return _parts(value, _PATH)


def _parts(value: object, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the name {brief(value)} is not a text")
    if _PLAIN.fullmatch(value):
        return value
    parts = value[: _PATH + 1].split("/")
    if len(value) > _PATH or any(len(part.encode(errors="replace")) > _PART for part in parts):
        rule = f"it is longer than {_PART} bytes ({_PATH:,} letters with its folders)"
    elif len(parts) > most:
        rule = "it has a /"
    elif not all(parts):
        rule = "it is absolute" if value.startswith("/") else "it is empty" if not value else "a part of it is empty"
    elif "." in parts or ".." in parts:
        rule = "it has . or .. in it"
    elif "\\" in value or re.match("[A-Za-z]:", value):
        rule = "it has a backslash or a drive's letter"
    elif any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in value):
        rule = "it has a control character, or is not Unicode"
    else:
        return value
    raise ValueError(f"the name {brief(value)} cannot be used: {rule}")
