"""Tars that exist already become a data set: each gets an index, all a manifest, and none is touched."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimscale.data.images import decode
from vimscale.data.shards.cache import local_copy
from vimscale.data.shards.manifest import MANIFEST, Manifest, Shard, checked_name, sha256_of, write_file, write_index
from vimscale.data.shards.tar import hidden
from vimscale.errors import BadSample, DataError, brief
from vimscale.prepare import pool, shapes
from vimscale.prepare.index import Sample, scan
from vimscale.prepare.inputs import members
from vimscale.prepare.inputs.classes import check_dense
from vimscale.prepare.inputs.sources import braces, expand, passed_over, without_images
from vimscale.prepare.tally import Tally
from vimscale.storage.addresses import secret

_log = logging.getLogger(__name__)

MEASURED = 2000
"""Images, about, that mean and deviation are taken from: as many of each shard."""


_READ = (*decode.EXTENSIONS, "jpe", "jfif")
"""Last parts of extensions of files that training reads."""


class Tar(NamedTuple):
    name: str
    """In the data set."""
    where: str
    """Its path or address."""


@dataclass
class Found:
    """What a shard holds."""

    shard: Shard
    offsets: np.ndarray
    tally: Tally
    unread: tuple[str, ...]
    """Messages about images whose header cannot be read."""
    passed: tuple[str, ...]
    """Files that are part of no sample."""


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
    """Write index and manifest of the tars in folders, globs, braces or addresses: (folder, manifest, what was odd).

    They go beside the tars, or to `output`, and then the manifest says where the tars are. `image`: extensions of the
    samples' images, first match first, where there are others.

    Raises:
        DataError: no tars, a damaged tar, a sample without image or label, or a folder with a manifest.
    """
    base, tars = _tars(patterns)
    if output is None and "://" in base:
        raise DataError(f"index {patterns[0]}: the index cannot be written there; give a folder with --output")
    folder = Path(base) if output is None else output
    if (folder / MANIFEST).exists():
        raise DataError(f"data {folder}: it has a {MANIFEST}; `vimscale data repair` mends a set, or remove the file")
    quota = -(-MEASURED // len(tars))
    for name in image:
        if name.rpartition(".")[2] not in _READ:
            raise DataError(
                f"--image {name}: training reads {', '.join(_READ)}; `vimscale data prepare --image {name}`"
                " converts these"
            )
    work = partial(look, quota=quota, classes=len(classes) if classes else None, image=image)
    found: dict[int, Found] = {}
    progress(0, len(tars))
    for number, result in pool.run(work, tars, jobs):
        path = folder / result.shard.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_index(path, result.offsets)
        except OSError as error:
            raise DataError(f"{path}.idx cannot be written: {error.strerror}; give a folder with --output") from None
        found[number] = result
        progress(len(found), len(tars))
    parts = [found[number] for number in range(len(tars))]
    tally = Tally.sum(part.tally for part in parts)
    if classes is None:
        check_dense(tally.labels, f"index {patterns[0]}")
    names = classes or tuple(map(str, range(max(tally.labels) + 1)))
    if empty := [name for number, name in enumerate(names) if number not in tally.labels]:
        _log.warning("%s: %s", folder, without_images(empty, len(names)))
    if passed := [name for part in parts for name in part.passed]:
        _log.warning("%s: %s", folder, passed_over(passed))
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
    )
    write_file(folder / MANIFEST, manifest.to_json().encode())
    return folder, manifest, [message for part in parts for message in part.unread]


def look(tar: Tar, *, quota: int, classes: int | None, image: tuple[str, ...]) -> Found:
    """All that the manifest says of one tar; `quota` of its images are decoded.

    Raises:
        DataError: it is damaged, empty, or a sample has no image or no label among the `classes`.
    """
    path = local_copy(tar.where)
    found = scan(path)
    if found.fault is not None:
        raise DataError(f"{tar.where}, {found.fault}; {found.fix}")
    if not found.samples:
        others = f" ({passed_over(found.passed)})" if found.passed else ""
        raise DataError(f"{tar.where} holds no samples{others}; leave it out")
    tally, unread = Tally(), []
    stride = -(-len(found.samples) // quota)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for i, sample in enumerate(found.samples):
            where = f"{tar.where}, offset {sample.start}, sample {sample.key}"
            label = _label(descriptor, sample, where, classes)
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
    return Found(shard, found.offsets, tally, tuple(unread), tuple(found.passed))


def _label(descriptor: int, sample: Sample, where: str, classes: int | None) -> int:
    if "cls" not in sample.members:
        raise DataError(
            f"{where}: no member .cls, the label (it has {_has(sample)}); `vimscale data prepare` of the tars takes one"
            " from a .json, and names with more dots apart"
        )
    offset, size = sample.members["cls"]
    text = os.pread(descriptor, size, offset).decode("utf-8", "replace").strip("\ufeff \t\r\n")
    label = decode.whole_number(text)
    if label is None and text.lower() not in ("", "nan"):
        raise DataError(
            f"{where}: its .cls is {text[:40]!r}, and training reads whole numbers; `vimscale data prepare` of the tars"
            " with --classes FILE numbers them"
        )
    if label is None or label < 0:
        raise DataError(f"{where}: its .cls is {text[:40]!r}, and labels count from 0; leave the sample out")
    if classes is not None and label >= classes:
        raise DataError(
            f"{where}: label {label} is none of the {classes} classes; --classes FILE lists all, one a line"
        )
    return label


def _image(sample: Sample, where: str, image: tuple[str, ...]) -> tuple[int, int]:
    found = members.image_of(sample.members, image, where)
    if found is None or not (image or found in decode.EXTENSIONS):
        known = ", ".join(image or decode.EXTENSIONS)
        advice = "`vimscale data prepare` of the tars writes such"
        if found is not None and found.rpartition(".")[2] in _READ:
            advice = f"say --image {found} if that is the image"
        raise DataError(f"{where}: no image among its members ({_has(sample)}); training reads {known}: {advice}")
    return sample.members[found]


def _has(sample: Sample) -> str:
    names = list(sample.members)
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _tars(patterns: list[str]) -> tuple[str, list[Tar]]:
    """(folder or address above them all, the tars), in order."""
    if any(pattern.startswith("pipe:") for pattern in patterns):
        raise DataError("index pipe: commands are not run; write their output to files, and give those")
    remote = [pattern for pattern in patterns if "://" in pattern]
    if remote and len(remote) < len(patterns):
        raise DataError(f"index {remote[0]}: give addresses or local files, not both")
    if kept := next((what for pattern in remote if (what := secret(pattern))), None):
        raise DataError(
            f"index {remote[0]}: the address holds {kept}, which the manifest would hold too; download the tars first"
        )
    places = [place for pattern in patterns for place in (braces(pattern) if remote else _local(pattern))]
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise DataError(f"index: {twice[0]} is given twice")
    if strange := [place for place in places if not place.endswith(".tar")]:
        raise DataError(
            f"index {strange[0]}: shards are files that end in .tar; of a folder elsewhere, list them as"
            " {00000..00099}.tar"
        )
    if remote:
        scheme, rest = zip(*(place.split("://", 1) for place in places), strict=True)
        if len(set(scheme)) > 1:
            raise DataError(
                f"index {places[0]}: all addresses must be of one place; make a set of each, and merge them"
            )
        base = f"{scheme[0]}://{_above(list(rest))}"
    else:
        places = [os.path.abspath(place) for place in places]
        base = _above(places)
    tars = [Tar(place[len(base) :].lstrip("/"), place) for place in places]
    for tar in tars:
        try:
            checked_name(tar.name)
        except ValueError as error:
            raise DataError(f"index {brief(tar.where, 200)}: {error}; rename it") from None
    return base, tars


def _above(paths: list[str]) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _local(pattern: str) -> list[str]:
    folder = Path(pattern)
    within = [path for path in sorted(folder.glob("*.tar")) if not hidden(path.name)]
    found = within if folder.is_dir() else expand(pattern)
    if not found:
        raise DataError(f"index {pattern}: there are no tars; give a folder of them, a glob or braces")
    return [str(path) for path in found]
