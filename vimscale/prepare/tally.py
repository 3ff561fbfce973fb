"""What a data set's manifest counts: labels, sides, skipped inputs, and the pixels' mean and std."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vimscale.data.shards.manifest import Bags, Manifest

SIDES = (1, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
"""Lower edges of the bins of the histogram of shorter sides."""


@dataclass
class Tally:
    """Counts of some samples. The tallies of a set's parts add up to the tally of the set."""

    labels: Counter[int] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    tiles: Counter[int] = field(default_factory=Counter)
    """Bags, by their number of tiles."""
    captions: int = 0
    """Samples with a caption that is not empty."""
    measured: int = 0
    """Images whose pixels were measured. Each has the same weight, whatever its size."""
    means: list[float] = field(default_factory=lambda: [0.0] * 3)
    squares: list[float] = field(default_factory=lambda: [0.0] * 3)

    def count(self, label: int, height: int, width: int) -> None:
        self.labels[label] += 1
        self.sides[max(edge for edge in SIDES if edge <= min(height, width))] += 1

    def measure(self, image: Tensor) -> None:
        """Add the pixels of an image, uint8 (3, h, w)."""
        self.measure_counts(counts_of(image))

    def measure_counts(self, counts: np.ndarray) -> None:
        """Add the pixels of an image of which each value occurs `counts` times, int64 (3, 256)."""
        levels = np.arange(256)  # sums of integers are exact in any order
        self.measured += 1
        for channel, count in enumerate(counts):
            pixels = int(count.sum())
            self.means[channel] += float(count @ levels) / pixels / 255
            self.squares[channel] += float(count @ levels**2) / pixels / 255**2

    @classmethod
    def sum(cls, parts: Iterable["Tally"]) -> "Tally":
        """Add up tallies. Pass them in the order of the set: the last bits of the sums depend on it."""
        total = cls()
        for part in parts:
            total.labels += part.labels
            total.sides += part.sides
            total.skipped += part.skipped
            total.tiles += part.tiles
            total.captions += part.captions
            total.measured += part.measured
            total.means = [a + b for a, b in zip(total.means, part.means, strict=True)]
            total.squares = [a + b for a, b in zip(total.squares, part.squares, strict=True)]
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "labels": sorted(self.labels.items()),
            "sides": sorted(self.sides.items()),
            "skipped": sorted(self.skipped.items()),
            "tiles": sorted(self.tiles.items()),
            "captions": self.captions,
            "measured": self.measured,
            "means": self.means,
            "squares": self.squares,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Tally":
        labels, sides, skipped = (Counter(dict(tree[key])) for key in ("labels", "sides", "skipped"))
        # an older version may have written the record
        tiles, captions = Counter(dict(tree.get("tiles", ()))), tree.get("captions", 0)
        return cls(labels, sides, skipped, tiles, captions, tree["measured"], tree["means"], tree["squares"])

    def label_counts(self, classes: int) -> tuple[int, ...]:
        return tuple(self.labels[label] for label in range(classes))

    def side_counts(self) -> dict[str, int]:
        """Return `Manifest.sides`: without gaps, so that each bin's upper edge is the next key."""
        if not self.sides:
            return {}
        first, last = min(self.sides), max(self.sides)
        return {str(edge): self.sides[edge] for edge in sorted({*SIDES, *self.sides}) if first <= edge <= last}

    def bags(self, side: int | None) -> Bags | None:
        """Return `Manifest.tiles` of bags whose tiles have this side; None if there are no bags."""
        if side is None or not self.tiles:
            return None
        total = sum(tiles * count for tiles, count in self.tiles.items())
        return Bags(side, min(self.tiles), max(self.tiles), total)

    def skipped_counts(self) -> dict[str, int]:
        return dict(sorted(self.skipped.items()))

    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return (mean, std) per channel of images in [0, 1]; std is never 0."""
        mean = [total / self.measured for total in self.means]
        std = [max(total / self.measured - m * m, 0.0) ** 0.5 for total, m in zip(self.squares, mean, strict=True)]
        r, g, b = (round(value, 4) for value in mean)
        # images of one flat colour would be divided by zero
        x, y, z = (max(round(value, 4), 0.001) for value in std)
        return (r, g, b), (x, y, z)


def counts_of(image: Tensor) -> np.ndarray:
    """Count how often each value occurs in an image, uint8 (3, h, w) -> int64 (3, 256)."""
    return np.stack([np.bincount(channel, minlength=256) for channel in image.numpy().reshape(3, -1)])


def sides_text(manifest: Manifest) -> list[tuple[str, int]]:
    """Return the histogram's rows, such as ("256 to 383", 12)."""
    edges = [int(edge) for edge in manifest.sides]
    above = [*edges[1:], *(edge for edge in SIDES if edge > max(edges, default=0)), 0]
    names = [f"{low} to {high - 1}" if high else f"{low} and more" for low, high in zip(edges, above, strict=False)]
    return list(zip(names, manifest.sides.values(), strict=True))
