"""The data sets that a recipe trains on, as one."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vimscale.data.dataset import Dataset, Traffic
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import Data, size_bytes

Skipped = Sequence[tuple[int, int]]
"""(step, images): from which step on so many images were passed over."""
log = logging.getLogger(__name__)

_STATE = 1


@dataclass(frozen=True)
class TrainingSet:
    datasets: tuple[Dataset, ...]

    @classmethod
    def open(cls, data: Data) -> "TrainingSet":
        """Raises:
        DataError: one of the sets cannot be opened, or they do not have the same classes.
        """
        opened = tuple(Dataset.open(source.data, data.cache) for source in data.sources)
        first = opened[0].manifest.classes
        for source, dataset in zip(data.sources, opened, strict=True):
            if dataset.manifest.classes != first:
                raise DataError(
                    f"data {source.data} has other classes than {data.sources[0].data}, and labels would mean two"
                    " things; prepare both with the same --classes"
                )
            if dataset.manifest.samples < data.lanes:
                raise DataError(
                    f"data {source.data}: {dataset.manifest.samples} samples cannot be cut into {data.lanes} lanes;"
                    " lower data.lanes"
                )
            largest = max(shard.bytes for shard in dataset.manifest.shards)
            if dataset.remote and (size_bytes(data.cache) or 0) < data.window * largest:
                log.warning(
                    "data.cache %s holds less than a window, %d shards of %.1f GB: shards will be fetched again and"
                    " again; raise data.cache, or lower data.window",
                    *(data.cache, data.window, largest / 1e9),
                )
        return cls(opened)

    @property
    def manifest(self) -> Manifest:
        """Of the first data set: its classes, and the mean and deviation that images are normalised with."""
        return self.datasets[0].manifest

    @property
    def samples(self) -> int:
        return sum(dataset.manifest.samples for dataset in self.datasets)

    @property
    def traffic(self) -> Traffic:
        return sum((dataset.traffic for dataset in self.datasets), Traffic())

    @property
    def about(self) -> dict[str, Any]:
        """What whoever uses the model later must know of the data, which need not be there then."""
        manifest = self.manifest
        return {
            "name": manifest.name,
            "samples": self.samples,
            "classes": list(manifest.classes),
            "mean": list(manifest.mean),
            "std": list(manifest.std),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 over the manifests, wherever their shards are."""
        each = [dataset.manifest.fingerprint for dataset in self.datasets]
        return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()

    def state(self, recipe: Recipe, step: int, skipped: Skipped = ()) -> dict[str, Any]:
        """Where the stream stands when the optimizer has taken `step` steps, and all that its order follows from.
        The same on every rank, and enough to go on at any number of them.
        """
        weights = [[0, [source.weight for source in recipe.data.sources]]]
        weights += [[change.step, list(change.weights)] for change in recipe.data.reweight]
        return {
            "format": _STATE,
            "data": self.fingerprint,
            "samples": recipe.consumed(step) + sum(images for at, images in skipped if at <= step),
            "skipped": [list(pair) for pair in skipped],
            "seed": recipe.seed,
            "batch": recipe.batch,
            "phases": [[phase.step, phase.batch] for phase in recipe.phases if phase.batch is not None],
            "window": recipe.data.window,
            "lanes": recipe.data.lanes,
            "repeats": recipe.augment.repeats,
            "weights": weights if len(self.datasets) > 1 else [],
        }

    def resume(self, recipe: Recipe, step: int, state: dict[str, Any]) -> list[tuple[int, int]]:
        """What was skipped until then, having made sure that the stream goes on after `step` steps as the one whose
        `state` was saved then would have.

        Raises:
            DataError: the data or what their order follows from are not the same.
        """
        skipped = [(at, images) for at, images in state.get("skipped", ())]
        expected = self.state(recipe, step, skipped)
        changed = [key for key in expected if state.get(key) != expected[key]]
        names = ", ".join(source.data for source in recipe.data.sources)
        if "data" in changed:
            raise DataError(
                f"data {names} is not what the checkpoint of step {step} was trained on (manifests differ);"
                " give those data back, or choose another name="
            )
        if changed:
            told = "; ".join(f"{key} was {state.get(key)} and is {expected[key]}" for key in changed)
            raise DataError(
                f"data {names}: the order of samples would not be that of the checkpoint of step {step}: {told};"
                " take the recipe that it was saved with, or choose another name="
            )
        return skipped
