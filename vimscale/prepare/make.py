"""Inputs to shards. A plan assigns keys to shards, so each shard is an independent job that may die and be redone.

During preparation, the folder `.NAME.partial` next to the set holds plan.json, a record of each finished shard, and the
shards. One rename at the end gives the set its name.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vimscale.data.images import decode
from vimscale.data.images.cutting import Tiling, cut
from vimscale.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    index_of,
    new_folder,
    publish,
    sha256_of,
    shard_name,
    write_file,
    write_shard,
)
from vimscale.errors import BadSample, DataError
from vimscale.prepare import large, pool
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inputs.sources import Entry, Input, open_input
from vimscale.prepare.shapes import Options, check_size, shape
from vimscale.prepare.tally import Tally
from vimscale.storage import untrusted

MEASURED = 10_000
"""Largest number of images that mean and std are measured on."""
SKIPPED = "skipped.jsonl"
_RECORDS, _SET, _PLAN = "records", "set", "plan.json"


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    split: str
    number: int
    entries: tuple[Entry, ...]
    measure: tuple[int, ...]
    """Indices of the entries that mean and std are measured on."""

    @property
    def name(self) -> str:
        return f"{self.split or 'set'}-{self.number:05d}"


def prepare(
    source: str,
    output: Path,
    options: Options,
    columns: Columns,
    *,
    jobs: int = 1,
    strict: bool = False,
    origin: str = "",
    licence: str = "",
    progress: pool.Progress = lambda done, total: None,
) -> dict[str, Manifest]:
    """Write `source` as the data set `output`, or as one data set per split below it. Return the manifests by split.

    The bytes depend only on source and options, not on `jobs` or on interruptions.

    Raises:
        DataError: an input or an option is unusable, an image is bad and `strict` is set, or the disk is full.
    """
    output = new_folder(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with _locked(partial):
            content, plan, digest = _planned(source, partial, options, columns, origin, licence)
            _write_plan(partial, digest)
            records = _run(content, plan, partial, options, jobs, strict, progress)
            written, skipped = {}, {}
            for split in dict.fromkeys(job.split for job in plan):
                own = [record for job, record in zip(plan, records, strict=True) if job.split == split]
                name = f"{output.name}-{split}" if split else output.name
                side = None if options.tiles is None else options.tiles.side
                written[split] = _manifest(name, content, own, digest, origin, licence, side)
                skipped[split] = [row for record in own for row in record["skipped"]]
            training = next(iter(written.values()))
            for split, manifest in written.items():
                # all splits are normalised the way the model is trained
                written[split] = replace(manifest, mean=training.mean, std=training.std)
                _finish(partial / _SET / split, written[split], skipped[split])
            publish(partial / _SET, output)
            shutil.rmtree(partial)
    except OSError as error:
        fix = "make room or choose another folder; the same command resumes from the complete shards"
        raise DataError(f"data {output}: {error.strerror} ({error.filename or partial}); {fix}") from error
    return written


def finished(
    source: str, output: Path, options: Options, columns: Columns, *, origin: str = "", licence: str = ""
) -> dict[str, Manifest] | None:
    """Return the manifests that `prepare` wrote for exactly this input and these options; None if there is no set yet.

    Raises:
        DataError: the existing set was made from another input or with other options.
    """
    existing = {"": output / MANIFEST} if (output / MANIFEST).is_file() else {}
    existing = existing or {path.parent.name: path for path in output.glob(f"*/{MANIFEST}")}
    if not existing:
        return None
    partial = output.with_name(f".{output.name}.partial")
    with _locked(partial):
        _, plan, digest = _planned(source, partial, options, columns, origin, licence)
    written = {split: Manifest.from_json(path.read_bytes(), str(path.parent)) for split, path in existing.items()}
    splits = list(dict.fromkeys(job.split for job in plan))
    if {*splits} != {*written} or any(manifest.plan != digest for manifest in written.values()):
        raise DataError(
            f"data {output}: there is a set made from another input or with other options; give a new folder, or remove"
            " this one"
        )
    return {split: written[split] for split in splits}


# ---- the plan


def _planned(
    source: str, partial: Path, options: Options, columns: Columns, origin: str, licence: str
) -> tuple[Input, list[Job], str]:
    """Return the input, its plan, and the hash of everything that determines the set."""
    content = open_input(source, columns, partial)
    plan = make_plan(content, options)
    return content, plan, plan_hash(content, options, plan, (origin, licence, *columns.members))


def make_plan(content: Input, options: Options) -> list[Job]:
    """Assign entries to shards: a function of the entries and the options.

    Raises:
        DataError: the fraction for validation leaves a split without images, or the input has splits already.
    """
    splits = content.splits
    if options.val:
        if set(splits) != {""}:
            raise DataError(f"--val {options.val}: the input has splits already ({', '.join(splits)}); leave it out")
        splits = _split(splits[""], options)
    jobs = []
    for split, entries in splits.items():
        if options.shuffle:
            order = _rng(options.seed, f"order {split}").permutation(len(entries))
            entries = [entries[i] for i in order]
        stride = -(-len(entries) // MEASURED)
        begin = 0
        for number, size in enumerate(_cut(entries, options)):
            end = begin + size
            measure = tuple(i - begin for i in range(begin, end) if i % stride == 0)
            jobs.append(Job(split, number, tuple(entries[begin:end]), measure))
            begin = end
    return jobs


def _split(entries: list[Entry], options: Options) -> dict[str, list[Entry]]:
    """Move the same fraction of every class to val."""
    by_class: dict[int, list[int]] = {}
    for i, entry in enumerate(entries):
        by_class.setdefault(entry.label, []).append(i)
    rng = _rng(options.seed, "split")
    held_out = set()
    for label in sorted(by_class):
        drawn = rng.permutation(by_class[label])
        held_out.update(drawn[: math.floor(len(drawn) * options.val + 0.5)].tolist())
    parts = {
        "train": [entry for i, entry in enumerate(entries) if i not in held_out],
        "val": [entry for i, entry in enumerate(entries) if i in held_out],
    }
    if empty := [split for split, part in parts.items() if not part]:
        smallest, largest = (f(map(len, by_class.values())) for f in (min, max))
        classes = f"classes have {smallest} to {largest} images"
        raise DataError(f"--val {options.val} leaves {empty[0]} without images: {classes}; choose another fraction")
    return parts


def _cut(entries: list[Entry], options: Options) -> Iterator[int]:
    """Yield the number of entries in each shard."""
    size, filled = 0, 0
    for entry in entries:
        full = filled + entry.bytes > options.shard_bytes if options.shard_bytes else size == options.per_shard
        if size and full:
            yield size
            size, filled = 0, 0
        size, filled = size + 1, filled + entry.bytes
    yield size


def _rng(seed: int, purpose: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, key]))


def plan_hash(content: Input, options: Options, plan: list[Job], about: tuple[str, ...]) -> str:
    """sha256 of everything that determines the set, except the bytes of the images."""
    digest = hashlib.sha256()
    given = dataclasses.asdict(options)
    if options.tiles is None:  # older versions had no such option, and their sets are continued
        del given["tiles"]
    for line in (given, content.classes, about):
        digest.update(json.dumps(line).encode() + b"\n")
    for job in plan:
        digest.update(f"{job.name}\n".encode())
        for entry in job.entries:
            caption = () if entry.caption is None else (entry.caption,)
            digest.update(json.dumps((*entry[:3], *caption)).encode() + b"\n")
    return digest.hexdigest()


def _write_plan(partial: Path, digest: str) -> None:
    """Write the plan's hash.

    Raises:
        DataError: the folder holds an unfinished set with another plan.
    """
    path = partial / _PLAN
    if path.exists() and path.read_text(errors="replace") != json.dumps({"plan": digest}):
        raise DataError(
            f"data {partial}: there is an unfinished set with other options or inputs; repeat the command that"
            f" started it, or start over: rm -r {shlex.quote(str(partial))}"
        )
    write_file(path, json.dumps({"plan": digest}).encode())


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Lock the unfinished set's folder for this process; remove it at the end if it holds no plan."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"data {partial}: another process is preparing this set; wait for it, or end it") from None
    try:
        yield
    finally:
        if partial.exists() and not (partial / _PLAN).exists():
            shutil.rmtree(partial)
        os.close(descriptor)


# ---- the work


def _run(
    content: Input, plan: list[Job], partial: Path, options: Options, jobs: int, strict: bool, progress: pool.Progress
) -> list[dict[str, Any]]:
    """Write the shards and return their records, in the plan's order."""
    (partial / _RECORDS).mkdir(exist_ok=True)
    for split in {job.split for job in plan}:
        (partial / _SET / split).mkdir(parents=True, exist_ok=True)
    worker = _Worker(content, partial, options, strict)
    return pool.run_all(worker, plan, jobs, progress, size=lambda job: len(job.entries))


class _Worker:
    """Writes shards, in any process."""

    def __init__(self, content: Input, partial: Path, options: Options, strict: bool):
        self._input = replace(content, splits={})  # each job brings its entries
        self._partial, self._options, self._strict = partial, options, strict

    def __call__(self, job: Job) -> dict[str, Any]:
        """Write a shard and return its record, or read the record if an earlier run left a complete shard."""
        path = self._partial / _RECORDS / f"{job.name}.json"
        record = _finished(path, self._tar(job))
        if record is None:
            record = self._make(job)
            write_file(path, json.dumps(record).encode())
        if self._strict and record["skipped"]:
            raise _strict_error(record["skipped"][0]["message"])
        return record

    def _tar(self, job: Job) -> Path:
        return self._partial / _SET / job.split / shard_name(job.number)

    def _make(self, job: Job) -> dict[str, Any]:
        tally = Tally()
        skipped: list[dict[str, str]] = []
        shard = write_shard(self._tar(job), self._samples(job, tally, skipped))
        if not shard.samples:
            self._tar(job).unlink()
            index_of(self._tar(job)).unlink()
        found = dataclasses.asdict(shard) if shard.samples else None
        return {"shard": found, "skipped": skipped, "tally": tally.to_json()}

    def _samples(self, job: Job, tally: Tally, skipped: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        measure = set(job.measure)
        for i, entry in enumerate(job.entries):
            try:
                yield self._sample(entry, i in measure, tally)
            except BadSample as error:
                if self._strict:
                    raise _strict_error(str(error)) from None
                tally.skipped[error.cause] += 1
                where = self._input.reader.where(entry.location)
                skipped.append({"key": entry.key, "path": where, "cause": error.cause, "message": str(error)})

    def _sample(self, entry: Entry, measure: bool, tally: Tally) -> dict[str, Any]:
        where = self._input.reader.where(entry.location)
        try:
            if self._options.tiles is not None:
                return self._bag(entry, where, self._options.tiles, measure, tally)
            members = self._input.reader.read(entry.location)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise BadSample("unreadable", f"{where}, sample {entry.key}: {reason}") from None
        if "image" not in members:
            has = ", ".join(members) or "only a label"
            raise BadSample("no image", f"{where}, sample {entry.key}: no image among its members ({has})")
        data = members.pop("image")
        extension, data, height, width, image = shape(data, where, entry.key, self._options, measure=measure)
        tally.count(entry.label, height, width)
        if measure and image is not None:
            tally.measure(image)
        return _with_label_and_caption({"__key__": entry.key, **members, extension: data}, entry, tally)

    def _bag(self, entry: Entry, where: str, tiling: Tiling, measure: bool, tally: Tally) -> dict[str, Any]:
        name = f"{where}, sample {entry.key}"
        with large.opened(self._input.reader, entry.location, name, tiling) as (level, others):
            check_size(level.height, level.width, name, self._options)
            members, counts = cut(level, tiling, name)
        tally.count(entry.label, level.height, level.width)
        tally.tiles[len(members) - 1] += 1
        if measure:
            tally.measure_counts(counts)
        return _with_label_and_caption({"__key__": entry.key, **others, **members}, entry, tally)


def _with_label_and_caption(sample: dict[str, Any], entry: Entry, tally: Tally) -> dict[str, Any]:
    """Add a sample's label and its table's caption; count the caption, or leave out an empty one."""
    if entry.label != decode.NO_LABEL:
        sample["cls"] = str(entry.label).encode()
    if entry.caption is not None:
        sample[decode.CAPTION] = entry.caption.encode()
    if decode.caption_of(sample) is None:
        sample.pop(decode.CAPTION, None)
    else:
        tally.captions += 1
    return sample


def _strict_error(message: str) -> DataError:
    return DataError(f"{message}; without --strict it is skipped and listed")


def _finished(record: Path, tar: Path) -> dict[str, Any] | None:
    """Read the record of a finished shard; None if the shard is incomplete or the record is damaged."""
    try:
        found = untrusted.loads(untrusted.read(record))
        shard = found["shard"]
        complete = shard is None or (sha256_of(tar) == shard["sha256"] and index_of(tar).exists())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found if complete else None


# ---- the end


def _finish(folder: Path, manifest: Manifest, skipped: list[dict[str, str]]) -> None:
    """Write the list of skipped inputs, then the manifest."""
    for leftover in folder.glob(".*"):  # partial files of killed processes
        leftover.unlink()
    if skipped:
        write_file(folder / SKIPPED, "".join(json.dumps(row) + "\n" for row in skipped).encode())
    write_file(folder / MANIFEST, manifest.to_json().encode())


def _manifest(
    name: str, content: Input, records: list[dict[str, Any]], plan: str, origin: str, licence: str, side: int | None
) -> Manifest:
    shards = tuple(Shard(**record["shard"]) for record in records if record["shard"] is not None)
    skipped = [row for record in records for row in record["skipped"]]
    if not shards:
        causes = ", ".join(
            f"{count} x {cause}" for cause, count in sorted(Counter(r["cause"] for r in skipped).items())
        )
        raise DataError(f"{name}: none of the {len(skipped)} inputs is usable ({causes}): {skipped[0]['message']}")
    tally = Tally.sum(Tally.from_json(record["tally"]) for record in records)
    mean, std = tally.normalisation()
    return Manifest(
        name,
        content.classes,
        shards,
        mean,
        std,
        source=origin,
        licence=licence,
        labels=tally.label_counts(len(content.classes)),
        sides=tally.side_counts(),
        skipped=tally.skipped_counts(),
        plan=plan,
        tiles=tally.bags(side),
        captions=tally.captions,
    )
