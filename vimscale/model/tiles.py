"""Large images as bags of tiles."""

from typing import NamedTuple

from torch import Tensor


class Bag(NamedTuple):
    """Tiles of one large image, as one sequence."""

    tiles: Tensor  # (t, 3, s, s), uint8 from the data plane, fp32 normalised on the device
    at: Tensor  # (t, 2) int32, the (row, column) of each tile's upper left corner, in pixels of the level
