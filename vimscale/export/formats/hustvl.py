"""The layouts of published code: model.pth, the constructor's arguments, and preprocessing.json."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from vimscale.export import published
from vimscale.export.formats.base import Format, Outputs, Source
from vimscale.export.parity import run_of
from vimscale.model.published.arguments import Family
from vimscale.model.published.weights import published_config


class Hustvl(Format):
    """hustvl/Vim."""

    of: ClassVar[Family] = "vim"

    def check(self, source: Source) -> None:
        published_config(source.model, self.of)

    def write(self, folder: Path, source: Source) -> None:
        published.write(folder, source.model, source.manifest, half=source.half)

    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        return run_of(published.load(folder))


class Arm(Hustvl):
    """OliverRensu/ARM, as fine-tuned."""

    of = "arm"


class MambaR(Hustvl):
    """wangf3014/Mamba-Reg."""

    of = "mambar"
