"""Folders that are whole or not there: a manifest with the size and sha256 of every file, written last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"


def seal(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file, which is on disk for good when this returns."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    path = folder / NAME
    path.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")
    sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path, part: int = 0, of: int = 1) -> str | None:
    """What is wrong with a folder's files, or None. Of its files, every `of`-th from `part` on is read."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        files = [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
        written = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{NAME} cannot be read ({error})"
    if written != FORMAT:
        return f"its format is {written}, this version reads {FORMAT}"
    for name, size, sha256 in files[part::of]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if _sha256(path) != sha256:
            return f"{name} does not have the sha256 it was written with"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
