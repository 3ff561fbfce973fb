"""What a recipe will need, take and cost where it is to run, before it runs: memory, communication, time, money.

Bytes of the model's states follow from DeepSpeed's layout (`sharding`), those of activations are counted with fake
tensors (`memory`), and times are predictions (`roofline`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from vimscale.engine import recompute, zero_layout
from vimscale.engine.zero_layout import Held, Parameter, Sent
from vimscale.errors import LaunchError, RecipeError
from vimscale.estimate import activations as memory
from vimscale.estimate import roofline
from vimscale.estimate.activations import Backend, Passes
from vimscale.estimate.devices import Device
from vimscale.estimate.roofline import Fabric
from vimscale.model import VimConfig
from vimscale.model.cost import flops
from vimscale.model.vim import Recompute
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import Parallel

USABLE = 0.92
"""Share of a device's memory that tensors can have: the rest is for contexts, NCCL's buffers and gaps."""
COUNTS = tuple(8 << i for i in range(10))
LEVELS = get_args(Recompute)


@dataclass(frozen=True)
class Target:
    """Where a recipe is to run, as far as a plan asks."""

    name: str
    device: Device | None
    """None: CPUs, whose speed is not known here."""
    memory: int
    """Bytes of one rank's device."""
    fabric: Fabric
    price: float | None
    """Of a rank's hour."""

    @property
    def room(self) -> int:
        return int(self.memory * (USABLE if self.device else 1.0))

    @property
    def backend(self) -> Backend:
        return "triton" if self.device else "cpu"


@dataclass(frozen=True)
class Need:
    """Bytes of one rank in the midst of a step."""

    held: Held
    """Between steps; its gradients are among `gradients` where they live through the peak."""
    gradients: int
    buckets: int
    gathered: int
    """Parameters that are whole for the time being."""
    activations: int
    images: int

    @property
    def total(self) -> int:
        parts = (self.gradients, self.buckets, self.gathered, self.activations, self.images)
        return self.held.between_steps + sum(parts)


@dataclass(frozen=True)
class Option:
    """One ZeRO stage and level of recomputation."""

    zero: int
    recompute: str
    need: Need
    fits: bool
    largest: int
    """Images of the largest micro-batch that fits; 0 where none does."""


@dataclass(frozen=True)
class Outlook:
    """A number of ranks."""

    world: int
    micro: int
    accumulation: int
    given: bool
    """Whether that is the recipe's own micro-batch; else it is the largest that fits."""
    need: Need
    fits: bool
    sent: Sent
    step_s: float
    """Mean over all phases; and so is what follows."""
    mfu: float
    days: float
    rank_hours: float
    money: float | None
    stall_s: float
    """That a checkpoint stops the loop: the copy to the host."""


class Planner:
    """A recipe at a place; everything else follows from the number of ranks."""

    def __init__(self, recipe: Recipe, config: VimConfig, place: Target, samples: int):
        """`samples`: of the training set; 0 if it is not known."""
        self.recipe, self.config, self.place, self.samples = recipe, config, place, samples
        self.steps = recipe.length(samples) if samples or recipe.steps else None
        self.parameters: tuple[Parameter, ...] = zero_layout.parameters(config, recipe)
        self._known: dict[tuple[int, int], Held] = {}
        self.checkpoint = sum(p.numel for p in self.parameters) * 4 * (4 if recipe.optim.ema else 3)

    @property
    def whole(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def flops(self) -> int:
        """Of the first step, the backward pass as two forward passes; recomputation is no work of the model's."""
        return 3 * self.recipe.batch_at(0) * flops(self._at(0))

    def _at(self, step: int) -> VimConfig:
        """The model on the images of that step."""
        return dataclasses.replace(self.config, image_size=self.recipe.size_at(step, self.config.size))

    def _starts(self) -> list[int]:
        """First steps of the phases."""
        return sorted({0, *(phase.step for phase in self.recipe.phases if phase.step < (self.steps or phase.step + 1))})

    # ---- memory

    def need(self, zero: int, passes: Passes, micro: int, accumulation: int, world: int, images: int) -> Need:
        """`images`: bytes of the micro-batch and of the next, on its way."""
        held = self._held(zero, world)
        bucket = zero_layout.buckets(self.parameters, zero)
        gathered = (
            zero_layout.gathered(self.parameters, world, persist=self.recipe.parallel.persist) if zero == 3 else 0
        )
        whole = 4 * self.whole
        reducing = zero_layout.transient(self.parameters, zero, world)
        # where gradients stay until a step's end they are there during every pass but the first
        if zero == 0 and accumulation == 1:
            gradients, activations = 0, max(passes.with_gradients, whole + reducing)
        elif zero == 3:
            gradients = held.gradients
            # gloo, which CPUs reduce with, scatters what it has copied
            activations = max(passes.peak, reducing * (1 if self.place.device else 2))
        else:
            gradients = whole if (zero < 2 and accumulation > 1) or zero == 0 else 0
            if zero == 2 and (accumulation > 1 or self.whole > zero_layout.BUCKET):
                gradients = held.gradients
            # a rank's share of the gradients is copied out of the bucket, which is given up before the update; at stage
            # 1 that begins while the backward pass still has something
            copied = held.gradients + (passes.end if zero == 1 else 0)
            activations = max(passes.peak, copied, held.gradients + reducing - gradients - bucket)
        return Need(held, gradients, bucket, gathered, activations, images)

    def _held(self, zero: int, world: int) -> Held:
        if (zero, world) not in self._known:
            persist, ema = self.recipe.parallel.persist, self.recipe.optim.ema is not None
            self._known[zero, world] = zero_layout.heaviest(self.parameters, zero, world, persist=persist, ema=ema)
        return self._known[zero, world]

    def _images(self, config: VimConfig, micro: int) -> int:
        height, width = config.size
        return micro * 3 * height * width * (4 + 1)

    def _levels(self, rule: str, config: VimConfig, micro: int) -> tuple[Recompute, ...]:
        parallel = Parallel(recompute=rule, precision=self.recipe.parallel.precision)
        return recompute.levels(parallel, config, micro, "cpu")

    def _passes(self, config: VimConfig, rule: str, micro: int, *, exact: bool) -> Passes:
        count = memory.passes if exact else memory.estimate
        levels = self._levels(rule, config, micro)
        precision, place = self.recipe.parallel.precision, self.place
        return count(config, levels, micro, precision, place.device, place.backend, self.recipe.objective)

    def most(self, zero: int, rule: str, micro: int, accumulation: int, world: int, *, exact: bool) -> Need:
        """The need of the phase that needs most; `micro`: of the recipe's own batch, from which phases' follow."""
        needs = []
        for start in self._starts():
            config = self._at(start)
            here = max(micro * self.recipe.batch_at(start) // self.recipe.batch, 1)
            passes = self._passes(config, rule, here, exact=exact)
            needs.append(self.need(zero, passes, here, accumulation, world, self._images(config, here)))
        return max(needs, key=lambda need: need.total)

    def largest(self, zero: int, rule: str, world: int) -> int:
        """Images of the largest micro-batch that fits and divides a rank's share of the batch; 0 if none does."""
        share = self.recipe.batch // world
        even = self.recipe.augment.mixes
        for micro in sorted((m for m in range(1, share + 1) if share % m == 0), reverse=True):
            if even and micro % 2:
                continue
            try:
                need = self.most(zero, rule, micro, share // micro, world, exact=False)
            except RecipeError:  # recompute is a size, and so many images cannot keep to it
                continue
            if need.total <= self.place.room:
                return micro
        return 0

    def options(self, world: int) -> Iterator[Option]:
        """Every ZeRO stage with every level of recomputation and the recipe's own, at its micro-batch."""
        micro, accumulation = self.recipe.micro_batch(world)
        for rule in dict.fromkeys((*LEVELS, self.recipe.parallel.recompute)):
            for zero in range(4):
                need = self.most(zero, rule, micro, accumulation, world, exact=True)
                fits = need.total <= self.place.room
                yield Option(zero, rule, need, fits, self.largest(zero, rule, world))

    # ---- time

    def outlook(self, world: int) -> Outlook:
        """Of the recipe on `world` ranks; with another micro-batch, if its own does not fit and another does.

        Raises:
            RecipeError: the batch cannot be divided among so many.
        """
        zero, rule = self.recipe.parallel.zero, self.recipe.parallel.recompute
        micro, accumulation = self.recipe.micro_batch(world)
        need = self.most(zero, rule, micro, accumulation, world, exact=False)
        fits = need.total <= self.place.room
        given = fits
        if not fits and (other := self.largest(zero, rule, world)):
            micro, accumulation = other, self.recipe.batch // world // other
            need, fits = self.most(zero, rule, micro, accumulation, world, exact=False), True
        sent = zero_layout.sent(self.parameters, zero, world, accumulation, persist=self.recipe.parallel.persist)
        seconds, work = 0.0, 0.0
        starts = self._starts()
        ends = [*starts[1:], self.steps or starts[-1] + 1]
        for start, end in zip(starts, ends, strict=True):
            step_s = self._step(start, rule, micro, accumulation, zero, world, sent)
            seconds += (end - start) * step_s
            work += (end - start) * 3 * self.recipe.batch_at(start) * flops(self._at(start))
        device, price = self.place.device, self.place.price
        hours = seconds / 3600
        return Outlook(
            world=world,
            micro=micro,
            accumulation=accumulation,
            given=given,
            need=need,
            fits=fits,
            sent=sent,
            step_s=seconds / ends[-1],
            mfu=work / (seconds * world * device.bf16) if device else 0.0,
            days=hours / 24,
            rank_hours=hours * world,
            money=None if price is None else price * hours * world,
            stall_s=self.checkpoint / world / roofline.HOST,
        )

    def _step(self, start: int, rule: str, micro: int, accumulation: int, zero: int, world: int, sent: Sent) -> float:
        """Seconds of step `start`; 0 where the device's rates are not known."""
        device = self.place.device
        if device is None:
            return 0.0
        config = self._at(start)
        here = max(micro * self.recipe.batch_at(start) // self.recipe.batch, 1)
        compute = accumulation * self._passes(config, rule, here, exact=False).seconds
        updating = roofline.update(device, self.whole // (world if zero else 1))
        return roofline.step(compute, self.place.fabric.seconds(sent, world), updating, zero)

    # ---- what to say where it cannot run

    def refuse(self, world: int, otherwise: str = "") -> None:
        """`otherwise`: what to add to the message.

        Raises:
            LaunchError: the recipe does not fit; says by how much, and what would.
        """
        parallel = self.recipe.parallel
        micro, accumulation = self.recipe.micro_batch(world)
        need = self.most(parallel.zero, parallel.recompute, micro, accumulation, world, exact=True)
        if need.total <= self.place.room:
            return
        said = (
            f"{self.recipe.name} does not fit {self.place.name} on {world} ranks: one needs"
            f" {need.total / 1e9:.1f} GB (ZeRO-{parallel.zero}, recompute {parallel.recompute}, micro-batch {micro})"
            f" and has {self.place.room / 1e9:.1f} GB"
        )
        ways = list(self._ways_out(world, micro))
        fix = f"would fit: {' | '.join(ways)}" if ways else "nothing that was tried would fit"
        raise LaunchError("; ".join(part for part in (said, fix, otherwise) if part))

    def _ways_out(self, world: int, micro: int) -> Iterator[str]:
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
        if self.place.device is None:  # more ranks on a machine share its memory
            return
        for more in (world << i for i in range(1, 10)):
            if self.recipe.batch % more == 0 and self.largest(parallel.zero, own, more):
                yield f"{more} GPUs"
                break


def lanes_and_shards(recipe: Recipe, shards: Sequence[int], nodes: int, *, remote: bool) -> list[str]:
    """What is to be said of how the data divide among nodes; `shards`: how many each data set has."""
    notes = []
    lanes = recipe.data.lanes
    if remote and lanes < nodes:
        notes.append(
            f"data.lanes {lanes} is below {nodes} nodes: every node fetches more than its part of the data; set"
            f" data.lanes={nodes}"
        )
    elif lanes > 1 and lanes % nodes:
        notes.append(f"data.lanes {lanes} is no multiple of {nodes} nodes: some have more lanes than others")
    for source, count in zip(recipe.data.sources, shards, strict=True):
        if count < lanes:
            notes.append(f"data {source.data}: {count} shards for {lanes} lanes, so that lanes share shards")
        elif count % lanes:
            notes.append(f"data {source.data}: {count} shards are no multiple of {lanes} lanes")
    return notes
