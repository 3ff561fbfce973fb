"""The stack of a model's layers, as `vimscale show` and reports draw it. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vimscale.model.cost import Cost, costs
from vimscale.model.presets import VimConfig

_SIGNS = {
    "fwd": "──▶",
    "bwd": "◀──",
    "bi": "◀─▶",
    "shared": "◁─▷",
    "pair": "▶┼◀",
    "cross": "◀╬▶",
    "ssd": "◀═▶",
    "ssd_fwd": "══▶",
    "ssd_bwd": "◀══",
    "attn": "═●═",
}


@dataclass(frozen=True)
class Row:
    """A run of equal layers, or a part that is not a layer."""

    label: str
    """Numbers of the layers, or the part's name."""
    sign: str
    """A picture of its directions; empty for parts that are not layers."""
    kind: str
    tokens: int
    d_model: int
    parameters: int
    flops: int
    share: float
    """Its fraction of the model's FLOPs."""
    kept: int
    """Bytes that it keeps for the backward pass."""
    level: str
    """Of recomputation."""


def rows(config: VimConfig, kept: Sequence[int] | None = None, levels: Sequence[str] | None = None) -> list[Row]:
    """One row per run of equal layers. `kept`: bytes that each layer keeps; `levels`: its level of recomputation."""
    depth = len(config.layers)
    numbered = iter(zip(kept or [0] * depth, levels or [""] * depth, strict=True))
    parts = [(part, *(next(numbered) if part.layer is not None else (0, ""))) for part in costs(config)]
    total, first, found = sum(part.flops for part, _, _ in parts), 0, []
    for (_, width, tokens, level), run in groupby(parts, key=lambda row: _shape(row[0], row[2])):
        equal = list(run)
        layer, label, sign, kind = equal[0][0].layer, equal[0][0].name, "", ""
        if layer is not None:
            label = f"{first}" if len(equal) == 1 else f"{first}-{first + len(equal) - 1}"
            sign, kind = _SIGNS.get(layer.kind, "═▣═"), str(layer)
            first += len(equal)
        work = sum(part.flops for part, _, _ in equal)
        numbers = sum(part.parameters for part, _, _ in equal)
        bytes_kept = sum(size for _, size, _ in equal)
        found.append(Row(label, sign, kind, tokens, width, numbers, work, work / total, bytes_kept, level))
    return found


def short(number: float) -> str:
    """A number with one decimal and the prefix of its unit: 1.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def _shape(part: Cost, level: str) -> tuple[object, int, int, str]:
    return part.layer or part.name, part.d_model, part.tokens, level
