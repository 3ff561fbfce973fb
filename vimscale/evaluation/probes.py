"""Which probes read a frozen encoder, and what they find: nearest neighbors and linear classifiers.

Axes: b images of a micro-batch, n samples, f features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import check_same_labels
from vimscale.errors import RecipeError
from vimscale.evaluation import heads, lars, linear, neighbors
from vimscale.evaluation.cache import FeatureCache, key_of
from vimscale.evaluation.classifier import Choose
from vimscale.evaluation.embedded import HEAD, Embed, Embedded, Read, embedded
from vimscale.evaluation.layers import MEAN, has_layers, last_layers, name_of, reader
from vimscale.evaluation.matching import LACKING, Matched, match
from vimscale.objectives.base import Learner
from vimscale.recipe.sections import size_bytes
from vimscale.runtime import distributed

log = logging.getLogger(__name__)

Method = Literal["lbfgs", "sgd", "lars"]
Pool = Literal["head", "mean"]
_LAYERS = 4


@dataclass(frozen=True)
class Probes:
    """What to read of a frozen encoder. Another process gets it by pickle."""

    knn: str | None = None
    """A labelled set whose nearest images classify the validation set."""
    k: Sequence[int] = neighbors.KS
    """Numbers of neighbors that vote."""
    linear: str | None = None
    """A labelled set to train linear classifiers on."""
    method: Method = "lbfgs"
    """lbfgs: exact logistic regression of standardized features; sgd: DINOv2's grid of heads; lars: MAE's."""
    choose: Choose = "held-out"
    """Which images choose among hyperparameters, in lbfgs and sgd."""
    pools: Sequence[Pool] = (HEAD, MEAN)
    """What nearest neighbors, lbfgs and lars read of the last layer: what the head reads, and the mean of the image's
    tokens, whose figures begin with mean_. A model that pools by the mean has only the first, and so has one of which
    only that can be read, see `layers.has_layers`.
    """
    layers: int | None = None
    """sgd reads the last layer, and this many last layers together; 1: only the last. Default: 4, or all that can be
    read if those are fewer.
    """
    steps: int | None = None
    """Of sgd and lars. Default: as published: 12,500; 90 epochs, and at least the 7,000 that these are on ImageNet."""
    batch: int | None = None
    """Of sgd and lars. Default: as published: 1,024; 16,384. A smaller set is one batch."""
    seed: int = 0
    """Of the initial weights and the order of images in sgd and lars."""
    features: Path | None = None
    """A folder that keeps features for later probes; RUN/features for a run. None: they are not kept."""
    limit: str = "20GB"
    """What `features` may take on disk."""

    def __post_init__(self) -> None:
        faults = [f"k {k}: nearest neighbors are counted from 1" for k in self.k if k < 1]
        if not self.k:
            faults.append("k: there is none; leave it out, or give at least one number of neighbors")
        if unknown := [pool for pool in self.pools if pool not in (HEAD, MEAN)]:
            faults.append(f"pool {unknown[0]}: it is {HEAD} or {MEAN}")
        if not self.pools:
            faults.append(f"pool: there is none; it is {HEAD}, {MEAN} or both")
        for name in ("layers", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} {value}: it is at least 1")
        if size_bytes(self.limit) is None:
            faults.append(f"features limit {self.limit!r} is not a size; write 500MB, 20GB or 2TB")
        if faults:
            raise RecipeError("evaluate", faults)


def probed(
    encoder: Learner | Embed,
    val: Dataset,
    manifest: Manifest,
    probes: Probes,
    *,
    device: torch.device,
    identity: str | None = None,
    precision: str = "fp32",
    cache: str = "100GB",
    **reading: Any,
) -> dict[str, float]:
    """Return the figures of all probes on `val`, the same on every rank and for any number of ranks. All ranks call
    this. If features are kept, a set that has been read before costs no forward pass.

    Args:
        encoder: a learner on `device`, or a function that computes what its head reads, and then nothing else can be
            read.
        manifest: of the set that the model was trained on, for its mean and std.
        identity: sha256 that identifies the weights; None: features are not kept.
        precision: that the caller computes in, by autocast; kept features of another are not read.
        cache: the limit of the node's cache of shards.
        reading: as of `embedded`.

    Raises:
        DataError: a set cannot be read, or has no class in common with `val`.
        RecipeError: the model has fewer layers than `probes.layers`, of those that can be read.
    """
    features = _Features(encoder, manifest, probes, device, identity, precision, reading)
    sources = {source: Dataset.open(source, cache) for source in (probes.knn, probes.linear) if source is not None}
    matched = {source: _matched(dataset.manifest, val.manifest) for source, dataset in sources.items()}
    if not sources:
        return {}
    found = dict[str, float]()
    grid = features.grid(probes.layers) if probes.linear is not None and probes.method == "sgd" else []
    names = {source: list[str]() for source in sources}
    if probes.knn is not None:
        names[probes.knn] += features.pools
    if probes.linear is not None:
        names[probes.linear] += [name for each in grid for name in each] if grid else features.pools
    of_val = features.of(val, list(dict.fromkeys(name for each in names.values() for name in each)))
    tested = {source: _relabelled(of_val, each) for source, each in matched.items()}
    classes = {source: len(dataset.manifest.classes) for source, dataset in sources.items()}
    known = {source: features.of(dataset, list(dict.fromkeys(names[source]))) for source, dataset in sources.items()}
    if probes.linear is not None and probes.method != "lars" and probes.choose == "published":
        log.warning(
            "the linear classifier is chosen on %s, on which it is reported: linear_top1 is the best of all, as DINOv2"
            " publishes it",
            val.manifest.name,
        )
    with torch.autocast(device.type, enabled=False):
        for pool in features.pools:
            prefix = "" if pool == HEAD else f"{pool}_"
            if (s := probes.knn) is not None:
                found |= _prefixed(prefix, features.nearest(known[s], tested[s], pool, classes[s]))
            if (s := probes.linear) is not None and not grid:
                found |= _prefixed(prefix, _linear(known[s], tested[s], pool, classes[s], device, probes))
        if (s := probes.linear) is not None and grid:
            found |= _best_head(known[s], tested[s], grid, classes[s], device, probes)
    return found


def _matched(learned: Manifest, val: Manifest) -> Matched | None:
    """What the labels of `val` mean in the set that a classifier learns from; None: the same. Says what does not match.

    Raises:
        DataError: a set has no labels, or they have no class in common.
    """
    if learned.classes == val.classes or not learned.classes:
        check_same_labels(learned, val)
        return None
    matched = match(learned.classes, val, owner=f"data {learned.name}")
    for note in matched.notes if distributed.rank() == 0 else ():
        log.warning("%s", note)
    return matched


def _relabelled(tested: Embedded, matched: Matched | None) -> Embedded:
    """The images of matched classes, with their labels."""
    if matched is None:
        return tested
    labels = torch.tensor(matched.classes)[tested.labels]
    kept = labels != LACKING
    return Embedded({name: t[kept] for name, t in tested.features.items()}, labels[kept], tested.numbers[kept])


def _prefixed(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in figures.items()}


def _linear(
    train: Embedded, tested: Embedded, name: str, classes: int, device: torch.device, probes: Probes
) -> dict[str, float]:
    if probes.method == "lbfgs":
        return linear.logistic(train, tested, name, classes, device, choose=probes.choose)
    batch = probes.batch or lars.BATCH
    return lars.linear(train, tested, name, classes, device, steps=probes.steps, batch=batch, seed=probes.seed)


def _best_head(
    train: Embedded,
    tested: Embedded,
    grid: Sequence[tuple[str, ...]],
    classes: int,
    device: torch.device,
    probes: Probes,
) -> dict[str, float]:
    """The figures of the best head, and what it reads: linear_layers, a number of layers, and linear_mean, 1 if the
    mean of the image's tokens is among its features.
    """
    every = [heads.Head(names, rate) for names in grid for rate in heads.RATES]
    found, chosen = heads.best_of(
        train,
        tested,
        every,
        classes,
        device,
        choose=probes.choose,
        steps=probes.steps or heads.STEPS,
        batch=probes.batch or heads.BATCH,
        seed=probes.seed,
    )
    return {**found, "linear_layers": len(set(chosen.names) - {MEAN}), "linear_mean": float(MEAN in chosen.names)}


class _Features:
    """Features of sets by one encoder: read from disk, or computed."""

    def __init__(
        self,
        encoder: Learner | Embed,
        manifest: Manifest,
        probes: Probes,
        device: torch.device,
        identity: str | None,
        precision: str,
        reading: dict[str, Any],
    ):
        self.encoder, self.manifest, self.probes, self.device = encoder, manifest, probes, device
        self.identity, self.precision, self.reading = identity, precision, reading
        self.groups = reading.get("world", 1) // reading.get("context", 1)
        only_head = not isinstance(encoder, Learner) or not has_layers(encoder)
        config = encoder.objective.evaluated(encoder).config if isinstance(encoder, Learner) else None
        self.config = None if only_head else config
        """Of the model whose layers can be read; None: only `head` can."""
        distinct = self.config is not None and self.config.pooling != "mean"
        if only_head and tuple(probes.pools) == (MEAN,):
            raise RecipeError("evaluate", [f"pool {MEAN}: of this model only {HEAD} can be read; leave it out"])
        self.pools = [pool for pool in dict.fromkeys(probes.pools) if distinct or pool == HEAD] or [HEAD]
        self.cache: FeatureCache | None = None
        if probes.features is not None and identity is not None:
            self.cache = FeatureCache(probes.features, size_bytes(probes.limit) or 0)

    def grid(self, layers: int | None) -> list[tuple[str, ...]]:
        """List the choices of features of DINOv2's heads: the last layer's or those of all `layers`, each without and
        with the mean of the image's tokens; only once those that are the same.
        """
        if self.config is None:
            return [(HEAD,)]
        last = last_layers(self.config, layers or _LAYERS)
        if layers is not None and len(last) < layers:
            fault = f"layers {layers}: features of {len(last)} layers can be read; give {len(last)} or fewer"
            raise RecipeError("evaluate", [fault])
        names = tuple(name_of(self.config, HEAD, layer) for layer in last)
        grid = list(dict.fromkeys([names[:1], names]))
        with_mean = [] if self.config.pooling == MEAN else [(*each, MEAN) for each in grid]
        return [*grid, *with_mean]

    def of(self, dataset: Dataset, names: list[str]) -> Embedded:
        """The features of a set by name, on every rank: from disk if they are there, or else computed and written."""
        key = self._key(dataset)
        read = None if self.cache is None else self.cache.read(key, names)
        absent = torch.tensor(int(read is None), device=self.device)
        if not int(distributed.largest(absent)) and read is not None:
            return read
        computed = embedded(self._reader(names), dataset, self.manifest, device=self.device, **self.reading)
        if self.cache is not None and distributed.rank() == 0:
            self.cache.write(key, computed)
        return computed

    def _key(self, dataset: Dataset) -> str:
        reading = self.reading
        choice = reading.get("choice")
        return key_of(
            model=self.identity,
            set=dataset.manifest.fingerprint,
            mean=self.manifest.mean,
            std=self.manifest.std,
            size=reading["size"],
            tiles=None if choice is None else [choice.side, choice.most],
            batch=reading["batch"],
            precision=self.precision,
            device=self.device.type,
        )

    def _reader(self, names: list[str]) -> Embed | Read:
        return reader(self.encoder, names) if isinstance(self.encoder, Learner) else self.encoder

    def nearest(self, bank: Embedded, tested: Embedded, name: str, classes: int) -> dict[str, float]:
        """kNN's figures; each group of ranks searches its part of the bank."""
        context, ks = self.reading.get("context", 1), sorted(set(self.probes.k))
        part = slice(self.reading.get("rank", 0) // context, None, self.groups)
        queries = tested.features[name].to(self.device)
        own = (t[part].to(self.device) for t in (bank.features[name], bank.labels, bank.numbers))
        ranked = neighbors.nearest(queries, *own, ks=ks, classes=classes, spread=context)
        return neighbors.figures(ranked.cpu(), tested.labels, ks, classes)
