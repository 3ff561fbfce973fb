"""One sample of a data set, and what an objective may make of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vimscale.model.tiles import Bag

Size = tuple[int, int]
"""Height and width of a batch's images."""


@dataclass(frozen=True)
class Sample:
    """A sample as it is decoded, for the views that an objective makes of it."""

    image: Tensor | Bag
    """uint8 (3, h, w), not augmented; or the bag of tiles that the model gets"""
    label: int
    """-1 (`decode.NO_LABEL`) if its data set has no labels."""
    key: str
    members: dict[str, Any]
    """The sample as webdataset parses it: the bytes of each member, by extension."""
    size: Size
    """Height and width of the batch's images."""
    class_name: str = ""
    """Of the label; empty if there is none."""


Views = Callable[[Sample, np.random.Generator], dict[str, Tensor]]
"""Makes tensors from a sample in addition to its image; each name has the same shape and dtype for all samples. Raises
BadSample if the sample lacks what they are made of.
"""


def no_views(sample: Sample, rng: np.random.Generator) -> dict[str, Tensor]:
    return {}
