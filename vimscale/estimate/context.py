"""Images that several ranks share (`parallel.context`): what the ranks send each other.

Axes: b images, l tokens, d model width, e inner channels, k scan paths, n states per channel, w convolution taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vimscale.model import VimConfig
from vimscale.model.block import Recompute
from vimscale.model.schedule import Layer


@dataclass(frozen=True)
class Exchanged:
    """What the ranks of one group exchange, as bytes of complete tensors; one that is all-reduced counts twice."""

    halo: int = 0
    """Tokens at the ends of stretches, for the convolutions of neighbors."""
    summaries: int = 0
    """What stretches add to states and their gradients, all-gathered."""
    attention: int = 0
    """Keys and values, all-gathered, and their gradients, all-reduced."""
    pooled: int = 0
    """What the head reads, all-gathered, and its gradient, all-reduced."""
    calls: int = 0

    @property
    def total(self) -> int:
        return self.halo + self.summaries + self.attention + self.pooled

    def sent(self, context: int) -> int:
        """Bytes that all `context` ranks of a group send together, if rings gather and reduce."""
        return self.halo + (context - 1) * (self.total - self.halo)

    def __add__(self, other: "Exchanged") -> "Exchanged":
        return Exchanged(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> "Exchanged":
        return Exchanged(*(value * times for value in vars(self).values()))


def exchanged(config: VimConfig, levels: Sequence[Recompute], batch: int, precision: str, context: int) -> Exchanged:
    """What `context` ranks exchange for a micro-batch of `batch` images: forward, again where a layer recomputes, and
    backward.
    """
    if context == 1:
        return Exchanged()
    number = 2 if precision == "bf16" else 4
    total = _pooled(config, batch, number, context)
    for layer, d, level in zip(config.layers, config.widths, levels, strict=True):
        if layer.kind == "attn":
            longest = -(-config.tokens // context)
            once = Exchanged(attention=context * longest * 2 * batch * d * number, calls=1)
            total += once * (2 if level == "block" else 1) + Exchanged(attention=2 * once.attention, calls=1)
        else:
            forward, backward = _scans(config, layer, d, batch, number, context)
            total += forward * (1 if level == "none" else 2) + backward
    return total


def _pooled(config: VimConfig, batch: int, number: int, context: int) -> Exchanged:
    """What ranks exchange for the features; `number`: bytes of an activation."""
    if config.pooling == "registers":
        size = batch * config.registers * config.widths[-1] * number
    else:
        size = batch * config.widths[-1] * (4 if config.pooling == "mean" else number)
    reduced = size * context if config.pooling == "max" else size
    return Exchanged(pooled=context * size + 2 * reduced, calls=2)


def _scans(
    config: VimConfig, layer: Layer, d: int, batch: int, number: int, context: int
) -> tuple[Exchanged, Exchanged]:
    """What a layer of scans exchanges in its forward and its backward pass."""
    e, n, k = config.expand * d, config.d_state, len(layer.paths)
    # both scans of a shared layer read one convolution
    one = layer.kind == "shared" or (layer.is_ssd and config.ssd_form == "shared")
    ways = 1 if one else len({reverse for _, reverse in layer.paths})
    convolved = e + (2 * config.ssd_state if layer.is_ssd else 0)
    halo = ways * (context - 1) * batch * (config.d_conv - 1) * convolved * number
    if layer.is_ssd:  # a state and a decay for each head
        summaries = context * k * batch * (e * config.ssd_state + e // config.d_head) * 4
        back = Exchanged(halo=halo, summaries=2 * summaries, calls=2)  # the gradient of what was gathered is reduced
        return Exchanged(halo=halo, summaries=summaries, calls=2), back
    states = context * k * batch * e * n * 4
    steps = context * k * batch * e * 4
    return Exchanged(halo=halo, summaries=states + steps, calls=2), Exchanged(halo=halo, summaries=states, calls=2)
