"""A run under way: what the loop, evaluations and recovery share, and the lines that they log."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vimscale.checkpoint.mirror import CheckpointStore, open_mirror
from vimscale.checkpoint.save import Saver
from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.choice import Choice
from vimscale.data.prefetch import Prefetcher
from vimscale.data.training_set import TrainingSet, check_same_labels
from vimscale.engine import layerwise, recompute
from vimscale.engine.compile_ahead import CompileAhead
from vimscale.engine.deepspeed_engine import Average, Engine
from vimscale.evaluation import neighbors
from vimscale.evaluation.figures import evaluate
from vimscale.guard.judge import Guard
from vimscale.model import VimConfig
from vimscale.objectives.base import Objective
from vimscale.recipe.recipe import Recipe
from vimscale.runtime import devices, evaluations
from vimscale.runtime.distributed import RankSpec
from vimscale.runtime.heartbeat import heartbeat
from vimscale.runtime.run_folder import RunFolder
from vimscale.tracking.base import Ending
from vimscale.tracking.trackers import check
from vimscale.training.metrics import Curve, Meter, Metrics
from vimscale.training.pictures import Pictures

log = logging.getLogger(__name__)

Event = dict[str, Any]
"""What rank 0 reports to the launcher: a kind (started, step, eval, checkpoint, guard), and figures."""


@dataclass
class Run:
    """One rank's part of a run. `recovery.resume` and `recovery.roll_back` set the fields below `step`."""

    spec: RankSpec
    emit: Callable[[Event], None]
    train_set: TrainingSet
    val_set: Dataset | None
    knn_set: Dataset | None
    """Whose labels nearest neighbors vote with."""
    steps: int
    """Length of the run."""
    config: VimConfig
    engine: Engine
    guard: Guard
    mirror: CheckpointStore | None
    kernels: CompileAhead
    ema: Average | None = None
    saver: Saver = field(init=False)

    step: int = 0
    """Steps finished."""
    saved: int = 0
    """The step of the newest checkpoint; 0 if there is none."""
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Data that the run passes over, see `Order`."""
    metrics: Metrics | None = None
    """On rank 0."""
    pictures: Pictures | None = None
    """On rank 0, if the recipe asks for pictures."""
    curve: Curve = field(default_factory=Curve)
    warned: str | None = None
    """What the objective warned of at the last line."""
    prefetcher: Prefetcher = field(init=False)
    meter: Meter = field(init=False)

    @classmethod
    def open(cls, spec: RankSpec, emit: Callable[[Event], None]) -> "Run":
        """Open the data and build the model, at step 0.

        Raises:
            UserError: the data are not what the recipe needs, the objective cannot be built, or a tracker is missing.
        """
        if spec.rank == 0:
            check(spec.recipe)
        recipe, device = spec.recipe, torch.device(spec.device)
        train_set = TrainingSet.open(recipe.data, labels=recipe.objective.classifies)
        val_set, knn_set = (
            Dataset.open(source, recipe.data.cache) if source else None
            for source in (recipe.data.val, recipe.evaluate.knn)
        )
        if knn_set is not None and val_set is not None:
            check_same_labels(knn_set.manifest, val_set.manifest)
        steps = recipe.length(train_set.samples)
        config = recipe.shape(len(train_set.manifest.classes))
        kernels = CompileAhead(config, recipe, device, spec.threads)
        torch.manual_seed(recipe.seed)  # the same weights on every rank
        heartbeat.beat("start")
        engine = Engine(config, recipe, device, spec.patience_s)
        heartbeat.beat("start")
        micro = recipe.micro_batch(spec.world).size
        levels = partial(recompute.levels, recipe.parallel, recipe.largest(config), micro, device.type)
        engine.encoder.recompute = levels(layerwise.lowest(engine.model), objective=recipe.objective)
        store = open_mirror(recipe.checkpoint.mirror, recipe.name)
        guard = Guard(recipe, device)
        return cls(spec, emit, train_set, val_set, knn_set, steps, config, engine, guard, store, kernels)

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe

    @property
    def objective(self) -> Objective:
        return self.engine.objective

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.spec.folder)

    def open_stream(self) -> None:
        """Read training data from the current step on, and measure from now."""
        spec, recipe, device = self.spec, self.recipe, self.engine.device
        vars(self).pop("prefetcher", None)  # after a rollback: the workers of before end first
        batches = stream.training(
            recipe,
            self.train_set,
            self.config,
            rank=spec.rank,
            world=spec.world,
            start=self.step,
            steps=self.steps,
            skipped=self.skipped,
            pin=device.type == "cuda",
            views=self.objective.views,
            augmented=self.recipe.objective.reads_images,
        )
        self.prefetcher = Prefetcher(batches, self.train_set.manifest, device)
        self.meter = Meter(self.prefetcher, recipe.data.max_bad, spec.context)

    def evaluate(self) -> dict[str, float]:
        """The figures of the current weights, or of their moving average, on the validation set; logs them."""
        assert self.val_set is not None
        spec, config, engine = self.spec, self.config, self.engine
        backward = [config.backward_at(self.step)] * len(config.layers)
        reading: dict[str, Any] = {
            "size": config.size,
            "choice": Choice.of(config, self.recipe.data),
            "batch": self.recipe.micro_batch(spec.world).size,
            "device": engine.device,
            "rank": spec.rank,
            "world": spec.world,
            "context": spec.context,
            "workers": self.recipe.data.workers,
        }
        engine.model.eval()
        with engine.weights(None if self.ema is None else self.ema.fragments):
            figures = evaluate(
                partial(engine.evaluation_sums, backward=backward),
                self.objective,
                self.val_set,
                self.train_set.manifest,
                **reading,
                shared_of=partial(engine.ask, "evaluation_shared"),
            )
            if self.knn_set is not None:
                embed = partial(engine.embedding, backward=backward)
                k = self.recipe.evaluate.knn_k
                figures |= neighbors.knn(embed, self.knn_set, self.val_set, self.train_set.manifest, k=k, **reading)
        engine.model.train()
        row = {"kind": "eval", "step": self.step, **figures}
        if self.metrics is not None:
            self.metrics.write(row)
        self.emit(row)
        self.meter.restart()
        return figures

    def log_line(self, probes: dict[int, dict[str, Tensor]] | None) -> None:
        """Write a row for every step since the last line, and report the last one. Waits for the device; called by all
        ranks.
        """
        grad_norm = self.engine.grad_norm()
        rows, figures = self.curve.read(self.step, self.spec.world)
        self._warn(figures)
        rows[-1] |= {**figures, "grad_norm": grad_norm, **self.meter.read(self.spec.world)}
        if self.metrics is not None:
            for row in rows:
                self.metrics.write(row)
            if self.recipe.evaluate.asynchronous:
                self.metrics.add_evaluations(self.step)
        epoch = self.recipe.consumed(self.step) / self.train_set.samples
        losses = [row["loss"] for row in rows]
        known = {"steps": self.steps, "epoch": epoch, "figures": figures, "losses": losses}
        self.emit({**rows[-1], "kind": "step", **known})
        if self.metrics is not None and probes:
            self.metrics.write({"kind": "layers", "step": self.step, **_columns(probes)})
        if self.pictures is not None:
            self.pictures.send()

    def close(self, ending: Ending) -> None:
        """Tell the trackers how the run ends. The other ranks need not wait for it."""
        if self.metrics is not None:
            self.metrics.trackers.close(ending)

    def describe(self) -> dict[str, Any]:
        """Write what the ranks compute on, and how long the run is, into its environment.json. Returns, on rank 0, what
        the launcher shows: the rank's `device`, `threads` and data `workers`, and the `best` evaluation so far, by the
        figure `headline`. All ranks call it.
        """
        found = devices.of_all_ranks(self.engine.device)
        if self.spec.rank > 0:
            return {}
        try:
            self.folder.add_to_environment({"ranks": self.spec.world, "steps": self.steps, "devices": found})
        except OSError as error:
            log.warning("environment.json lacks the devices of the ranks: %s", error.strerror)
        headline = self.recipe.objective.headline
        earlier = [row for row in self.folder.rows("eval") if row["step"] <= self.step and headline in row]
        best = (min if headline == "loss" else max)(earlier, key=lambda row: row[headline], default=None)
        shown = {"device": found[0], "threads": self.spec.threads, "workers": self.recipe.data.workers}
        return shown | {"headline": headline, "best": best}

    def unevaluated(self, names: Iterable[str]) -> set[str]:
        """Those of the checkpoints `names` that the launcher has yet to evaluate."""
        chosen = self.recipe.evaluate
        return evaluations.waiting(self.folder, chosen.every, names) if chosen.asynchronous else set()

    def _warn(self, figures: dict[str, float]) -> None:
        """Log what the objective warns of, once each time that it begins to."""
        warning = self.objective.warning(figures, self.step) if figures else None
        if warning is not None and self.warned is None and self.metrics is not None:
            log.warning("step %d: %s", self.step, warning)
            self.metrics.write({"kind": "warning", "step": self.step, "message": warning})
        self.warned = warning

    def log_guard(self, action: str, row: dict[str, Any], message: str) -> None:
        """Write down what the guard does, and report it."""
        if self.metrics is not None:
            self.metrics.write({"kind": "guard", "action": action, **row})
        self.emit({"kind": "guard", "action": action, **row, "message": message})


def _columns(probes: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Probes of the layers as one list per quantity; None where a layer lacks it (attention has no states)."""
    names = dict.fromkeys(name for probe in probes.values() for name in probe)
    return {
        "layer": list(probes),
        **{name: [float(probe[name]) if name in probe else None for probe in probes.values()] for name in names},
    }
