"""Inputs to shards: a plan says which keys each shard holds, so shards are independent jobs that may die and be redone.

While a set is prepared, `.NAME.partial` beside it holds plan.json, a record of each finished shard, and the shards;
these get their name, OUTPUT, in one rename at the end.
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
from vimscale.prepare import pool
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inputs.sources import Entry, Input, open_input
from vimscale.prepare.shapes import Options, shape
from vimscale.prepare.tally import Tally
from vimscale.storage import untrusted

MEASURED = 10_000
"""Images, at most, that mean and deviation are taken from."""
SKIPPED = "skipped.jsonl"
_RECORDS, _SET, _PLAN = "records", "set", "plan.json"


@dataclass(frozen=True)
class Job:
    """A shard to be."""

    split: str
    number: int
    entries: tuple[Entry, ...]
    measure: tuple[int, ...]
    """Which of the entries mean and deviation are taken from."""

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
    """Write `source` as a data set `output`, or as one a split below it: the manifests by split.

    The bytes depend on source and options alone, not on `jobs`, nor on how often the work was interrupted.

    Raises:
        DataError: an input or an option that cannot be used, a bad image if `strict`, or a full disk.
    """
    output = new_folder(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with _locked(partial):
            content = open_input(source, columns, partial)
            plan = make_plan(content, options)
            digest = plan_hash(content, options, plan, (origin, licence, *columns.members))
            _same_plan(partial, digest)
            records = _run(content, plan, partial, options, jobs, strict, progress)
            written, lists = {}, {}
            for split in dict.fromkeys(job.split for job in plan):
                mine = [record for job, record in zip(plan, records, strict=True) if job.split == split]
                name = f"{output.name}-{split}" if split else output.name
                written[split] = _manifest(name, content, mine, digest, origin, licence)
                lists[split] = [row for record in mine for row in record["skipped"]]
            training = next(iter(written.values()))
            for split, manifest in written.items():
                # all splits are normalised as the model will be trained
                written[split] = replace(manifest, mean=training.mean, std=training.std)
                _finish(partial / _SET / split, written[split], lists[split])
            publish(partial / _SET, output)
            shutil.rmtree(partial)
    except OSError as error:
        way_out = "make room or choose another place; the same command goes on from the shards that are whole"
        raise DataError(f"data {output}: {error.strerror} ({error.filename or partial}); {way_out}") from error
    return written


def finished(
    source: str, output: Path, options: Options, columns: Columns, *, origin: str = "", licence: str = ""
) -> dict[str, Manifest] | None:
    """The manifests that `prepare` has written for this very input and these options; None if there is no set yet.

    Raises:
        DataError: the set that is there was made of another input or with other options.
    """
    there = {"": output / MANIFEST} if (output / MANIFEST).is_file() else {}
    there = there or {path.parent.name: path for path in output.glob(f"*/{MANIFEST}")}
    if not there:
        return None
    partial = output.with_name(f".{output.name}.partial")
    with _locked(partial):
        content = open_input(source, columns, partial)
        plan = make_plan(content, options)
        digest = plan_hash(content, options, plan, (origin, licence))
    written = {split: Manifest.from_json(path.read_bytes(), str(path.parent)) for split, path in there.items()}
    splits = list(dict.fromkeys(job.split for job in plan))
    if {*splits} != {*written} or any(manifest.plan != digest for manifest in written.values()):
        raise DataError(
            f"data {output}: a set made of another input or with other options is there; give a new folder or remove it"
        )
    return {split: written[split] for split in splits}


# ---- the plan


def make_plan(content: Input, options: Options) -> list[Job]:
    """Which entries go into which shard: a function of the entries and the options.

    Raises:
        DataError: a share for validation that leaves one side without images, or splits that exist already.
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
    """Every class gives its share of images to val."""
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
        raise DataError(f"--val {options.val} leaves {empty[0]} without images: {classes}; choose another share")
    return parts


def _cut(entries: list[Entry], options: Options) -> Iterator[int]:
    """Sizes of the shards."""
    size, held = 0, 0
    for entry in entries:
        full = held + entry.bytes > options.shard_bytes if options.shard_bytes else size == options.per_shard
        if size and full:
            yield size
            size, held = 0, 0
        size, held = size + 1, held + entry.bytes
    yield size


def _rng(seed: int, purpose: str) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, key]))


def plan_hash(content: Input, options: Options, plan: list[Job], about: tuple[str, ...]) -> str:
    """sha256 of everything the set follows from, but for the images' own bytes."""
    digest = hashlib.sha256()
    for line in (dataclasses.asdict(options), content.classes, about):
        digest.update(json.dumps(line).encode() + b"\n")
    for job in plan:
        digest.update(f"{job.name}\n".encode())
        for entry in job.entries:
            digest.update(json.dumps(entry[:3]).encode() + b"\n")
    return digest.hexdigest()


def _same_plan(partial: Path, digest: str) -> None:
    path = partial / _PLAN
    if path.exists() and path.read_text(errors="replace") != json.dumps({"plan": digest}):
        raise DataError(
            f"data {partial}: an unfinished set of other options or other inputs is there;"
            f" give the same again to finish it, or start over: rm -r {shlex.quote(str(partial))}"
        )
    write_file(path, json.dumps({"plan": digest}).encode())


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """The unfinished set's folder, for this process alone; gone afterwards if nothing was planned in it."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"data {partial}: another process prepares this set; wait for it, or end it") from None
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
    """The record of every shard, in the plan's order."""
    (partial / _RECORDS).mkdir(exist_ok=True)
    for split in {job.split for job in plan}:
        (partial / _SET / split).mkdir(parents=True, exist_ok=True)
    total = sum(len(job.entries) for job in plan)
    worker = _Worker(content, partial, options, strict)
    records: dict[int, dict[str, Any]] = {}
    done = 0
    progress(0, total)
    for number, record in pool.run(worker, plan, jobs):
        records[number] = record
        done += len(plan[number].entries)
        progress(done, total)
    return [records[number] for number in range(len(plan))]


class _Worker:
    """Makes one shard after the other, in whatever process."""

    def __init__(self, content: Input, partial: Path, options: Options, strict: bool):
        self._input = replace(content, splits={})  # jobs bring their own entries
        self._partial, self._options, self._strict = partial, options, strict

    def __call__(self, job: Job) -> dict[str, Any]:
        """The shard's record: read, if an earlier run wrote a shard that is still whole."""
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
                where = self._input.reader.where(entry.place)
                skipped.append({"key": entry.key, "path": where, "cause": error.cause, "message": str(error)})

    def _sample(self, entry: Entry, measure: bool, tally: Tally) -> dict[str, Any]:
        where = self._input.reader.where(entry.place)
        try:
            members = self._input.reader.read(entry.place)
        except (OSError, ValueError) as error:  # a name may hold what no file's does
            reason = getattr(error, "strerror", None) or error
            raise BadSample("unreadable", f"{where}, sample {entry.key}: {reason}") from None
        if "image" not in members:
            has = ", ".join(members) or "only a label"
            raise BadSample("no image", f"{where}, sample {entry.key}: no image among its members ({has})")
        extension, data, height, width, image = shape(
            members.pop("image"), where, entry.key, self._options, look=measure
        )
        tally.count(entry.label, height, width)
        if measure and image is not None:
            tally.measure(image)
        return {"__key__": entry.key, **members, extension: data, "cls": str(entry.label).encode()}


def _strict_error(message: str) -> DataError:
    return DataError(f"{message}; without --strict it is skipped and listed")


def _finished(record: Path, tar: Path) -> dict[str, Any] | None:
    try:
        found = untrusted.loads(untrusted.read(record))
        shard = found["shard"]
        whole = shard is None or (sha256_of(tar) == shard["sha256"] and index_of(tar).exists())
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a record that is damaged is made again
        return None
    return found if whole else None


# ---- the end


def _finish(folder: Path, manifest: Manifest, skipped: list[dict[str, str]]) -> None:
    for leftover in folder.glob(".*"):  # of processes that were killed
        leftover.unlink()
    if skipped:
        write_file(folder / SKIPPED, "".join(json.dumps(row) + "\n" for row in skipped).encode())
    write_file(folder / MANIFEST, manifest.to_json().encode())


def _manifest(
    name: str, content: Input, records: list[dict[str, Any]], plan: str, origin: str, licence: str
) -> Manifest:
    shards = tuple(Shard(**record["shard"]) for record in records if record["shard"] is not None)
    skipped = [row for record in records for row in record["skipped"]]
    if not shards:
        causes = ", ".join(
            f"{count} x {cause}" for cause, count in sorted(Counter(r["cause"] for r in skipped).items())
        )
        raise DataError(f"{name}: none of the {len(skipped)} inputs can be used ({causes}): {skipped[0]['message']}")
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
    )
