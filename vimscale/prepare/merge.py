"""Merge several data sets with the same classes into one, without reading images."""

import os
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from vimscale.data.shards.manifest import (
    MANIFEST,
    Bags,
    Manifest,
    Shard,
    index_of,
    new_folder,
    new_set,
    shard_name,
    write_file,
)
from vimscale.errors import DataError
from vimscale.prepare.inspection.inspect import Located
from vimscale.prepare.tally import Tally


def merge(sets: list[Located], output: Path) -> Manifest:
    """Write `output` with the shards of all `sets`: hard links if the file system has them, else copies.

    Raises:
        DataError: the sets differ in classes or images, a shard occurs twice or is missing, or the output exists.
    """
    output = new_folder(output)
    _check(sets)
    shards: list[Shard] = []
    with new_set(output) as partial:
        for one in sets:
            for shard in one.manifest.shards:
                path = partial / shard_name(len(shards))
                _link(one.tar(shard), path)
                _link(one.index(shard), index_of(path))
                shards.append(replace(shard, name=path.name))
        manifest = _merged(output.name, [one.manifest for one in sets], tuple(shards))
        write_file(partial / MANIFEST, manifest.to_json().encode())
    return manifest


def _check(sets: list[Located]) -> None:
    first = sets[0]
    owners: dict[str, str] = {}
    for one in sets:
        mine, theirs = one.manifest.classes, first.manifest.classes
        if mine != theirs:
            label = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
            what = (
                f"{_count(mine)}, not {_count(theirs)}"
                if label is None
                else f"class {label} is {mine[label]!r}, not {theirs[label]!r}"
            )
            raise DataError(
                f"data {one.folder}: {what} as in {first.folder}; "
                + (
                    "prepare one of the sets again with the other's class names in --classes FILE"
                    if mine and theirs
                    else "prepare the one with labels again with --no-labels, or train on both as a mixture"
                )
            )
        if one.manifest.image != first.manifest.image:
            own, other = (", ".join(part.manifest.image) or "the usual member" for part in (one, first))
            raise DataError(
                f"data {one.folder}: its images are {own}, not {other} as in {first.folder}; prepare a set from its"
                " tars with `vimscale data prepare`, and merge that"
            )
        sides = [part.manifest.tiles.side if part.manifest.tiles else None for part in (one, first)]
        if sides[0] != sides[1]:
            own, other = (f"bags of {side}-pixel tiles" if side else "images" for side in sides)
            raise DataError(
                f"data {one.folder}: its samples are {own}, not {other} as in {first.folder}; prepare one of the sets"
                " again with the other's --tiles"
            )
        for shard in one.manifest.shards:
            name = str(one.tar(shard))
            for path, size in ((one.tar(shard), shard.bytes), (one.index(shard), shard.index_bytes)):
                if not path.is_file() or path.stat().st_size != size:
                    raise DataError(
                        f"data {one.folder}: {path} is missing or does not have {size:,} bytes; repair the set first:"
                        f" {shlex.join(['vimscale', 'data', 'repair', str(one.folder)])}"
                    )
            if shard.sha256 in owners:
                raise DataError(f"{name} and {owners[shard.sha256]} are the same; give each set once")
            owners[shard.sha256] = name


def _count(classes: tuple[str, ...]) -> str:
    return f"{len(classes):,} classes" if classes else "no labels"


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, to)


def _merged(name: str, parts: list[Manifest], shards: tuple[Shard, ...]) -> Manifest:
    """Combine the manifests; the mean and std weight each set by its number of samples."""
    tally = Tally()
    for part in parts:
        tally.measured += part.samples
        for channel, (m, s) in enumerate(zip(part.mean, part.std, strict=True)):
            tally.means[channel] += part.samples * m
            tally.squares[channel] += part.samples * (s**2 + m**2)
        tally.labels += Counter(dict(enumerate(part.labels)))
        tally.sides += Counter({int(side): count for side, count in part.sides.items()})
        tally.skipped += Counter(part.skipped)
    mean, std = tally.normalisation()
    classes = parts[0].classes
    return Manifest(
        name,
        classes,
        shards,
        mean,
        std,
        source="; ".join(dict.fromkeys(part.source for part in parts if part.source)),
        licence="; ".join(dict.fromkeys(part.licence for part in parts if part.licence)),
        labels=tally.label_counts(len(classes)) if all(part.labels for part in parts) else (),
        sides=tally.side_counts() if all(part.sides for part in parts) else {},
        skipped=tally.skipped_counts(),
        image=parts[0].image,
        tiles=_tiles([part.tiles for part in parts if part.tiles]),
        captions=sum(part.captions for part in parts),
    )


def _tiles(parts: list[Bags]) -> Bags | None:
    if not parts:
        return None
    least, most = min(part.least for part in parts), max(part.most for part in parts)
    return Bags(parts[0].side, least, most, sum(part.total for part in parts))
