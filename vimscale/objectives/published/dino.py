"""DINO as facebookresearch/dino has it: heads, loss, schedules and the order of an iteration, by the original's names.

Axes: c crops, b images, k prototypes. Rows of several crops are crop-major: all images of the first crop, then all of
the second.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vimscale.engine import optim
from vimscale.objectives import distillation_losses as losses
from vimscale.objectives import teacher
from vimscale.objectives.projection import ProjectionHead
from vimscale.recipe.sections import Optim

_LAST = {"last_layer.weight_v": "prototypes.weight_v", "last_layer.weight_g": "prototypes.weight_g"}
_HEAD = {"in_dim", "out_dim", "use_bn", "norm_last_layer", "nlayers", "hidden_dim", "bottleneck_dim"}


def head(arguments: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> ProjectionHead:
    """The head that `DINOHead(**arguments)` is, with the weights of its state dict.

    Raises:
        ValueError: an argument is unknown or not supported, or the weights are of another head.
    """
    return head_of(arguments, _HEAD, state, scaled=not arguments.get("norm_last_layer", True))


def head_of(
    arguments: Mapping[str, Any], known: Collection[str], state: Mapping[str, Tensor] | None, *, scaled: bool
) -> ProjectionHead:
    """The head of a `DINOHead` that has the arguments `known`; `scaled`: whether it learns the prototypes' lengths.

    Raises:
        ValueError: as `head`.
    """
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(f"DINOHead has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if arguments.get("use_bn"):
        raise ValueError("use_bn: heads with batch norm are not supported; no recipe for ViT or Vim has them")
    made = ProjectionHead(
        arguments["in_dim"],
        arguments["out_dim"],
        hidden=arguments.get("hidden_dim", 2048),
        bottleneck=arguments.get("bottleneck_dim", 256),
        layers=max(arguments.get("nlayers", 3), 1),
        bias=arguments.get("mlp_bias", True),
        scaled=scaled,
    )
    return _fresh(made) if state is None else load_head(made, state)


def _fresh(made: ProjectionHead) -> ProjectionHead:
    """Set the initial values of a head."""
    for module in made.modules():
        init = getattr(module, "init_weights", None)
        if init is not None:
            init()
    return made


def load_head(made: ProjectionHead, state: Mapping[str, Tensor]) -> ProjectionHead:
    """Load weights by the original's names. A head with fixed lengths takes only those that are 1.

    Raises:
        ValueError: the weights are of another head.
    """
    named = {_LAST.get(name, _sequential(name, made)): value for name, value in state.items()}
    lengths = named.get("prototypes.weight_g")
    if made.prototypes.weight_g is None and lengths is not None:
        if not bool((lengths == 1).all()):
            raise ValueError("last_layer.weight_g is not 1: the head was trained with norm_last_layer=False")
        del named["prototypes.weight_g"]
    try:
        made.load_state_dict(named)
    except RuntimeError as error:
        raise ValueError(f"these weights are of another head: {error}") from None
    return made


def _sequential(name: str, made: ProjectionHead) -> str:
    """A head of one layer is not a sequence in the original: mlp.weight."""
    return f"mlp.0.{name.removeprefix('mlp.')}" if name in ("mlp.weight", "mlp.bias") else name


def head_state(made: ProjectionHead) -> dict[str, Tensor]:
    """Parameters of a head by the original's names."""
    back = {ours: theirs for theirs, ours in _LAST.items()}
    return {back.get(name, name): p for name, p in made.named_parameters()}


def settings(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
) -> tuple[Optim, int]:
    """Our learning-rate options for `cosine_scheduler` with these arguments, and the steps of the run."""
    warmup = warmup_epochs * niter_per_ep
    # the options are checked when they come from a recipe; schedules may fall from less than they end with
    rates = {"lr": base_value, "min_lr": final_value, "warmup": warmup, "warmup_from": start_warmup_value}
    return Optim().model_copy(update=rates), epochs * niter_per_ep


def cosine_scheduler(*arguments: Any, **named: Any) -> list[float]:
    """The values of the original's function of this name: the arguments of `settings`."""
    chosen, steps = settings(*arguments, **named)
    return [optim.learning_rate(chosen, step, steps) for step in range(steps)]


class Loss:
    """`DINOLoss`: takes outputs, keeps the center."""

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        """`total` sums over ranks, which have equally many images each."""
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        self.temperatures = [
            teacher.warmed_up(warmup_teacher_temp, teacher_temp, epoch, warmup_teacher_temp_epochs)
            for epoch in range(nepochs)
        ]
        self.center = torch.zeros(out_dim)
        self._total = total

    def __call__(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The loss () of outputs (c b, k) and (2 b, k); then moves the center."""
        self.center = self.center.to(teacher_output)
        temperature = self.temperatures[epoch]
        bias = losses.centering_bias(self.center, temperature)
        student = student_output.unflatten(0, (self.ncrops, -1))
        of_teacher = losses.targets(teacher_output, temperature, bias).unflatten(0, (2, -1)).detach()
        each = losses.dino(student, of_teacher, self.student_temp)
        teacher.follow_mean(self.center, self._mean(teacher_output), self.center_momentum)
        return each.mean()

    def _mean(self, rows: Tensor) -> Tensor:
        count = self._total(rows.new_tensor(float(len(rows))))
        return self._total(rows.detach().sum(dim=0)) / count


class Training:
    """`train_one_epoch` over `epochs`: a student and a teacher, modules of a `backbone` and a `head`."""

    def __init__(
        self,
        student: nn.ModuleDict,
        of_teacher: nn.ModuleDict,
        loss: Loss,
        *,
        lr: Optim,
        weight_decay: tuple[float, float],
        momentum: tuple[float, float],
        epochs: int,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int,
    ):
        """`lr`: of `settings`. `weight_decay` and `momentum`: at the first step, and what their cosines end with.
        `clip_grad`: 0 does not clip.
        """
        self.student, self.teacher, self.loss = student, teacher.without_parameters(of_teacher), loss
        self.steps, self.per_epoch, self.momentum = epochs * niter_per_ep, niter_per_ep, momentum
        self.freeze_last_layer, self.step = freeze_last_layer, 0
        first, last = weight_decay
        update: dict[str, Any] = {"weight_decay": first, "weight_decay_end": last, "beta2": 0.999, "eps": 1e-8}
        self.options = lr.model_copy(update={**update, "clip": clip_grad or None, "clip_by": "parameter"})
        self.named = dict(student.named_parameters())
        no_decay = {name for name, p in self.named.items() if name.endswith(".bias") or p.ndim == 1}
        late = {name for name in self.named if ".prototypes." in name}
        self.adamw = optim.optimizer(self.named.items(), no_decay, self.options, fused=False, late=late)

    def __call__(self, crops: Sequence[Tensor]) -> Tensor:
        """Take the next step on crops (b, ...); the first two go to the teacher. Returns the loss ()."""
        for group in self.adamw.param_groups:
            group["lr"] = self.rates[0]
        optim.set_decay(self.adamw, self.options, self.rates[1])
        with torch.no_grad():
            of_teacher = self._outputs(self.teacher, crops[:2])
        epoch = self.step // self.per_epoch
        loss = self.loss(self._outputs(self.student, crops), of_teacher, epoch)
        self.adamw.zero_grad()
        loss.backward()
        if self.options.clip is not None:
            grads = [p.grad for p in self.named.values() if p.grad is not None]
            optim.clip_each(range(len(grads)), grads, self.options.clip, len(grads), lambda squares: squares)
        if epoch < self.freeze_last_layer:
            optim.leave_out_late(self.adamw)
        self.adamw.step()
        followers = dict(self.teacher.named_buffers())
        teacher.follow(((followers[name], p) for name, p in self.named.items()), 1 - self.rates[2])
        self.step += 1
        return loss.detach()

    @property
    def rates(self) -> tuple[float, float, float]:
        """Learning rate, weight decay and momentum of the next step."""
        return (
            optim.learning_rate(self.options, self.step, self.steps),
            optim.weight_decay(self.options, self.step, self.steps),
            teacher.momentum(*self.momentum, self.step, self.steps),
        )

    def _outputs(self, modules: nn.ModuleDict, crops: Sequence[Tensor]) -> Tensor:
        return modules["head"](torch.cat([modules["backbone"](crop) for crop in crops]))


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Clip the gradient of each parameter by itself; returns their norms before."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert math.isfinite(clip)
    return optim.clip_each(range(len(grads)), grads, clip, len(grads), lambda squares: squares).tolist()
