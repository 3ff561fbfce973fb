"""What a trained model makes of the images of a data set, batch by batch.

Axes: b images, l tokens, d model width, f features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vimscale.data import stream
from vimscale.data.dataset import Dataset
from vimscale.data.images.augment import normalised
from vimscale.data.images.choice import Choice
from vimscale.data.samples import Samples
from vimscale.errors import UserError
from vimscale.inference.loaded import Loaded
from vimscale.model import VimConfig, VisionMamba, tiles
from vimscale.model.layout import layout
from vimscale.model.published.quirks import PublishedVim
from vimscale.model.vim import Images

Pool = Literal["head", "cls", "mean", "none"]
"""What becomes of a layer's tokens: what the classifier reads; the class token, or the mean of several; the mean of the
image's tokens; a map of them.
"""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Features:
    """Of the images of one batch that can be read."""

    numbers: Tensor
    """int64 (b): positions in the data set."""
    keys: list[str]
    labels: Tensor
    """int64 (b); -1 without labels."""
    features: Tensor
    """fp32 (b, f), or maps (b, f, h, w); on the CPU."""
    unreadable: list[str]
    """The images of the batch that are left out, and why."""


@dataclass(frozen=True)
class Reading:
    """Which features of a model to take. Layers are concatenated along f. Every layer's residual stream passes the
    model's final norm; those of earlier stages of a hierarchical model do not.
    """

    layers: tuple[int, ...]
    """Counted from 0; empty for pool "head"."""
    pool: Pool

    @classmethod
    def of(cls, model: VisionMamba, layers: Sequence[int] | None, pool: Pool | None) -> "Reading":
        """Check a user's choice. Default: what the head reads; the mean if there are `layers`; the last layer if there
        is another `pool`.

        Raises:
            UserError: the model has no such layers or no such tokens.
        """
        config = model.config
        pool = pool or ("mean" if layers else "head")
        depth = len(config.layers)
        if pool == "head":
            if layers:
                raise UserError("pool head is what the classifier reads, after the last layer; leave out the layers")
            return cls((), pool)
        layers = (-1,) if layers is None else layers
        if missing := [layer for layer in layers if not -depth <= layer < depth]:
            raise UserError(
                f"there is no layer {missing[0]}: count from 0 to {depth - 1}, or from the end with -1 to -{depth}"
            )
        if not layers:
            raise UserError("no layers: name at least one")
        if isinstance(model, PublishedVim):
            raise UserError(f"pool {pool}: a model with published quirks gives what its head reads only; use pool head")
        if config.tiles is not None:
            raise UserError(f"pool {pool}: a model of bags of tiles has features of whole bags only; use pool head")
        if pool == "cls" and not config.cls_tokens:
            raise UserError("pool cls: the model has no class token; use mean, none or head")
        return cls(tuple(layer % depth for layer in layers), pool)

    def __call__(self, model: VisionMamba, images: Images) -> Tensor:
        """Compute features (b, f), or (b, f, h, w) for pool "none", of normalized images.

        Raises:
            UserError: maps of layers in different stages have different sizes.
        """
        if self.pool == "head":
            return model(images, features=True)
        assert isinstance(images, Tensor)
        config = model.config
        rows, columns = grid = config.grid_of(*images.shape[-2:])
        slots = layout(config, grid)
        streams = model.encode([(model.patches(images), grid)], layers=self.layers).taps
        last_stage = len(config.layers) - config.parts[-1].depth
        parts = []
        for layer, x in zip(self.layers, streams, strict=True):
            if layer >= last_stage:
                x, _ = model.norm(x, None)
            if self.pool == "cls":
                parts.append(x[:, list(slots.cls)].mean(dim=1))
            elif self.pool == "mean":
                parts.append(slots.image_tokens(x).mean(dim=1))
            else:
                factor = _reduction(config, layer)
                parts.append(slots.image_tokens(x).mT.unflatten(2, (rows // factor, columns // factor)))
        if len({part.shape[2:] for part in parts}) > 1:
            sizes = ", ".join(f"{i}: {p.shape[2]} x {p.shape[3]}" for i, p in zip(self.layers, parts, strict=True))
            raise UserError(f"pool none: the layers' maps have different sizes ({sizes}); take one stage's")
        return torch.cat(parts, dim=1)


def _reduction(config: VimConfig, layer: int) -> int:
    """Return how many tokens of the first stage, along a side, became one of this layer's."""
    factor, first = 1, 0
    for number, stage in enumerate(config.parts):
        factor *= stage.downsample if number else 1
        first += stage.depth
        if layer < first:
            break
    return factor


def features(
    loaded: Loaded,
    data: str | Samples,
    *,
    layers: Sequence[int] | None = None,
    pool: Pool | None = None,
    batch: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
    start: int = 0,
) -> Iterator[Features]:
    """Compute the features of every image of a data set once, in its order; memory holds one batch at a time.

    Args:
        loaded: what `vimscale.load` returned.
        data: a data set, or what `Dataset.open` takes: a folder, an address, "digits:val".
        layers: whose tokens to take, counted from 0, or from the end if negative. Default: the last one's.
        pool: what becomes of them: `Pool`. Default: "head"; "mean" if there are `layers`.
        batch: images that are computed at once; 1 for a model of bags of tiles.
        workers: processes that read and decode. With some, a script needs `if __name__ == "__main__"`.
        precision: in which the model computes.
        start: batches to leave out first.

    Raises:
        UserError: the model has no such layers or tokens; at once.
        DataError: the data set cannot be used.
    """
    model = loaded.model
    reading = Reading.of(model, layers, pool)
    source = data.opened if isinstance(data, Samples) else Dataset.open(data)
    return _features(loaded, source, reading, 1 if model.config.tiles else batch, workers, precision, start)


def _features(
    loaded: Loaded, data: Dataset, reading: Reading, batch: int, workers: int, precision: Precision, start: int
) -> Iterator[Features]:
    config, recipe, device = loaded.model.config, loaded.opened.recipe, loaded.device
    most = None if recipe is None else recipe.data.max_tiles
    choice = None if config.tiles is None else Choice(config.tiles, most)
    mean, std = (
        torch.tensor(values, device=device) for values in (loaded.preprocessing.mean, loaded.preprocessing.std)
    )
    batches = stream.evaluation(
        data, rank=0, world=1, batch=batch, size=config.size, choice=choice, workers=workers, start=start
    )
    for number, part in enumerate(batches, start):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = reading(loaded.model, normalised(part.to(device).images, mean, std)).float().cpu()
        there = (part.weights > 0).nonzero()[:, 0]
        yield Features(
            there + number * batch,
            [part.keys[i] for i in there.tolist()],
            part.labels[there],
            found[there],
            [description for _, description in part.bad],
        )


def shape_of(loaded: Loaded, reading: Reading) -> tuple[int, ...]:
    """Return the shape of one image's features."""
    config = loaded.model.config
    one: Images = torch.zeros(1, 3, *config.size, device=loaded.device)
    images = one if config.tiles is None else [tiles.blank(config, loaded.device)]
    with torch.inference_mode():
        return tuple(reading(loaded.model, images).shape[1:])
