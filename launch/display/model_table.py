"""A model as a table in the terminal: what each layer is, how large it is, and what it costs."""

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table

from vimscale.model.cost import Cost, costs, flops, parameters
from vimscale.model.presets import PRESETS, VimConfig

_SIGNS = {
    "fwd": "──▶",
    "bwd": "◀──",
    "bi": "◀─▶",
    "shared": "◁─▷",
    "pair": "▶┼◀",
    "cross": "◀╬▶",
    "ssd": "◀═▶",
    "attn": "═●═",
}


def layers(config: VimConfig, kept: Sequence[int], levels: Sequence[str], of: str) -> Table:
    """One row per run of equal layers; fits into 80 columns. `kept`: bytes that each layer keeps for the backward pass
    of `of`, such as "4 images". `levels`: each layer's level of recomputation.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", caption=f"kept: for the backward pass of {of}")
    for title in ("layers", "", ""):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for title in ("tokens", "width", "parameters", "GFLOPs", "kept"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("FLOPs", no_wrap=True)
    numbered = iter(zip(kept, levels, strict=True))
    rows = [(part, *(next(numbered) if part.layer is not None else (0, ""))) for part in costs(config)]
    total, first = sum(part.flops for part, _, _ in rows), 0
    for (_, width, tokens, level), run in groupby(rows, key=lambda row: _shape(row[0], row[2])):
        parts = list(run)
        layer, label, sign, kind = parts[0][0].layer, parts[0][0].name, "", ""
        if layer is not None:
            label = f"{first}" if len(parts) == 1 else f"{first}-{first + len(parts) - 1}"
            sign, kind = _SIGNS.get(layer.kind, "═▣═"), str(layer)
            first += len(parts)
        work = sum(part.flops for part, _, _ in parts)
        bytes_kept = sum(size for _, size, _ in parts)
        table.add_row(
            label,
            sign,
            kind,
            f"{tokens:,}",
            f"{width:,}",
            short(sum(part.parameters for part, _, _ in parts)),
            f"{work / 1e9:.3f}",
            f"{short(bytes_kept)}B" if layer is not None else "",
            level if level != "none" else "",
            "█" * round(12 * work / total),
        )
    table.add_section()
    table.add_row("sum", "", "", "", "", short(parameters(config)), f"{total / 1e9:.3f}", f"{short(sum(kept))}B")
    return table


def short(number: float) -> str:
    """A number with one decimal and the prefix of its unit: 1.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "


def _shape(part: Cost, level: str) -> tuple[object, int, int, str]:
    return part.layer or part.name, part.d_model, part.tokens, level


def presets() -> Table:
    """Every preset with its shape, parameters and FLOPs."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("preset", "directions"):
        table.add_column(title)
    for title in ("width", "tokens", "parameters", "GFLOPs per image"):
        table.add_column(title, justify="right")
    for name, config in PRESETS.items():
        widths = list(dict.fromkeys(config.widths))
        table.add_row(
            name,
            " | ".join(dict.fromkeys(stage.directions or f"bi*{stage.depth}" for stage in config.parts)),
            " ".join(map(str, widths)),
            f"{config.tokens:,}",
            f"{parameters(config):,}",
            f"{flops(config) / 1e9:,.2f}",
        )
    return table
