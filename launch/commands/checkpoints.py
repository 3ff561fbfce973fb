"""`vimscale checkpoints …`: what a run has saved: look at it, check it, compare it, make room."""

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

checkpoints = typer.Typer(help="Look at a run's checkpoints, check, compare and remove them.", no_args_is_help=True)


@dataclass
class Entry:
    """One checkpoint, here, at the second place, or at both."""

    name: str
    step: int
    here: bool
    second: bool
    ranks: int | None = None
    zero: int | None = None
    bytes: int = 0
    saved: float = 0.0
    """Seconds since the epoch, of one that is here."""
    fault: str | None = None
    """What a glance at names and sizes shows to be wrong."""
    asked: bool = False
    """Saved because a stop was asked for."""
    resume: bool = False
    """Whether a resume would take it."""
    set_aside: bool = False


@checkpoints.command(name="list")
def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """List a run's checkpoints, newest first, and say which one a resume would take. Sizes are looked at, not contents:
    for these, verify.
    """
    from vimscale.runtime.run_folder import RunFolder

    folder = RunFolder.of(run)
    place, there, problem = _second(folder)
    entries, foreign = _entries(folder, there), _foreign(folder)
    if as_json:
        listed = {"checkpoints": [asdict(entry) for entry in entries], "second": problem or "reached"}
        print(json.dumps({**listed, "foreign": foreign}))
        return
    console = Console()
    if problem is not None:
        console.print(f"checkpoint.second: {problem}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if foreign:
        text = f"not checkpoints, and passed over: {', '.join(foreign)}"
        console.print(text, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if not entries:
        console.print(f"{folder.path} has no checkpoint yet", highlight=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("checkpoint", "ranks", "ZeRO", "MB", "age", "here", *(["second"] if place is not None else []), ""):
        table.add_column(name, justify="right" if name in ("ranks", "ZeRO", "MB", "age") else "left")
    for entry in entries:
        if entry.set_aside:
            continue
        age, size = (_age(entry), f"{entry.bytes / 1e6:,.1f}") if entry.here else ("", "")
        ranks, zero = ("" if number is None else str(number) for number in (entry.ranks, entry.zero))
        cells = [entry.name, ranks, zero, size, age, "" if not entry.here else "damaged" if entry.fault else "whole"]
        if place is not None:
            cells.append("there" if entry.second else "")
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


def _second(folder: "RunFolder") -> tuple["CheckpointStore | None", list[str], str | None]:
    """The second place of a run's checkpoints, the names there, and why they cannot be had."""
    from vimscale.checkpoint import mirror as second

    recipe = folder.recipe()
    try:
        place = second.open_mirror(recipe.checkpoint.second, recipe.name)
        return place, place.names() if place is not None else [], None
    except (OSError, DataError, CheckpointError) as error:
        return None, [], str(error)


def _entries(folder: "RunFolder", there: list[str]) -> list[Entry]:
    """Newest first; what was set aside at the end."""
    from vimscale.runtime.run_folder import is_checkpoint, step_of

    found = {name: Entry(name, step_of(name), here=False, second=True) for name in there}
    for path in folder.checkpoints.glob("step_*"):
        if not is_checkpoint(path.name):
            continue
        entry = _look_at(path, step_of(path.name))
        entry.second = path.name in found
        found[path.name] = entry
    entries = sorted(found.values(), key=lambda entry: -entry.step)
    for entry in entries:
        if entry.second or (entry.here and entry.fault is None):
            entry.resume = True
            break
    for path in _set_aside(folder)[::-1]:
        entry = _look_at(path, int(path.name.split("_")[2]))
        entry.set_aside = True
        entries.append(entry)
    return entries


def _set_aside(folder: "RunFolder") -> list[Path]:
    """Checkpoints that were damaged, and have another name since."""
    from vimscale.runtime.run_folder import is_checkpoint

    found = folder.checkpoints.glob("damaged_step_*")
    return sorted(path for path in found if is_checkpoint("_".join(path.name.split("_")[1:3])) and path.is_dir())


def _foreign(folder: "RunFolder") -> list[str]:
    """What lies among the checkpoints and is none of this package's."""
    from vimscale.runtime.run_folder import is_checkpoint

    ours = {path.name for path in _set_aside(folder)}
    names = sorted(path.name for path in folder.checkpoints.glob("[!.]*"))
    return [name for name in names if name not in ours and not is_checkpoint(name)]


def _look_at(path: Path, step: int) -> Entry:
    from vimscale.runtime import run_folder

    files = [file.stat() for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    entry = Entry(path.name, step, here=True, second=False, bytes=sum(file.st_size for file in files))
    entry.saved = max((file.st_mtime for file in files), default=0.0)
    look = manifest.faults if path.name.startswith("damaged_") else run_folder.faults
    entry.fault = next(iter(_faults(look(path, glance=True))), None)
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
    """All of them, of which one may be that another version wrote the checkpoint."""
    faults: list[str] = []
    try:
        faults.extend(found)
    except CheckpointError as error:
        faults.append(str(error))
    return faults


@checkpoints.command()
def verify(run: RunArgument, as_json: JsonOption = False) -> None:
    """Read all of a run's checkpoints, here and at the second place, and compare them with their sha256; exit code 1 if
    one is damaged.
    """
    from vimscale.checkpoint import mirror as second
    from vimscale.runtime import run_folder

    folder = run_folder.RunFolder.of(run)
    place, there, problem = _second(folder)
    found = {str(path): _faults(run_folder.faults(path)) for path in run_folder.checkpoints(folder.checkpoints)}
    if place is not None:
        found |= {place.where(name): _faults(second.faults(place, name)) for name in there}
    if problem is not None:
        found["checkpoint.second"] = [problem]
    damaged = [where for where, faults in found.items() if faults]
    if as_json:
        print(json.dumps(found))
    else:
        console = Console()
        for where, faults in found.items():
            console.print(f"{where}: {'whole' if not faults else 'damaged'}", highlight=False, soft_wrap=True)
            for fault in faults:
                console.print(f"  {fault}", style="red", highlight=False, soft_wrap=True, markup=False)
        damage = f"{len(damaged)} damaged" if damaged else "all whole"
        console.print(f"{len(found)} checkpoints, {damage}", highlight=False)
        if damaged:
            console.print("  a launch sets a damaged one aside and takes the one before it", highlight=False)
    raise typer.Exit(1 if damaged else 0)


@checkpoints.command()
def diff(
    run: RunArgument,
    a: Annotated[int, typer.Argument(help="The step of a checkpoint.")],
    b: Annotated[int, typer.Argument(help="The step of another one.")],
    other: Annotated[str | None, typer.Option(help="The run that the second one is of, if it is another run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints, written at whatever numbers of ranks and ZeRO stages: settings, weights, moving average
    and the optimizer's moments.
    """
    from vimscale.checkpoint.compare import Pair
    from vimscale.runtime.run_folder import RunFolder

    paths = [RunFolder.of(run).newest_checkpoint(a), RunFolder.of(other or run).newest_checkpoint(b)]
    pair = Pair(*paths)
    found = list(pair.differences())
    identical = all(each.same_bits for each in found) and not any(pair.unshared)
    if as_json:
        rows = [
            {**asdict(each), "largest": _finite(each.largest), "relative": _finite(each.relative)} for each in found
        ]
        same = {"tensors": rows, "only_first": pair.unshared[0], "only_second": pair.unshared[1]}
        print(json.dumps({"bit_identical": identical, "settings": pair.settings(), **same}))
        return
    console = Console()
    settings = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, (ours, theirs) in pair.settings().items():
        settings.add_row(key, _short(ours), "->", _short(theirs))
    console.print(settings)
    for path, names in zip(paths, pair.unshared, strict=True):
        for name in names:
            console.print(f"only in {path}: {name}", highlight=False, soft_wrap=True, markup=False)
    if identical:
        console.print(f"all {len(found)} tensors are bit-identical", style="green", highlight=False)
        return
    table = Table("kind", "tensors", "that differ", "largest difference", "relative", "most in", box=None)
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
        int | None, typer.Option(min=1, help="So many of the newest stay; absent: as in the recipe.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Multiples of so many steps stay; absent: as in the recipe.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Remove those, too, that were set aside as damaged.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove a run's older checkpoints, but never the newest whole one, and none while the run is going on. What is at
    the second place stays.
    """
    from vimscale.checkpoint import mirror as second
    from vimscale.runtime import run_folder

    folder = run_folder.RunFolder.of(run)
    if not dry_run:
        folder.hold("its checkpoints are pruned once it has ended (checkpoint.keep does it meanwhile)")
    given = {"keep": keep, "keep_every": keep_every}
    rules = folder.recipe().checkpoint.model_copy(update={key: n for key, n in given.items() if n is not None})
    names = [path.name for path in run_folder.checkpoints(folder.checkpoints)]
    whole = folder.newest_checkpoint().name if names else None
    going = [folder.checkpoints / name for name in sorted(run_folder.surplus(names, rules)) if name != whole]
    if damaged:
        going += _set_aside(folder)
    room = 0
    for path in going:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        room += size
        print(f"{path}: {size / 1e6:,.1f} MB")
        if dry_run:
            continue
        if path.name.startswith("damaged_"):
            shutil.rmtree(path)
        else:
            second.remove(path)
    done = "would be removed, which would give" if dry_run else "removed, which gives"
    print(f"{len(going)} {done} {room / 1e6:,.1f} MB; {len(names) - _regular(going)} checkpoints stay")


def _regular(paths: list[Path]) -> int:
    return sum(not path.name.startswith("damaged_") for path in paths)
