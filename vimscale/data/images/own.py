"""A user's own augmentation: a class in a file of theirs, which the recipe names in `augment.own`.

docs/own-code.md explains an example.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vimscale.errors import RecipeError
from vimscale.recipe.sections import AugmentationOptions
from vimscale.storage import own_code

__all__ = ["Augmentation", "AugmentationOptions"]


class Augmentation(ABC):
    """Changes one training image. Data workers construct it once each, and call it for every image."""

    Options: ClassVar[type[AugmentationOptions]] = AugmentationOptions
    """The keys of the recipe's section `augment.own`; a subclass of `AugmentationOptions` adds its own."""
    options: Any

    def __init__(self, options: Any):
        """`options`: an `Options`."""
        self.options = options

    @abstractmethod
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Return an image of the same shape and type: uint8 (3, h, w).

        The image is cropped, resized, flipped, and changed by the recipe's policy and jitter. It is contiguous, on the
        CPU, and not used by anybody else, so it may be changed. `rng` depends on the recipe's seed and the image's
        position in the run; draw from nothing else, and keep nothing from one image for the next. Then the pixels are
        the same for any number of ranks and workers, and after any restart.
        """


def build(options: AugmentationOptions | None) -> Augmentation | None:
    """Construct the augmentation that a recipe's `augment.own` asks for; None if it asks for none.

    Raises:
        RecipeError: the user's own file does not define one.
    """
    if options is None:
        return None
    try:
        kind = own_code.load(options.kind)
        if not issubclass(kind, Augmentation):
            raise ValueError("it does not derive from vimscale.data.images.own.Augmentation")
    except ValueError as error:
        raise RecipeError("augment.own", [f"{options.kind}: {error}"]) from None
    return kind(options)


def apply(augmentation: Augmentation, image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply a user's own augmentation to a copy of an image, uint8 (3, h, w).

    Raises:
        RecipeError: what it returns is not an image of the same shape and type.
    """
    changed = augmentation(image.clone(memory_format=torch.contiguous_format), rng)
    expected = _described(image)
    if not isinstance(changed, Tensor) or changed.device.type != "cpu" or _described(changed) != expected:
        found = _described(changed) if isinstance(changed, Tensor) else f"a {type(changed).__name__}"
        fault = f"{augmentation.options.kind} returned {found}; it must return {expected} on the CPU, as it was passed"
        raise RecipeError("augment.own", [fault])
    return changed


def _described(image: Tensor) -> str:
    device = "" if image.device.type == "cpu" else f" on {image.device}"
    return f"a tensor {tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}{device}"
