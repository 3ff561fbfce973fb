"""An evaluation's results: lines in the terminal, JSON, and a folder of tables and pictures."""

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vimscale.errors import LaunchError, shortened
from vimscale.storage import files

from .lines import print_line

if TYPE_CHECKING:
    from vimscale.evaluation.tally import Tally

_WORST, _CONFUSED, _NAME = 10, 20, 40


def tree(about: dict[str, Any], figures: dict[str, float], notes: list[str], tally: "Tally") -> dict[str, Any]:
    """Everything that an evaluation found, as JSON has it. `about`: the model and the data set."""
    found = about | {"figures": figures, "left_out": tally.left_out, "unreadable": tally.unreadable, "notes": notes}
    if tally.counted:
        found["classes"] = [{"name": one.name, "images": one.images, "top1": one.top1} for one in tally.per_class()]
        found["confused"] = [
            {"true": true, "chosen": chosen, "images": count} for true, chosen, count in tally.confused(_CONFUSED)
        ]
        found["calibration"] = [
            {"images": int(images), "accuracy": hits / images, "probability": probability / images}
            if images
            else {"images": 0}
            for images, hits, probability in tally.bins.tolist()
        ]
    return found


def check_folder(folder: Path) -> None:
    """Raises:
    LaunchError: the folder exists and is not empty, or is a file.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "is not empty"
        raise LaunchError(f"--to {folder} {what}, and nothing is overwritten; name a new folder")


def write(folder: Path, report: dict[str, Any], tally: "Tally") -> None:
    """Write report.json and, if the evaluation chose among classes, per_class.csv, confusion.png and calibration.png.

    Raises:
        LaunchError: the folder is in use.
        OSError: a file cannot be written; names it.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    if not tally.counted:
        return
    from . import plots

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("class", "images", "top1"))
    rows.writerows((one.name, one.images, f"{one.top1:.6f}") for one in tally.per_class())
    files.write(folder / "per_class.csv", text.getvalue())
    title = f"{shortened(report['model'], _NAME)} on {shortened(report['data'], _NAME)}"
    plots.calibration(tally, title, folder / "calibration.png")
    if tally.confusion is not None:
        plots.confusion(tally, title, folder / "confusion.png")


def print_classes(console: Console, tally: "Tally") -> None:
    """Print the classes with the lowest accuracy, and what was not evaluated."""
    for count, why in (
        (tally.left_out, "left out: the model lacks their classes"),
        (tally.unreadable, "cannot be read"),
    ):
        if count:
            print_line(console, f"{count:,} images {why}")
    worst = tally.worst(_WORST)
    if len(worst) < 2:
        return
    names = [shortened(one.name, _NAME) for one in worst]
    width = max(map(len, names))
    count = len(tally.per_class())
    print_line(console, f"lowest of {count:,} classes:" if count > len(worst) else "classes, the lowest first:")
    for name, one in zip(names, worst, strict=True):
        print_line(console, f"  {name:{width}}  {one.top1:7.2%}  ({one.images:,} images)")


def print_probes(console: Console, figures: Mapping[str, float]) -> None:
    """Print what frozen features say: top-1 and top-5 for each k and of the linear classifier, and what it chose."""
    for features, of in (("", "what the head reads"), ("mean_", "the mean of the image's tokens")):
        for key, value in figures.items():
            found = re.fullmatch(rf"{features}(?:knn(\d+)|(knn)|(linear))_top1", key)
            if found is None or (found[2] and any(re.match(rf"{features}knn\d", name) for name in figures)):
                continue
            what = f"kNN, k {found[1]}" if found[1] else "kNN" if found[2] else "linear"
            top5 = figures.get(key.replace("top1", "top5"))
            also = "" if top5 is None else f"  top-5 {top5:.2%}"
            print_line(console, f"  {what:10}  top-1 {value:.2%}{also}  ({of})")
    chosen = {"linear_l2": "L2 factor", "linear_lr": "rate", "linear_layers": "layers", "linear_mean": "mean of tokens"}
    parts = [f"{name} {figures[key]:g}" for key, name in chosen.items() if key in figures]
    if parts:
        print_line(console, f"  linear: {', '.join(parts)}")
