"""The recipe: what to train, typed, and read from YAML files."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from vimscale.errors import RecipeError
from vimscale.model.presets import VimConfig
from vimscale.recipe.model_section import Model
from vimscale.recipe.objective import ClassificationOptions
from vimscale.recipe.objectives import AnyObjective
from vimscale.recipe.sections import (
    Augment,
    Checkpoint,
    Count,
    Data,
    Evaluate,
    Guard,
    Log,
    Optim,
    OwnOptions,
    Parallel,
    Phase,
    Step,
    size_bytes,
)
from vimscale.recipe.typed_yaml import Kind, Section, Whole, check_name, dump
from vimscale.storage import own_code


class MicroBatch(NamedTuple):
    """How a global batch is cut: each data rank takes a contiguous part of it, in `accumulation` micro-batches of
    `size`. A data rank is a group of `parallel.context` ranks, which all read the same images.
    """

    size: int
    """Images that a rank computes at once."""
    accumulation: int
    """Micro-batches per step."""

    def rows(self, data_rank: int, part: int) -> range:
        """The images of the global batch in micro-batch `part` of a data rank."""
        begin = (data_rank * self.accumulation + part) * self.size
        return range(begin, begin + self.size)

    def rank_rows(self, data_rank: int) -> range:
        """The images of the global batch that a data rank computes in a step."""
        return range(self.rows(data_rank, 0).start, self.rows(data_rank + 1, 0).start)


class Recipe(Section):
    """What to train. A recipe names no machine."""

    name: Annotated[str, AfterValidator(check_name)]
    """Name of the run's folder under runs/."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: weights, data order, augmentation, masks."""
    steps: Step | None = None
    """Length of the run in optimizer steps; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Length of the run in passes over the training set, rounded to a whole number of steps."""
    batch: Count = 1024
    """Images per step over all ranks; gradient accumulation follows from it."""
    phases: tuple[Phase, ...] = ()
    """Progressive training: other image sizes and batches, each from a given step on."""
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    objective: AnyObjective = ClassificationOptions()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()

    @classmethod
    def load(cls, source: "Recipe | str | Path", overrides: Iterable[str] = ()) -> "Recipe":
        """Load a YAML file, or a shipped recipe by its name, and apply overrides such as "optim.lr=1e-3". Given a
        recipe, return one with these changes.

        Raises:
            RecipeError: with every fault of the file and the overrides.
        """
        if isinstance(source, Recipe):
            return _KIND.changed(source.model_dump(), overrides, f"recipe {source.name}")
        return load(source, overrides)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        faults = []
        if (self.steps is None) == (self.epochs is None):
            given = "both are given" if self.steps else "neither is given"
            faults.append(f"give the length as steps or as epochs; {given}")
        if self.steps is not None and self.optim.warmup >= self.steps:
            faults.append(f"optim.warmup {self.optim.warmup:,} must be below steps {self.steps:,}")
        if self.optim.min_lr > self.optim.lr:
            faults.append(f"optim.min_lr {self.optim.min_lr:g} is above optim.lr {self.optim.lr:g}")
        if self.optim.head_lr != 1 and not self.objective.classifies:
            fault = f"objective {self.objective.kind} trains no head; leave it out"
            faults.append(f"optim.head_lr {self.optim.head_lr:g}: {fault}")
        if self.optim.schedule == "rise" and self.optim.min_lr == 0:
            faults.append("optim.min_lr 0: schedule rise multiplies it, so it must be above 0")
        micro = self.parallel.micro_batch
        if micro is not None and self.batch % micro:
            near = _nearest(self.batch, micro)
            faults.append(f"batch {self.batch} is not a multiple of parallel.micro_batch {micro}; use batch={near}")
        starts = [phase.step for phase in self.phases]
        if starts != sorted(set(starts)):
            faults.append(f"phases: their steps must increase; they are {', '.join(map(str, starts))}")
        unit = self.augment.repeats * self.data.lanes
        for batch in sorted({self.batch, *(phase.batch for phase in self.phases if phase.batch is not None)}):
            if batch % unit:
                what = f"augment.repeats {self.augment.repeats} x data.lanes {self.data.lanes}"
                near = _nearest(batch, unit)
                faults.append(f"batch {batch} is not a multiple of {what}; use {near} or change those")
        faults += self._phase_faults()
        if self.parallel.context > 1:
            faults += self._context_faults()
        faults += self._tile_faults()
        faults += self._objective_faults()
        config = self.model.shape(classes=1)
        if self.evaluate.knn is not None and self.data.val is None:
            faults.append(f"evaluate.knn {self.evaluate.knn}: nothing to classify; set data.val, or leave it out")
        faults += self._evaluation_faults()
        if self.augment.buckets > 1 and (self.augment.mixes or self.phases):
            faults.append("augment.buckets: images of several shapes can be neither mixed nor resized by phases")
        packs = self.augment.buckets > 1 or (config.tiles is not None and self.parallel.micro_batch != 1)
        if packs and self.model.kinds:
            used = {layer.kind for layer in config.layers}
            faults += [
                f"{own.kind} cannot keep images apart that are packed into one row (`packs` is false):"
                f" {'set parallel.micro_batch: 1' if self.augment.buckets == 1 else 'leave out augment.buckets'}"
                for name, own in self.model.kinds.items()
                if name in used and not getattr(own_code.load(own.kind), "packs", False)
            ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _evaluation_faults(self) -> Iterator[str]:
        """What asynchronous evaluations lack."""
        every, saved = self.evaluate.every, self.checkpoint.every
        if not self.evaluate.asynchronous:
            return
        if self.data.val is None:
            yield "evaluate.asynchronous: nothing to evaluate; set data.val, or leave it out"
        if every % saved:
            yield (
                f"evaluate.every {every} is not a multiple of checkpoint.every {saved}, and evaluate.asynchronous"
                f" evaluates checkpoints; use evaluate.every={_nearest(every, saved)} or checkpoint.every={every}"
            )

    def _tile_faults(self) -> Iterator[str]:
        """What cannot be done with bags of tiles, or without them."""
        config, most = self.model.shape(classes=1), self.data.max_tiles
        if config.tiles is None:
            if most is not None:
                yield f"data.max_tiles {most}: the model takes images; set model.tiles, or leave it out"
            return
        if most is not None:
            try:
                config.with_bag_size(most)
            except ValueError as error:
                yield f"data.max_tiles {most}: {error}"
        elif size_bytes(self.parallel.recompute) is not None:
            yield (
                f"parallel.recompute {self.parallel.recompute}: what bags of any length keep has no limit; set"
                " data.max_tiles, or use scan or block"
            )
        plain = Augment(crop_min=1, flip=self.augment.flip, repeats=self.augment.repeats)
        set_up = self.augment.model_dump()
        odd = [key for key, value in plain.model_dump().items() if set_up[key] != value and key != "aspect_max"]
        if odd:
            fixes = ["set crop_min: 1"] * ("crop_min" in odd)
            others = [key for key in odd if key != "crop_min"]
            fixes += [f"leave out {', '.join(others)}"] * bool(others)
            yield f"augment: bags of tiles (model.tiles) can only be flipped and repeated; {' and '.join(fixes)}"
        if any(phase.image_size is not None for phase in self.phases):
            yield "phases: tiles (model.tiles) keep their size; leave image_size out"

    def _objective_faults(self) -> Iterator[str]:
        """Yield what cannot be done with the recipe's objective."""
        objective, augment, zero = self.objective, self.augment, self.parallel.zero
        kind = f"objective {objective.kind}"
        if augment.buckets > 1 and not objective.packs and objective.reads_images:
            yield f"augment.buckets {augment.buckets}: {kind} needs images of one shape; use augment.buckets=1"
        if not objective.reads_images:
            plain = Augment(crop_min=augment.crop_min, flip=augment.flip, repeats=augment.repeats)
            given = augment.model_dump()
            odd = [key for key, value in plain.model_dump().items() if given[key] != value and key != "aspect_max"]
            if odd:
                yield f"augment: {kind} makes its own views of images; leave out {', '.join(odd)}"
        elif augment.mixes and not objective.mixable:
            yield f"augment: {kind} needs images as they are; leave out mixup and cutmix"
        if self.optim.clip_by == "parameter" and zero == 3:
            yield "optim.clip_by parameter: at stage 3 only the norm over all parameters is known; use zero=2"
        if zero > (most := objective.most_zero):
            yield f"parallel.zero {zero}: {kind} can be trained at stage {most} or lower; use zero={most}"
        config = self.model.shape(classes=1)
        yield from (f"{kind}: {fault}" for fault in objective.faults(config, self._sizes(config)))

    def _phase_faults(self) -> Iterator[str]:
        config = self.model.shape(classes=1)
        for phase in self.phases:
            if phase.image_size is not None and config.tiles is None:
                try:
                    replace(config, image_size=phase.image_size)
                except ValueError as error:
                    yield f"phase at step {phase.step}: {error}"

    def _context_faults(self) -> Iterator[str]:
        from vimscale.model import stretch  # imports torch

        key, config = f"parallel.context {self.parallel.context}", self.largest(self.model.shape(classes=1))
        if not self.objective.divisible:
            yield f"{key}: objective {self.objective.kind} needs whole images on every rank; use parallel.context=1"
        if self.augment.buckets > 1:
            what = f"augment.buckets {self.augment.buckets} packs images into rows, which cannot be cut"
            yield f"{key}: {what}; use augment.buckets=1 or parallel.context=1"
        if config.tiles is not None and self.parallel.micro_batch != 1:
            yield f"{key}: several bags of tiles are packed into rows, which cannot be cut; set parallel.micro_batch=1"
        for fault in stretch.faults(config, self.parallel.context, self._sizes(config)):
            yield f"{key}: {fault}"

    def _sizes(self, config: VimConfig) -> dict[tuple[int, int], str]:
        """Return the heights and widths of the training images, and what to call each of them."""
        sizes = {config.size: "model.image_size"}
        for phase in self.phases:
            sizes.setdefault(self.size_at(phase.step, config.size), f"phase at step {phase.step}: image_size")
        return sizes

    def largest(self, config: VimConfig) -> VimConfig:
        """Return the config of the run's model with the size of its largest bags, for counts of memory and work;
        without data.max_tiles, that of one tile.
        """
        return config if config.tiles is None else config.with_bag_size(self.data.max_tiles or 1)

    def length(self, samples: int) -> int:
        """Return the optimizer steps of a complete run on a training set of this many samples.

        Raises:
            RecipeError: the warm-up is as long as the run, or longer.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = max(round(self._step_after(self.epochs * samples)), 1)
        if self.optim.warmup >= steps:
            fault = (
                f"optim.warmup {self.optim.warmup:,} must be below the {steps:,} steps that {self.epochs:g} epochs are"
            )
            raise RecipeError(f"recipe {self.name}", [fault])
        return steps

    def shape(self, classes: int) -> VimConfig:
        """Return the model's shape for a training set of this many classes; without a head, if the objective needs
        none.
        """
        return self.model.shape(classes if self.objective.classifies else 0)

    def batch_at(self, step: int) -> int:
        """Return the number of images of step `step`, counted from 0."""
        return next((p.batch for p in reversed(self.phases) if p.step <= step and p.batch is not None), self.batch)

    def consumed(self, step: int) -> int:
        """Return the number of images of all steps before `step`."""
        return sum(batch * (min(step, end) - start) for start, end, batch in self._spans() if start < step)

    def size_at(self, step: int, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the training images of step `step`; `size`: the model's own."""
        chosen = next((p.image_size for p in reversed(self.phases) if p.step <= step and p.image_size), size)
        return (chosen, chosen) if isinstance(chosen, int) else chosen

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first step, step after the last, images per step) of each phase; the last one has no end."""
        starts = sorted({0, *(phase.step for phase in self.phases)})
        for start, end in zip(starts, [*starts[1:], sys.maxsize], strict=True):
            yield start, end, self.batch_at(start)

    def _step_after(self, images: float) -> float:
        """Return the step, with its fraction, by which the run has consumed this many images."""
        for start, end, batch in self._spans():
            if images <= batch * (end - start):
                return start + images / batch
            images -= batch * (end - start)
        raise AssertionError("the last span has no end")

    def data_ranks(self, world: int) -> int:
        """Return the number of groups of `parallel.context` ranks that `world` ranks form. Ranks r of group
        g = r // parallel.context are neighbors and read the same images.

        Raises:
            RecipeError: the ranks are not a multiple of `parallel.context`.
        """
        context = self.parallel.context
        if world % context:
            near = max(world // context, 1) * context
            fault = f"{_ranks(world)} cannot be divided into groups of parallel.context {context}"
            fix = f"use --workers {near} or another parallel.context"
            raise RecipeError(f"recipe {self.name}", [f"{fault}; {fix}"])
        return world // context

    def micro_batch(self, world: int, step: int | None = None) -> MicroBatch:
        """Return how `world` ranks, all of them, cut a global batch.

        `step`: the step that it is for, since phases change the batch. default: a step with the recipe's `batch`.

        Raises:
            RecipeError: the ranks are not a multiple of `parallel.context`, or cannot divide the batch, or a phase's
                batch.
        """
        micro, context = self.parallel.micro_batch, self.parallel.context
        groups = self.data_ranks(world)
        unit = groups if micro is None else groups * micro
        ranks = _ranks(world) if context == 1 else f"{groups} group{'s' * (groups > 1)} of {context} ranks"
        sizes = ranks if micro is None else f"{ranks} x parallel.micro_batch {micro}"
        accumulation = 1 if micro is None else max(self.batch // unit, 1)
        faults = []
        if self.batch % unit:
            others = ", another micro_batch" if micro else ""
            fix = f"use batch={_nearest(self.batch, unit)}{others} or another number of --workers"
            faults.append(f"batch {self.batch} is not a multiple of {sizes}; {fix}")
        micro_batches = groups * accumulation
        for phase in self.phases:
            if phase.batch is not None and phase.batch % micro_batches:
                near = _nearest(phase.batch, micro_batches)
                what = f"phase at step {phase.step}: batch {phase.batch}"
                faults.append(f"{what} is not a multiple of {ranks} x {accumulation} micro-steps; use {near}")
        if not faults and self.augment.mixes:
            odd = [images for _, _, batch in self._spans() if (images := batch // micro_batches) % 2]
            faults += [
                f"mixup and cutmix mix pairs, and micro-batches of {images} images are odd; change the batch,"
                " parallel.micro_batch or the number of --workers"
                for images in odd
            ]
        if faults:
            raise RecipeError(f"recipe {self.name}", faults)
        return MicroBatch((self.batch if step is None else self.batch_at(step)) // micro_batches, accumulation)

    @property
    def own_classes(self) -> tuple[str, ...]:
        """The classes in files of the user's own that the recipe names, such as mine.py:MyLoss."""
        found: list[str] = []

        def noted(reference: str) -> str:
            found.append(reference)
            return reference

        self.with_own_classes(noted)
        return tuple(found)

    def with_own_classes(self, change: Callable[[str], str]) -> "Recipe":
        """Return the recipe with `change` applied to each of `own_classes`."""

        def changed(options: OwnOptions) -> OwnOptions:
            kind = options.kind if own_code.split(options.kind) is None else change(options.kind)
            return options.model_copy(update={"kind": kind})

        updates: dict[str, Section] = {"objective": changed(self.objective)}
        if (own := self.augment.own) is not None:
            updates["augment"] = self.augment.model_copy(update={"own": changed(own)})
        if self.model.kinds:
            kinds = {name: changed(options) for name, options in self.model.kinds.items()}
            updates["model"] = self.model.model_copy(update={"kinds": kinds})
        return self.model_copy(update=updates)

    def to_yaml(self) -> str:
        """Write the complete recipe, defaults included, as YAML that `load` and `parse` read."""
        return dump(self.model_dump())


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _nearest(batch: int, unit: int) -> int:
    """Return the multiple of `unit` nearest to `batch`, at least one unit."""
    return max(round(batch / unit), 1) * unit


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_full_paths(tree: dict, folder: Path) -> None:
    """Make the paths of a user's own files, which a recipe gives relative to itself, full ones."""
    augment, model = (_mapping(tree.get(key)) for key in ("augment", "model"))
    for section in (tree.get("objective"), augment.get("own"), *_mapping(model.get("kinds")).values()):
        if isinstance(section, dict) and isinstance(section.get("kind"), str):
            section["kind"] = own_code.absolute(section["kind"], folder)


_KIND = Kind(
    "recipe",
    Recipe,
    RecipeError,
    "recipes",
    either=("steps", "epochs"),
    renamed={"checkpoint.second": "checkpoint.mirror"},
    with_full_paths=_with_full_paths,
)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the recipe `source`, a YAML file or the name of a shipped recipe, and apply `a.b=c` overrides.

    Raises:
        RecipeError: with every fault of the file and the overrides.
    """
    return _KIND.load(source, overrides)


def parse(text: str, where: str) -> Recipe:
    """Parse a recipe that `to_yaml` or `model_dump_json` wrote; `where` names the text in messages.

    Raises:
        RecipeError: with every fault of the text.
    """
    return _KIND.parse(text, where)


def shipped() -> dict[str, Path]:
    """List the recipes that come with the package, by name."""
    return _KIND.shipped()
