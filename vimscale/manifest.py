"""Folders that are whole or not there: a manifest with sizes and sha256 of all files and of itself, written last."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vimscale.errors import CheckpointError

FORMAT = 2
NAME = "manifest.json"


def seal(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file, which is on disk for good when this returns."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def seal_bytes(name: str, content: bytes) -> dict[str, Any]:
    """The entry for a file of this content, wherever it is."""
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def text(entries: list[dict[str, Any]]) -> bytes:
    """The manifest of these files, to the byte: what is read again is compared with it."""
    content: dict[str, Any] = {"format": FORMAT, "files": entries}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content, indent=1) + "\n").encode()


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    path = folder / NAME
    path.write_bytes(text(entries))
    sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files(folder: Path) -> list[dict[str, Any]]:
    """The manifest's entries.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
        CheckpointError: another version of this package wrote it.
    """
    raw = (folder / NAME).read_bytes()
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("it holds no entries")
    if content.get("format") == 1 and "sha256" not in content:
        raise CheckpointError(
            f"{folder}: its format is 1, this version reads {FORMAT}; go on with the version that wrote it, or choose"
            " another name="
        )
    if not isinstance(content.get("files"), list) or raw != text(content["files"]):
        raise ValueError("it does not have the sha256 it was written with")
    return content["files"]


def damage(folder: Path, part: int = 0, of: int = 1) -> str | None:
    """What is wrong with a folder's files, or None. Of its files, every `of`-th from `part` on is read.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    try:
        entries = files(folder)
    except (OSError, ValueError) as error:
        return f"{NAME} cannot be read ({error})"
    for entry in entries[part::of]:
        name, size = entry["name"], entry["bytes"]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} does not have the sha256 it was written with"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
