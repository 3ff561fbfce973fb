"""Existing tars become a data set: each gets an index, all get one manifest, and no tar changes."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimscale.data.images import bags, decode
from vimscale.data.shards.cache import local_copy
from vimscale.data.shards.manifest import MANIFEST, Manifest, Shard, checked_name, sha256_of, write_file, write_index
from vimscale.data.shards.tar import hidden
from vimscale.errors import BadSample, DataError, brief
from vimscale.prepare import pool, shapes
from vimscale.prepare.index import Sample, scan
from vimscale.prepare.inputs import members
from vimscale.prepare.inputs.classes import check_dense
from vimscale.prepare.inputs.sources import braces, expand, ignored_files, without_images
from vimscale.prepare.tally import Tally, counts_of
from vimscale.storage.addresses import secret

_log = logging.getLogger(__name__)

MEASURED = 2000
"""Approximate number of images for mean and std; each shard contributes the same number."""
MEASURED_TILES = 256
"""Largest number of tiles of such an image."""
_READ = (*decode.EXTENSIONS, "jpe", "jfif")
"""Last parts of the extensions of images that training reads."""


class Tar(NamedTuple):
    name: str
    """Name in the data set."""
    where: str
    """Path or address."""


@dataclass
class Found:
    """What a shard holds."""

    shard: Shard
    offsets: np.ndarray
    tally: Tally
    unread: tuple[str, ...]
    """Messages about images that cannot be read."""
    ignored: tuple[str, ...]
    """Files that belong to no sample."""
    unlabelled: str | None
    """The first sample without a label."""
    side: int | None
    """Of the tiles in pixels, if the samples are bags."""


def index(
    patterns: list[str],
    output: Path | None,
    *,
    classes: tuple[str, ...] | None = None,
    image: tuple[str, ...] = (),
    origin: str = "",
    licence: str = "",
    jobs: int = 1,
    progress: pool.Progress = lambda done, total: None,
) -> tuple[Path, Manifest, list[str]]:
    """Write indexes and a manifest for the tars that `patterns` name: folders, globs, braces or addresses.

    The files go next to the tars, or into `output`; then the manifest records where the tars are. `image` lists the
    extensions of the samples' images, first match first, if they have several. Returns (folder, manifest, messages
    about images that cannot be read).

    Raises:
        DataError: there are no tars, a tar is damaged, a sample has no image, only some samples have labels, or the
            folder has a manifest.
    """
    base, tars = _tars(patterns)
    if output is None and "://" in base:
        raise DataError(f"index {patterns[0]}: the index cannot be written there; give a folder with --output")
    folder = Path(base) if output is None else output
    if (folder / MANIFEST).exists():
        raise DataError(
            f"data {folder}: it has a {MANIFEST}; fix the set with `vimscale data repair`, or remove the file"
        )
    quota = -(-MEASURED // len(tars))
    for name in image:
        if name.rpartition(".")[2] not in _READ:
            raise DataError(
                f"--image {name}: training reads {', '.join(_READ)}; `vimscale data prepare --image {name}`"
                " converts such images"
            )

    def write(part: Found) -> None:
        path = folder / part.shard.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_index(path, part.offsets)
        except OSError as error:
            raise DataError(f"{path}.idx cannot be written: {error.strerror}; give a folder with --output") from None

    work = partial(scan_tar, quota=quota, classes=len(classes) if classes else None, image=image)
    parts = pool.run_all(work, tars, jobs, progress, finish=write)
    tally = Tally.sum(part.tally for part in parts)
    labelled = sum(count for label, count in tally.labels.items() if label != decode.NO_LABEL)
    without = next((part.unlabelled for part in parts if part.unlabelled), None)
    if without is not None and (labelled or classes):
        raise DataError(
            f"{without}; all samples of a set have labels, or none: `vimscale data prepare` of the tars takes them from"
            " a .json and separates samples whose names have more dots; with --no-labels it leaves them out"
        )
    if classes is None and labelled:
        check_dense(tally.labels, f"index {patterns[0]}")
    names = classes or tuple(map(str, range(max(tally.labels) + 1)))
    if empty := [name for number, name in enumerate(names) if number not in tally.labels]:
        _log.warning("%s: %s", folder, without_images(empty, len(names)))
    if ignored := [name for part in parts for name in part.ignored]:
        _log.warning("%s: %s", folder, ignored_files(ignored))
    sides = {part.side: part.shard.name for part in parts}
    if len(sides) > 1:
        (side, name), (other, odd), *_ = sides.items()
        raise DataError(
            f"index {patterns[0]}: {name} holds {_kind(side)}, and {odd} {_kind(other)}; make a set of each"
        )
    if not tally.measured:
        raise DataError(f"index {patterns[0]}: no image could be decoded: {parts[0].unread[0]}")
    mean, std = tally.normalisation()
    manifest = Manifest(
        folder.resolve().name,
        names,
        tuple(part.shard for part in parts),
        mean,
        std,
        origin,
        licence,
        base="" if output is None else base,
        labels=tally.label_counts(len(names)),
        sides=tally.side_counts(),
        image=image,
        tiles=tally.bags(next(iter(sides))),
        captions=tally.captions,
    )
    write_file(folder / MANIFEST, manifest.to_json().encode())
    return folder, manifest, [message for part in parts for message in part.unread]


def scan_tar(tar: Tar, *, quota: int, classes: int | None, image: tuple[str, ...]) -> Found:
    """Collect what a manifest needs to know about one tar; decode `quota` of its images.

    Raises:
        DataError: it is damaged or empty, a sample has no image, a label is not below `classes`, or several samples
            look like one.
    """
    path = local_copy(tar.where)
    found = scan(path)
    if found.fault is not None:
        raise DataError(f"{tar.where}, {found.fault}; {found.fix}")
    if not found.samples:
        others = f" ({ignored_files(found.ignored)})" if found.ignored else ""
        raise DataError(f"{tar.where} holds no samples{others}; leave it out")
    tally, unread = Tally(), []
    side, unlabelled = None, None
    stride = -(-len(found.samples) // quota)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for i, sample in enumerate(found.samples):
            where = f"{tar.where}, offset {sample.start}, sample {sample.key}"
            label = _label(descriptor, sample, where, classes)
            if label == decode.NO_LABEL and unlabelled is None:
                unlabelled = f"{where}: no member .cls, the label (it has {_member_names(sample)})"
            tally.captions += _has_caption(descriptor, sample)
            if bags.is_bag(found.samples[0].members):
                side = _count_bag(descriptor, sample, where, side, tally, label, measure=i % stride == 0)
                continue
            offset, size = _image(sample, where, image)
            data = os.pread(descriptor, size, offset)
            try:
                _, height, width = shapes.header(data, where)
                if i % stride == 0:
                    tally.measure(shapes.pixels(data, where))
                tally.count(label, height, width)
            except BadSample as error:
                tally.labels[label] += 1
                unread.append(str(error))
    finally:
        os.close(descriptor)
    shard = Shard(tar.name, len(found.samples), path.stat().st_size, sha256_of(path))
    return Found(shard, found.offsets, tally, tuple(unread), tuple(found.ignored), unlabelled, side)


def _has_caption(descriptor: int, sample: Sample) -> bool:
    if decode.CAPTION not in sample.members:
        return False
    offset, size = sample.members[decode.CAPTION]
    return decode.caption_of({decode.CAPTION: os.pread(descriptor, size, offset)}) is not None


def _count_bag(
    descriptor: int, sample: Sample, where: str, side: int | None, tally: Tally, label: int, *, measure: bool
) -> int:
    """Count a bag of tiles; `measure` the pixels of some of them. Return the tiles' side.

    Raises:
        DataError: it is not a bag, its tiles have another side than `side`, or one of those measured is damaged.
    """
    read = {name: os.pread(descriptor, size, at) for name, (at, size) in sample.members.items() if name == bags.MEMBER}
    try:
        found = bags.stored(dict.fromkeys(sample.members, b"") | read, where, side)
        tally.count(label, *found.cut.size)
        tally.tiles[len(found.names)] += 1
        if measure:
            chosen = bags.spread(len(found.names), MEASURED_TILES)
            names = found.names if chosen is None else [found.names[i] for i in chosen]
            members = {name: sample.members[name] for name in names}
            tiles = {name: os.pread(descriptor, size, at) for name, (at, size) in members.items()}
            counts = sum(counts_of(tile) for tile in bags.images(tiles, found, where, chosen))
            assert not isinstance(counts, int), "a bag has tiles"
            tally.measure_counts(counts)
    except BadSample as error:
        raise DataError(f"{error}; leave the sample out") from None
    return found.cut.side


def _kind(side: int | None) -> str:
    return "images" if side is None else f"bags of tiles of {side} pixels"


def _label(descriptor: int, sample: Sample, where: str, classes: int | None) -> int:
    if "cls" not in sample.members:
        if any(name.endswith(".cls") for name in sample.members):
            raise DataError(
                f"{where}: no member .cls, the label (it has {_member_names(sample)}); `vimscale data prepare` of the"
                " tars separates samples whose names have more dots"
            )
        return decode.NO_LABEL
    offset, size = sample.members["cls"]
    text = os.pread(descriptor, size, offset).decode("utf-8", "replace").strip("\ufeff \t\r\n")
    label = decode.whole_number(text)
    if label is None and text.lower() not in ("", "nan"):
        raise DataError(
            f"{where}: its .cls is {text[:40]!r}, but training reads whole numbers; `vimscale data prepare` of the tars"
            " with --classes FILE numbers them"
        )
    if label is None or label < 0:
        raise DataError(f"{where}: its .cls is {text[:40]!r}, but labels count from 0; leave the sample out")
    if classes is not None and label >= classes:
        raise DataError(
            f"{where}: label {label} is not one of the {classes} classes; list all of them in --classes FILE, one per"
            " line"
        )
    return label


def _image(sample: Sample, where: str, image: tuple[str, ...]) -> tuple[int, int]:
    if bags.is_bag(sample.members):
        raise DataError(f"{where}: a bag of tiles among images; make a set of each")
    found = members.image_of(sample.members, image, where)
    if found is None or not (image or found in decode.EXTENSIONS):
        known = ", ".join(image or decode.EXTENSIONS)
        fix = "convert the tars with `vimscale data prepare`"
        if found is not None and found.rpartition(".")[2] in _READ:
            fix = f"give --image {found} if that is the image"
        raise DataError(f"{where}: no image among its members ({_member_names(sample)}); training reads {known}: {fix}")
    return sample.members[found]


def _member_names(sample: Sample) -> str:
    names = list(sample.members)
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _tars(patterns: list[str]) -> tuple[str, list[Tar]]:
    """Return (folder or address above all tars, the tars in order)."""
    if any(pattern.startswith("pipe:") for pattern in patterns):
        raise DataError("index pipe: commands are not run; write their output to files, and give those")
    remote = [pattern for pattern in patterns if "://" in pattern]
    if remote and len(remote) < len(patterns):
        raise DataError(f"index {remote[0]}: give addresses or local files, not both")
    if kept := next((what for pattern in remote if (what := secret(pattern))), None):
        raise DataError(
            f"index {remote[0]}: the address holds {kept}, which the manifest would hold too; download the tars first"
        )
    urls = [url for pattern in patterns for url in (braces(pattern) if remote else _local_tars(pattern))]
    if duplicates := [url for url, count in Counter(urls).items() if count > 1]:
        raise DataError(f"index: {duplicates[0]} is given twice; give each tar once")
    if others := [url for url in urls if not url.endswith(".tar")]:
        raise DataError(
            f"index {others[0]}: shards are files that end in .tar; list those of a remote folder as"
            " {00000..00099}.tar"
        )
    if remote:
        schemes, rest = zip(*(url.split("://", 1) for url in urls), strict=True)
        if len(set(schemes)) > 1:
            raise DataError(
                f"index {urls[0]}: all addresses must have the same scheme; make a set of each, and merge them"
            )
        base = f"{schemes[0]}://{_common_folder(list(rest))}"
    else:
        urls = [os.path.abspath(url) for url in urls]
        base = _common_folder(urls)
    tars = [Tar(url[len(base) :].lstrip("/"), url) for url in urls]
    for tar in tars:
        try:
            checked_name(tar.name)
        except ValueError as error:
            raise DataError(f"index {brief(tar.where, 200)}: {error}; rename it") from None
    return base, tars


def _common_folder(paths: list[str]) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _local_tars(pattern: str) -> list[str]:
    folder = Path(pattern)
    inside = [path for path in sorted(folder.glob("*.tar")) if not hidden(path.name)]
    found = inside if folder.is_dir() else expand(pattern)
    if not found:
        raise DataError(f"index {pattern}: there are no tars; give a folder of tars, a glob or braces")
    return [str(path) for path in found]
