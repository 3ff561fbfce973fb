"""What a data set is prepared from: image folders, tables, Hugging Face data sets and tars, all as rows of one kind."""

import csv
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vimscale.data.images import decode
from vimscale.data.shards.tar import hidden, split_name
from vimscale.errors import DataError
from vimscale.prepare.index import scan
from vimscale.prepare.inputs import members, tables
from vimscale.prepare.inputs.classes import Label, class_map
from vimscale.prepare.inputs.rows import (
    IMAGE_FILES,
    LABEL_COLUMNS,
    Columns,
    Files,
    Reader,
    Rows,
    checked_label,
    key_of,
    pick,
    size_of,
)
from vimscale.storage import untrusted

_log = logging.getLogger(__name__)

SPLITS = ("train", "val", "validation", "test")


class Entry(NamedTuple):
    """One image to be."""

    key: str
    label: int
    bytes: int
    place: Any
    """What its reader finds it by."""


@dataclass
class Input:
    """All rows of an input, by split; "" where there is one split only."""

    reader: Reader
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]


def open_input(source: str, columns: Columns, scratch: Path) -> Input:
    """The rows of `source`: a folder of images, a .csv, .tsv or .parquet, a saved Hugging Face data set or hf:NAME,
    or tars (a folder, a glob or braces). `scratch` is a folder for what must be unpacked first.

    Raises:
        DataError: it is none of these, or has rows without label, or keys that are there twice.
    """
    reader: Reader
    if source.startswith("pipe:"):
        raise DataError(f"input {source}: commands are not run; write their output to a file, and give that")
    if "://" in source:
        raise DataError(f"input {source}: only local files are prepared; copy them here (`data index` takes addresses)")
    if source.startswith("hf:") or tables.is_saved(Path(source)):
        reader, found = tables.hub(source, columns)
    else:
        parts = _parts(source)
        kinds = {kind for _, kind in parts.values()}
        if len(kinds) > 1:
            raise DataError(f"input {source}: splits of several kinds ({', '.join(sorted(kinds))}); prepare one by one")
        kind = kinds.pop()
        files = {split: paths for split, (paths, _) in parts.items()}
        if kind == "parquet":
            reader, found = tables.parquet(files, columns, scratch)
        else:
            rows: Callable[[list[Path]], Rows] = {
                "images": _folder_rows,
                "table": lambda paths: _csv_rows(paths, columns),
                "tar": lambda paths: _tar_rows(paths, columns),
            }[kind]
            reader = Tars() if kind == "tar" else Files()
            found = {split: rows(paths) for split, paths in files.items()}
    return _checked(source, reader, found, columns)


def _parts(source: str) -> dict[str, tuple[list[Path], str]]:
    """Files and kind of each split."""
    path = Path(source)
    if not path.is_dir():
        return {"": _files(source)}
    below = {entry.name for entry in os.scandir(path) if entry.is_dir() and not hidden(f"{entry.name}/")}
    if "train" in below and below <= set(SPLITS):
        return {split: _files(str(path / split)) for split in sorted(below, key=SPLITS.index)}
    if "train" in below and len(below & set(SPLITS)) > 1:
        others = sorted(below - set(SPLITS))
        raise DataError(
            f"input {source}: it has splits, and other folders ({', '.join(others[:3])}), so {others[0]} may be a class"
            " or not; move those elsewhere, or prepare the splits one by one"
        )
    return {"": _files(source)}


def _files(source: str) -> tuple[list[Path], str]:
    path = Path(source)
    if path.is_dir():
        for kind, pattern in (("tar", "*.tar"), ("parquet", "*.parquet")):
            if found := [file for file in sorted(path.glob(pattern)) if not hidden(file.name)]:
                return found, kind
        return [path], "images"
    paths = expand(source)
    if not paths:
        what = "no file has such a name" if glob.has_magic(source) or "{" in source else "it is not there"
        raise DataError(f"input {source}: {what}; give a folder of images, a table, a data set's folder, or tars")
    kinds = {path.suffix.lower() for path in paths}
    known = {".tar": "tar", ".parquet": "parquet", ".csv": "table", ".tsv": "table"}
    if len(kinds) != 1 or not kinds <= known.keys():
        raise DataError(f"input {source}: files ending in {', '.join(sorted(kinds))}; known: {', '.join(known)}")
    return paths, known[kinds.pop()]


def expand(pattern: str) -> list[Path]:
    """The files of a path, glob or brace pattern, in order."""
    if os.path.lexists(pattern):
        return [Path(pattern)]
    found = [name for part in braces(pattern) for name in (sorted(glob.glob(part)) or [part])]
    return [Path(name) for name in found if os.path.lexists(name)]


def braces(pattern: str) -> list[str]:
    """The names that a pattern like {00..99}.tar or {a,b}.tar stands for.

    Raises:
        DataError: a brace without its other one.
    """
    from braceexpand import braceexpand  # webdataset's

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"input {pattern}: its braces are not closed; write {{00..99}}.tar or {{a,b}}.tar") from None


def _checked(source: str, reader: Reader, found: dict[str, Rows], columns: Columns) -> Input:
    if columns.members and not isinstance(reader, Tars):
        raise DataError(f"input {source}: --image names a member of samples in tars, and it has none; leave it out")
    found = dict(sorted(found.items(), key=lambda item: item[0] != "train"))  # what it says of classes and pixels holds
    first = next(iter(found.values()))
    names = columns.classes or first.classes
    splits: dict[str, list[Entry]] = {}
    for split, rows in found.items():
        where = f"input {source}" + (f", split {split}" if split else "")
        try:
            untrusted.file_name(split or "set")
        except ValueError as error:
            raise DataError(f"input {source}: a split, which becomes a folder: {error}") from None
        if not rows.keys:
            known = ", ".join(IMAGE_FILES)
            raise DataError(f"{where}: no images in it; looked for {known} below folders named after classes")

        def row(i: int, rows: Rows = rows) -> str:
            return f"{reader.where(rows.places[i])}, sample {rows.keys[i]}"

        if missing := [i for i, label in enumerate(rows.labels) if label is None]:
            raise DataError(
                f"{where}: {len(missing):,} rows have no label; leave them out; the first is {row(missing[0])}"
            )
        if own := next((key for key in rows.keys if split_name(f"{key}.x") is None), None):
            raise DataError(
                f"{where}: {own} would be passed over, as names like __x__ and __MACOSX are kept for other things;"
                " rename its folder"
            )
        if twice := [key for key, count in Counter(rows.keys).items() if count > 1]:
            places = [reader.where(p) for key, p in zip(rows.keys, rows.places, strict=True) if key == twice[0]][:2]
            more = f" ({len(twice):,} such keys)" if len(twice) > 1 else ""
            way_out = "--prefix-keys tells tars apart" if isinstance(reader, Tars) else "rename one"
            raise DataError(f"{where}: {' and '.join(places)} both have the key {twice[0]}{more}; {way_out}")
        mine, counted = _by_name(rows, names)
        names, labels = class_map(mine, names, where, row, counted=counted)
        if not splits and (empty := sorted(set(range(len(names))) - set(labels))):
            _log.warning("%s: %s", where, without_images([names[number] for number in empty], len(names)))
        splits[split] = [Entry(*entry) for entry in zip(rows.keys, labels, rows.sizes, rows.places, strict=True)]
    assert names is not None
    return Input(reader, names, splits)


def without_images(empty: list[str], classes: int) -> str:
    """A word on numbers that no label has: they stay what they are, gaps and all."""
    shown = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
    return f"{len(empty):,} of {classes:,} classes have no images: {shown}"


def _by_name(rows: Rows, names: tuple[str, ...] | None) -> tuple[list[str | int], bool]:
    """(labels, whether their numbers count the classes). Where an input names its own classes and `names` has some of
    them in another order, its numbers become names.
    """
    labels = [label for label in rows.labels if label is not None]
    own = rows.classes
    if own is None or names is None or own == names:
        return labels, own is not None
    if len(own) == len(names) and not set(own) & set(names):
        return labels, True  # other names for the same
    return [own[label] if isinstance(label, int) and 0 <= label < len(own) else label for label in labels], False


def _folder_rows(paths: list[Path]) -> Rows:
    (root,) = paths
    rows, others = Rows(), Counter[str]()
    for folder, below, files in os.walk(root, followlinks=True, onerror=_refuse):
        below[:] = sorted(name for name in below if not hidden(f"{name}/"))
        inside = Path(folder).relative_to(root)
        for name in sorted(files):
            extension = name.rpartition(".")[2].lower()
            if extension not in IMAGE_FILES or hidden(name):
                others["hidden" if hidden(name) else f".{extension}"] += 1
                continue
            path = os.path.join(folder, name)
            if not inside.parts:
                raise DataError(f"input {root}: {name} lies in no class's folder; move it to {root}/CLASS/{name}")
            rows.add(key_of(str(inside / name)), inside.parts[0], size_of(path), path)
    if others:
        counts = ", ".join(f"{count:,} {extension}" for extension, count in others.most_common(5))
        _log.warning("%s: files that are no images are passed over: %s", root, counts)
    _check_folders(root, {str(label) for label in rows.labels})
    return rows


def _check_folders(root: Path, names: set[str]) -> None:
    """Each folder is a class: 7 and 07 would be one."""
    numbers: dict[int, str] = {}
    for name in sorted(names):
        number = decode.whole_number(name)
        if number is not None and numbers.setdefault(number, name) != name:
            raise DataError(
                f"input {root}: the folders {numbers[number]} and {name} are both class {number}; rename one"
            )


def _refuse(error: OSError) -> None:
    raise DataError(f"input {error.filename} cannot be read: {error.strerror}")


def _csv_rows(paths: list[Path], columns: Columns) -> Rows:
    rows = Rows()
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                image, label = pick(path, table.fieldnames or (), columns)
                for row in table:
                    value = checked_label(row[label], f"{path}: column {label!r}", columns.classes)
                    rows.add_file(path, row[image] or "", value)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"input {path} cannot be read: {error}") from None
    return rows


class Tars:
    """Each place is a tar, where its members' bytes are, and which of them is the image."""

    def where(self, place: tuple[str, dict[str, tuple[int, int]], str | None]) -> str:
        return place[0]

    def read(self, place: tuple[str, dict[str, tuple[int, int]], str | None]) -> dict[str, bytes]:
        path, parts, image = place
        with open(path, "rb") as file:
            read = {name: os.pread(file.fileno(), size, offset) for name, (offset, size) in parts.items()}
        found = {"image": read.pop(image)} if image is not None else {}
        for name, data in read.items():
            # training takes a member of such an extension for the image
            while name in (*decode.EXTENSIONS, "image") or name in found:
                name = f"other.{name}"
            found[name] = data
        return found


def _tar_rows(paths: list[Path], columns: Columns) -> Rows:
    rows = Rows()
    passed: list[str] = []
    for path in paths:
        found = scan(path, scattered=True)
        if found.fault is not None:
            raise DataError(f"input {path}, {found.fault}; {found.fix}")
        passed += found.passed
        with path.open("rb") as file:
            for sample in found.samples:
                for key, parts in members.samples_of(sample):
                    where = f"{path}, sample {key}"
                    label, parts = _tar_label(file.fileno(), parts, columns, where)
                    image = members.image_of(parts, columns.members, f"input {where}")
                    key = f"{path.stem}/{key}" if columns.prefix_keys else key
                    size = sum(size for _, size in parts.values())
                    rows.add(key, label, size, (str(path), parts, image))
    if passed:
        _log.warning("%s", passed_over(passed))
    return rows


def passed_over(names: list[str]) -> str:
    """A word on files that are hidden, or have no name of a sample."""
    shown = ", ".join(name[:60] for name in names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names):,} files in the tars are part of no sample and passed over: {shown}"


def _tar_label(
    file: int, parts: dict[str, tuple[int, int]], columns: Columns, where: str
) -> tuple[Label, dict[str, tuple[int, int]]]:
    """(a sample's label, its other members): the .cls, or else a field of the .json."""
    name = members.label_of(parts)
    if name is None:
        return None, parts
    offset, size = parts[name]
    data = os.pread(file, size, offset)
    if name.endswith("json"):
        return checked_label(_field(data, columns.label), f"{where}: its .{name}", columns.classes), parts
    rest = {other: place for other, place in parts.items() if other != name}
    return checked_label(data.decode("utf-8", "replace"), where, columns.classes), rest


def _field(data: bytes, name: str | None) -> Any:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    keys: Sequence[str] = (name,) if name else LABEL_COLUMNS
    return next((tree[key] for key in keys if key in tree), None) if isinstance(tree, dict) else None
