"""Rows of an input: the common form that every kind of input is read into."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vimscale.data.images.decode import CAPTION
from vimscale.data.shards.tar import MEMBER_LIMIT
from vimscale.errors import BadSample, DataError, brief, kind_of
from vimscale.prepare.inputs.classes import Label, suggestion
from vimscale.storage import untrusted

_log = logging.getLogger(__name__)

_SLIDES = ("svs", "ndpi", "scn", "qptiff", "btf", "tf8")
"""TIFF files of scanners, and BigTIFF."""
IMAGE_FILES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
    *_SLIDES,
)
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")
_IMAGE_COLUMNS = ("image", "img", "path", "file", "filename", "filepath", "file_name", "image_path", "jpg")


class Picked(NamedTuple):
    """The columns of a table."""

    image: str
    label: str | None
    """None: the table has no labels."""
    caption: str | None
    """None: none was asked for."""

    @property
    def all(self) -> list[str]:
        return [name for name in self if name is not None]


class Reader(Protocol):
    """Reads the bytes of a row, in any process."""

    def where(self, location: Any) -> str:
        """Describe a row's location, for messages."""

    def read(self, location: Any) -> dict[str, bytes]:
        """Return the members of a sample by extension; the image's key is "image", whatever its format."""


@dataclass(frozen=True)
class Columns:
    """The user's choices where an input is ambiguous."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    """Column of a table, or key of the .json in tars, that holds the captions."""
    labels: bool = True
    """Whether to read labels at all."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of their labels."""
    prefix_keys: bool = False
    """Whether to put a tar's name before its keys."""
    members: tuple[str, ...] = ()
    """Extensions of the image in a tar's samples, first match first; default: the only member that may be an image."""


@dataclass
class Rows:
    """The rows of one split, with labels as the input has them."""

    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """In bytes; 0 if unknown."""
    locations: list[Any] = field(default_factory=list)
    """What the reader needs to find each row."""
    captions: list[str | None] = field(default_factory=list)
    """Those of tables; readers of other inputs return them as the member txt."""
    classes: tuple[str, ...] | None = None
    """Class names, if the input has them."""
    labelled: bool = True
    """Whether the input has a place for labels: class folders, a column, members."""

    def add(self, key: str, label: Label, size: int, location: Any, caption: str | None = None) -> None:
        self.keys.append(key)
        self.labels.append(label)
        self.captions.append(caption)
        self.sizes.append(size)
        self.locations.append(location)

    def add_file(self, table: Path, name: str, label: Label, caption: str | None = None) -> None:
        """Add a row of a table of paths, which are relative to the table."""
        path = os.path.join(table.parent, name)
        self.add(key_of(name), label, size_of(path), path, caption)


class Files:
    """Reads image files. A location is a path."""

    def where(self, location: str) -> str:
        return location

    def read(self, location: str) -> dict[str, bytes]:
        return {"image": image_file(location)} | self.others(location)

    def others(self, location: str) -> dict[str, bytes]:
        """Return the members of a sample without its image."""
        return {}


class Captioned(Files):
    """Reads image files and the captions next to them: 0017.txt is that of 0017.jpg."""

    def others(self, location: str) -> dict[str, bytes]:
        path = caption_file(location)
        return {CAPTION: untrusted.read(path)} if path.is_file() else {}


def caption_file(image: str) -> Path:
    """Return where the caption of an image file would be."""
    return Path(image).with_suffix(f".{CAPTION}")


def caption_in(value: Any) -> str | None:
    """Return a caption as a table holds it; None if it is empty, or not text."""
    return value.strip() or None if isinstance(value, str) else None


def image_file(path: str) -> bytes:
    """Read an image file.

    Raises:
        OSError: it cannot be read.
        BadSample: it is a pipe or a device, which may have no end, or larger than any image.
    """
    try:
        return untrusted.read(Path(path), MEMBER_LIMIT)
    except ValueError as error:
        raise BadSample("unreadable", f"{path}: {error}") from None


def key_of(path: str) -> str:
    """Turn a file's path into a key without dots, since webdataset starts the extension at a name's first dot.

    Leading dots go too: hidden names belong to no sample.
    """
    folder, _, name = os.path.normpath(path).rpartition("/")
    stem = name.rpartition(".")[0].replace(".", "_") or name
    return "/".join(part for part in (part.lstrip(".") for part in (*folder.split("/"), stem)) if part)


def size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0  # a broken link: the job that reads it reports and counts it


def pick(path: Path | str, available: Iterable[str], columns: Columns) -> Picked:
    """Return the names of the columns. A table without any of the usual label columns has no labels.

    Raises:
        DataError: a chosen column, or all usual ones of the image, are missing.
    """
    names = list(available)
    found: dict[str, str | None] = {}
    wanted = {
        "image": (columns.image, _IMAGE_COLUMNS),
        "label": (columns.label, LABEL_COLUMNS if columns.labels else ()),
        "caption": (columns.caption, ()),
    }
    for option, (chosen, usual) in wanted.items():
        name = next((name for name in ((chosen,) if chosen else usual) if name in names), None)
        if name is None and (chosen or option == "image"):
            what = f"no column {chosen!r}" if chosen else f"no column for the {option}, such as {', '.join(usual[:3])}"
            hint = suggestion(chosen, names) if chosen else ""
            has = f"it has {', '.join(names) or 'none'}"
            fix = "--caption" if option == "caption" else f"--{option}-column"
            raise DataError(f"input {path}: {what}{hint}; {has}; name one with {fix}")
        found[option] = name
    assert found["image"] is not None
    if found["label"] is None and columns.labels:
        _log.warning(
            "input %s: no column for the label, such as %s; the set has no labels; if a column has them, name it with"
            " --label-column (%s)",
            *(path, ", ".join(LABEL_COLUMNS[:3]), ", ".join(names)),
        )
    return Picked(found["image"], found["label"], found["caption"])


def checked_label(label: Any, where: str, names: tuple[str, ...] | None) -> Label:
    """Return an input's label without blanks, or None if there is none. `names` are the user's class names, if any.

    Raises:
        DataError: the label is neither a name nor a whole number.
    """
    if isinstance(label, float):
        label = None if label != label else int(label) if label.is_integer() else label
    if isinstance(label, str):
        label = label.strip("\ufeff \t\r\n")
        # tables write an empty field or nan for a missing label
        return None if label == "" or (label.lower() == "nan" and label not in (names or ())) else label
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        value, kind = brief(label), kind_of(label)
        shown = value if value == kind else f"{value} ({kind})"
        raise DataError(
            f"input {where} holds {shown}, but labels are names or whole numbers; name another with --label-column"
        )
    return label
