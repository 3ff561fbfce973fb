"""Rows of an input before they are planned: what every kind of input is read into."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vimscale.data.shards.tar import MEMBER_LIMIT
from vimscale.errors import BadSample, DataError, brief, kind_of
from vimscale.prepare.inputs.classes import Label, suggestion
from vimscale.storage import untrusted

IMAGE_FILES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")
_IMAGE_COLUMNS = ("image", "img", "path", "file", "filename", "filepath", "file_name", "image_path", "jpg")


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
    members: tuple[str, ...] = ()
    """Extensions of the image in a tar's samples, first match first; default: the only one that may be it."""


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
        self.add(key_of(name), label, size_of(place), place)


class Files:
    """Each place is a path."""

    def where(self, place: str) -> str:
        return place

    def read(self, place: str) -> dict[str, bytes]:
        return {"image": image_file(place)}


def image_file(path: str) -> bytes:
    """Raises:
    OSError: it cannot be read.
    BadSample: it is a pipe or a device, which may have no end, or larger than any image.
    """
    try:
        return untrusted.read(Path(path), MEMBER_LIMIT)
    except ValueError as error:
        raise BadSample("unreadable", f"{path}: {error}") from None


def key_of(path: str) -> str:
    """A file's path as a key: webdataset reads all after a name's first dot as the extension, and hidden names are part
    of no sample.
    """
    folder, _, name = os.path.normpath(path).rpartition("/")
    stem = name.rpartition(".")[0].replace(".", "_") or name
    return "/".join(part for part in (part.lstrip(".") for part in (*folder.split("/"), stem)) if part)


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
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


def checked_label(label: Any, where: str, names: tuple[str, ...] | None) -> Label:
    """A label as it stands in an input, without blanks; None where there is none. `names` are those of the classes, if
    the user gave them.

    Raises:
        DataError: it is neither a name nor a whole number.
    """
    if isinstance(label, float):
        label = None if label != label else int(label) if label.is_integer() else label
    if isinstance(label, str):
        label = label.strip("\ufeff \t\r\n")
        # what tables write where there is no label
        return None if label == "" or (label.lower() == "nan" and label not in (names or ())) else label
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        value, kind = brief(label), kind_of(label)
        held = value if value == kind else f"{value} ({kind})"
        raise DataError(
            f"input {where} holds {held}, and labels are names or whole numbers; name another with --label-column"
        )
    return label
