"""`vimscale data COMMAND`: make, inspect and repair data sets of tar shards."""

import shlex
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vimscale.errors import DataError
from vimscale.recipe import recipe as recipes
from vimscale.recipe import sections
from vimscale.storage import files
from vimscale.storage.addresses import masked

from ..hardware import cpus
from ..processes import temporary
from .arguments import Overrides, RecipeArgument

if TYPE_CHECKING:
    from vimscale.data.images.cutting import Tiling
    from vimscale.data.shards.manifest import Manifest

data = typer.Typer(help="Make, inspect and repair data sets of tar shards.", no_args_is_help=True)

SetArgument = Annotated[
    str, typer.Argument(help="A data set: a folder with a manifest.json, digits:train or slides:train.")
]
ClassesOption = Annotated[
    Path | None, typer.Option("--classes", help="File of class names, one per line, in the order of their labels.")
]
JobsOption = Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one per CPU.")]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", help="Extensions of the image, such as jpg or jpg,tif, if samples in tars hold several."),
]
OriginOption = Annotated[str, typer.Option("--source", help="Origin of the images, for the manifest.")]
LicenceOption = Annotated[str, typer.Option(help="License of the images, for the manifest.")]


@data.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder with one subfolder per class (or train/ and val/ with such subfolders), or of images without"
            " labels; a .csv, .tsv, .jsonl or .parquet; a saved Hugging Face data set or hf:NAME; or tars: a folder of"
            " them, a glob, braces. NAME.txt next to NAME.jpg is its caption.",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="A new folder. Several splits become one data set each, in subfolders.")
    ],
    per_shard: Annotated[
        int | None, typer.Option(min=1, help="Samples per shard. Default: 1000, or 8 with --tiles.")
    ] = None,
    shard_bytes: Annotated[
        str | None, typer.Option(help="Size of a shard, such as 200MB, instead of --per-shard.")
    ] = None,
    val: Annotated[float, typer.Option(min=0, max=0.99, help="Fraction of each class to put into val/.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and of the split.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the samples.")] = True,
    resize: Annotated[
        int | None,
        typer.Option(min=1, help="Resize images to a shorter side of this many pixels, if theirs is larger, as JPEGs."),
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of these JPEGs, and of tiles.")] = 90,
    min_size: Annotated[int, typer.Option(min=1, help="Skip images whose shorter side has fewer pixels.")] = 1,
    max_aspect: Annotated[
        float | None, typer.Option(min=1, help="Skip images whose longer side exceeds the shorter one by this factor.")
    ] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image, to skip those that do not decode.")] = True,
    tiles: Annotated[
        int | None,
        typer.Option(
            min=8, max=4096, help="Cut large images into tiles of this many pixels per side; a sample is a bag of them."
        ),
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=0, help="Level of a pyramid to cut. Default: 0, the full image.")
    ] = None,
    downsample: Annotated[
        float | None, typer.Option(min=1, help="Cut the level that is smaller by this factor, within 5 %.")
    ] = None,
    background: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=255,
            help="Leave out tiles whose pixels, all but one in 1,000, differ from the tile's median color by at most"
            " this much, of 255. 0 keeps all tiles. Default: 10.",
        ),
    ] = None,
    tile_format: Annotated[str | None, typer.Option(help="Format of tiles: jpg (default) or png.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad image instead of skipping it.")
    ] = False,
    classes: ClassesOption = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of a table that holds the images' bytes or paths.")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Column of a table, or key of the .json in tars without .cls, that holds the labels."),
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help="Column of a table, or key of the .json in tars, that holds captions.")
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Read labels, if the input has some, or make a set without.")
    ] = True,
    image: ImageOption = None,
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Prefix each key with the name of its tar.")
    ] = False,
    jobs: JobsOption = None,
    origin: OriginOption = "",
    licence: LicenceOption = "",
) -> None:
    """Write images as shards. An interrupted command resumes where it stopped, and writes the same bytes."""
    from vimscale.prepare import make
    from vimscale.prepare.inputs.classes import read_classes
    from vimscale.prepare.inputs.rows import Columns
    from vimscale.prepare.shapes import Options

    tiling = _tiling(tiles, level, downsample, background, tile_format, quality)
    if tiling is not None and (resize is not None or not decode):
        odd = " and ".join(["--resize"] * (resize is not None) + ["--no-decode"] * (not decode))
        raise DataError(f"--tiles {tiles} decodes images and cuts them at their own size; leave out {odd}")
    options = Options(
        per_shard or (1000 if tiling is None else 8),
        _size(shard_bytes),
        seed,
        shuffle,
        val,
        resize,
        quality,
        min_size,
        max_aspect,
        decode,
        tiling,
    )
    names = read_classes(classes) if classes else None
    columns = Columns(image_column, label_column, caption, labels, names, prefix_keys, _extensions(image))
    written = make.finished(source, output, options, columns, origin=origin, licence=licence)
    if written is not None:
        print(f"{output} is finished; to make it again, give a new folder or remove it")
        return
    with Bar("images") as bar:
        written = make.prepare(
            source,
            output,
            options,
            columns,
            jobs=jobs or cpus(),
            strict=strict,
            origin=origin,
            licence=licence,
            progress=bar.show,
        )
    for split, manifest in written.items():
        _say_written(output / split, manifest)
        if manifest.skipped:
            causes = ", ".join(f"{count:,} x {cause}" for cause, count in manifest.skipped.items())
            print(f"  {sum(manifest.skipped.values()):,} skipped ({causes}): {output / split / make.SKIPPED}")
    first = output / next(iter(written))
    print(f"next: {shlex.join(['vimscale', 'data', 'stats', str(first)])}; in a recipe, data.train: {first}")


@data.command()
def index(
    tars: Annotated[
        list[str], typer.Argument(metavar="TARS...", help="Folders of tars, globs, or paths or URLs with braces.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the manifest and the indexes. Default: the folder of the tars.")
    ] = None,
    classes: ClassesOption = None,
    image: ImageOption = None,
    jobs: JobsOption = None,
    origin: OriginOption = "",
    licence: LicenceOption = "",
) -> None:
    """Make a data set of existing tars: write an index of each tar, and a manifest."""
    from vimscale.prepare import adopt
    from vimscale.prepare.inputs.classes import read_classes

    with Bar("shards") as bar:
        folder, manifest, unread = adopt.index(
            tars,
            output,
            classes=read_classes(classes) if classes else None,
            image=_extensions(image),
            origin=origin,
            licence=licence,
            jobs=jobs or cpus(),
            progress=bar.show,
        )
    _say_written(folder, manifest)
    if unread:
        _list(f"  {len(unread):,} images cannot be read; training will replace and count them:", unread)


@data.command()
def verify(
    source: SetArgument,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read everything: check the sha256 of shards, and decode every image.")
    ] = False,
    jobs: JobsOption = None,
) -> None:
    """Check a data set against its manifest, and list every fault."""
    from vimscale.prepare.inspection import inspect

    located = inspect.locate(source)
    with Bar("shards") as bar:
        # reading only headers takes less time than starting processes
        found = inspect.verify(located, deep=deep, jobs=jobs or (cpus() if deep else 1), progress=bar.show)
    faults = [fault for health in found for fault in health.faults + health.index_faults]
    if deep and not faults:
        faults = inspect.miscounted(located, found)
    if faults:
        shards = sum(bool(health.faults or health.index_faults) for health in found)
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise DataError(
            f"data {source}: {len(faults):,} faults in {shards:,} of {len(found):,} shards\n{lines}\n"
            f"copy these shards again, or see what `{shlex.join(['vimscale', 'data', 'repair', source])}` can save"
        )
    checked = "every image decodes" if deep else "sizes and indexes match; --deep reads the images, too"
    print(f"{source}: {located.manifest.samples:,} samples in {len(found):,} shards are intact: {checked}")
    without, empty = (sum(getattr(health, name) for health in found) for name in ("uncaptioned", "empty_captions"))
    if (without or empty) and without < located.manifest.samples:
        print(f"  captions: {without:,} samples have none, {empty:,} have an empty one")


@data.command()
def repair(
    source: SetArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without --yes, only print what would be done.")] = False,
    jobs: JobsOption = None,
) -> None:
    """Save the intact samples of a damaged data set, and rewrite its indexes and manifest."""
    from vimscale.prepare.inspection import inspect
    from vimscale.prepare.inspection import repair as repairs

    located = inspect.locate(source)
    with Bar("shards") as bar:
        todo = repairs.steps(inspect.verify(located, deep=True, jobs=jobs or cpus(), progress=bar.show))
    if not todo:
        print(f"{source}: nothing to repair")
        return
    _list(f"{source}: {len(todo):,} of {len(located.manifest.shards):,} shards need repair:", map(str, todo))
    if not yes:
        print("nothing is done yet; the same command with --yes does it")
        return
    before = repairs.repair(located, todo, jobs or cpus())
    print("done" if before is None else f"done; the old manifest is {before}, and the old shards are where they were")


@data.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SET SET... OUTPUT", help="Data sets to merge, and a new folder at the end.")
    ],
) -> None:
    """Merge data sets with the same classes into one."""
    from vimscale.prepare import merge as merges
    from vimscale.prepare.inspection import inspect

    *sets, output = sources
    if len(sets) < 2:
        raise DataError("merge takes two or more data sets, and a new folder at the end")
    _say_written(output, merges.merge([inspect.locate(str(one)) for one in sets], output))


@data.command()
def stats(
    source: SetArgument,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw samples before and after augmentation into this PNG.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that the sheet takes image size and augmentation from.")
    ] = None,
) -> None:
    """Print a data set's size, classes, and image statistics."""
    from vimscale.prepare.inspection import inspect

    located = inspect.locate(source)
    Console(markup=False, emoji=False).print(_table(located.manifest))
    if sheet is not None:
        from vimscale.prepare.inspection import contact_sheet

        chosen = recipes.load(recipe) if recipe else None
        picture = contact_sheet.draw(located, chosen)
        with files.replacing(sheet) as partial:
            picture.save(partial, "PNG")
        print(f"{sheet}: samples before and after augmentation")


def _table(manifest: "Manifest") -> Table:
    from vimscale.prepare.tally import sides_text

    size = sum(shard.bytes for shard in manifest.shards)
    counts = [shard.samples for shard in manifest.shards]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("name", manifest.name)
    about = {"source": manifest.source, "licence": manifest.licence, "shards at": masked(manifest.base)}
    for title, text in (about | {"image": ", ".join(manifest.image)}).items():
        if text:
            table.add_row(title, text)
    table.add_row("samples", f"{manifest.samples:,}")
    if (bags := manifest.tiles) is not None:
        each = f"{bags.least:,}" if bags.least == bags.most else f"{bags.least:,} to {bags.most:,}"
        table.add_row("tiles", f"{bags.side} x {bags.side} pixels, {each} per image, {bags.total:,} in all")
    table.add_row("shards", f"{len(counts):,} of {min(counts):,} to {max(counts):,} samples, {size / 1e6:,.1f} MB")
    table.add_row("mean, std", " ".join(map(str, manifest.mean)) + ", " + " ".join(map(str, manifest.std)))
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "none: no labels")
    if manifest.captions:
        table.add_row("captions", f"of {manifest.captions:,} samples")
    ranked = sorted(enumerate(manifest.labels), key=lambda pair: (-pair[1], pair[0]))
    shown: list[tuple[int, int] | None] = [*ranked] if len(ranked) <= 12 else [*ranked[:5], None, *ranked[-5:]]
    most = max(manifest.labels, default=0)
    for row in shown:
        if row is None:
            table.add_row("", f"... {len(ranked) - 10:,} more ...")
        else:
            table.add_row(f"  {manifest.classes[row[0]]}", _bar(row[1], most))
    if manifest.sides:
        table.add_row("shorter side", "pixels")
        for title, count in sides_text(manifest):
            table.add_row(f"  {title}", _bar(count, max(manifest.sides.values())))
    for cause, count in manifest.skipped.items():
        table.add_row(f"skipped: {cause}", f"{count:,}")
    return table


def _bar(count: int, most: int) -> str:
    return f"{count:>10,}  {'━' * round(30 * count / max(most, 1))}"


@data.command()
def digits(
    folder: Annotated[Path, typer.Argument(help="A new folder, for train/ and val/.")],
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Write the embedded data set, 1,797 scans of digits, as webdataset shards."""
    from vimscale.data import digits

    for split, manifest in digits.write(folder, seed).items():
        print(f"{folder / split}: {manifest.samples:,} images in {len(manifest.shards)} shards")


@data.command()
def order(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="The rank to print, counted from 0.")] = 0,
    start: Annotated[int, typer.Option("--from", min=0, help="First step, counted from 0.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 1,
    workers: Annotated[int | None, typer.Option(min=0, help="Data workers. Default: the recipe's.")] = None,
) -> None:
    """Print every sample of a rank: epoch, position, shard, key and a checksum of its augmented pixels.

    The samples come from the loader that training uses. So the output shows that a position holds the same sample
    whatever the number of ranks and workers and the first step.
    """
    from vimscale.data import stream
    from vimscale.data.training_set import TrainingSet

    if rank >= world:
        raise DataError(f"--rank {rank}: with --world {world}, ranks are counted from 0 to {world - 1}")
    changes = [] if workers is None else [f"data.workers={workers}"]
    chosen = recipes.load(recipe, [*(overrides or ()), *changes])
    _, accumulation = chosen.micro_batch(world)
    train_set = TrainingSet.open(chosen.data, labels=chosen.objective.classifies)
    config = chosen.shape(len(train_set.manifest.classes))
    temporary.shorten()
    batches = stream.training(chosen, train_set, config, rank=rank, world=world, start=start, steps=start + steps)
    print("step\tepoch\tposition\tshard\tkey\tpixels")
    for number, batch in enumerate(batches):
        step = start + number // accumulation
        for ref, key, image in zip(batch.refs, batch.keys, batch.images, strict=True):
            shard = train_set.datasets[ref.source].where(ref.shard)
            checksum = 0
            for tensor in stream.tensors_of([image]):
                checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
            print(f"{step}\t{ref.epoch}\t{ref.position}\t{shard}\t{key}\t{checksum:08x}")


def _tiling(
    side: int | None,
    level: int | None,
    downsample: float | None,
    background: int | None,
    kind: str | None,
    quality: int,
) -> "Tiling | None":
    """Return what --tiles and its options ask for; None without --tiles."""
    from vimscale.data.images.cutting import Tiling

    given = {"level": level, "downsample": downsample, "background": background, "format": kind}
    given = {name: value for name, value in given.items() if value is not None}
    if side is None:
        if given:
            names = ", ".join(f"--{name}" for name in given).replace("--format", "--tile-format")
            raise DataError(f"{names}: only tiles have these options; give --tiles SIDE, or leave them out")
        return None
    if level is not None and downsample is not None:
        raise DataError(f"--level {level} and --downsample {downsample:g} both choose a level; give one of them")
    if kind not in (None, "jpg", "png"):
        raise DataError(f"--tile-format {kind!r} is not jpg or png")
    return Tiling(side, quality=quality, **given)  # type: ignore[arg-type]


def _say_written(folder: Path, manifest: "Manifest") -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    what = "images" if manifest.tiles is None else f"images in {manifest.tiles.total:,} tiles,"
    counts = f"{manifest.samples:,} {what} " + (
        f"of {len(manifest.classes):,} classes" if manifest.classes else "without labels"
    )
    if manifest.captions:
        counts += f", {manifest.captions:,} of them with a caption,"
    print(f"{folder}: {counts} in {len(manifest.shards):,} shards, {size:,.1f} MB")


def _list(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")


def _extensions(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip(" .").lower() for part in (text or "").split(",") if part.strip(" ."))


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    size = sections.size_bytes(text)
    if size is None:
        raise DataError(f"--shard-bytes {text!r} is not a size; write 200MB or 1GB")
    return size


class Bar:
    """Progress of a command: a bar in a terminal, elsewhere a line every ten seconds."""

    def __init__(self, what: str):
        self._what = what
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=None)
        self._printed = time.monotonic()

    def __enter__(self) -> "Bar":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            self._console.print(f"{done:,} of {total:,} {self._what}", highlight=False)
