"""`vimscale data …`: make data sets of tar shards, look at them, mend them."""

import os
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

from ..processes import temporary
from .arguments import Overrides, RecipeArgument

if TYPE_CHECKING:
    from vimscale.data.shards.manifest import Manifest

data = typer.Typer(help="Make and look at data sets of tar shards.", no_args_is_help=True)

SetArgument = Annotated[str, typer.Argument(help="A data set: a folder with a manifest.json, or digits:train.")]
ClassesOption = Annotated[
    Path | None, typer.Option("--classes", help="File of class names, one a line, in the order of their labels.")
]
JobsOption = Annotated[int | None, typer.Option(min=1, help="Processes; absent: one a CPU.")]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", help="Extension of the image where a tar's samples hold several, such as jpg or jpg,tif."),
]
OriginOption = Annotated[str, typer.Option("--source", help="Where the images are from, for the manifest.")]
LicenceOption = Annotated[str, typer.Option(help="Their licence, for the manifest.")]


@data.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder with a sub-folder a class (or train/ and val/ of such), a .csv, .tsv or .parquet, a saved"
            " Hugging Face data set or hf:NAME, or tars: a folder of them, a glob, braces.",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A new folder; of several splits, each is a set below it.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    shard_bytes: Annotated[str | None, typer.Option(help="Size of a shard instead, such as 200MB.")] = None,
    val: Annotated[float, typer.Option(min=0, max=0.99, help="Share of each class to put into val/.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the order and of the split.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Put the samples into random order.")] = True,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Make images with a larger shorter side so small, as JPEGs.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of these JPEGs.")] = 90,
    min_size: Annotated[int, typer.Option(min=1, help="Skip images with a smaller shorter side.")] = 1,
    max_aspect: Annotated[float | None, typer.Option(min=1, help="Skip images that are longer, side to side.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image, to skip those that cannot be.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first bad image instead of skipping it.")
    ] = False,
    classes: ClassesOption = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table: bytes or paths of the images.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Of a table, or of the .json in tars without .cls: the labels.")
    ] = None,
    image: ImageOption = None,
    prefix_keys: Annotated[bool, typer.Option("--prefix-keys", help="Put a tar's name before its keys.")] = False,
    jobs: JobsOption = None,
    origin: OriginOption = "",
    licence: LicenceOption = "",
) -> None:
    """Write images as shards. A command that was interrupted goes on where it stopped, to the same bytes."""
    from vimscale.prepare import make
    from vimscale.prepare.inputs.classes import read_classes
    from vimscale.prepare.inputs.rows import Columns
    from vimscale.prepare.shapes import Options

    options = Options(per_shard, _size(shard_bytes), seed, shuffle, val, resize, quality, min_size, max_aspect, decode)
    columns = Columns(
        image_column, label_column, read_classes(classes) if classes else None, prefix_keys, _extensions(image)
    )
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
            jobs=jobs or _cpus(),
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
        list[str], typer.Argument(metavar="TARS...", help="Folders of tars, globs, braces, or addresses with braces.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for manifest and indexes; absent: beside the tars.")
    ] = None,
    classes: ClassesOption = None,
    image: ImageOption = None,
    jobs: JobsOption = None,
    origin: OriginOption = "",
    licence: LicenceOption = "",
) -> None:
    """Make a data set of tars that exist: an index of each, and a manifest."""
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
            jobs=jobs or _cpus(),
            progress=bar.show,
        )
    _say_written(folder, manifest)
    if unread:
        _say(f"  {len(unread):,} images cannot be read; training will replace them, and count that:", unread)


@data.command()
def verify(
    source: SetArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read all: sha256 of shards, and decode every image.")] = False,
    jobs: JobsOption = None,
) -> None:
    """Check a data set against its manifest; every fault is listed."""
    from vimscale.prepare.inspection import inspect

    located = inspect.locate(source)
    with Bar("shards") as bar:
        # headers alone take less time than it takes to start processes
        found = inspect.verify(located, deep=deep, jobs=jobs or (_cpus() if deep else 1), progress=bar.show)
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
    how = "every image decodes" if deep else "sizes and indexes fit; --deep reads the images, too"
    print(f"{source}: {located.manifest.samples:,} samples in {len(found):,} shards are whole: {how}")


@data.command()
def repair(
    source: SetArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, it is only said what would be done.")] = False,
    jobs: JobsOption = None,
) -> None:
    """Save what is whole of a damaged data set, and write its indexes and manifest anew."""
    from vimscale.prepare.inspection import inspect
    from vimscale.prepare.inspection import repair as repairs

    located = inspect.locate(source)
    with Bar("shards") as bar:
        todo = repairs.steps(inspect.verify(located, deep=True, jobs=jobs or _cpus(), progress=bar.show))
    if not todo:
        print(f"{source}: nothing to repair")
        return
    _say(f"{source}: {len(todo):,} of {len(located.manifest.shards):,} shards need repair:", map(str, todo))
    if not yes:
        print("nothing is done yet: the same command with --yes does it")
        return
    before = repairs.repair(located, todo, jobs or _cpus())
    print("done" if before is None else f"done; the old manifest is {before}, and the old shards are where they were")


@data.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="SET SET... OUTPUT", help="Data sets, and a new folder.")],
) -> None:
    """Make one data set of several with the same classes."""
    from vimscale.prepare import merge as merges
    from vimscale.prepare.inspection import inspect

    *sets, output = sources
    if len(sets) < 2:
        raise DataError("merge wants two sets or more, and a new folder at the end")
    _say_written(output, merges.merge([inspect.locate(str(one)) for one in sets], output))


@data.command()
def stats(
    source: SetArgument,
    sheet: Annotated[Path | None, typer.Option(help="Draw samples before and after augmentation: a PNG.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Whose image size and augmentation the picture shows.")] = None,
) -> None:
    """Show what a data set consists of."""
    from vimscale.prepare.inspection import inspect

    located = inspect.locate(source)
    Console(markup=False, emoji=False).print(_table(located.manifest))
    if sheet is not None:
        from vimscale.prepare.inspection import contact_sheet

        chosen = recipes.load(recipe) if recipe else None
        picture = contact_sheet.draw(located, chosen)
        with files.replacing(sheet) as partial:
            picture.save(partial, "PNG")
        print(f"{sheet}: samples, and what training makes of them")


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
    table.add_row("shards", f"{len(counts):,} of {min(counts):,} to {max(counts):,} samples, {size / 1e6:,.1f} MB")
    table.add_row("mean, std", " ".join(map(str, manifest.mean)) + ", " + " ".join(map(str, manifest.std)))
    table.add_row("classes", f"{len(manifest.classes):,}")
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
    folder: Annotated[Path, typer.Argument(help="A new folder; train/ and val/ are written below it.")],
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Write the embedded set, 1,797 scans of digits, as webdataset shards."""
    from vimscale.data import digits

    for split, manifest in digits.write(folder, seed).items():
        print(f"{folder / split}: {manifest.samples:,} images in {len(manifest.shards)} shards")


@data.command()
def order(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Which of them.")] = 0,
    start: Annotated[int, typer.Option("--from", min=0, help="First step, counted from 0.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read; absent: the recipe's.")] = None,
) -> None:
    """Print every sample that a rank gets: epoch, position, shard, key and a checksum of its augmented pixels.

    Read through the loader that training uses, so that anyone can see that neither ranks nor workers nor where one
    starts change what a position holds.
    """
    from vimscale.data import stream
    from vimscale.data.training_set import TrainingSet

    if rank >= world:
        raise DataError(f"there is no rank {rank} among {world}: they are counted from 0 to {world - 1}")
    changes = [] if workers is None else [f"data.workers={workers}"]
    chosen = recipes.load(recipe, [*(overrides or ()), *changes])
    _, accumulation = chosen.micro_batch(world)
    train_set = TrainingSet.open(chosen.data)
    config = chosen.model.shape(len(train_set.manifest.classes))
    temporary.shorten()
    batches = stream.training(chosen, train_set, config, rank=rank, world=world, start=start, steps=start + steps)
    print("step\tepoch\tposition\tshard\tkey\tpixels")
    for number, batch in enumerate(batches):
        step = start + number // accumulation
        for ref, key, image in zip(batch.refs, batch.keys, batch.images, strict=True):
            shard = train_set.datasets[ref.source].where(ref.shard)
            checksum = zlib.crc32(image.contiguous().numpy())
            print(f"{step}\t{ref.epoch}\t{ref.position}\t{shard}\t{key}\t{checksum:08x}")


def _say_written(folder: Path, manifest: "Manifest") -> None:
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    counts = f"{manifest.samples:,} images of {len(manifest.classes):,} classes"
    print(f"{folder}: {counts} in {len(manifest.shards):,} shards, {size:,.1f} MB")


def _say(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


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
    """How far a command is: a bar in a terminal, elsewhere a line every ten seconds."""

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
        self._said = time.monotonic()

    def __enter__(self) -> "Bar":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self._console.print(f"{done:,} of {total:,} {self._what}", highlight=False)
