"""Images that several ranks share (`parallel.context`): what one rank computes, and what the ranks send each other.

Axes: b images, l tokens, d model width, e inner channels, k scan paths, n states per channel, w convolution taps.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from vimscale.engine.recompute import gathered_bytes, of_one_rank
from vimscale.estimate.activations import Passes
from vimscale.model import VimConfig
from vimscale.model.schedule import Layer
from vimscale.model.vim import Recompute


@dataclass(frozen=True)
class Exchanged:
    """What the ranks of one group exchange, as bytes of complete tensors: all that they send, put together."""

    halo: int = 0
    """Tokens at the ends of a rank's range, for the convolutions of its neighbors."""
    summaries: int = 0
    """States at the ends of ranges, all-gathered."""
    attention: int = 0
    """Keys and values, all-gathered, and their gradients, reduced and scattered."""
    pooled: int = 0
    """What the head reads, all-reduced."""
    calls: int = 0

    @property
    def total(self) -> int:
        return self.halo + self.summaries + self.attention + self.pooled

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
    total = Exchanged(pooled=4 * batch * config.features, calls=1)
    for layer, d, level in zip(config.layers, config.widths, levels, strict=True):
        if layer.kind == "attn":
            once = Exchanged(attention=gathered_bytes(config, layer, batch, precision), calls=1)
            total += once * (3 if level == "block" else 2)
        else:
            forward, backward = _scans(config, layer, d, batch, precision, context)
            total += forward * (1 if level == "none" else 2) + backward
    return total


def _scans(
    config: VimConfig, layer: Layer, d: int, batch: int, precision: str, context: int
) -> tuple[Exchanged, Exchanged]:
    """What a layer of scans exchanges in its forward and its backward pass."""
    e, n, k = config.expand * d, config.d_state, len(layer.paths)
    # both scans of a shared layer read one convolution
    ways = 1 if layer.kind == "shared" else len({reverse for _, reverse in layer.paths})
    halo = ways * (context - 1) * batch * (config.d_conv - 1) * e * (2 if precision == "bf16" else 4)
    states = context * k * batch * e * n * 4
    steps = context * k * batch * e * 4
    return Exchanged(halo=halo, summaries=states + steps, calls=2), Exchanged(halo=halo, summaries=states, calls=2)


def of_rank(
    passes: Passes, config: VimConfig, levels: Sequence[Recompute], batch: int, precision: str, context: int
) -> Passes:
    """Passes of a rank that shares its images with others, from those of `of_one_rank(config, context)`: adds the
    gathered keys and values, and the gradient of the complete position embedding.

    It leaves out the buffers of the exchanges, which do not grow with the tokens, and the scan that finds a range's
    summary.
    """
    if context == 1:
        return passes
    mine = of_one_rank(config, context)
    gathered = [gathered_bytes(config, layer, batch, precision) for layer in config.layers]
    kept = sum(size for size, level in zip(gathered, levels, strict=True) if level != "block")
    again = max((size for size, level in zip(gathered, levels, strict=True) if level == "block"), default=0)
    more = kept + again + max(gathered)  # the last: gradients of one layer's keys and values
    position = 4 * config.widths[0] * (config.tokens - mine.tokens) if config.pos_embed else 0
    end = passes.end + position + (2 * gathered[0])
    work = dataclasses.replace(passes.work, attention_flops=passes.work.attention_flops * config.tokens / mine.tokens)
    return Passes(
        kept=passes.kept + kept,
        peak=max(passes.peak + more, end),
        with_gradients=passes.with_gradients + more + position,
        end=end,
        work=work,
    )
