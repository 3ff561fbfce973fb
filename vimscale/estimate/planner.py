"""What a recipe will need, take and cost on a given machine, before it runs: memory, communication, time, money.

Bytes of the model's states follow from DeepSpeed's layout (`zero_layout`); those of activations are counted with fake
tensors (`activations`); times are predictions (`roofline`), from rates that were measured where somebody has done so
(`calibration`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import get_args

from vimscale.engine import flat, layerwise, recompute, zero_layout
from vimscale.engine.zero_layout import Held, Sent
from vimscale.errors import LaunchError, RecipeError
from vimscale.estimate import activations as memory
from vimscale.estimate import calibration, roofline
from vimscale.estimate.activations import Backend, Passes
from vimscale.estimate.context import Exchanged, exchanged
from vimscale.estimate.devices import Device
from vimscale.estimate.roofline import Fabric, Step
from vimscale.estimate.work import update
from vimscale.model import VimConfig
from vimscale.model.block import Recompute
from vimscale.model.cost import flops
from vimscale.recipe.objective import ClassificationOptions
from vimscale.recipe.recipe import Recipe, parse
from vimscale.recipe.sections import Parallel

USABLE = 0.92
"""Fraction of a device's memory that tensors can use: contexts, NCCL's buffers and gaps take the rest."""
COUNTS = tuple(8 << i for i in range(10))
LEVELS = get_args(Recompute)


@dataclass(frozen=True)
class Target:
    """The machine that a plan is for."""

    name: str
    device: Device | None
    """None for CPUs, whose speed is unknown."""
    memory: int
    """Bytes of one rank's device."""
    fabric: Fabric
    price: float | None
    """Per rank and hour."""

    @property
    def room(self) -> int:
        return int(self.memory * (USABLE if self.device else 1.0))

    @property
    def backend(self) -> Backend:
        return "triton" if self.device else "cpu"


@dataclass(frozen=True)
class Need:
    """Bytes of one rank at the peak of a step."""

    held: Held
    """Between steps; `gradients` includes its gradients if they exist at the peak."""
    gradients: int
    buckets: int
    gathered: int
    """Parameters that stage 3 has gathered."""
    activations: int
    images: int
    graphs: int
    """What CUDA graphs hold twice: gradients, and a micro-batch."""
    buffers: int
    """What an objective keeps besides parameters, such as a teacher."""

    @property
    def total(self) -> int:
        parts = (self.gradients, self.buckets, self.gathered, self.activations, self.images, self.graphs, self.buffers)
        return self.held.between_steps + sum(parts)


@dataclass(frozen=True)
class Option:
    """One ZeRO stage and level of recomputation."""

    zero: int
    recompute: str
    need: Need
    fits: bool
    largest: int
    """Images of the largest micro-batch that fits; 0 if none does."""


@dataclass(frozen=True)
class Outlook:
    """What a plan predicts for a number of ranks."""

    world: int
    micro: int
    accumulation: int
    given: bool
    """Whether this is the recipe's own micro-batch; if not, it is the largest that fits."""
    need: Need
    fits: bool
    sent: Sent
    exchanged: Exchanged
    """What a group of ranks that share images exchanges in the first step."""
    step_s: float
    """Seconds per step; this and the next seven are means over all phases, or their sums."""
    kernels_s: float
    """Seconds of the device's kernels per step."""
    host_s: float
    """Seconds that the host needs to issue a step without graphs; beyond `kernels_s`, the device waits for it."""
    other_s: float
    """As `step_s`, without CUDA graphs if the recipe has them, and with them if not."""
    mfu: float
    days: float
    rank_hours: float
    money: float | None
    stall_s: float
    """Seconds that a checkpoint stops the loop: the copy to the host."""


class Planner:
    """Plans a recipe for a target; everything else follows from the number of ranks."""

    def __init__(self, recipe: Recipe, config: VimConfig, target: Target, samples: int):
        """`samples`: size of the training set; 0 if unknown.

        Raises:
            RecipeError: the model takes bags of tiles, and the recipe does not limit them.
        """
        if config.tiles is not None and recipe.data.max_tiles is None:
            fault = (
                f"data.max_tiles is missing: a plan counts tokens, and bags of any number of tiles of {config.tiles}"
                " pixels have no largest number; set the most tiles that a step may read, such as data.max_tiles=1024"
            )
            raise RecipeError(f"recipe {recipe.name}", [fault])
        self.recipe, self.config, self.target, self.samples = recipe, recipe.largest(config), target, samples
        self.steps = recipe.length(samples) if samples or recipe.steps else None
        self.parameters = lru_cache(maxsize=None)(partial(zero_layout.parameters, config, recipe))
        """By ZeRO stage and number of ranks."""
        self._known: dict[tuple[int, int], Held] = {}
        self._relative: dict[tuple[VimConfig, int], float] = {}
        self.whole = sum(p.numel for p in self.parameters(0, 1))
        """Trained elements."""
        learner = zero_layout.learner(config, recipe)
        self.frozen = [p.numel() for _, p in learner.frozen()]
        """Elements of each frozen parameter."""
        self.lowest = layerwise.lowest(learner)
        """The first layer that the backward pass reaches."""
        self.buffers = sum(buffer.nbytes for buffer in learner.buffers_to_save().values())
        self.looks_ahead = learner.objective.looks_ahead
        average = recipe.optim.ema is not None
        self.checkpoint = self.whole * 4 * (3 + average) + sum(self.frozen) * 4 * (1 + average) + self.buffers

    @property
    def flops(self) -> float:
        """FLOPs of the first step. The backward pass counts as two forward passes; recomputation does not count."""
        return self._flops_at(0)

    def _flops_at(self, step: int) -> float:
        return 3 * self.recipe.batch_at(step) * flops(self._at(step)) * self.relative_work(step)

    def relative_work(self, step: int = 0) -> float:
        """Operations of a step as a multiple of those of the same step of classification."""
        recipe = self.recipe
        if isinstance(recipe.objective, ClassificationOptions):
            return 1
        config, precision, whole = self._at(step), recipe.parallel.precision, recipe.batch_at(step)
        if (config, whole) not in self._relative:
            self._relative[config, whole] = memory.relative_work(
                config, precision, self.target.backend, recipe.objective, whole
            )
        return self._relative[config, whole]

    def _at(self, step: int) -> VimConfig:
        """The model on the images of that step."""
        return dataclasses.replace(self.config, image_size=self.recipe.size_at(step, self.config.size))

    def _micro_at(self, step: int, micro: int) -> int:
        """Images of a micro-batch in that step, if `micro` is that of a batch of the recipe's own size."""
        return max(micro * self.recipe.batch_at(step) // self.recipe.batch, 1)

    def _starts(self) -> list[int]:
        """The first step of each phase."""
        return sorted({0, *(phase.step for phase in self.recipe.phases if phase.step < (self.steps or phase.step + 1))})

    # ---- memory

    def need(self, zero: int, passes: Passes, micro: int, accumulation: int, world: int, images: int) -> Need:
        """`images`: bytes of the micro-batch and of the next one, which is prefetched."""
        held, parameters = self._held(zero, world), self.parameters(zero, world)
        bucket = zero_layout.buckets(parameters, zero)
        gathered = zero_layout.gathered(parameters, world, persist=self.recipe.parallel.persist) if zero == 3 else 0
        whole = 4 * self.whole
        reducing = zero_layout.transient(parameters, zero, world)
        slices = zero_layout.slices(parameters)
        # where gradients stay until the end of a step, they exist during every pass but the first
        if zero == 0 and accumulation == 1:
            gradients, activations = 0, max(passes.with_gradients, whole + reducing, whole + slices // 2)
        elif zero == 3:
            gradients = held.gradients
            # gloo, which reduces on CPUs, copies what it scatters
            activations = max(passes.peak, reducing * (1 if self.target.device else 2))
        else:
            gradients = whole if (zero < 2 and accumulation > 1) or zero == 0 else 0
            if zero == 2 and (accumulation > 1 or self.whole > zero_layout.BUCKET):
                gradients = held.gradients
            # a rank's shard of the gradients is copied out of the bucket, which is freed before the update
            copied = held.gradients
            if self.whole < flat.SEGMENT:  # the bucket is allocated when the gradients are complete
                peak = max(passes.with_gradients, slices) - bucket
            else:  # while the backward pass goes on; the gradients of a segment wait for one another
                peak = max(min(passes.with_gradients, passes.peak + slices // 2), slices)
                copied += passes.end if zero == 1 else 0
            activations = max(peak, copied, held.gradients + reducing - gradients - bucket)
        graphs = whole + images * 4 // 5 if self.replays(zero) else 0
        return Need(held, gradients, bucket, gathered, activations, images, graphs, self.buffers)

    def replays(self, zero: int) -> bool:
        """Whether micro-steps are CUDA graphs."""
        alone, one_size = self.recipe.parallel.context == 1, self.recipe.augment.buckets == 1
        able = self.target.device is not None and zero < 3 and alone and one_size and self.config.tiles is None
        return able and self.recipe.parallel.graphs == "auto"

    def _held(self, zero: int, world: int) -> Held:
        if (zero, world) not in self._known:
            persist, ema = self.recipe.parallel.persist, self.recipe.optim.ema is not None
            held = zero_layout.heaviest(self.parameters(zero, world), zero, world, persist=persist, ema=ema)
            frozen = zero_layout.frozen(self.frozen, zero, world, persist=persist)
            self._known[zero, world] = dataclasses.replace(held, parameters=held.parameters + frozen)
        return self._known[zero, world]

    def _images(self, config: VimConfig, micro: int, accumulation: int) -> int:
        """Bytes of images and views: of the micro-batch, or of all of a step if the objective looks ahead; and of the
        next one, which waits as data workers made it.
        """
        height, width = config.size
        seen, made = memory.view_bytes(config, self.recipe.objective)
        pixels = 3 * height * width
        return micro * ((accumulation if self.looks_ahead else 1) * (4 * pixels + seen) + pixels + made)

    def _levels(self, rule: str, config: VimConfig, micro: int) -> tuple[Recompute, ...]:
        own = self.recipe.parallel
        parallel = Parallel(recompute=rule, precision=own.precision, context=own.context)
        return recompute.levels(parallel, config, micro, "cpu", self.lowest, objective=self.recipe.objective)

    def _passes(self, config: VimConfig, rule: str, micro: int, *, exact: bool) -> Passes:
        if config.tiles is not None:  # a single bag is not packed, and counting many, one by one, takes long
            exact = micro <= 16
        count = memory.passes if exact else memory.estimate
        levels = self._levels(rule, config, micro)
        precision, shared = self.recipe.parallel.precision, self.recipe.parallel.context
        whole = max(self.recipe.batch, micro) if self.looks_ahead else None
        frozen = self.recipe.optim.freeze
        backend, objective = self.target.backend, self.recipe.objective
        return count(config, levels, micro, precision, backend, objective, shared, whole, frozen)

    def _exchanged(self, config: VimConfig, rule: str, micro: int) -> Exchanged:
        """What a group of ranks exchanges for a micro-batch."""
        parallel = self.recipe.parallel
        levels = self._levels(rule, config, micro)
        return exchanged(config, levels, micro, parallel.precision, parallel.context)

    def most(self, zero: int, rule: str, micro: int, accumulation: int, world: int, *, exact: bool) -> Need:
        """The need of the phase that needs the most; `micro`: images for a batch of the recipe's own size."""
        needs = []
        for start in self._starts():
            config, here = self._at(start), self._micro_at(start, micro)
            passes = self._passes(config, rule, here, exact=exact)
            needs.append(self.need(zero, passes, here, accumulation, world, self._images(config, here, accumulation)))
        return max(needs, key=lambda need: need.total)

    def largest(self, zero: int, rule: str, world: int) -> int:
        """Images of the largest micro-batch that fits and divides a data rank's part of the batch; 0 if none does."""
        rank_batch = self.recipe.batch // self.recipe.data_ranks(world)
        even = self.recipe.augment.mixes
        for micro in sorted((m for m in range(1, rank_batch + 1) if rank_batch % m == 0), reverse=True):
            if even and micro % 2:
                continue
            try:
                need = self.most(zero, rule, micro, rank_batch // micro, world, exact=False)
            except RecipeError:  # recompute is a size, which this many images exceed
                continue
            if need.total <= self.target.room:
                return micro
        return 0

    def options(self, world: int) -> Iterator[Option]:
        """Every ZeRO stage with every level of recomputation, and with the recipe's own, at its micro-batch."""
        micro, accumulation = self.recipe.micro_batch(world)
        for rule in dict.fromkeys((*LEVELS, self.recipe.parallel.recompute)):
            for zero in range(4):
                need = self.most(zero, rule, micro, accumulation, world, exact=True)
                fits = need.total <= self.target.room
                yield Option(zero, rule, need, fits, self.largest(zero, rule, world))

    # ---- time

    def outlook(self, world: int) -> Outlook:
        """Predict the recipe on `world` ranks, with another micro-batch if its own does not fit and another does.

        Raises:
            RecipeError: the batch cannot be divided among that many ranks.
        """
        zero, rule = self.recipe.parallel.zero, self.recipe.parallel.recompute
        micro, accumulation = self.recipe.micro_batch(world)
        need = self.most(zero, rule, micro, accumulation, world, exact=False)
        fits = need.total <= self.target.room
        given = fits
        if not fits and (other := self.largest(zero, rule, world)):
            micro, accumulation = other, self.recipe.batch // self.recipe.data_ranks(world) // other
            need, fits = self.most(zero, rule, micro, accumulation, world, exact=False), True
        sent = zero_layout.sent(
            self.parameters(zero, world), zero, world, accumulation, persist=self.recipe.parallel.persist
        )
        replays = self.replays(zero)
        seconds, kernels, host, other_s, work = 0.0, 0.0, 0.0, 0.0, 0.0
        starts = self._starts()
        ends = [*starts[1:], self.steps or starts[-1] + 1]
        for start, end in zip(starts, ends, strict=True):
            step = self._step(start, rule, micro, accumulation, zero, world, sent)
            seconds += (end - start) * step.seconds(zero, graphs=replays)
            other_s += (end - start) * step.seconds(zero, graphs=not replays)
            kernels += (end - start) * step.kernels
            host += (end - start) * step.host
            work += (end - start) * self._flops_at(start)
        device, price = self.target.device, self.target.price
        hours = seconds / 3600
        return Outlook(
            world=world,
            micro=micro,
            accumulation=accumulation,
            given=given,
            need=need,
            fits=fits,
            sent=sent,
            exchanged=self._exchanged(self._at(0), rule, self._micro_at(0, micro)) * accumulation,
            step_s=seconds / ends[-1],
            kernels_s=kernels / ends[-1],
            host_s=host / ends[-1],
            other_s=other_s / ends[-1],
            mfu=work / (seconds * world * device.bf16) if device else 0.0,
            days=hours / 24,
            rank_hours=hours * world,
            money=None if price is None else price * hours * world,
            stall_s=self.checkpoint / world / roofline.HOST,
        )

    def _step(self, start: int, rule: str, micro: int, accumulation: int, zero: int, world: int, sent: Sent) -> Step:
        """Seconds of step `start`; 0 if the device's rates are unknown."""
        device = self.target.device
        if device is None:
            return Step(0.0, 0.0, 0.0, 0.0)
        rates = calibration.rates_of(device)
        config, here = self._at(start), self._micro_at(start, micro)
        work = self._passes(config, rule, here, exact=False).work * accumulation
        work += update(self.whole // (world if zero else 1))
        checkpoints = accumulation * self._levels(rule, config, here).count("block")
        engine = len(self.parameters(zero, world)) * rates.engine_s
        shared = self._exchanged(config, rule, here) * accumulation
        return Step(
            kernels=sum(roofline.kernels(device, rates, work).values()),
            host=roofline.host(rates, work, checkpoints) + engine,
            engine=engine,
            communication=self.target.fabric.seconds(sent, world),
            exchange=self.target.fabric.exchange_seconds(shared, self.recipe.parallel.context, world),
        )

    # ---- refusals

    def refuse(self, world: int, otherwise: str = "") -> None:
        """Raises:
        LaunchError: the recipe does not fit; the message says by how much, and what would fit. `otherwise` is appended.
        """
        parallel = self.recipe.parallel
        micro, accumulation = self.recipe.micro_batch(world)
        need = self.most(parallel.zero, parallel.recompute, micro, accumulation, world, exact=True)
        if need.total <= self.target.room:
            return
        problem = (
            f"{self.recipe.name} does not fit {self.target.name} on {world} rank{'s' * (world > 1)}: one needs"
            f" {need.total / 1e9:.1f} GB (ZeRO-{parallel.zero}, recompute {parallel.recompute}, micro-batch {micro})"
            f" and has {self.target.room / 1e9:.1f} GB"
        )
        fixes = list(self._fixes(world, micro))
        fix = f"would fit: {' | '.join(fixes)}" if fixes else "nothing that was tried would fit"
        raise LaunchError("; ".join(part for part in (problem, fix, otherwise) if part))

    def _fixes(self, world: int, micro: int) -> Iterator[str]:
        parallel = self.recipe.parallel
        own = parallel.recompute
        if fitting := self.largest(parallel.zero, own, world):
            yield f"parallel.micro_batch={fitting}"
        for rule in (rule for rule in ("scan", "block") if rule != own):
            if self.largest(parallel.zero, rule, world) >= micro:
                yield f"parallel.recompute={rule}"
                break
        for zero in range(parallel.zero + 1, 4):
            if self.largest(zero, own, world) >= micro:
                yield f"parallel.zero={zero}"
                break
        for zero in range(parallel.zero, 4):  # the least that fits at all
            if fitting := self.largest(zero, "block", world):
                yield f"parallel.zero={zero} parallel.recompute=block parallel.micro_batch={fitting}"
                break
        else:  # not even a single image
            for shared in (parallel.context << i for i in range(1, world.bit_length())):
                if world % shared == 0 and (fitting := self._largest_shared(shared, world)):
                    yield f"parallel.context={shared} parallel.recompute=block parallel.micro_batch={fitting}"
                    break
        if self.target.device is None:  # more ranks on a machine share its memory
            return
        for more in (world << i for i in range(1, 10)):
            if self.recipe.batch % self.recipe.data_ranks(more) == 0 and self.largest(parallel.zero, own, more):
                yield f"{more} GPUs"
                break

    def _largest_shared(self, context: int, world: int) -> int:
        """As `largest`, if groups of `context` ranks shared their images and recomputed blocks; 0 if the model cannot
        be cut.
        """
        parallel = self.recipe.parallel.model_copy(update={"context": context})
        try:
            recipe = parse(self.recipe.model_copy(update={"parallel": parallel}).to_yaml(), "of a plan")
        except RecipeError:
            return 0
        return Planner(recipe, self.config, self.target, self.samples).largest(parallel.zero, "block", world)


def lanes_and_shards(recipe: Recipe, shards: Sequence[int], nodes: int, *, remote: bool) -> list[str]:
    """Warnings about how the data divide among nodes; `shards`: the number of shards of each data set."""
    notes = []
    lanes = recipe.data.lanes
    if remote and lanes < nodes:
        notes.append(
            f"data.lanes {lanes} is below {nodes} nodes: every node fetches more than its part of the data; set"
            f" data.lanes={nodes}"
        )
    elif lanes > 1 and lanes % nodes:
        notes.append(f"data.lanes {lanes} is not a multiple of {nodes} nodes: some have more lanes than others")
    for source, count in zip(recipe.data.sources, shards, strict=True):
        if count < lanes:
            notes.append(f"data {source.data}: {count} shards for {lanes} lanes: lanes share shards")
        elif count % lanes:
            notes.append(f"data {source.data}: {count} shards are not a multiple of {lanes} lanes")
    return notes
