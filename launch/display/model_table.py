"""A model as a table in the terminal: what each layer is, how large it is, and what it costs."""

from collections.abc import Sequence

from rich.table import Table

from vimscale.model.cost import flops, parameters
from vimscale.model.presets import PRESETS, VimConfig
from vimscale.report import stack
from vimscale.report.stack import short


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
    for row in stack.rows(config, kept, levels):
        table.add_row(
            row.label,
            row.sign,
            row.kind,
            f"{row.tokens:,}",
            f"{row.d_model:,}",
            short(row.parameters),
            f"{row.flops / 1e9:.3f}",
            f"{short(row.kept)}B" if row.sign else "",
            row.level if row.level != "none" else "",
            "█" * round(12 * row.share),
        )
    table.add_section()
    total = f"{flops(config) / 1e9:.3f}"
    table.add_row("sum", "", "", "", "", short(parameters(config)), total, f"{short(sum(kept))}B")
    return table


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
