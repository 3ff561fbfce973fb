"""Vision Mamba: configuration, mixers, model and published formats. Needs only torch and numpy; `presets`,
`schedule` and `cost` need neither.

It imports `vimscale.ops`, `vimscale.storage` and `vimscale.errors`. Any package above it, and `vimscale.recipe`, may
import it.
"""

from typing import TYPE_CHECKING, Any

from vimscale.model.presets import PRESETS, VimConfig

if TYPE_CHECKING:
    from vimscale.model.vim import VisionMamba

__all__ = ["PRESETS", "VimConfig", "VisionMamba"]


def __getattr__(name: str) -> Any:
    # Checking a recipe should not take the seconds that importing torch takes.
    if name == "VisionMamba":
        from vimscale.model.vim import VisionMamba

        return VisionMamba
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
