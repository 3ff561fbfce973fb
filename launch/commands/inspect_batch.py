"""`vimscale inspect-batch`: the batch of a bad step, as a table and as a picture."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vimscale.errors import DataError
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files

from ..display.lines import print_line
from .arguments import RunArgument


def inspect_batch(
    run: RunArgument,
    step: Annotated[int | None, typer.Argument(help="The bad step. Default: the last one with a report.")] = None,
) -> None:
    """Show the batch of a step that the guard found bad: the guard's report, the samples, and a picture of them."""
    show(RunFolder.of(run), step, Console(markup=False, emoji=False))


def show(folder: RunFolder, step: int | None, console: Console) -> None:
    """Print a report and its samples, the largest loss first, and draw the samples into the report's folder.

    Raises:
        CheckpointError: there is no such report.
    """
    from vimscale.guard import picture as guard_picture
    from vimscale.guard import report as guard_report

    path, report, images = guard_report.read(folder, step)
    names = _names(folder, report["samples"])
    head = guard_report.text(report).split("\n\nsamples of the largest loss")[0]
    print_line(console, head)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "micro-batch", "loss", "label", "key", "shard", "sample"):
        table.add_column(name, overflow="fold")
    for i in guard_picture.worst_first(report):
        sample = report["samples"][i]
        label = guard_picture.label_text(sample, names[i])
        loss = f"{sample['loss']:.4g}"
        cells = (sample["rank"], sample["part"], loss, label, sample["key"], sample["shard"], sample["sample"])
        table.add_row(*map(str, cells))
    console.print()
    console.print(table)
    picture = path / "batch.png"
    drawing = guard_picture.draw(report, images, names)
    with files.replacing(picture) as partial:
        drawing.save(partial, "PNG")
    print_line(console, f"\npicture: {picture}")


def _names(folder: RunFolder, samples: list[dict[str, Any]]) -> list[str]:
    """Each sample's class: from the report; for old reports, which lack it, from the training set if it is there."""
    from vimscale.data.training_set import TrainingSet

    if all("class" in sample for sample in samples):
        return [sample["class"] for sample in samples]
    try:
        recipe = folder.recipe()
        manifest = TrainingSet.open(recipe.data, labels=recipe.objective.classifies).manifest
    except DataError:
        return ["" for _ in samples]
    return [manifest.class_name(sample["label"]) for sample in samples]
