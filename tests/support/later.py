"""Modules that take a second or more to import, and that few tests use: every test process collects all tests."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class _Later:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_mock", "_pytest", "pytest")):  # asked of everything when tests are collected
            raise AttributeError(name)
        return getattr(import_module(self._name), name)


def module(name: str, *others: str, reason: str = "needs the extra dev") -> Any:
    """Return a module that is imported when a test first uses it. Skips the tests of the file that asks for it if its
    package is not installed, or one of the `others`.
    """
    if not all(map(find_spec, (name.partition(".")[0], *others))):
        pytest.skip(reason, allow_module_level=True)
    return _Later(name)
