"""The batch of a bad step as a picture."""

import math
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor

from vimscale.prepare.inspection import contact_sheet

_DRAWN = 128
"""The most images in the picture: those with the largest loss."""


def worst_first(report: dict[str, Any]) -> list[int]:
    """Numbers of a report's samples, the largest loss first; those without a finite loss before all others."""
    losses = [sample["loss"] for sample in report["samples"]]
    return sorted(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf, reverse=True)


def label_text(sample: dict[str, Any], name: str) -> str:
    """A sample's label and the name of its class, once if they are the same."""
    return str(sample["label"]) if name in ("", str(sample["label"])) else f"{sample['label']} {name}"


def draw(report: dict[str, Any], images: Sequence[Tensor], names: Sequence[str]) -> Image:
    """Draw a report's samples, the largest loss first: `images` (3, h, w) uint8 and the `names` of their classes."""
    drawn = []
    for i in worst_first(report)[:_DRAWN]:
        sample = report["samples"][i]
        first = f"{label_text(sample, names[i])}   loss {sample['loss']:.4g}"
        drawn.append((images[i], first, f"{sample['key']}   rank {sample['rank']}"))
    title = f"step {report['step']}: {report['reason']}"
    about = f"{len(images)} images before normalizing and mixing, largest loss first; {report['cause']}"
    return contact_sheet.grid(title, about, drawn)
