"""DINOv2's losses and head as facebookresearch/dinov2 has them, by the original's names.

Axes: b images, n rows, k prototypes, l patches, f features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vimscale.objectives import distillation_losses as losses
from vimscale.objectives import teacher
from vimscale.objectives.projection import ProjectionHead
from vimscale.objectives.published.dino import head_of

_HEAD = {"in_dim", "out_dim", "use_bn", "nlayers", "hidden_dim", "bottleneck_dim", "mlp_bias"}


def _same(values: Tensor) -> Tensor:
    return values


def head(arguments: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> ProjectionHead:
    """The head that `DINOHead(**arguments)` is, with the weights of its state dict. The lengths of its prototypes are
    trained.

    Raises:
        ValueError: an argument is unknown or not supported, or the weights are of another head.
    """
    return head_of(arguments, _HEAD, state, scaled=True)


def sinkhorn_knopp_teacher(
    teacher_output: Tensor,
    teacher_temp: float,
    n_iterations: int = 3,
    *,
    total: Callable[[Tensor], Tensor] = _same,
    largest: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """The targets (n, k) of teacher outputs (n, k), of class tokens or of masked patches."""
    rows = [lambda: teacher_output]
    bias = losses.sinkhorn_bias(rows, [None], teacher_temp, n_iterations, total, largest)
    return losses.targets(teacher_output, teacher_temp, bias)


class Centering:
    """`softmax_center_teacher` and `update_center` of both losses. The mean is that of all rows of all ranks; iBOT's
    original takes the mean of the ranks' means, which differs where ranks mask different numbers of patches.
    """

    def __init__(self, out_dim: int, center_momentum: float = 0.9, total: Callable[[Tensor], Tensor] = _same):
        self.center, self.momentum, self._total = torch.zeros(out_dim), center_momentum, total

    def __call__(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """The targets (n, k) of outputs (n, k); then moves the center."""
        self.center = self.center.to(teacher_output)
        bias = losses.centering_bias(self.center, teacher_temp)
        made = losses.targets(teacher_output, teacher_temp, bias)
        rows = teacher_output.flatten(0, -2)
        count = self._total(rows.new_tensor(float(len(rows))))
        teacher.follow_mean(self.center, self._total(rows.sum(dim=0)) / count, self.momentum)
        return made


def class_token_loss(
    student_global: Tensor, student_local: Tensor | None, targets: Tensor, student_temp: float = 0.1
) -> Tensor:
    """The training code's sum of both terms of class tokens ().

    Args:
        student_global: logits (2 b, k), first view first.
        student_local: logits of the local crops (c b, k).
        targets: (2 b, k), **second view first**, as the training code arranges them.
    """
    views = student_global.unflatten(0, (2, -1))
    student = views
    if student_local is not None:
        student = torch.cat([views, student_local.unflatten(0, (-1, views.shape[1]))])
    return losses.dino(student, targets.unflatten(0, (2, -1)).flip(0), student_temp).mean()


def ibot_loss(
    student: Tensor,
    targets: Tensor,
    masks: Tensor,
    masks_weight: Tensor | None = None,
    student_temp: float = 0.1,
) -> Tensor:
    """`iBOTPatchLoss.forward_masked`: logits and targets (n, k) of the n masked patches of masks (b, l)."""
    if masks_weight is None:
        masks_weight = losses.ibot_weights(masks.to(student.dtype))[masks]
    return (losses.cross_entropy(student, targets, student_temp) * masks_weight).sum() / len(masks)


def ibot_loss_dense(student: Tensor, targets: Tensor, masks: Tensor, student_temp: float = 0.1) -> Tensor:
    """`iBOTPatchLoss.forward`: logits and targets (b, l, k) of all patches, which the training code does not use."""
    weights = losses.ibot_weights(masks.to(student.dtype))
    return (losses.cross_entropy(student, targets, student_temp) * weights).sum(dim=1).mean()


def koleo_loss(features: Tensor) -> Tensor:
    """`KoLeoLoss` of features (n, f), one rank's; ours is of the global batch."""
    x = losses.unit(features)
    with torch.no_grad():
        near = losses.nearest(x)
    return losses.koleo(x, x[near])
