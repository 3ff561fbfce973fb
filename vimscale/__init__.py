"""Distributed pretraining of Vision Mamba at scale.

docs/python.md shows the names of this module at work. They are imported on first use: `import vimscale` loads no torch.
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vimscale.data.samples import dataset
    from vimscale.errors import RunFailed, UserError
    from vimscale.inference.features import features
    from vimscale.inference.loaded import load
    from vimscale.inference.predict import predict
    from vimscale.model import PRESETS, VimConfig, VisionMamba
    from vimscale.ops import (
        bidirectional_scan,
        bidirectional_scan_with_state,
        selective_scan,
        selective_scan_with_state,
    )
    from vimscale.recipe.recipe import Recipe
    from vimscale.runtime.run_folder import RunFolder

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Recipe",
    "RunFailed",
    "UserError",
    "VimConfig",
    "VisionMamba",
    "bidirectional_scan",
    "bidirectional_scan_with_state",
    "dataset",
    "features",
    "load",
    "predict",
    "selective_scan",
    "selective_scan_with_state",
    "train",
]

# kernels/, launch/ and recipes/ are next to this folder in a source tree, and inside it in the wheel.
# Searching the tree's root too makes `vimscale.kernels` mean the same in both.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / ".source-tree").exists():
    __path__.append(str(_root))

_HOMES = {
    "vimscale.data.samples": ("dataset",),
    "vimscale.errors": ("RunFailed", "UserError"),
    "vimscale.inference.features": ("features",),
    "vimscale.inference.loaded": ("load",),
    "vimscale.inference.predict": ("predict",),
    "vimscale.model": ("PRESETS", "VimConfig", "VisionMamba"),
    "vimscale.ops": (
        "bidirectional_scan",
        "bidirectional_scan_with_state",
        "selective_scan",
        "selective_scan_with_state",
    ),
    "vimscale.recipe.recipe": ("Recipe",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def train(
    recipe: "Recipe | str | Path",
    overrides: Iterable[str] = (),
    *,
    workers: int | str | None = None,
    runs: str | Path = "runs",
    force: bool = False,
) -> "RunFolder":
    """Train a recipe on this machine, as `vimscale launch --no-ray` does, and print its progress. Resume an interrupted
    run of the same name; return a finished one at once. The ranks are separate processes: this one needs no
    `if __name__ == "__main__"`, and may be a notebook's.

    Args:
        recipe: a `Recipe`, the name of a shipped one, or the path of a YAML file.
        overrides: changes to it, such as "steps=100".
        workers: number of ranks, or "MIN:MAX". Default: one per GPU; without GPUs, two.
        runs: folder of all runs.
        force: start even if the recipe is not expected to fit into memory.

    Returns:
        The run: its folder is `path`, its final figures are `result()`, its logged figures are `rows()`. `load(run)`
        opens the model.

    Raises:
        UserError: the recipe, the data or this machine do not allow the run.
        RunFailed: the run itself failed.
        KeyboardInterrupt: it was interrupted (Ctrl-C, SIGTERM). What was trained is saved, and the same call resumes.
    """
    # the only way from vimscale/ up into launch/
    return import_module("vimscale.launch.sweeps.unattended").train(
        recipe, overrides, workers=workers, runs=Path(runs), force=force
    )
