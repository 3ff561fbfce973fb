"""A user's own class in a Python file that a recipe names: `mine.py:MyLoss`.

The file must be self-contained: a run keeps a copy of it and of nothing else, and it cannot import modules next to it.
"""

import hashlib
import importlib.util
import os
import platform
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from vimscale.storage import files

_FORM = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.DOTALL)


def split(reference: str) -> tuple[Path, str] | None:
    """(file, class) of `mine.py:MyLoss`; None if a text is not of that form."""
    found = _FORM.fullmatch(reference)
    return (Path(found[1]), found[2]) if found else None


def absolute(reference: str, folder: Path) -> str:
    """The reference with the full path of its file, which is relative to `folder`; any other text stays as it is."""
    parts = split(reference)
    return reference if parts is None else f"{os.path.abspath(folder / parts[0])}:{parts[1]}"


def identity(reference: str) -> str:
    """What a reference stands for wherever its file is: the file's name, the class and the content's sha256.

    Raises:
        ValueError: the file cannot be read.
    """
    parts = split(reference)
    if parts is None:
        return reference
    file, name = parts
    return f"{file.name}:{name} (sha256 {hashlib.sha256(_read(file)).hexdigest()[:12]})"


def load(reference: str) -> type:
    """The class that a reference names. Files of the same content are imported once.

    Raises:
        ValueError: there is no such file, it cannot be imported, or it has no such class.
    """
    parts = split(reference)
    if parts is None:
        raise ValueError(f"{reference!r} does not name a class in a file; write mine.py:MyLoss")
    file, name = parts
    module = _imported(file)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ValueError(f"{file} has no class {name}; it has {', '.join(classes) or 'none'}")
    return found


def copy(reference: str, folder: Path) -> str:
    """Copy the file into `folder`, unless it is there; returns the reference with the full path of the copy.

    Raises:
        OSError: the copy cannot be written.
        ValueError: the file cannot be read.
    """
    parts = split(reference)
    assert parts is not None
    file, name = parts
    kept = folder.absolute() / file.name
    if file != kept:
        files.write(kept, _read(file).decode())
    return f"{kept}:{name}"


def without_folder(reference: str) -> str:
    """The reference with the file's name in place of its path."""
    parts = split(reference)
    return reference if parts is None else f"{parts[0].name}:{parts[1]}"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read on {platform.node()}: {error.strerror}; give a path relative to the recipe's file,"
            " or one that every machine of the run sees"
        ) from None


def _imported(file: Path) -> ModuleType:
    name = f"vimscale_own_{re.sub(r'[^A-Za-z0-9]', '_', file.stem)}_{hashlib.sha256(_read(file)).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is a fault of the recipe that names it
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{file} cannot be imported{where}: {type(error).__name__}: {error}") from None
    return module
