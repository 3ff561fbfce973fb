"""Features of a model's last layers, one forward pass for all of them.

A feature has a name: `head`, what the classification head reads (the class token, registers or a mean, as the model
pools); `mean`, the mean of the image's tokens; and `head.K` and `mean.K`, the same after layer K, counted from 0. Those
of earlier layers are taken of the residual stream with the model's last norm applied, as DINOv2 does with
`get_intermediate_layers(norm=True)`, so that all layers have the last one's scale.

Axes: b images, l tokens, d model width, f features.
"""

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from vimscale.evaluation.embedded import HEAD, Read
from vimscale.model import VimConfig, schedule
from vimscale.model.layout import layout
from vimscale.model.published.quirks import PublishedVim
from vimscale.model.tokens import Encoded
from vimscale.objectives.base import Inputs, Learner, Objective

MEAN: Final = "mean"


def last_layers(config: VimConfig, count: int) -> list[int]:
    """List the last `count` layers that features can be read after, the deepest one first: of a pair of layers the
    second, and only those of the last stage, whose width the last norm has.
    """
    seconds = schedule.second_of_pairs(config.layers)
    depth = len(config.layers)
    first = depth - config.stages[-1].depth if config.stages else 0
    ends = [layer for layer in range(first, depth) if layer + 1 not in seconds]
    return ends[::-1][:count]


def name_of(config: VimConfig, kind: str, layer: int) -> str:
    """Name the feature `kind`, head or mean, after a layer."""
    return kind if layer == len(config.layers) - 1 else f"{kind}.{layer}"


def has_layers(learner: Learner) -> bool:
    """Whether more than `head` can be read: not of bags of tiles, nor of a published model with quirks, which has its
    own forward pass, nor if the objective has its own idea of an embedding.
    """
    model = learner.objective.evaluated(learner)
    usual = model.config.tiles is None and not isinstance(model, PublishedVim)
    return usual and type(learner.objective).embedding is Objective.embedding


def reader(learner: Learner, names: Sequence[str]) -> Read:
    """Return what computes the features `names` of a micro-batch of images of one size: (b, f) each.

    Raises:
        ValueError: only `head` can be read of this model, see `has_layers`.
    """
    if not has_layers(learner):
        if others := [name for name in names if name != HEAD]:
            raise ValueError(f"of this model, only {HEAD} can be read, not {others[0]}")
        return lambda inputs: {HEAD: learner.ask("embedding", inputs)}
    model = learner.objective.evaluated(learner)
    config, last = model.config, len(model.config.layers) - 1
    wanted = [(name, kind, int(layer or last)) for name in names for kind, _, layer in [name.partition(".")]]
    layers = sorted({layer for _, _, layer in wanted} - {last})
    shrink = 1
    for stage in config.stages[1:]:
        shrink *= stage.downsample

    def read(inputs: Inputs) -> dict[str, Tensor]:
        images = inputs.images
        assert isinstance(images, Tensor)
        rows, columns = config.grid_of(*images.shape[-2:])
        encoded = model.encode([(model.patches(images), (rows, columns))], layers=layers)
        grid = rows // shrink, columns // shrink
        tokens = {last: encoded.tokens}  # (b, l, d)
        for layer, stream in zip(layers, encoded.taps, strict=True):
            tokens[layer] = model.norm(stream, None)[0].to(encoded.tokens.dtype)
        found = {}
        for name, kind, layer in wanted:
            x = tokens[layer]
            if kind == HEAD:
                (found[name],) = model.pooled(Encoded(x, [], ((slice(0, x.shape[1]), grid),)))
            else:
                found[name] = layout(config, grid).image_tokens(x).mean(dim=1)
        return found

    return read
