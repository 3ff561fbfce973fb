"""An objective for tests, as a user's own file: a head that sets its initial values, a buffer that counts updates, and
a view. The loss reads all three, so it shows whether they are saved and restored.
"""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vimscale.objectives.base import Inputs, Learner, Objective, ObjectiveOptions, Sample


class Head(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, features))
        self.bias = nn.Parameter(torch.empty(4))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("updates", torch.zeros(()))


class Counting(Objective):
    class Options(ObjectiveOptions):
        headline: ClassVar[str] = "loss"
        scale: float = 1.0

    options: Options

    def modules(self) -> dict[str, nn.Module]:
        return {"head": Head(self.config.features), "counter": Counter()}

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"target": torch.tensor(rng.random(4), dtype=torch.float32)}

    def loss(self, model: Learner, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.loss_per_sample(model, inputs)
        return losses.mean(), {"largest": losses.max(), "updates": model["counter"].updates}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        guess = model["head"](model.features(inputs))
        aim = inputs.views["target"] + 0.01 * model["counter"].updates
        return self.options.scale * (guess - aim).square().mean(dim=1)

    def after_update(self, model: Learner, step: int, applied: Tensor) -> None:
        model["counter"].updates += applied


class Frozen(Counting):
    """A mistake: a parameter that nothing trains."""

    def modules(self) -> dict[str, nn.Module]:
        return {"head": Head(self.config.features).requires_grad_(False)}


class Integer(Counting):
    """A mistake: a buffer that checkpoints cannot hold."""

    def modules(self) -> dict[str, nn.Module]:
        return {"norm": nn.BatchNorm1d(4)}


class Unlabelled(Counting):
    class Options(Counting.Options):
        classifies: ClassVar[bool] = False
