"""The data sets that a recipe trains on, treated as one."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

from vimscale.data.dataset import Dataset, Traffic
from vimscale.data.order import Skipped, positions_before
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import DataError
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import Data, size_bytes

log = logging.getLogger(__name__)

_STATE = 1


def check_labels(source: str, manifest: Manifest) -> None:
    """Raises:
    DataError: the set has no labels.
    """
    if not manifest.classes:
        raise DataError(
            f"data {source} has no labels, and an objective that classifies needs them; use a set with labels, or train"
            " without: objective.kind"
        )


def check_same_labels(bank: Manifest, val: Manifest) -> None:
    """Raises:
    DataError: the two sets do not have the same classes, or none.
    """
    if not bank.classes or bank.classes != val.classes:
        what = "has no labels" if not bank.classes else f"has other classes than {val.name}"
        raise DataError(
            f"data {bank.name} {what}: nearest neighbors and linear classifiers learn from its labels, and are tested"
            f" on {val.name}; give two sets with the same classes (evaluate.knn, --linear; data.val)"
        )


@dataclass(frozen=True)
class TrainingSet:
    datasets: tuple[Dataset, ...]

    @classmethod
    def open(cls, data: Data, *, labels: bool = True) -> "TrainingSet":
        """Open the recipe's data sets. `labels`: whether the objective learns them; if not, sets need none, and their
        classes may differ.

        Raises:
            DataError: a set cannot be opened, the sets have different classes or none, or one has fewer samples than
                lanes.
        """
        datasets = tuple(Dataset.open(source.data, data.cache) for source in data.sources)
        first = datasets[0].manifest.classes
        for source, dataset in zip(data.sources, datasets, strict=True):
            if labels:
                check_labels(source.data, dataset.manifest)
            if labels and dataset.manifest.classes != first:
                raise DataError(
                    f"data {source.data} has other classes than {data.sources[0].data}, so a label would have two"
                    " meanings; prepare both with the same --classes"
                )
            if dataset.manifest.samples < data.lanes:
                raise DataError(
                    f"data {source.data}: {dataset.manifest.samples} samples cannot be split into {data.lanes} lanes;"
                    " lower data.lanes"
                )
            largest = max(shard.bytes for shard in dataset.manifest.shards)
            if dataset.remote and (size_bytes(data.cache) or 0) < data.window * largest:
                log.warning(
                    "data.cache %s holds less than one window, %d shards of %.1f GB, so shards will be fetched"
                    " repeatedly; raise data.cache, or lower data.window",
                    *(data.cache, data.window, largest / 1e9),
                )
        return cls(datasets)

    @staticmethod
    def recorded(about: dict[str, Any], recipe: Recipe) -> Manifest:
        """Return name, classes, mean and std of the set that a checkpoint was trained on, without the set. `about`:
        what it keeps of `TrainingSet.about`; checkpoints of early versions keep nothing, and need the set.

        Raises:
            DataError: such a checkpoint's training set cannot be read.
        """
        if not about:
            try:
                return TrainingSet.open(recipe.data, labels=recipe.objective.classifies).manifest
            except DataError as error:
                raise DataError(
                    "the checkpoint is of an early version, which did not keep its classes, mean and std, so they are"
                    f" read from its training set, and {error}\n  put the set there, or change data.train in the run's"
                    " recipe.yaml"
                ) from None
        classes, mean, std = (tuple(about[key]) for key in ("classes", "mean", "std"))
        return Manifest(name=about["name"], classes=classes, shards=(), mean=mean, std=std)

    @property
    def manifest(self) -> Manifest:
        """The first data set's manifest: its classes, which are everyone's if the objective learns them, and the mean
        and std that images are normalised with.
        """
        return self.datasets[0].manifest

    @property
    def samples(self) -> int:
        return sum(dataset.manifest.samples for dataset in self.datasets)

    @property
    def traffic(self) -> Traffic:
        return sum((dataset.traffic for dataset in self.datasets), Traffic())

    @property
    def about(self) -> dict[str, Any]:
        """What a later user of the model needs to know about the data, without having the data."""
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
        """sha256 over the manifests; it does not depend on where their shards are."""
        each = [dataset.manifest.fingerprint for dataset in self.datasets]
        return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()

    def state(self, recipe: Recipe, step: int, skipped: Skipped = ()) -> dict[str, Any]:
        """Return the state of the stream after `step` optimizer steps, and everything that determines its order.

        It is the same on every rank, and enough to resume on any number of ranks.
        """
        weights = [[0, [source.weight for source in recipe.data.sources]]]
        weights += [[change.step, list(change.weights)] for change in recipe.data.reweight]
        return {
            "format": _STATE,
            "data": self.fingerprint,
            "samples": positions_before(recipe, step, skipped),
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
        """Check that the stream up to `step` steps is the one that saved `state`, so that it continues there.

        Returns what had been skipped by then.

        Raises:
            DataError: the data, or something that determines their order up to `step`, has changed.
        """
        skipped = [(at, images) for at, images in state.get("skipped", ())]
        expected = self.state(recipe, step, skipped)
        by_step = ("phases", "weights")
        before, after = (
            {**each, **{key: _begun(each.get(key), step) for key in by_step}} for each in (state, expected)
        )
        changed = [key for key in expected if before.get(key) != after[key]]
        names = ", ".join(source.data for source in recipe.data.sources)
        if "data" in changed:
            raise DataError(
                f"data {names} is not what the checkpoint of step {step} was trained on (manifests differ);"
                " restore that data, or choose another name="
            )
        if changed:
            changes = "; ".join(f"{key} was {state.get(key)} and is {expected[key]}" for key in changed)
            raise DataError(
                f"data {names}: the order of samples would differ from that of the checkpoint of step {step}:"
                f" {changes}; use the recipe that it was saved with, or choose another name="
            )
        return skipped


def _begun(entries: Any, step: int) -> Any:
    """Those of [step, ...] entries that begin before `step`; anything else as it is."""
    if not (isinstance(entries, list) and all(isinstance(entry, list) and entry for entry in entries)):
        return entries
    return [entry for entry in entries if entry[0] < step]
