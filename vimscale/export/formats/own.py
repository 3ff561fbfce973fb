"""This package's own exports: model.safetensors and config.json."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from vimscale.export import safetensors
from vimscale.export.formats.base import Format, Outputs, Source
from vimscale.export.parity import run_of


class Own(Format):
    """Holds every model, bit by bit."""

    def write(self, folder: Path, source: Source) -> None:
        safetensors.write(folder, source.model, source.manifest, source.about, half=source.half)

    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        return run_of(safetensors.load(folder, run_own_code=True))  # the code that the model has already run
