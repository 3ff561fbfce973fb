"""Parameters and operations of a model before it is built, layer by layer. Needs no torch.

Letters: d model width, e inner width, n state, r dt rank, w convolution taps, k sets of path parameters, l tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from vimscale.model.presets import VimConfig
from vimscale.model.schedule import Layer


@dataclass(frozen=True)
class Cost:
    """The cost of one part of a model, for one image of the config's size."""

    name: str
    layer: Layer | None
    """None for parts that are not layers: embedding, merges, head."""
    tokens: int
    d_model: int
    parameters: int
    flops: int
    """Operations of a forward pass; a multiply-add counts as two. They include matrix products, convolutions and the
    scan (9 operations per state: exp, three products, two multiply-adds, shared work included; 5 in `ssd` layers, as a
    recurrence), but not norms and activations, which are below 1 %.
    """


def costs(config: VimConfig) -> list[Cost]:
    """List every part in order; the model's parameters and flops are their sums."""
    return [_embedding(config), *_layers(config), _head(config)]


def parameters(config: VimConfig) -> int:
    """Count the model's parameters."""
    return sum(part.parameters for part in costs(config))


def flops(config: VimConfig) -> int:
    """Count the operations of one image's forward pass."""
    return sum(part.flops for part in costs(config))


def _embedding(config: VimConfig) -> Cost:
    d, (rows, columns) = config.widths[0], config.grid
    extra = config.cls_tokens + config.registers
    count = d * extra + {True: d * config.tokens, "coordinates": d, "sincos": 0, False: 0}[config.pos_embed]
    if config.stem == "patch":
        weights = 3 * config.patch_size**2 * d
        return Cost("embedding", None, config.tokens, d, count + weights + d, 2 * config.patches * weights)
    widths = config.stem_widths
    operations = 0
    for i, (before, after) in enumerate(pairwise(widths), 1):
        shrink = config.patch_size >> i
        count += 9 * before * after + 2 * after
        operations += 2 * 9 * before * after * rows * columns * shrink**2
    count += d * widths[-1] + d
    return Cost("embedding", None, config.tokens, d, count, operations + 2 * config.patches * d * widths[-1])


def _layers(config: VimConfig) -> Iterator[Cost]:
    tokens, index = config.tokens, 0
    for i, stage in enumerate(config.parts):
        if i > 0:
            before, area = config.parts[i - 1].d_model, stage.downsample**2
            tokens //= area
            weights = before * area * stage.d_model
            count = weights + _norm(config, before * area)
            name = f"merge {stage.downsample} x {stage.downsample}"
            yield Cost(name, None, tokens, stage.d_model, count, 2 * tokens * weights)
        for layer in config.layers[index : index + stage.depth]:
            count, operations = _mixer(config, layer, stage.d_model, tokens)
            count += config.backward_gate and index in config.optional
            count += _norm(config, stage.d_model)
            if config.mlp == "swiglu":
                d, hidden = stage.d_model, stage.d_model * 8 // 3
                count += 3 * d * hidden + 2 * hidden + d + _norm(config, d)
                operations += tokens * 6 * d * hidden
            yield Cost(f"layer {index}", layer, tokens, stage.d_model, count, operations)
            index += 1


def _mixer(config: VimConfig, layer: Layer, d: int, tokens: int) -> tuple[int, int]:
    """Return (parameters, operations on one image) of one mixer."""
    if layer.is_own:
        return _own_mixer(config, layer, d, tokens)
    scale = d if config.layer_scale is not None else 0
    if layer.kind == "attn":
        return 4 * d * d + scale, tokens * (8 * d * d + 4 * tokens * d)
    if layer.is_ssd:
        return _ssd_mixer(config, layer, d, tokens)
    e, n, r, w = config.expand * d, config.d_state, config.dt_rank(d), config.d_conv
    paths = len(layer.paths)
    k = 1 if layer.kind == "shared" else paths
    fuse = config.fuse if paths > 1 else "sum"
    width = e * paths if fuse == "concat" else e
    count = 2 * d * e + width * d + k * e * (w + 1 + r + 2 * n + r + 1 + 1) + paths * e * n + scale
    count += paths * e if fuse == "gate" else 0
    count += {False: 0, True: width, "layer": 2 * width}[config.ssm_norm]
    conv_and_projections = 2 * w * e + 2 * e * (r + 2 * n) + 2 * r * e
    return count, tokens * (4 * d * e + 2 * width * d + k * conv_and_projections + paths * 9 * e * n)


def _ssd_mixer(config: VimConfig, layer: Layer, d: int, tokens: int) -> tuple[int, int]:
    e, n, w, paths = config.expand * d, config.ssd_state, config.d_conv, len(layer.paths)
    h, hydra = e // config.d_head, config.ssd_form == "quasiseparable"
    two = 2 if hydra else 1
    convolved, sets = e + 2 * n * two, 1 if config.ssd_form == "shared" else paths
    wide = e + convolved + h * two
    width = e * paths if config.fuse == "concat" else e
    count = wide * d + width * d + sets * convolved * (w + 1) + 3 * h * (1 if hydra else paths)
    count += h * e if hydra else 0
    count += paths * e if config.fuse == "gate" else 0
    count += 2 * width if config.ssm_norm == "layer" else width
    count += d if config.layer_scale is not None else 0
    products = 2 * (wide * d + width * d + sets * convolved * w + (h * e if hydra else 0))
    return count, tokens * (products + paths * 5 * e * n)


def _own_mixer(config: VimConfig, layer: Layer, d: int, tokens: int) -> tuple[int, int]:
    import torch

    from vimscale.model import own

    with torch.device("meta"):
        mixer = own.build(config.own_kind(layer), d, config)
    scale = d if config.layer_scale is not None else 0
    return sum(p.numel() for p in mixer.parameters()) + scale, mixer.flops(tokens)


def _norm(config: VimConfig, d: int) -> int:
    """Count the parameters of a norm of width d."""
    return 2 * d if config.norm == "layer" else d


def _head(config: VimConfig) -> Cost:
    """Cost of the last norm, the neck and the head."""
    d = config.widths[-1]
    count, operations = _norm(config, d), 0
    if config.pooling == "registers" and config.register_reduce > 1:
        weights = d * (d // config.register_reduce)
        count += weights + _norm(config, config.features)
        operations += 2 * config.registers * weights
    count += (config.features + 1) * config.num_classes
    return Cost("head", None, 1, config.features, count, operations + 2 * config.features * config.num_classes)
