"""An augmentation of your own: hide squares on a grid (GridMask, arXiv:2001.04086).

    vimscale launch examples/own_augmentation.yaml

docs/own-code.md goes through this file.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vimscale.data.images.own import Augmentation, AugmentationOptions


class GridMask(Augmentation):
    class Options(AugmentationOptions):
        """Keys of the recipe's section `augment.own`, next to `kind`."""

        chance: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Chance that an image gets a grid."""
        cell: Annotated[int, Field(ge=2)] = 16
        """Side of a cell of the grid, in pixels."""
        hidden: Annotated[float, Field(gt=0, lt=1)] = 0.5
        """Side of the hidden square in each cell, as a fraction of the cell's side."""

    options: Options

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if rng.random() >= self.options.chance:
            return image
        cell = self.options.cell
        top, left = rng.integers(cell, size=2).tolist()
        side = max(round(self.options.hidden * cell), 1)
        rows = (torch.arange(image.shape[1]) + top) % cell < side  # (h)
        columns = (torch.arange(image.shape[2]) + left) % cell < side  # (w)
        image[:, rows[:, None] & columns] = 0
        return image
