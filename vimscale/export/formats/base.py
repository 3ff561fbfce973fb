"""What formats have in common: what they are given, what they must be able to do, and which there are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError, suggest
from vimscale.model import VimConfig, VisionMamba

Outputs = dict[str, Tensor]
"""fp32 `features` (b, features), what the head reads, and `logits` (b, classes) if the model has a head."""


@dataclass(frozen=True)
class Source:
    """A model to export, with what its users need to know."""

    model: VisionMamba
    """On the CPU, ready to evaluate, fp32."""
    manifest: Manifest
    """Classes, mean and std of the set that it was trained on; lists no shards."""
    about: dict[str, Any]
    """Where the weights come from: run, step, which weights."""
    half: bool = False
    """Store the weights that `VisionMamba.product_weights` names in bf16, which holds their values exactly: the caller
    has rounded them. All others stay fp32, and the format computes in fp32."""
    any_size: bool = False
    """Let the exported program take images of any size whose sides patches fill, if the format can."""
    aoti: bool = False
    """Also compile the program for this CPU, if the format can."""


class Format(ABC):
    """A folder that other programs open."""

    needs: ClassVar[dict[str, str]] = {}
    """Modules that writing and reading it import -> what pip installs them."""
    tolerance: ClassVar[float] = 0.0
    """Largest difference of logits and features from the model's, as a part of the model's largest one, in fp32."""

    def check(self, source: Source) -> None:  # noqa: B027 - most formats hold every model
        """Raise CheckpointError if the format cannot hold the model: the value, the rule, the fix."""

    @abstractmethod
    def write(self, folder: Path, source: Source) -> None:
        """Write the model into the empty folder `folder`, which the caller moves into place.

        Raises:
            OSError: names the file.
        """

    @abstractmethod
    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        """Open what `write` wrote as its users do: a function of normalized images (b, 3, h, w)."""

    def others(self, folder: Path) -> dict[str, Callable[[Tensor], Outputs]]:
        """Open the further programs in the folder, which compute the same as that of `reopen`, by their files."""
        return {}

    def read(self, folder: Path) -> Source:
        """Read back what `write` wrote as a model of ours, bit by bit. `vimscale import`, `vimscale.load` and all
        commands that take a model open such folders.

        Raises:
            CheckpointError: the folder does not hold one, or the format is for other programs only.
        """
        raise CheckpointError(
            f"{folder} is for other programs, and its weights cannot be read back; use the run, or its export --to"
            " safetensors or hf"
        )


FORMATS = {
    "safetensors": "vimscale.export.formats.own:Own",
    "hustvl": "vimscale.export.formats.hustvl:Hustvl",
    "arm": "vimscale.export.formats.hustvl:Arm",
    "mambar": "vimscale.export.formats.hustvl:MambaR",
    "hf": "vimscale.export.formats.hf:HuggingFace",
    "timm": "vimscale.export.formats.timm:Timm",
    "onnx": "vimscale.export.formats.onnx:Onnx",
    "torch": "vimscale.export.formats.torch_program:TorchProgram",
}
"""What --to takes -> where its class is."""


def sides(config: VimConfig) -> tuple[int, int]:
    """Return the smallest side of an image, in pixels, that patches fill and stages can merge, and the step to the next
    larger one.
    """
    step = config.step * math.prod(stage.downsample for stage in config.stages[1:])
    return config.patch_size - config.step + step, step


def of(name: str) -> Format:
    """The format `name`, to write.

    Raises:
        CheckpointError: there is none, or what it needs is not installed or cannot be imported.
    """
    found = unchecked(name)
    missing = []
    for package in found.needs:
        try:
            import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                missing.append(package)
                continue
            raise CheckpointError(
                f"--to {name} needs {package}, which cannot be imported here ({str(error).splitlines()[0]}); install"
                f" what it imports, in builds for torch {torch.__version__}"
            ) from error
    if missing:
        pip = " ".join(dict.fromkeys(f"'{found.needs[package]}'" for package in missing))
        raise CheckpointError(f"--to {name} needs {', '.join(missing)}, not installed here: pip install {pip}")
    return found


def unchecked(name: str) -> Format:
    """The format `name`, to read, which needs no other package.

    Raises:
        CheckpointError: there is none.
    """
    if name not in FORMATS:
        raise CheckpointError(f"--to {name} is not a format{suggest(name, FORMATS)}")
    return _class_of(name)()


def _class_of(name: str) -> type[Format]:
    module, _, title = FORMATS[name].partition(":")
    found: type[Format] = getattr(import_module(module), title)
    return found
