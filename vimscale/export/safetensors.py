"""Weights as model.safetensors, and everything else an image needs to meet them as config.json."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vimscale.data.shards import Manifest
from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba


def write(folder: Path, model: VisionMamba, manifest: Manifest, about: dict[str, Any]) -> None:
    """Write `model` to `folder`. `about`: where the weights come from, for people."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    shape = {f.name: getattr(model.config, f.name) for f in fields(VimConfig) if f.init}
    whole = asdict(manifest)
    preprocessing = {key: whole[key] for key in ("classes", "mean", "std")}
    config = {"format": 1, "model": shape, **preprocessing, "about": about}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        model = VisionMamba(VimConfig(**config["model"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {error}") from None
    return model.eval()


def largest_difference(folder: Path, model: VisionMamba, images: torch.Tensor) -> float:
    """Load what was written and compare logits with `model` on `images` (b, 3, h, w): the largest difference."""
    with torch.no_grad():
        return float((load(folder)(images) - model(images)).abs().max())
