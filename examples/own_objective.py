"""An objective of your own: hide a square of the image, and predict the mean color of what is hidden.

    vimscale launch examples/own_objective.yaml

It needs no labels. docs/objectives.md goes through this file line by line.

Axes: b images, f features of the encoder, w width of the head.
"""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from vimscale.objectives.base import Inputs, Learner, Objective, ObjectiveOptions, Sample


class HiddenColor(Objective):
    class Options(ObjectiveOptions):
        """Keys of the recipe's `objective` section, next to `kind`."""

        headline: ClassVar[str] = "explained"
        classifies: ClassVar[bool] = False
        side: Annotated[float, Field(gt=0, lt=1)] = 0.4
        """Side of the hidden square, as a fraction of the image's shorter side."""
        width: Annotated[int, Field(ge=1)] = 64
        """Width of the head's hidden layer."""

    options: Options

    def modules(self) -> dict[str, nn.Module]:
        features, width = self.config.features, self.options.width
        return {"head": nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, 3))}

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
        """The hidden square: [top, left, side] in pixels."""
        height, width = sample.size
        side = max(round(self.options.side * min(height, width)), 1)
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        return {"square": torch.tensor([int(top), int(left), side])}

    def loss(self, model: Learner, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        guess, truth = self._predict(model, inputs)
        return (guess - truth).square().mean(), {"off_by": (guess - truth).abs().mean()}

    def loss_per_sample(self, model: Learner, inputs: Inputs) -> Tensor:
        guess, truth = self._predict(model, inputs)
        return (guess - truth).square().mean(dim=1)

    def _predict(self, model: Learner, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(predicted, true) mean color of the hidden squares, (b, 3) each, in units of the data set's deviation."""
        images = inputs.images
        assert isinstance(images, Tensor), "images of several shapes (augment.buckets) cannot be hidden"
        top, left, side = inputs.views["square"].T[:, :, None]  # (b, 1) each
        rows, columns = (torch.arange(n, device=images.device) for n in images.shape[2:])
        in_rows = (top <= rows) & (rows < top + side)  # (b, h)
        in_columns = (left <= columns) & (columns < left + side)  # (b, w)
        hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (b, 1, h, w)
        truth = (images * hidden).sum(dim=(2, 3)) / side.square()  # (b, 3)
        seen = Inputs(images * ~hidden, inputs.targets, draws=inputs.draws, backward=inputs.backward)
        return model["head"](model.features(seen)).float(), truth

    # ---- evaluation

    def evaluation_sums(self, model: Learner, inputs: Inputs) -> Tensor:
        """Images, squared error, colors and their squares."""
        assert inputs.weights is not None
        guess, truth = self._predict(model, inputs)
        errors, colors, squares = ((t.mean(dim=1)) for t in ((guess - truth).square(), truth, truth.square()))
        return torch.stack([torch.ones_like(errors), errors, colors, squares]).double() @ inputs.weights.double()

    def figures(self, sums: Tensor) -> dict[str, float]:
        """`explained`: 1 if every color is predicted, 0 if no better than by their mean."""
        images, error, color, square = sums.tolist()
        variance = square / images - (color / images) ** 2
        return {"images": int(images), "explained": 1 - error / images / variance, "loss": error / images}
