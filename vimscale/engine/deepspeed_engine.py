"""DeepSpeed: the only file, besides `eager`, that uses it.

At every ZeRO stage, the engine shows a rank's part of the training state as *fragments*: slices of single parameters,
with the fp32 weights and the optimizer's moments as flat tensors. Checkpoints and the moving average are written in
terms of fragments, so they know neither the stage nor the number of ranks.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vimscale.checkpoint.restore import OF_OBJECTIVE
from vimscale.engine import layerwise, optim
from vimscale.engine.eager import deepspeed, without_compiler
from vimscale.engine.flat import FlatLearner, NarrowPieces, layout
from vimscale.engine.zero_layout import BUCKET
from vimscale.errors import RecipeError, RunFailed
from vimscale.model import VimConfig, VisionMamba
from vimscale.objectives.base import Inputs, Learner, Question, parts_of
from vimscale.objectives.build import build
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.context import RankContext

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
Judge = Callable[[Tensor], Tensor]
"""From the norm of a step's gradient to 1 if its update must be left out, else 0: fp32 (), on the device."""


def ds_config(recipe: Recipe, world: int, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for this recipe and a model of `numel` parameters on `world` ranks. Features that are
    not named here are not used.
    """
    micro, accumulation = recipe.micro_batch(world)
    zero = recipe.parallel.zero
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # below stage 3 the engine clips itself; the default is 1.0
        "gradient_clipping": (recipe.optim.clip or 0.0) if zero == 3 else 0.0,
        # DeepSpeed allocates buckets of this size even if there are fewer gradients
        "zero_optimization": {"stage": zero, "reduce_bucket_size": min(BUCKET, numel)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if zero in (1, 2):
        config["zero_optimization"]["compute_grad_norm"] = False  # it waits for the device several times a step
    if zero == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = recipe.parallel.persist
    if recipe.parallel.precision == "bf16":
        # fp32 parameters with bf16 compute; DeepSpeed's "bf16" engine would cast the parameters themselves
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if zero < 3:
            narrow = f"{NarrowPieces.__module__}.{NarrowPieces.__qualname__}"
            config["torch_autocast"]["lower_precision_safe_modules"] = [narrow]
    return config


def _gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather sharded parameters for a while; afterwards each rank keeps its shard of the values that rank 0 set."""
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, held by this rank."""

    name: str
    start: int
    numel: int
    owned: bool
    """Whether this rank is the one that saves it: at stage 0 all ranks hold everything."""
    weight: Tensor
    """fp32 (numel), a view of what the optimizer updates"""
    flat: Tensor
    """The tensor that the optimizer knows."""
    offset: int
    """The fragment's first element in `flat`."""
    trained: bool = True
    """False: frozen. `weight` is then what the model computes with, and the optimizer does not know it."""


class Average:
    """The exponential moving average of an engine's weights."""

    def __init__(self, fragments: Sequence[Fragment]):
        """Starts at the weights. That of frozen ones is the weights themselves."""
        weights = {id(f.flat): f.flat.detach() for f in fragments if f.trained}
        averages = {key: weight.clone() for key, weight in weights.items()}
        self._pairs = [(averages[key].view(-1), weights[key].view(-1)) for key in weights]
        self.fragments = [
            averages[id(f.flat)].view(-1)[f.offset : f.offset + f.numel] if f.trained else f.weight for f in fragments
        ]
        """(numel) for each fragment, views."""

    def update(self, weight: Tensor) -> None:
        """Move it towards the weights by a share `weight` (), on the device."""
        for average, current in self._pairs:
            average.lerp_(current, weight)


class Engine:
    """A model under training: forward, backward, update, and its state as fragments."""

    def __init__(self, config: VimConfig, recipe: Recipe, device: torch.device, patience_s: float = 300.0):
        """Builds the model and the recipe's objective. At stage 3 the parameters are sharded as each module is made and
        initialised one module at a time, so that no rank ever holds all of them. `patience_s`: how long ranks that
        share images wait for each other.
        """
        world = dist.get_world_size()
        self.objective = build(recipe.objective, config)
        with torch.device("meta"):  # of a sharded parameter only the name can be read
            shapes = Learner(self.objective, VisionMamba(config))
        layerwise.freeze(shapes, recipe.optim.freeze)
        settings = ds_config(recipe, world, sum(p.numel() for _, p in shapes.trained()))
        without_compiler()
        self.stage = recipe.parallel.zero
        self.device = device
        self._flat: FlatLearner | None = None
        if self.stage == 3 and shapes.late():
            raise RecipeError(f"recipe {recipe.name}", ["parallel.zero 3 updates all parameters at once; use zero=2"])
        if self.stage == 3:
            # No dtype argument: DeepSpeed 0.19 ignores it on devices without fp16 and falls back to bf16. Without it,
            # settings that enable neither mean fp32.
            with deepspeed.zero.Init(config_dict_or_path=settings):
                self.model = Learner(self.objective, VisionMamba(config, gather=_gathered), gather=_gathered)
            layerwise.freeze(self.model, recipe.optim.freeze)
            factors = layerwise.factors(shapes, recipe.optim)
            adamw = optim.optimizer(self.model.trained(), shapes.no_decay(), recipe.optim, fused=True, factors=factors)
        else:
            self.model = Learner(self.objective, VisionMamba(config)).to(device)
            layerwise.freeze(self.model, recipe.optim.freeze)
            groups = layout(shapes, recipe.optim, self.stage, world, bf16=recipe.parallel.precision == "bf16")
            self._flat = FlatLearner(self.model, groups)
            adamw = optim.adamw(self._flat.grouped(), recipe.optim, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=self._flat or self.model, optimizer=adamw, config=settings, dist_init_required=False
        )
        self._adamw: torch.optim.AdamW = self._engine.basic_optimizer
        self._parameters = dict(self.model.every())
        self._late_names = self.model.late()
        self._check_fp32()
        if self._flat is not None:
            self._flat.adopt()
        shared = recipe.parallel.context > 1
        if shared:
            # each rank computes the loss of the group's images; the mean over all ranks, which DeepSpeed takes, is then
            # the gradient of the mean over images: every rank's gradient is that of the sum of all losses of its group
            self.encoder.context = RankContext(recipe.parallel.context, patience_s)
        if recipe.parallel.graphs == "auto" and device.type == "cuda":
            if self._flat is not None and not shared:
                self._flat.use_graphs()
            elif dist.get_rank() == 0:
                reason = "with parallel.context" if shared else "at ZeRO stage 3, whose hooks gather parameters"
                log.info("parallel.graphs: none %s", reason)
        self.fragments = list(self._fragments())
        self._judge: Judge | None = None
        self._optim = recipe.optim
        self._late = False
        self._norm: Tensor
        self.broken_gradients: Callable[[], list[str]] = list
        """Names the parameters whose gradient was not finite in the last step, among those that this rank holds. Waits
        for the device. A reference taken before the next step keeps answering for this one.
        """
        self._adamw.register_step_pre_hook(self._before_update)
        if recipe.optim.backward_lr != 1:
            optim.scale_updates(self._adamw, list(self._backward_slices()), recipe.optim.backward_lr)
        if bounds := {OF_OBJECTIVE + name: both for name, both in self.objective.bounds.items()}:
            bounded = [f for f in self.fragments if f.name in bounds and f.trained]
            optim.clamp_after(self._adamw, [(f.weight, *bounds[f.name]) for f in bounded])

    def _check_fp32(self) -> None:
        """Raises:
        RunFailed: DeepSpeed holds a parameter, or this rank's shard of it, in another type than fp32.
        """
        held_by: nn.Module = self.model if self._flat is None else self._flat
        for name, p in held_by.named_parameters():
            held = {t.dtype for t in (p, getattr(p, "ds_tensor", p))}
            if held != {torch.float32}:
                found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
                raise RunFailed(
                    f"DeepSpeed {deepspeed.__version__} holds {name.removeprefix('encoder.')} in {found} at ZeRO stage"
                    f" {self.stage}, and vimscale trains fp32 parameters only; set parallel.zero=2, or install the"
                    " DeepSpeed of constraints.txt"
                )

    @property
    def encoder(self) -> VisionMamba:
        return self.model.encoder

    def loss(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(a micro-batch's loss (), the objective's figures () by name)."""
        return self.ask("loss", inputs)

    def look_ahead(self, parts: Sequence[Inputs]) -> list[Inputs]:
        """The micro-batches of a step, with what the objective's first pass over all of them made for each."""
        with torch.no_grad():
            seen = [self.ask("ahead", inputs) for inputs in parts]
            shared = self.objective.meet(self.model, seen)
        return [replace(inputs, shared=own) for inputs, own in zip(parts, shared, strict=True)]

    def evaluation_sums(self, inputs: Inputs, backward: Sequence[float] | None = None) -> Tensor:
        """The objective's sums (n) for an evaluation; `backward`: how much of each layer's backward path is in."""
        return self.ask("evaluation_sums", replace(inputs, backward=backward))

    def embedding(self, inputs: Inputs, backward: Sequence[float] | None = None) -> Tensor:
        """As `evaluation_sums`: features (b, f) of the encoder that the objective evaluates."""
        return self.ask("embedding", replace(inputs, backward=backward))

    def ask(self, question: Question, inputs: Inputs) -> Any:
        """What the objective answers for a micro-batch."""
        return self._engine(question, *parts_of(inputs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss; DeepSpeed divides by their number."""
        self._engine.backward(loss)
        if self._flat is not None:
            self._flat.release()

    def step(self, lr: float, judge: Judge | None = None, *, decay: float | None = None, late: bool = True) -> None:
        """Call it after every micro-batch. After the last one of a step it updates the weights, unless `judge`, which
        every rank calls once, is against it. An update that is left out changes no weight, moment or count. `decay`:
        weight decay of matrices; default: the recipe's. `late`: whether late parameters are updated too.
        """
        optim.set_rate(self._adamw, lr)
        if decay is not None:
            optim.set_decay(self._adamw, self._optim, decay)
        self._late = late
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._judge = judge or (lambda norm: (~norm.isfinite()).float())
        shards = list(self._gradient_shards())
        if self.stage < 3:
            self._measure_and_clip(shards)
            self._engine.step()
        else:
            self._engine.step()
            # DeepSpeed looks for gradients that are not finite, waits for the answer, and then skips the optimizer
            overflow = self._engine.optimizer.overflow
            broken = [name for name, grad in shards if not grad.isfinite().all()] if overflow else []
            self.broken_gradients = lambda: broken
            if self._judge is not None:
                self._judge(torch.full((), math.inf, device=self.device))
                if not self._adamw.state:
                    self.restore_moments(0)
        self._judge = None

    def _measure_and_clip(self, shards: list[tuple[str, Tensor]]) -> None:
        """Compute the norm of this rank's gradients by name, and of all gradients; clip them. Waits for nothing."""
        names = [name for name, _ in shards]
        grads = [grad for _, grad in shards]
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1, device=self.device)
        squares = self._summed(norms.square().sum())
        self._norm = squares.sqrt()
        limit = self._optim.clip
        if limit is not None and self._optim.clip_by == "parameter":
            slots = {name: i for i, name in enumerate(self._parameters)}
            optim.clip_each([slots[name] for name in names], grads, limit, len(slots), self._summed)
        elif limit is not None and grads:
            # the formula of DeepSpeed's stage 3, to the bit
            excess = ((self._norm + 1e-6) / limit).clamp_min(1)
            torch._foreach_mul_(self._updated_with(), excess.reciprocal())
        self.broken_gradients = lambda: [
            name for name, norm in zip(names, norms.tolist(), strict=False) if not math.isfinite(norm)
        ]

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over the ranks where each holds other gradients, in place."""
        if self.stage and dist.get_world_size() > 1:
            dist.all_reduce(values)
        return values

    def _before_update(self, *_: Any) -> None:
        """The optimizer is about to be called: at stages 1-3 once for every group of parameters. Its fused kernel
        changes nothing where `found_inf` is 1.
        """
        if not self._late:
            optim.leave_out_late(self._adamw)
        if self._judge is None:
            return
        norm: Tensor = self._engine.optimizer._global_grad_norm if self.stage == 3 else self._norm
        self._adamw.found_inf = self._judge(norm)  # type: ignore[attr-defined]
        self._judge = None

    def _updated_with(self) -> list[Tensor]:
        """The gradients that this rank is about to update with, below stage 3: flat tensors."""
        if self.stage == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        groups = self._engine.optimizer.averaged_gradients.values()
        return [grad for group in groups for grad in group if not getattr(grad, "_zero_padding", False)]

    def _gradient_shards(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients that this rank is about to update with. Stage 3 frees them if any is not finite."""
        if self._flat is not None and self.stage == 0:
            yield from self._flat.gradients()
            return
        zero = self._engine.optimizer
        if self.stage == 3:
            names = {id(p): name for name, p in self._parameters.items()}
            for i, group in enumerate(zero.fp16_groups):
                grads = [grad for grad in zero.averaged_gradients[i] if not getattr(grad, "_zero_padding", False)]
                yield from ((names[id(p)], grad) for p, grad in zip(group, grads, strict=False))
            return
        held = {id(part): zero.averaged_gradients[i] for i, part in enumerate(zero.single_partition_of_fp32_groups)}
        for fragment in (f for f in self.fragments if f.trained):
            first, end = fragment.offset, fragment.offset + fragment.numel
            for grad in held[id(fragment.flat)]:  # one after the other, like the fragments
                if first < grad.numel() and end > 0:
                    yield fragment.name, grad.view(-1)[max(first, 0) : end]
                first, end = first - grad.numel(), end - grad.numel()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping. Waits for the device."""
        return float(self._engine.get_global_grad_norm() if self.stage == 3 else self._norm)

    # ---- state

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(p.ds_shape if self.stage == 3 else p.shape) for name, p in self._parameters.items()}

    def _fragments(self) -> Iterator[Fragment]:
        rank, world = dist.get_rank(), dist.get_world_size()
        zero = self._engine.optimizer
        for number, (name, p) in enumerate(self.model.frozen()):
            if self.stage < 3:
                yield Fragment(name, 0, p.numel(), number % world == rank, p.detach().view(-1), p, 0, trained=False)
                continue
            start = rank * p.ds_tensor.numel()
            numel = min(p.ds_tensor.numel(), p.ds_numel - start)
            if numel > 0:
                weight = p.ds_tensor.data[:numel]
                yield Fragment(name, start, numel, True, weight, p.ds_tensor, 0, trained=False)
        if self._flat is None:
            for name, p in self.model.trained():
                group, offset, size = zero.grad_position[zero.get_param_id(p)]
                flat = zero.fp32_partitioned_groups_flat[group]
                start = rank * size
                numel = min(size, p.ds_numel - start)  # the last rank's shard is padded
                if numel > 0:
                    weight = flat.detach()[offset : offset + numel]
                    yield Fragment(name, start, numel, True, weight, flat, offset)
            return
        for number, place in enumerate(self._flat.places()):
            if self.stage == 0:
                weight = place.piece.detach()[place.offset : place.offset + place.numel]
                owned = number % world == rank
                yield Fragment(place.name, 0, place.numel, owned, weight, place.piece, place.offset)
                continue
            flat = zero.single_partition_of_fp32_groups[place.group]
            first = max(place.start, rank * flat.numel())
            numel = min(place.start + place.numel, (rank + 1) * flat.numel()) - first
            if numel > 0:
                offset = first - rank * flat.numel()
                weight = flat.detach()[offset : offset + numel]
                yield Fragment(place.name, first - place.start, numel, True, weight, flat, offset)

    def _backward_slices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The slices of the backward paths' own parameters on this rank: (the optimizer's tensor, a view of it)."""
        own = self.encoder.backward_slices()
        for fragment in self.fragments:
            for first, last in own.get(fragment.name, ()):  # fractions of the complete parameter
                numel = torch.Size(self.shapes[fragment.name]).numel()
                begin = max(int(first * numel) - fragment.start, 0)
                end = min(int(last * numel) - fragment.start, fragment.numel)
                if begin < end:
                    yield fragment.flat, fragment.weight[begin:end]

    def moment(self, fragment: Fragment, key: str) -> Tensor | None:
        """The optimizer's `key` for a fragment, a view; None before the first step."""
        state = self._adamw.state.get(fragment.flat, {})
        return state[key].view(-1)[fragment.offset : fragment.offset + fragment.numel] if key in state else None

    def broken_weights(self) -> list[str]:
        """Names of this rank's fragments that are not finite. Waits for the device."""
        if not self.fragments:
            return []
        finite = torch.stack([fragment.weight.isfinite().all() for fragment in self.fragments]).tolist()
        return [fragment.name for fragment, sound in zip(self.fragments, finite, strict=True) if not sound]

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made; its bias correction counts them."""
        return self._updates(late=False)

    @property
    def late_updates(self) -> int:
        """Updates of late parameters."""
        return self._updates(late=True)

    def _updates(self, *, late: bool) -> int:
        flats = (f.flat for f in self.fragments if (f.name in self._late_names) == late)
        states = (self._adamw.state.get(flat, {}) for flat in flats)
        return next((int(state["step"]) for state in states if "step" in state), 0)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take these complete parameters, on the CPU; others stay as they are."""
        for fragment in self.fragments:
            if fragment.name in weights:
                flat = weights[fragment.name].view(-1)
                fragment.weight.copy_(flat[fragment.start : fragment.start + fragment.numel])
        self.publish([fragment.weight for fragment in self.fragments])

    def restore_moments(self, updates: int, late_updates: int = 0) -> None:
        """Allocate moments, to be filled in by the caller, and set the number of updates made. Late parameters have no
        moments before their first update.
        """
        # stage 3 shows its optimizer each flat tensor only while it updates it, so its groups do not list them
        trained = [f for f in self.fragments if f.trained]
        for flat, late in {id(f.flat): (f.flat, f.name in self._late_names) for f in trained}.values():
            if late and not late_updates:
                self._adamw.state.pop(flat, None)
                continue
            step = torch.tensor(float(late_updates if late else updates), device=flat.device)
            self._adamw.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}

    def publish(self, values: list[Tensor]) -> None:
        """Make the model compute with `values`, one (numel) per fragment; the optimizer's own weights stay. Frozen
        fragments have no other values than their weights.
        """
        trained = [(f, value) for f, value in zip(self.fragments, values, strict=True) if f.trained]
        if self.stage == 0:
            for fragment, value in trained:
                fragment.weight.copy_(value)
            return
        if self.stage == 3:
            # parameters that are still gathered from the last forward pass would be used again
            self._engine.empty_partition_cache()
            for fragment, value in trained:
                self._parameters[fragment.name].ds_tensor.data[: fragment.numel].copy_(value)
            kept = self._engine.optimizer.persistent_parameters  # small ones that stay gathered on every rank
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)
            return
        shards = {f.name: (f, value) for f, value in trained}
        for name, p in self.model.trained():
            full = torch.zeros_like(p.data).view(-1)
            if name in shards:
                fragment, value = shards[name]
                full[fragment.start : fragment.start + fragment.numel].copy_(value)
            dist.all_reduce(full)  # each element comes from one rank and is zero on the others: the sum is exact
            p.data.copy_(full.view(p.shape))

    @contextmanager
    def weights(self, values: list[Tensor] | None) -> Iterator[None]:
        """`publish` values for a while; None leaves the weights as they are."""
        if values is None:
            yield
            return
        kept = [f.weight.clone() if f.trained else f.weight for f in self.fragments] if self.stage == 0 else None
        self.publish(values)
        try:
            yield
        finally:
            self.publish(kept if kept is not None else [fragment.weight for fragment in self.fragments])
