"""Classes and probabilities of images, as people have them."""

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vimscale.data.images.decode import EXTENSIONS
from vimscale.errors import BadSample, CheckpointError, DataError
from vimscale.inference.loaded import Loaded

Picture = Path | str | bytes | Image.Image | np.ndarray | Tensor
"""What `Preprocessing` takes."""


@dataclass(frozen=True)
class Prediction:
    """What a model makes of one image."""

    image: Picture
    """As it was given."""
    top: tuple[tuple[str, float], ...] = ()
    """(class, probability), the most probable first; empty if the image cannot be used."""
    error: str = ""
    """Why the image cannot be used."""


def predict(loaded: Loaded, images: Iterable[Picture], *, top: int = 5, batch: int = 64) -> Iterator[Prediction]:
    """Classify images of any sizes, in their order; `batch` of them at once.

    Raises:
        CheckpointError: the model has no classes, or takes bags of tiles.
    """
    model, preprocess = loaded
    if model.head is None:
        raise CheckpointError(
            f"{loaded.opened.source} has no classes: it was trained without labels; take its features"
        )
    if model.config.tiles is not None:
        raise CheckpointError(f"{loaded.opened.source} takes bags of tiles, not images")
    names, remaining = loaded.classes, iter(images)
    while some := list(islice(remaining, batch)):
        read: list[Tensor | str] = []
        for image in some:
            try:
                read.append(preprocess(image))
            except BadSample as error:
                read.append(str(error))
            except OSError as error:
                read.append(error.strerror or str(error))
        usable = [each for each in read if isinstance(each, Tensor)]
        found: Iterator[tuple[tuple[str, float], ...]] = iter(())
        if usable:
            with torch.inference_mode():
                logits = model(torch.stack(usable).to(loaded.device)).cpu()
            if logits.shape != (len(usable), len(names)):
                shape = tuple(logits.shape)
                raise CheckpointError(
                    f"{loaded.opened.source} gives {shape} for {len(usable)} images, not a logit per class"
                )
            probabilities, labels = logits.softmax(dim=1).sort(dim=1, descending=True, stable=True)
            rows = zip(labels[:, :top].tolist(), probabilities[:, :top].tolist(), strict=True)
            found = (tuple((names[label], p) for label, p in zip(*row, strict=True)) for row in rows)
        for image, each in zip(some, read, strict=True):
            yield Prediction(image, error=each) if isinstance(each, str) else Prediction(image, next(found))


def image_files(names: Iterable[str]) -> list[Path]:
    """List the images that names stand for: files, all images below a folder, and patterns such as `photos/**/*.jpg`.

    Raises:
        DataError: a pattern matches nothing, or a folder holds no images.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            endings = {f".{extension}" for extension in EXTENSIONS}
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
            if not found:
                raise DataError(f"{name}: no image in this folder; known extensions: {', '.join(EXTENSIONS)}")
        elif not path.exists() and glob.has_magic(name):
            found = sorted(file for match in glob.glob(name, recursive=True) if (file := Path(match)).is_file())
            if not found:
                raise DataError(f"{name}: no file has such a name")
        else:
            found = [path]
        files += found
    return files
