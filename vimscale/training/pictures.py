"""Pictures for trackers (`log.images`): the first batch after augmentation, and the batches that the guard finds bad.

b images, h and w their height and width.
"""

import io
import logging
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vimscale.data.images.bags import overview
from vimscale.data.stream import Images
from vimscale.errors import CheckpointError
from vimscale.guard import picture
from vimscale.guard import report as guard_report
from vimscale.model.tiles import Bag
from vimscale.runtime.run_folder import RunFolder
from vimscale.tracking.trackers import Trackers

log = logging.getLogger(__name__)

_MOST, _SIDE, _GAP = 64, 160, 2
"""Images of the first batch, the longer side of each in pixels, and the space between them."""


class Pictures:
    """Makes pictures on rank 0, and sends them with the next log line: by then all ranks have written their parts."""

    def __init__(self, folder: RunFolder, trackers: Trackers, mean: tuple[float, ...], std: tuple[float, ...]):
        self._folder, self._trackers = folder, trackers
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        self._first: tuple[int, Image.Image] | None = None
        self._begun = False
        self._bad: list[int] = []

    def look(self, step: int, images: Images) -> None:
        """Keep the first micro-batch that comes: normalised images, as the model gets them in `step`."""
        if not self._begun:
            self._begun = True
            self._first = step, grid([unnormalised(image, self._mean, self._std) for image in images[:_MOST]])

    def add_bad(self, step: int) -> None:
        """Take note of a step that the guard has written a report of."""
        self._bad.append(step)

    def send(self) -> None:
        if self._first is not None:
            step, drawn = self._first
            self._trackers.picture(step, "images/first_batch", _png(drawn))
            self._first = None
        for step in self._bad:
            try:
                _, report, images = guard_report.read(self._folder, step)
            except CheckpointError as error:  # a full disk, or its folder has been removed
                log.warning("no picture of step %d for the trackers: %s", step, error)
                continue
            names = [sample["class"] for sample in report["samples"]]
            self._trackers.picture(step, "images/bad_batch", _png(picture.draw(report, images, names)))
        self._bad = []


def unnormalised(image: Tensor | Bag, mean: Tensor, std: Tensor) -> Tensor:
    """The picture (3, h, w) uint8 of a normalised image (3, h, w), or of a bag of normalised tiles."""
    if isinstance(image, Bag):
        return overview(Bag(_bytes(image.tiles, mean, std), image.at.cpu()))
    return _bytes(image, mean, std)


def _bytes(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `augment.normalise`. Noise of erased rectangles is cut to what a picture can show."""
    values = images.detach().cpu().float() * std[:, None, None] + mean[:, None, None]
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def grid(images: list[Tensor]) -> Image.Image:
    """Images (3, h, w) uint8 of any sizes in a square of rows, the large ones shrunk."""
    small = []
    for image in images:
        scale = _SIDE / max(image.shape[1:])
        if scale < 1:
            size = [max(round(length * scale), 1) for length in image.shape[1:]]
            image = F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)
        small.append(image)
    columns = math.ceil(math.sqrt(len(small)))
    height, width = (max(image.shape[axis] for image in small) + _GAP for axis in (1, 2))
    sheet = torch.full((3, -(-len(small) // columns) * height, columns * width), 255, dtype=torch.uint8)
    for number, image in enumerate(small):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
