"""`vimscale.load`: a trained model for Python programs, on their device."""

from pathlib import Path
from typing import Any

import torch

from vimscale.errors import CheckpointError
from vimscale.inference.opened import Opened, open_model
from vimscale.inference.preprocessing import Preprocessing
from vimscale.model import PRESETS, VisionMamba
from vimscale.runtime.run_folder import RunFolder


class Loaded(tuple[VisionMamba, Preprocessing]):
    """A model, ready to evaluate, and what turns an image into its input: `model, preprocess = vimscale.load(...)`."""

    opened: Opened

    def __new__(cls, opened: Opened, device: torch.device) -> "Loaded":
        self = super().__new__(cls, (opened.model.to(device), opened.preprocessing))
        self.opened = opened
        return self

    @property
    def model(self) -> VisionMamba:
        return self[0]

    @property
    def preprocessing(self) -> Preprocessing:
        return self[1]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits; empty: the model has no head."""
        return self.opened.manifest.classes if self.model.head is not None else ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def about(self) -> dict[str, Any]:
        """Where the weights come from: `source`, `step` (of a run's checkpoint), `trained_on`, `sha256`."""
        opened = self.opened
        return {
            "source": str(opened.source),
            "step": opened.step,
            "trained_on": opened.manifest.name,
            "sha256": opened.identity,
        }

    def __repr__(self) -> str:
        return f"<model of {self.opened.source}: {len(self.model.config.layers)} layers, {len(self.classes)} classes>"


def load(
    source: str | Path | RunFolder,
    *,
    device: str | torch.device = "cpu",
    step: int | None = None,
    raw: bool = False,
    run_own_code: bool = False,
) -> Loaded:
    """Load a model: of a run (its name under runs/, its folder, or what `train` returned), of a checkpoint's folder, or
    of the folder of an export or an imported model. Of a self-distilled run it is the teacher.

    Args:
        device: where the model computes, such as "cuda".
        step: of the checkpoint. Default: the newest one's.
        raw: take the weights themselves where there is a moving average.
        run_own_code: import the Python files of an export that define a user's own kinds of layers. They run with your
            rights. Those of a run are always imported.

    Raises:
        CheckpointError: there is no such model, or `step` or `raw` is given for an export.
    """
    if isinstance(source, RunFolder):
        source = source.path
    if str(source) in PRESETS and not any(folder.exists() for folder in (Path(source), Path("runs") / source)):
        raise CheckpointError(
            f"{source} is a preset, which has no weights; name a run or an export."
            f" VisionMamba(PRESETS[{str(source)!r}]) has random weights"
        )
    return Loaded(open_model(source, step=step, raw=raw, own_code=run_own_code), torch.device(device))
