"""Vision Mamba. Needs torch and numpy; the configuration (`presets`, `schedule`) needs neither."""

from typing import TYPE_CHECKING, Any

from vimscale.model.presets import PRESETS, VimConfig

if TYPE_CHECKING:
    from vimscale.model.vim import VisionMamba

__all__ = ["PRESETS", "VimConfig", "VisionMamba"]


def __getattr__(name: str) -> Any:
    # Recipes are checked without the seconds that importing torch takes.
    if name == "VisionMamba":
        from vimscale.model.vim import VisionMamba

        return VisionMamba
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
