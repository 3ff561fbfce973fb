"""`vimscale inspect-batch`: the batch of a bad step as a table and as a picture."""

import math

from rich.console import Console
from rich.table import Table

from vimscale import guard_report
from vimscale.prepare import contact_sheet
from vimscale.recipe import Recipe
from vimscale.run_folder import RunFolder

_DRAWN = 128
"""Images of the picture, those of the largest loss."""


def show(folder: RunFolder, step: int | None, console: Console) -> None:
    """Print a report and its samples, those of the largest loss first, and draw them into the report's folder.

    Raises:
        CheckpointError: there is no such report.
    """
    path, report, images = guard_report.read(folder, step)
    classes = _classes(folder.recipe())
    head = guard_report.text(report).split("\n\nsamples of the largest loss")[0]
    console.print(head, highlight=False, soft_wrap=True, markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "micro-batch", "loss", "label", "key", "shard", "sample"):
        table.add_column(name, overflow="fold")
    order = sorted(range(len(images)), key=lambda i: _badness(report["samples"][i]["loss"]), reverse=True)
    drawn = []
    for i in order:
        sample = report["samples"][i]
        label = f"{sample['label']} {classes[sample['label']]}"
        loss = f"{sample['loss']:.4g}"
        cells = (sample["rank"], sample["part"], loss, label, sample["key"], sample["shard"], sample["sample"])
        table.add_row(*map(str, cells))
        drawn.append((images[i], f"{label}   loss {loss}", f"{sample['key']}   rank {sample['rank']}"))
    console.print()
    console.print(table)
    title = f"step {report['step']}: {report['reason']}"
    about = f"{len(images)} images before normalising and mixing, those of the largest loss first; {report['cause']}"
    picture = path / "batch.png"
    contact_sheet.grid(title, about, drawn[:_DRAWN]).save(picture)
    console.print(f"\npicture: {picture}", highlight=False, soft_wrap=True)


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _classes(recipe: Recipe) -> tuple[str, ...]:
    from vimscale.data.training_set import TrainingSet

    return TrainingSet.open(recipe.data).manifest.classes
