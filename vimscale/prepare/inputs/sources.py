"""What a data set is prepared from: image folders, tables, Hugging Face data sets and tars, all read as `Rows`."""

import csv
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vimscale.data.images import bags, decode
from vimscale.data.shards.tar import hidden, split_name
from vimscale.errors import DataError
from vimscale.prepare.index import scan
from vimscale.prepare.inputs import members, tables
from vimscale.prepare.inputs.classes import Label, class_map
from vimscale.prepare.inputs.rows import (
    IMAGE_FILES,
    LABEL_COLUMNS,
    Captioned,
    Columns,
    Files,
    Reader,
    Rows,
    caption_file,
    caption_in,
    checked_label,
    key_of,
    pick,
    size_of,
)
from vimscale.storage import untrusted

_log = logging.getLogger(__name__)

SPLITS = ("train", "val", "validation", "test")


class Entry(NamedTuple):
    """One row of the input, with its class number, or NO_LABEL."""

    key: str
    label: int
    bytes: int
    location: Any
    """What its reader needs to find it."""
    caption: str | None = None
    """Of a table's row."""


@dataclass
class Input:
    """All rows of an input, by split; the name is "" if there is only one split."""

    reader: Reader
    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]


def open_input(source: str, columns: Columns, scratch: Path) -> Input:
    """Read the rows of `source`.

    `source` is a folder of images, a .csv, .tsv, .jsonl or .parquet file, a saved Hugging Face data set or hf:NAME, or
    tars (a folder, a glob or braces). `scratch` is a folder for what must be unpacked first.

    Raises:
        DataError: it is none of these, some rows have no label, or a key occurs twice.
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
            names = ", ".join(sorted(kinds))
            raise DataError(f"input {source}: splits of several kinds ({names}); prepare them one by one")
        kind = kinds.pop()
        files = {split: paths for split, (paths, _) in parts.items()}
        if kind == "parquet":
            reader, found = tables.parquet(files, columns, scratch)
        else:
            rows: Callable[[list[Path]], Rows] = {
                "images": lambda paths: _folder_rows(paths, columns),
                "table": lambda paths: _table_rows(paths, columns),
                "tar": lambda paths: _tar_rows(paths, columns),
            }[kind]
            reader = Tars() if kind == "tar" else Captioned() if kind == "images" else Files()
            found = {split: rows(paths) for split, paths in files.items()}
    return _checked(source, reader, found, columns)


def _parts(source: str) -> dict[str, tuple[list[Path], str]]:
    """Return the files and the kind of each split."""
    path = Path(source)
    if not path.is_dir():
        return {"": _files(source)}
    below = {entry.name for entry in os.scandir(path) if entry.is_dir() and not hidden(f"{entry.name}/")}
    if "train" in below and below <= set(SPLITS):
        return {split: _files(str(path / split)) for split in sorted(below, key=SPLITS.index)}
    if "train" in below and len(below & set(SPLITS)) > 1:
        others = sorted(below - set(SPLITS))
        raise DataError(
            f"input {source}: it has splits, and other folders ({', '.join(others[:3])}), so {others[0]} may or may not"
            " be a class; move those elsewhere, or prepare the splits one by one"
        )
    return {"": _files(source)}


def _files(source: str) -> tuple[list[Path], str]:
    """Return the files of one split and their kind: images, table, parquet or tar."""
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
    known = {".tar": "tar", ".parquet": "parquet", ".csv": "table", ".tsv": "table", ".jsonl": "table"}
    if len(kinds) != 1 or not kinds <= known.keys():
        endings = ", ".join(sorted(kinds))
        raise DataError(f"input {source}: files ending in {endings}; give files of one kind: {', '.join(known)}")
    return paths, known[kinds.pop()]


def expand(pattern: str) -> list[Path]:
    """List the files of a path, glob or brace pattern, in order."""
    if os.path.lexists(pattern):
        return [Path(pattern)]
    found = [name for part in braces(pattern) for name in (sorted(glob.glob(part)) or [part])]
    return [Path(name) for name in found if os.path.lexists(name)]


def braces(pattern: str) -> list[str]:
    """List the names that a pattern like {00..99}.tar or {a,b}.tar stands for.

    Raises:
        DataError: a brace is not closed.
    """
    from braceexpand import braceexpand  # a requirement of webdataset

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"input {pattern}: its braces are not closed; write {{00..99}}.tar or {{a,b}}.tar") from None


def _checked(source: str, reader: Reader, found: dict[str, Rows], columns: Columns) -> Input:
    """Check the rows of all splits and number their classes."""
    if columns.members and not isinstance(reader, Tars):
        raise DataError(f"input {source}: --image names a member of samples in tars, but it has no tars; leave it out")
    # train comes first: its classes, mean and std apply to all splits
    found = dict(sorted(found.items(), key=lambda item: item[0] != "train"))
    first = next(iter(found.values()))
    names = columns.classes or first.classes
    if columns.caption and isinstance(reader, Captioned):
        raise DataError(
            f"input {source}: --caption names a column of a table or a key of .json members, and this is a folder of"
            " images; a caption there is a file NAME.txt next to NAME.jpg, and is taken without an option"
        )
    if odd := next((split for split, rows in found.items() if rows.labelled != first.labelled), None):
        raise DataError(
            f"input {source}: {'split ' + odd} {'has' if found[odd].labelled else 'has no'} labels, unlike the first"
            " split; prepare the splits one by one, or all without labels with --no-labels"
        )
    if columns.classes and not first.labelled:
        raise DataError(f"input {source}: --classes names classes, and the input has no labels; leave it out")
    splits: dict[str, list[Entry]] = {}
    for split, rows in found.items():
        where = f"input {source}" + (f", split {split}" if split else "")
        try:
            untrusted.file_name(split or "set")
        except ValueError as error:
            raise DataError(f"input {source}: a split becomes a folder: {error}") from None
        if not rows.keys:
            raise DataError(f"{where}: no images in it; looked for {', '.join(IMAGE_FILES)}")

        def row(i: int, rows: Rows = rows) -> str:
            return f"{reader.where(rows.locations[i])}, sample {rows.keys[i]}"

        missing = [i for i, label in enumerate(rows.labels) if label is None]
        if missing and rows.labelled:
            raise DataError(
                f"{where}: {len(missing):,} rows have no label; leave them out; the first is {row(missing[0])};"
                " --no-labels makes a set without labels"
            )
        if reserved := next((key for key in rows.keys if split_name(f"{key}.x") is None), None):
            raise DataError(
                f"{where}: {reserved} would be ignored, because names like __x__ and __MACOSX are reserved; rename its"
                " folder"
            )
        if duplicates := [key for key, count in Counter(rows.keys).items() if count > 1]:
            first_two = [i for i, key in enumerate(rows.keys) if key == duplicates[0]][:2]
            owners = " and ".join(reader.where(rows.locations[i]) for i in first_two)
            more = f" ({len(duplicates):,} such keys)" if len(duplicates) > 1 else ""
            fix = "--prefix-keys puts the tar's name before them" if isinstance(reader, Tars) else "rename one"
            raise DataError(f"{where}: {owners} both have the key {duplicates[0]}{more}; {fix}")
        labels = [decode.NO_LABEL] * len(rows.keys)
        if rows.labelled:
            own, counted = _by_name(rows, names)
            names, labels = class_map(own, names, where, row, counted=counted)
            if not splits and (empty := sorted(set(range(len(names))) - set(labels))):
                _log.warning("%s: %s", where, without_images([names[number] for number in empty], len(names)))
        columns_of_rows = (rows.keys, labels, rows.sizes, rows.locations, rows.captions)
        splits[split] = [Entry(*entry) for entry in zip(*columns_of_rows, strict=True)]
    return Input(reader, names or (), splits)


def without_images(empty: list[str], classes: int) -> str:
    """Describe the classes without labels; they keep their numbers."""
    shown = ", ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
    return f"{len(empty):,} of {classes:,} classes have no images: {shown}"


def _by_name(rows: Rows, names: tuple[str, ...] | None) -> tuple[list[str | int], bool]:
    """Return (labels, whether their numbers count the classes).

    If the input names its classes and `names` has some of them in another order, its numbers become names.
    """
    labels = [label for label in rows.labels if label is not None]
    own = rows.classes
    if own is None or names is None or own == names:
        return labels, own is not None
    if len(own) == len(names) and not set(own) & set(names):
        return labels, True  # other names for the same classes
    return [own[label] if isinstance(label, int) and 0 <= label < len(own) else label for label in labels], False


def _folder_rows(paths: list[Path], columns: Columns) -> Rows:
    """The images below a folder. Its sub-folders are classes, unless all images are in the folder itself, or labels are
    not wanted.
    """
    (root,) = paths
    rows, others = Rows(labelled=columns.labels), Counter[str]()
    alone: str | None = None
    for folder, below, files in os.walk(root, followlinks=True, onerror=_refuse):
        below[:] = sorted(name for name in below if not hidden(f"{name}/"))
        inside = Path(folder).relative_to(root)
        captioned = _captioned(files)
        for name in sorted(files):
            extension = name.rpartition(".")[2].lower()
            if extension == decode.CAPTION and name.rpartition(".")[0] in captioned:
                continue
            if extension not in IMAGE_FILES or hidden(name):
                others["hidden" if hidden(name) else f".{extension}"] += 1
                continue
            path = os.path.join(folder, name)
            size = size_of(path) + (size_of(str(caption_file(path))) if captioned else 0)
            alone = alone if inside.parts else alone or name
            label = inside.parts[0] if inside.parts and columns.labels else None
            rows.add(key_of(str(inside / name)), label, size, path)
    if others:
        counts = ", ".join(f"{count:,} {extension}" for extension, count in others.most_common(5))
        _log.warning("%s: files that are not images are ignored: %s", root, counts)
    if columns.labels and alone is not None:
        if any(label is not None for label in rows.labels):
            raise DataError(
                f"input {root}: {alone} is not in a class folder, and others are; move it to {root}/CLASS/{alone}, or"
                " make a set without labels with --no-labels"
            )
        rows.labelled = False
    _check_folders(root, {str(label) for label in rows.labels if label is not None})
    return rows


def _captioned(files: list[str]) -> set[str]:
    """Names, without extension, of the images among a folder's files that have a caption next to them."""
    texts = {name.rpartition(".")[0] for name in files if name.endswith(f".{decode.CAPTION}")}
    if not texts:
        return texts
    return texts & {name.rpartition(".")[0] for name in files if name.rpartition(".")[2].lower() in IMAGE_FILES}


def _check_folders(root: Path, names: set[str]) -> None:
    """Check that no two folders have the same class number: 7 and 07 would be one class."""
    numbers: dict[int, str] = {}
    for name in sorted(names):
        number = decode.whole_number(name)
        if number is not None and numbers.setdefault(number, name) != name:
            raise DataError(
                f"input {root}: the folders {numbers[number]} and {name} are both class {number}; rename one"
            )


def _refuse(error: OSError) -> None:
    raise DataError(f"input {error.filename} cannot be read: {error.strerror}")


def _table_rows(paths: list[Path], columns: Columns) -> Rows:
    rows = Rows(labelled=False)
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                names, table = _lines(path, file)
                image, label, caption = pick(path, names, columns)
                rows.labelled = rows.labelled or label is not None
                for row in table:
                    value = row.get(label) if label else None
                    value = checked_label(value, f"{path}: column {label!r}", columns.classes)
                    name, text = row.get(image), row.get(caption) if caption else None
                    rows.add_file(path, name if isinstance(name, str) else "", value, caption_in(text))
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"input {path} cannot be read: {error}") from None
    return rows


def _lines(path: Path, file: TextIO) -> tuple[Sequence[str], Iterable[dict[str, Any]]]:
    """Return (names of columns, rows) of a table. Columns of a .jsonl are the keys of its first line."""
    if path.suffix.lower() != ".jsonl":
        table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return table.fieldnames or (), table
    rows = [json.loads(line) for line in file if line.strip()]
    if odd := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise ValueError(f"line {odd} is not an object with an entry per column")
    return list(rows[0]) if rows else (), rows


class Tars:
    """Reads samples in tars. A location is (tar, offset and size of each member, which member is the image)."""

    def where(self, location: tuple[str, dict[str, tuple[int, int]], str | None]) -> str:
        return location[0]

    def read(self, location: tuple[str, dict[str, tuple[int, int]], str | None]) -> dict[str, bytes]:
        path, parts, image = location
        with open(path, "rb") as file:
            read = {name: os.pread(file.fileno(), size, offset) for name, (offset, size) in parts.items()}
        found = {"image": read.pop(image)} if image is not None else {}
        for name, data in read.items():
            # training would take a member with such an extension for the image
            while name in (*decode.EXTENSIONS, "image") or name in found:
                name = f"other.{name}"
            found[name] = data
        return found


def _tar_rows(paths: list[Path], columns: Columns) -> Rows:
    rows = Rows(labelled=columns.label is not None)
    ignored: list[str] = []
    for path in paths:
        found = scan(path, scattered=True)
        if found.fault is not None:
            raise DataError(f"input {path}, {found.fault}; {found.fix}")
        ignored += found.ignored
        with path.open("rb") as file:
            for sample in found.samples:
                for key, parts in members.samples_of(sample):
                    where = f"{path}, sample {key}"
                    if bags.is_bag(parts):
                        raise DataError(
                            f"input {where}: it is a bag of tiles already; `vimscale data index` and `merge` take such"
                            " tars, and `prepare --tiles` cuts the images that they were made from"
                        )
                    caption = _tar_caption(file.fileno(), parts, columns)
                    found_label, label, parts = _tar_label(file.fileno(), parts, columns, where)
                    rows.labelled = rows.labelled or found_label
                    image = members.image_of(parts, columns.members, f"input {where}")
                    key = f"{path.stem}/{key}" if columns.prefix_keys else key
                    size = sum(size for _, size in parts.values())
                    rows.add(key, label, size, (str(path), parts, image), caption)
    if ignored:
        _log.warning("%s", ignored_files(ignored))
    return rows


def ignored_files(names: list[str]) -> str:
    """Describe files that belong to no sample: hidden ones, or those with other names."""
    shown = ", ".join(name[:60] for name in names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names):,} files in the tars belong to no sample and are ignored: {shown}"


def _tar_label(
    file: int, parts: dict[str, tuple[int, int]], columns: Columns, where: str
) -> tuple[bool, Label, dict[str, tuple[int, int]]]:
    """Return (whether a sample has a place for its label, the label, its other members). The label is the .cls, or else
    a field of the .json.
    """
    name = members.label_of(parts)
    if name is None:
        return False, None, parts
    offset, size = parts[name]
    if name.endswith("json"):
        if not columns.labels:
            return False, None, parts
        value = _field(os.pread(file, size, offset), (columns.label,) if columns.label else LABEL_COLUMNS)
        label = checked_label(value, f"{where}: its .{name}", columns.classes)
        return label is not None, label, parts
    rest = {other: part for other, part in parts.items() if other != name}
    if not columns.labels:
        return False, None, rest
    data = os.pread(file, size, offset)
    return True, checked_label(data.decode("utf-8", "replace"), where, columns.classes), rest


def _tar_caption(file: int, parts: dict[str, tuple[int, int]], columns: Columns) -> str | None:
    """Return the caption in the field of a sample's .json that was asked for; it replaces a .txt."""
    if columns.caption is None or "json" not in parts:
        return None
    offset, size = parts["json"]
    return caption_in(_field(os.pread(file, size, offset), (columns.caption,)))


def _field(data: bytes, keys: Sequence[str]) -> Any:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return next((tree[key] for key in keys if key in tree), None) if isinstance(tree, dict) else None
