"""Rows of an input before they are planned: what every kind of input is read into."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vimscale.errors import DataError, brief, kind_of
from vimscale.prepare.classes import suggestion

IMAGE_FILES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")
_IMAGE_COLUMNS = ("image", "img", "path", "file", "filename", "filepath", "file_name", "image_path", "jpg")

Label = str | int | None


class Reader(Protocol):
    """Gets at the bytes of a row, in any process."""

    def where(self, place: Any) -> str:
        """For messages."""

    def read(self, place: Any) -> dict[str, bytes]:
        """The members of a sample by extension; the image as "image", whatever its format."""


@dataclass(frozen=True)
class Columns:
    """How an input that leaves a choice is read."""

    image: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    """Names in the order of their labels."""
    prefix_keys: bool = False
    """Whether a tar's name is put before its keys."""


@dataclass
class Rows:
    """Of one split, labels as they stand in the input."""

    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """In bytes, 0 where that is not known."""
    places: list[Any] = field(default_factory=list)
    """What the reader finds each by."""
    classes: tuple[str, ...] | None = None
    """Where the input itself names them."""

    def add(self, key: str, label: Label, size: int, place: Any) -> None:
        self.keys.append(key)
        self.labels.append(label)
        self.sizes.append(size)
        self.places.append(place)

    def add_file(self, table: Path, name: str, label: Label) -> None:
        """A row of a table of paths, which stand relative to the table."""
        place = os.path.join(table.parent, name)
        self.add(key_of(name), None if label == "" else label, size_of(place), place)


class Files:
    """Each place is a path."""

    def where(self, place: str) -> str:
        return place

    def read(self, place: str) -> dict[str, bytes]:
        return {"image": Path(place).read_bytes()}


def key_of(path: str) -> str:
    """A file's path as a key: webdataset reads all after a name's first dot as the extension."""
    folder, _, name = os.path.normpath(path).rpartition("/")
    stem = name.rpartition(".")[0].replace(".", "_") or name
    return f"{folder}/{stem}".lstrip("./")


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # a broken link: the job that reads it says so, and counts it


def pick(path: Path | str, there: Iterable[str], columns: Columns) -> tuple[str, str]:
    """Names of the image's and the label's column.

    Raises:
        DataError: a column that was asked for, or any of the usual ones, is not there.
    """
    names = list(there)
    found = []
    for option, asked, usual in (("image", columns.image, _IMAGE_COLUMNS), ("label", columns.label, LABEL_COLUMNS)):
        name = next((name for name in ((asked,) if asked else usual) if name in names), None)
        if name is None:
            what = f"no column {asked!r}" if asked else f"no column for the {option}, such as {', '.join(usual[:3])}"
            hint = suggestion(asked, names) if asked else ""
            has = f"it has {', '.join(names) or 'none'}"
            raise DataError(f"input {path}: {what}{hint}; {has}; name one with --{option}-column")
        found.append(name)
    return found[0], found[1]


def checked_labels(where: str, column: str, labels: list[Any]) -> list[Label]:
    """Raises:
    DataError: labels that are neither names nor whole numbers.
    """
    for label in labels:
        if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
            held = f"{brief(label)} ({kind_of(label)})"
            raise DataError(
                f"input {where}: column {column!r} holds {held}, and labels are names or whole numbers;"
                " name another with --label-column"
            )
    return labels
