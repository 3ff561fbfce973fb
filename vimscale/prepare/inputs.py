"""What a data set is prepared from: image folders, tables, Hugging Face data sets and tars, all as rows of one kind."""

import csv
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vimscale import untrusted
from vimscale.errors import DataError
from vimscale.prepare import tables
from vimscale.prepare.classes import class_map
from vimscale.prepare.index import META, Scan, scan
from vimscale.prepare.rows import IMAGE_FILES, LABEL_COLUMNS, Columns, Files, Label, Reader, Rows, key_of, pick, size_of

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
    below = {entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")}
    if "train" in below and below <= set(SPLITS):
        return {split: _files(str(path / split)) for split in sorted(below, key=SPLITS.index)}
    return {"": _files(source)}


def _files(source: str) -> tuple[list[Path], str]:
    path = Path(source)
    if path.is_dir():
        for kind, pattern in (("tar", "*.tar"), ("parquet", "*.parquet")):
            if found := sorted(path.glob(pattern)):
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
        missing = [key for key, label in zip(rows.keys, rows.labels, strict=True) if label is None]
        if missing:
            raise DataError(f"{where}: {len(missing):,} rows have no label, {missing[0]} the first; leave them out")
        if hidden := next((key for key in rows.keys if META.match(key)), None):
            raise DataError(
                f"{where}: {hidden} would be passed over, as webdataset keeps names like __x__ for itself;"
                " rename its folder"
            )
        if twice := [key for key, count in Counter(rows.keys).items() if count > 1]:
            places = [reader.where(p) for key, p in zip(rows.keys, rows.places, strict=True) if key == twice[0]][:2]
            more = f" ({len(twice):,} such keys)" if len(twice) > 1 else ""
            way_out = "--prefix-keys tells tars apart" if isinstance(reader, Tars) else "rename one"
            raise DataError(f"{where}: {' and '.join(places)} both have the key {twice[0]}{more}; {way_out}")
        names, labels = class_map([label for label in rows.labels if label is not None], names, where)
        splits[split] = [Entry(*row) for row in zip(rows.keys, labels, rows.sizes, rows.places, strict=True)]
    assert names is not None
    return Input(reader, names, splits)


def _folder_rows(paths: list[Path]) -> Rows:
    (root,) = paths
    rows, others = Rows(), Counter[str]()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        for name in sorted(names):
            extension = name.rpartition(".")[2].lower()
            if extension not in IMAGE_FILES or name.startswith("."):
                others[extension] += 1
                continue
            path = os.path.join(folder, name)
            if not inside.parts:
                raise DataError(f"input {root}: {name} lies in no class's folder; move it to {root}/CLASS/{name}")
            rows.add(key_of(str(inside / name)), inside.parts[0], size_of(path), path)
    rows.classes = tuple(sorted({str(label) for label in rows.labels}))
    if others:
        counts = ", ".join(f"{count:,} .{extension}" for extension, count in others.most_common(5))
        _log.warning("%s: files that are no images are passed over: %s", root, counts)
    return rows


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
                    rows.add_file(path, row[image] or "", row[label])
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"input {path} cannot be read: {error}") from None
    return rows


class Tars:
    """Each place is a tar, and where its members' bytes are."""

    def where(self, place: tuple[str, dict[str, tuple[int, int]]]) -> str:
        return place[0]

    def read(self, place: tuple[str, dict[str, tuple[int, int]]]) -> dict[str, bytes]:
        path, members = place
        with open(path, "rb") as file:
            read = {ext: os.pread(file.fileno(), size, offset) for ext, (offset, size) in members.items()}
        image = next((ext for ext in IMAGE_FILES if ext in read), None)
        return {"image" if ext == image else ext: data for ext, data in read.items() if ext != "cls"}


def _tar_rows(paths: list[Path], columns: Columns) -> Rows:
    rows = Rows()
    for path in paths:
        found = scan(path)
        if found.fault is not None:
            raise DataError(f"input {path}, {found.fault}; copy it again, or leave it out")
        for key, label, size, members in tar_labels(path, found, columns.label):
            rows.add(f"{path.stem}/{key}" if columns.prefix_keys else key, label, size, (str(path), members))
    return rows


def tar_labels(path: Path, found: Scan, field: str | None) -> Iterator[tuple[str, Label, int, dict]]:
    """Key, label, bytes and members of each sample: the label is its .cls, or else `field` of its .json."""
    with path.open("rb") as file:
        for sample in found.samples:
            label: Label = None
            if "cls" in sample.members:
                offset, size = sample.members["cls"]
                text = os.pread(file.fileno(), size, offset).decode("utf-8", "replace").strip()
                label = text or None
            elif "json" in sample.members:
                offset, size = sample.members["json"]
                label = _field(os.pread(file.fileno(), size, offset), field)
            yield sample.key, label, sum(size for _, size in sample.members.values()), sample.members


def _field(data: bytes, name: str | None) -> Label:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    keys: Sequence[str] = (name,) if name else LABEL_COLUMNS
    value = next((tree[key] for key in keys if key in tree), None) if isinstance(tree, dict) else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None
