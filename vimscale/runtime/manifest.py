"""Folders that are complete or absent: the manifest, with sizes and sha256 of all files and of itself, comes last."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vimscale.errors import CheckpointError
from vimscale.storage import untrusted
from vimscale.storage.files import pieces, sync

FORMAT = 2
NAME = "manifest.json"


@dataclass
class _Entry:
    name: str
    bytes: int
    sha256: str


def seal(path: Path) -> dict[str, Any]:
    """Sync a file to disk and return its entry for the manifest."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(pieces(path))}


def seal_bytes(name: str, content: bytes) -> dict[str, Any]:
    """The entry for a file with this content, wherever it is stored."""
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def text(entries: list[dict[str, Any]]) -> bytes:
    """The manifest of these files. The same entries always give the same bytes, and reading compares them."""
    content: dict[str, Any] = {"format": FORMAT, "files": entries}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content, indent=1) + "\n").encode()


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    path = folder / NAME
    path.write_bytes(text(entries))
    sync(path)
    sync(folder)


def files(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of a folder's manifest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
        CheckpointError: another version of this package wrote it.
    """
    return entries(untrusted.read(folder / NAME), folder)


def entries(raw: bytes, where: Path | str) -> list[dict[str, Any]]:
    """Parse the entries of a manifest. `where` names its folder in messages. Raises as `files` does."""
    content = untrusted.loads(raw)
    if not isinstance(content, dict):
        raise ValueError("it holds no entries")
    if content.get("format") == 1 and "sha256" not in content:
        raise CheckpointError(
            f"{where}: its format is 1, this version reads {FORMAT}; resume with the version that wrote it, or choose"
            " another name="
        )
    if not isinstance(content.get("files"), list) or raw != text(content["files"]):
        raise ValueError("it does not have the sha256 it was written with")
    listed = [asdict(entry) for entry in untrusted.build(list[_Entry], content["files"], "files")]
    names = {untrusted.file_name(entry["name"]) for entry in listed}
    if NAME in names or len(names) < len(listed):
        raise ValueError("it lists a file twice, or itself")
    return listed


def faults(folder: Path, part: int = 0, of: int = 1, *, sizes_only: bool = False) -> Iterator[str]:
    """Yield what is wrong with a folder's files: it checks every `of`-th one, starting at `part`. `sizes_only`: their
    sizes only, without reading them.

    Raises:
        CheckpointError: another version of this package wrote it.
    """
    try:
        listed = files(folder)
    except (OSError, ValueError) as error:
        yield f"{NAME} cannot be read ({error})"
        return
    for entry in listed[part::of]:
        name, size = entry["name"], entry["bytes"]
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        elif not sizes_only and not holds(entry, pieces(path)):
            yield f"{name} does not have the sha256 it was written with"


def damage(folder: Path, part: int = 0, of: int = 1) -> str | None:
    """The first of a folder's `faults`, or None."""
    return next(faults(folder, part, of), None)


def holds(entry: dict[str, Any], content: Iterable[bytes]) -> bool:
    """Whether a file's content has the sha256 of its entry."""
    return _sha256(content) == entry["sha256"]


def _sha256(content: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()
