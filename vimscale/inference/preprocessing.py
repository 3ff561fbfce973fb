"""From an image as people have it to the tensor that a model was trained on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vimscale.data.images import augment, decode


@dataclass(frozen=True)
class Preprocessing:
    """Resize to cover `size` / 0.875, bicubic; crop the center; normalize. An image of exactly `size` is kept."""

    size: tuple[int, int]
    """Height and width of the model's images, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of the channels, for values from 0 to 1."""

    def __call__(self, image: Path | str | bytes | Image.Image | np.ndarray | Tensor) -> Tensor:
        """Return fp32 (3, *size) of an image: a path, the bytes of a file, a Pillow image, or uint8 pixels, as an array
        (h, w, 3) or a tensor (3, h, w).

        Raises:
            OSError: the file cannot be read.
            BadSample: it is not an image that can be decoded.
            ValueError: the pixels have another shape or type.
        """
        pixels = augment.for_evaluation(_pixels(image), self.size)
        return augment.normalise(pixels, torch.tensor(self.mean), torch.tensor(self.std))


def _pixels(image: Path | str | bytes | Image.Image | np.ndarray | Tensor) -> Tensor:
    """uint8 (3, h, w)."""
    if isinstance(image, Path | str):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode.pixels(image)
    if isinstance(image, Image.Image):
        image = np.array(decode.rgb(image))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) if image.ndim == 3 else torch.empty(0)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError("an image is uint8 pixels, an array (h, w, 3) or a tensor (3, h, w)")
    return image
