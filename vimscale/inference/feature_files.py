"""Features of a data set in files: written in parts, each complete or absent, which are joined at the end.

A writer that is killed loses the part that it was writing. The same call continues, and its files have the bytes of an
undisturbed one. The parts are in OUT.parts, next to OUT.
"""

import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vimscale.data.dataset import Dataset
from vimscale.data.samples import Samples
from vimscale.data.shards.manifest import Manifest, shard_name, write_file, write_shard
from vimscale.errors import DataError, LaunchError, UserError
from vimscale.inference.features import Features, Pool, Precision, Reading, features, shape_of
from vimscale.inference.loaded import Loaded
from vimscale.storage import files
from vimscale.storage.addresses import shown

DType = Literal["fp16", "fp32"]
Format = Literal["parquet", "npy", "tars"]

_ROWS = 4096
"""Most images of a part: what a killed writer loses."""
_BYTES = 64 << 20
"""Most bytes of a part's features, which memory holds."""
_ABOUT = "features.json"


@dataclass
class _Part:
    """What memory holds of a part, and what its JSON file says next to its .npy."""

    numbers: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """What a call of `write` has left."""

    path: Path
    rows: int
    shape: tuple[int, ...]
    """Of one image's features."""
    unreadable: list[str]
    """The images that are left out, and why."""


def format_of(to: str | Path) -> Format:
    """Return the format of a path: .parquet, .npy, or a folder of tars, which has no suffix.

    Raises:
        UserError: it has another suffix; or the format needs pyarrow, which is not installed.
    """
    suffix = Path(to).suffix
    if suffix not in (".parquet", ".npy", ""):
        raise UserError(f"{to}: name a file .parquet or .npy, or a folder without a suffix for tars")
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(f"{to}: parquet needs pyarrow; pip install 'vimscale[prepare]', or write .npy") from None
    return "parquet" if suffix == ".parquet" else "npy" if suffix else "tars"


def write(
    loaded: Loaded,
    data: str,
    to: Path,
    *,
    layers: Sequence[int] | None = None,
    pool: Pool | None = None,
    dtype: DType = "fp32",
    batch: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    rows: int = _ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write the features of every image of a data set to `to`: NAME.parquet; NAME.npy with NAME.csv, which has the key
    and label of each row; or a folder of tars, with a .npy of each sample. A JSON file next to them (in the folder of
    tars) says what they are and which images are left out. Rows are in the set's order.

    Args:
        layers, pool, batch, workers, precision: see `features.features`.
        dtype: of the features in the files.
        rows: most images of a part, and of a tar.
        progress: called with (images done, images of the set) after each batch.

    Raises:
        UserError: the model has no such features; they are too large for fp16; `to` has another suffix, exists, or is
            being written by another process.
        DataError: the data set cannot be used.
        OSError: a file cannot be written; has its name.
    """
    kind = format_of(to)
    reading = Reading.of(loaded.model, layers, pool)
    samples = Samples(Dataset.open(data))
    shape = shape_of(loaded, reading)
    if loaded.model.config.tiles is not None:
        batch = 1
    item = 4 if dtype == "fp32" else 2
    per_part = batch * max(1, min(rows, _BYTES // (item * int(np.prod(shape)))) // batch)
    plan = {
        "format": 1,
        "model": loaded.about,
        "data": {"source": shown(data), "name": samples.manifest.name, "fingerprint": samples.manifest.fingerprint},
        "layers": list(reading.layers),
        "pool": reading.pool,
        "shape": list(shape),
        "dtype": dtype,
        "precision": precision,
        "device": loaded.device.type,
        "batch": batch,
        "rows_per_part": per_part,
        "versions": {name: metadata.version(name) for name in ("vimscale", "torch")},
    }
    about = to / _ABOUT if kind == "tars" else to.with_name(f"{to.name}.json")
    if to.exists():
        return _finished(to, about, plan)
    parts = _Parts(to, plan, per_part)
    try:
        parts.compute(
            features(
                loaded,
                samples,
                layers=layers,
                pool=pool,
                batch=batch,
                workers=workers,
                precision=precision,
                start=parts.count * (per_part // batch),
            ),
            len(samples),
            progress,
        )
        unreadable = [line for part in parts.read() for line in part.unreadable]
        count = sum(len(part.keys) for part in parts.read())
        if not count:
            raise DataError(f"data {data}: none of its images can be read; `vimscale data verify --deep` says why")
        text = json.dumps(plan | {"rows": count, "classes": samples.classes, "unreadable": unreadable}, indent=1) + "\n"
        _publish(parts, to, about, samples.manifest, text, count)
        parts.remove()
    finally:
        parts.close()
    return Written(to, count, shape, unreadable)


def _finished(to: Path, about: Path, plan: dict[str, Any]) -> Written:
    """Raises LaunchError if what is there is anything but the result of the same call."""
    try:
        found = json.loads(about.read_bytes())
        same = {key: found[key] for key in plan} == plan
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise LaunchError(f"{to} exists, and holds something else; remove it, or choose another --to")
    shutil.rmtree(_parts_of(to), ignore_errors=True)  # of a writer that was killed after the join
    return Written(to, found["rows"], tuple(found["shape"]), found["unreadable"])


def _parts_of(to: Path) -> Path:
    return to.with_name(f"{to.name}.parts")


class _Parts:
    """The parts that are complete, always the first ones. Holds a lock on their folder."""

    def __init__(self, to: Path, plan: dict[str, Any], per_part: int):
        self.folder, self._per_part, self._plan = _parts_of(to), per_part, plan
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise LaunchError(f"{self.folder} is in use by another process, which writes {to}") from None
        path = self.folder / "plan.json"
        text = json.dumps(plan, indent=1).encode()
        if not path.exists():
            write_file(path, text)
        elif path.read_bytes() != text:
            self._lock.close()
            before = json.loads(path.read_bytes())
            keys = ", ".join(sorted(key for key in plan if before.get(key) != plan[key]))
            raise LaunchError(
                f"{self.folder} holds the parts of other features ({keys} differ): repeat that command, remove the"
                " folder, or choose another --to"
            )
        self.count = 0
        while self._json(self.count).exists():
            self.count += 1

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def compute(self, batches: Iterator[Features], total: int, progress: Callable[[int, int], None]) -> None:
        """Write the parts that are missing. `batches` begins with the first of them."""
        done = min(self.count * self._per_part, total)
        found: list[np.ndarray] = []
        part = _Part()
        progress(done, total)
        for one in batches:
            found.append(self._converted(one))
            part.numbers += one.numbers.tolist()
            part.keys += one.keys
            part.labels += one.labels.tolist()
            part.unreadable += one.unreadable
            done = min(done + self._plan["batch"], total)
            progress(done, total)
            if done % self._per_part == 0 or done == total:
                self._write(np.concatenate(found), part)
                found, part = [], _Part()

    def _converted(self, one: Features) -> np.ndarray:
        values = one.features.numpy()
        if self._plan["dtype"] == "fp32":
            return values
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all() and np.isfinite(values).all():
            raise UserError(
                f"features of up to {np.abs(values).max():,.0f} do not fit fp16, whose largest is 65,504; use fp32"
            )
        return halves

    def _write(self, values: np.ndarray, part: _Part) -> None:
        with files.replacing(self._npy(self.count)) as partial, partial.open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        write_file(self._json(self.count), json.dumps(vars(part)).encode())  # last: it makes the part complete
        self.count += 1

    def read(self) -> Iterator[_Part]:
        for number in range(self.count):
            yield _Part(**json.loads(self._json(number).read_bytes()))

    def values(self) -> Iterator[np.ndarray]:
        for number in range(self.count):
            yield np.load(self._npy(number), mmap_mode="r")

    def _npy(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"

    def _json(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


# ---- joining the parts


def _publish(parts: _Parts, to: Path, about: Path, manifest: Manifest, text: str, count: int) -> None:
    """Join the parts in their folder; then give the results their names, `to` last."""
    joined = parts.folder / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    write_file(joined / about.name, text.encode())
    {"parquet": _parquet, "npy": _npy, "tars": _tars}[format_of(to)](parts, joined / to.name, manifest, text, count)
    if about.parent == to:
        joined.rename(to)
        return
    for path in sorted(joined.iterdir(), key=lambda path: path.name == to.name):
        files.sync(path)
        path.replace(to.with_name(path.name))


def _npy(parts: _Parts, to: Path, manifest: Manifest, about: str, count: int) -> None:
    rows = to.with_suffix(".csv")
    with files.naming(rows), rows.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("number", "key", "label", "class"))
        for part in parts.read():
            for number, key, label in zip(part.numbers, part.keys, part.labels, strict=True):
                writer.writerow((number, key, label if label >= 0 else "", manifest.class_name(label)))
    with files.naming(to), to.open("wb") as file:
        for i, values in enumerate(parts.values()):
            if i == 0:
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": (count, *values.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            values.tofile(file)


def _parquet(parts: _Parts, to: Path, manifest: Manifest, about: str, count: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    with files.naming(to):
        for part, values in zip(parts.read(), parts.values(), strict=True):
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns = {
                "number": pa.array(part.numbers, pa.int64()),
                "key": pa.array(part.keys, pa.string()),
                "label": pa.array([label if label >= 0 else None for label in part.labels], pa.int64()),
                "class": pa.array([manifest.class_name(label) or None for label in part.labels], pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:]))),
            }
            table = pa.table(columns, metadata={"vimscale": about})
            if writer is None:
                writer = parquet.ParquetWriter(to, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def _tars(parts: _Parts, to: Path, manifest: Manifest, about: str, count: int) -> None:
    numbers = iter(range(parts.count))
    for part, values in zip(parts.read(), parts.values(), strict=True):
        if part.keys:
            write_shard(to.parent / shard_name(next(numbers)), _samples(part, values))


def _samples(part: _Part, values: np.ndarray) -> Iterator[dict[str, Any]]:
    for key, label, row in zip(part.keys, part.labels, values, strict=True):
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(row))
        yield {"__key__": key, "npy": file.getvalue()} | ({"cls": label} if label >= 0 else {})
