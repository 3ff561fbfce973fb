"""Inputs with images in columns: parquet files and Hugging Face data sets."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from vimscale.errors import BadSample, DataError
from vimscale.prepare.inputs.classes import Label
from vimscale.prepare.inputs.rows import (
    Columns,
    Files,
    Picked,
    Reader,
    Rows,
    caption_in,
    checked_label,
    image_file,
    pick,
)

_BATCH = 256
"""Rows that are unpacked or read at once."""


def parquet(files: dict[str, list[Path]], columns: Columns, scratch: Path) -> tuple[Reader, dict[str, Rows]]:
    """Return the reader and the rows of each split's files.

    Images in columns are unpacked to `scratch` once: shards take rows in random order, and reading one row of a parquet
    file decompresses a thousand others.

    Raises:
        DataError: a file is not parquet, lacks the columns, or has columns of other types.
    """
    pyarrow = needs("pyarrow")
    from pyarrow.parquet import ParquetFile

    found, inside = {}, False
    for split, paths in files.items():
        rows = found[split] = Rows(labelled=False)
        for number, path in enumerate(paths):
            try:
                table = ParquetFile(path)
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"input {path} cannot be read: {error}") from None
            picked = pick(path, table.schema_arrow.names, columns)
            rows.labelled = rows.labelled or picked.label is not None
            named = _named(table.schema_arrow.metadata, picked.label)
            if number and named != rows.classes:
                raise DataError(
                    f"input {path}: it names other classes than {paths[0]}, so a label would have two meanings; prepare"
                    " them one by one with --classes FILE, and merge the sets"
                )
            rows.classes = named
            kind = table.schema_arrow.field(picked.image).type
            if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
                content = table.read(picked.all)
                names = content[picked.image].to_pylist()
                for name, value, caption in zip(names, *_values(content, picked, path, columns), strict=True):
                    rows.add_file(path, name or "", value, caption)
            else:
                inside = True
                about = path.stat()
                unpacked = scratch / f"{split or 'rows'}-{number:05d}-{about.st_size}-{about.st_mtime_ns}.arrow"
                _unpack(path, table, picked, unpacked)
                _add_unpacked(rows, path, unpacked, picked, columns)
    return Unpacked() if inside else Files(), found


def _values(table: Any, picked: Picked, where: Path | str, columns: Columns) -> tuple[list[Label], list[str | None]]:
    """Return (labels, captions) of a table's rows; None where there is none."""
    labels: list[Label] = [None] * table.num_rows
    if picked.label is not None:
        about = f"{where}: column {picked.label!r}"
        labels = [checked_label(value, about, columns.classes) for value in table[picked.label].to_pylist()]
    captions = [None] * table.num_rows if picked.caption is None else table[picked.caption].to_pylist()
    return labels, [caption_in(value) for value in captions]


def _unpack(path: Path, table: Any, picked: Picked, to: Path) -> None:
    """Write the chosen columns of a parquet file as an Arrow file, which can be memory-mapped."""
    import pyarrow as pa

    if to.exists():
        return
    partial = to.with_suffix(".partial")
    schema = None
    try:
        with pa.OSFile(str(partial), "wb") as sink:
            writer = None
            others = picked.all[1:]
            for batch in table.iter_batches(_BATCH, columns=picked.all):
                data = _bytes_of(path, picked.image, batch.column(picked.image))
                schema = pa.schema([("image", data.type), *((name, batch.column(name).type) for name in others)])
                writer = writer or pa.ipc.new_file(sink, schema)
                writer.write_batch(pa.record_batch([data, *map(batch.column, others)], schema=schema))
            if writer is not None:
                writer.close()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"input {path} cannot be read: {error}") from None
    partial.replace(to)


def _add_unpacked(rows: Rows, path: Path, unpacked: Path, picked: Picked, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not unpacked.stat().st_size:
        return
    with pa.memory_map(str(unpacked)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            sizes = pc.binary_length(batch.column(0)).to_pylist()
            found = zip(sizes, *_values(batch, picked, path, columns), strict=True)
            for i, (size, value, caption) in enumerate(found):
                rows.add(f"{len(rows.keys):08d}", value, size or 0, (str(unpacked), number, i), caption)


def _bytes_of(path: Path | str, name: str, column: Any) -> Any:
    """Return a column of bytes, or the bytes of a column of {bytes, path}, as Hugging Face writes images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"input {path}: column {name!r} has type {column.type}, but images are bytes or paths; name another with"
            " --image-column"
        )
    return column


def _named(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    """Return the label's class names from Hugging Face's metadata, if there are any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


class Unpacked:
    """Reads unpacked images. A location is (Arrow file, batch, row in the batch)."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}

    def __reduce__(self) -> tuple:
        return Unpacked, ()  # each process maps the files itself

    def where(self, location: tuple[str, int, int]) -> str:
        path, batch, row = location
        return f"{Path(path).stem}, row {row} of batch {batch}"

    def read(self, location: tuple[str, int, int]) -> dict[str, bytes]:
        path, batch, row = location
        if path not in self._open:
            import pyarrow as pa

            self._open[path] = pa.ipc.open_file(pa.memory_map(path))
        data = self._open[path].get_batch(batch).column(0)[row].as_py()
        if data is None:
            raise BadSample("unreadable", f"{self.where(location)} holds no bytes")
        return {"image": data}


# ---- Hugging Face


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def hub(source: str, columns: Columns) -> tuple[Reader, dict[str, Rows]]:
    """Return the reader and the rows of each split of a saved data set's folder, or of hf:NAME, which is downloaded.

    Raises:
        DataError: the set is unavailable, or lacks the columns.
    """
    datasets = needs("datasets")
    try:
        if source.startswith("hf:"):
            loaded = datasets.load_dataset(source.removeprefix("hf:"))
        else:
            loaded = datasets.load_from_disk(source)
    except Exception as error:  # it raises whatever its file systems, hub and builders raise
        raise DataError(f"input {source} cannot be loaded: {error}") from None
    tables = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    found, images = {}, {}
    for split, table in tables.items():
        picked = pick(source, table.features, columns)
        image, label = picked.image, picked.label
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        names = None if label is None else _class_label(table.features[label])
        rows = found[split] = Rows(classes=names, labelled=label is not None)
        for batch in table.select_columns(picked.all).with_format("arrow").iter(_BATCH):
            sizes = _sizes(source, image, batch[image])
            for size, value, caption in zip(sizes, *_values(batch, picked, source, columns), strict=True):
                rows.add(f"{len(rows.keys):08d}", value, size, (split, len(rows.keys)), caption)
        images[split] = table.select_columns([image])
    return Hub(images), found


def _class_label(feature: Any) -> tuple[str, ...] | None:
    names = getattr(feature, "names", None)
    return tuple(names) if names else None


def _sizes(source: str, name: str, column: Any) -> list[int]:
    import pyarrow.compute as pc

    return [size or 0 for size in pc.binary_length(_bytes_of(source, name, column.combine_chunks())).to_pylist()]


class Hub:
    """Reads rows of Hugging Face data sets. A location is (split, row)."""

    def __init__(self, tables: dict[str, Any]):
        self._tables = tables

    def where(self, location: tuple[str, int]) -> str:
        split, row = location
        return f"row {row}" + (f" of {split}" if split else "")

    def read(self, location: tuple[str, int]) -> dict[str, bytes]:
        split, row = location
        (image,) = self._tables[split][row].values()
        if isinstance(image, dict):
            if image["bytes"] is None and image["path"]:
                return {"image": image_file(os.fspath(image["path"]))}
            image = image["bytes"]
        if image is None:
            raise BadSample("unreadable", f"{self.where(location)} holds no bytes")
        return {"image": image}


def needs(name: str) -> ModuleType:
    """Import an optional library.

    Raises:
        DataError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"this input needs {name}, which is not installed: pip install 'vimscale[prepare]'") from None
