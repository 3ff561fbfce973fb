"""`vimscale checkpoints ...`: list, verify, compare and remove the checkpoints of a run."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import CheckpointError, DataError
from vimscale.runtime import manifest

from .arguments import JsonOption, RunArgument

if TYPE_CHECKING:
    from vimscale.checkpoint.mirror import CheckpointStore
    from vimscale.runtime.run_folder import RunFolder

checkpoints = typer.Typer(help="List, verify, compare and remove a run's checkpoints.", no_args_is_help=True)


@dataclass
class Entry:
    """One checkpoint: in the run's folder, in the mirror, or in both."""

    name: str
    step: int
    here: bool
    mirror: bool
    ranks: int | None = None
    zero: int | None = None
    bytes: int = 0
    saved: float = 0.0
    """When it was saved, in seconds since the epoch, if it is here."""
    fault: str | None = None
    """What is wrong with it, as far as names and sizes show."""
    asked: bool = False
    """Whether it was saved because somebody asked for a stop."""
    resume: bool = False
    """Whether the run would resume from it."""
    set_aside: bool = False


@checkpoints.command(name="list")
def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """List a run's checkpoints, newest first, and show which one the run would resume from. This checks sizes only; use
    verify to check contents.
    """
    from vimscale.runtime.run_folder import RunFolder

    folder = RunFolder.of(run)
    store, mirrored, problem = _mirror(folder)
    entries, foreign = _entries(folder, mirrored), _foreign(folder)
    if as_json:
        listed = {"checkpoints": [asdict(entry) for entry in entries], "mirror": problem or "reached"}
        print(json.dumps({**listed, "foreign": foreign}))
        return
    console = Console()
    if problem is not None:
        console.print(f"checkpoint.mirror: {problem}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if foreign:
        text = f"ignored, because they are not checkpoints: {', '.join(foreign)}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if not entries:
        console.print(f"{folder.path} has no checkpoint yet", highlight=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("checkpoint", "ranks", "ZeRO", "MB", "age", "here", *(["mirror"] if store is not None else []), ""):
        table.add_column(name, justify="right" if name in ("ranks", "ZeRO", "MB", "age") else "left")
    for entry in entries:
        if entry.set_aside:
            continue
        age, size = (_age(entry), f"{entry.bytes / 1e6:,.1f}") if entry.here else ("", "")
        ranks, zero = ("" if number is None else str(number) for number in (entry.ranks, entry.zero))
        cells = [entry.name, ranks, zero, size, age, "" if not entry.here else "damaged" if entry.fault else "intact"]
        if store is not None:
            cells.append("yes" if entry.mirror else "")
        remarks = [*(["for a stop"] if entry.asked else []), *(["resumes from it"] if entry.resume else [])]
        table.add_row(*cells, ", ".join(remarks))
    console.print(table)
    for entry in entries:
        if entry.set_aside:
            text = f"set aside: {entry.name}, {entry.bytes / 1e6:,.1f} MB, {_age(entry)}"
            console.print(text, highlight=False, soft_wrap=True)
        elif entry.fault is not None:
            console.print(f"{entry.name}: {entry.fault}", style="red", highlight=False, soft_wrap=True, markup=False)


def _age(entry: Entry) -> str:
    seconds = time.time() - entry.saved
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _mirror(folder: "RunFolder") -> tuple["CheckpointStore | None", list[str], str | None]:
    """The mirror of a run's checkpoints, the names in it, and why it cannot be reached."""
    from vimscale.checkpoint.mirror import open_mirror

    recipe = folder.recipe()
    try:
        store = open_mirror(recipe.checkpoint.mirror, recipe.name)
        return store, store.names() if store is not None else [], None
    except (OSError, DataError, CheckpointError) as error:
        return None, [], str(error)


def _entries(folder: "RunFolder", mirrored: list[str]) -> list[Entry]:
    """All checkpoints, newest first; those that were set aside come last."""
    from vimscale.runtime.run_folder import intact, is_checkpoint, newest_first, step_of

    paths = {path.name: path for path in folder.checkpoints.glob("step_*") if is_checkpoint(path.name)}
    here = {name: _look_at(path, step_of(name)) for name, path in paths.items()}
    found = {name: Entry(name, step_of(name), here=False, mirror=True) for name in mirrored} | here
    for name in mirrored:
        found[name].mirror = True
    chosen = next(intact(here, mirrored, lambda name, from_mirror: from_mirror or here[name].fault is None), None)
    if chosen is not None:
        found[chosen].resume = True
    entries = [found[name] for name in newest_first(found)]
    for path in _set_aside(folder)[::-1]:
        entry = _look_at(path, int(path.name.split("_")[2]))
        entry.set_aside = True
        entries.append(entry)
    return entries


def _set_aside(folder: "RunFolder") -> list[Path]:
    """Damaged checkpoints that were renamed to damaged_..."""
    from vimscale.runtime.run_folder import is_checkpoint

    found = folder.checkpoints.glob("damaged_step_*")
    return sorted(path for path in found if is_checkpoint("_".join(path.name.split("_")[1:3])) and path.is_dir())


def _foreign(folder: "RunFolder") -> list[str]:
    """Names in the folder of checkpoints that this package did not make."""
    from vimscale.runtime.run_folder import is_checkpoint

    ours = {path.name for path in _set_aside(folder)}
    names = sorted(path.name for path in folder.checkpoints.glob("[!.]*"))
    return [name for name in names if name not in ours and not is_checkpoint(name)]


def _look_at(path: Path, step: int) -> Entry:
    from vimscale.runtime import run_folder

    files = [file.stat() for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    entry = Entry(path.name, step, here=True, mirror=False, bytes=sum(file.st_size for file in files))
    entry.saved = max((file.st_mtime for file in files), default=0.0)
    faults = manifest.faults if path.name.startswith("damaged_") else run_folder.faults
    entry.fault = next(iter(_faults(faults(path, sizes_only=True))), None)
    try:
        train_state = json.loads((path / "trainer.json").read_bytes())
        entry.ranks, entry.zero, entry.asked = (
            train_state["world"],
            train_state["zero"],
            train_state.get("asked", False),
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        entry.fault = entry.fault or f"trainer.json cannot be read ({error})"
    return entry


def _faults(found: Iterator[str]) -> list[str]:
    """Collect faults; that another version wrote the checkpoint, which is raised, counts as one."""
    faults: list[str] = []
    try:
        faults.extend(found)
    except CheckpointError as error:
        faults.append(str(error))
    return faults


@checkpoints.command()
def verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Read all of a run's checkpoints, in its folder and in the mirror, and check every sha256; exit code 1 if one is
    damaged.
    """
    from vimscale.checkpoint import mirror
    from vimscale.runtime import run_folder

    folder = run_folder.RunFolder.of(run)
    store, mirrored, problem = _mirror(folder)
    found = {str(path): _faults(run_folder.faults(path)) for path in run_folder.checkpoints(folder.checkpoints)}
    if store is not None:
        found |= {store.where(name): _faults(mirror.faults(store, name)) for name in mirrored}
    if problem is not None:
        found["checkpoint.mirror"] = [problem]
    damaged = [where for where, faults in found.items() if faults]
    if as_json:
        print(json.dumps(found))
    else:
        console = Console()
        for where, faults in found.items():
            console.print(f"{where}: {'intact' if not faults else 'damaged'}", highlight=False, soft_wrap=True)
            for fault in faults:
                console.print(f"  {fault}", style="red", highlight=False, soft_wrap=True, markup=False)
        damage = f"{len(damaged)} damaged" if damaged else "all intact"
        console.print(f"{len(found)} checkpoints, {damage}", highlight=False)
        if damaged:
            console.print("  a launch sets a damaged one aside and resumes from the one before it", highlight=False)
    raise typer.Exit(1 if damaged else 0)


@checkpoints.command()
def diff(
    run: RunArgument,
    a: Annotated[int, typer.Argument(help="The step of a checkpoint.")],
    b: Annotated[int, typer.Argument(help="The step of another one.")],
    other: Annotated[str | None, typer.Option(help="The run of the second checkpoint; default: the same run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare settings, weights, moving averages and optimizer moments of two checkpoints. They may be of different
    numbers of ranks and ZeRO stages.
    """
    from vimscale.checkpoint.compare import Pair
    from vimscale.runtime.run_folder import RunFolder

    paths = [RunFolder.of(run).newest_checkpoint(a), RunFolder.of(other or run).newest_checkpoint(b)]
    pair = Pair(*paths)
    found = list(pair.differences())
    identical = all(each.same_bits for each in found) and not any(pair.only_in)
    if as_json:
        rows = [
            {**asdict(each), "largest": _finite(each.largest), "relative": _finite(each.relative)} for each in found
        ]
        same = {"tensors": rows, "only_first": pair.only_in[0], "only_second": pair.only_in[1]}
        print(json.dumps({"bit_identical": identical, "settings": pair.settings(), **same}))
        return
    console = Console()
    settings = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, (first, second) in pair.settings().items():
        settings.add_row(key, _short(first), "->", _short(second))
    console.print(settings)
    for path, names in zip(paths, pair.only_in, strict=True):
        for name in names:
            console.print(f"only in {path}: {name}", highlight=False, soft_wrap=True, markup=False)
    if identical:
        console.print(f"all {len(found)} tensors are bit-identical", style="green", highlight=False)
        return
    table = Table("kind", "tensors", "differing", "largest difference", "relative", "most in", box=None)
    for kind in dict.fromkeys(each.kind for each in found):
        mine = [each for each in found if each.kind == kind]
        differ = [each for each in mine if not each.same_bits]
        worst = max(differ, key=lambda each: _badness(each.relative), default=None)
        largest = max((each.largest for each in differ), key=_badness, default=0.0)
        row = (f"{largest:.3g}", f"{worst.relative:.3g}", worst.parameter) if worst else ("bit-identical", "", "")
        table.add_row(kind, str(len(mine)), str(len(differ)), *row)
    console.print(table)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _badness(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@checkpoints.command()
def prune(
    run: RunArgument,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep this many of the newest; default: as in the recipe.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Keep those at multiples of this many steps; default: as in the recipe.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also remove those that were set aside as damaged.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go, and remove nothing.")] = False,
) -> None:
    """Remove a run's older checkpoints, but never the newest intact one, and none while the run is in progress. The
    mirror is left alone.
    """
    from vimscale.checkpoint import retention
    from vimscale.runtime import run_folder

    folder = run_folder.RunFolder.of(run)
    if not dry_run:
        folder.hold("prune its checkpoints once it has ended (checkpoint.keep does it meanwhile)")
    given = {"keep": keep, "keep_every": keep_every}
    rules = folder.recipe().checkpoint.model_copy(update={key: n for key, n in given.items() if n is not None})
    names = [path.name for path in run_folder.checkpoints(folder.checkpoints)]
    newest = folder.newest_checkpoint().name if names else None
    removed = [folder.checkpoints / name for name in sorted(retention.surplus(names, rules)) if name != newest]
    stay = len(names) - len(removed)
    if damaged:
        removed += _set_aside(folder)
    freed = 0
    for path in removed:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        freed += size
        print(f"{path}: {size / 1e6:,.1f} MB")
        if dry_run:
            continue
        if path.name.startswith("damaged_"):
            shutil.rmtree(path)
        else:
            retention.remove(path)
    done = "would be removed, which would free" if dry_run else "removed, which frees"
    print(f"{len(removed)} {done} {freed / 1e6:,.1f} MB; {stay} checkpoints stay")
