"""Small models of random weights, as exports that commands and functions open."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vimscale.data.shards.manifest import Manifest
from vimscale.export import parity, safetensors
from vimscale.model import PRESETS, VisionMamba

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def export(folder: Path, seed: int = 0, **changes: Any) -> VisionMamba:
    """Write a model of two layers for 32 x 32 pixels and ten classes, zero to nine; return it."""
    torch.manual_seed(seed)
    config = replace(PRESETS["vim_digits"], **{"d_model": 32, "depth": 2, "directions": "bi*2"} | changes)
    model = VisionMamba(config).eval()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    classes = names if config.num_classes else ()
    safetensors.write(folder, model, Manifest("ten", classes, shards=(), mean=MEAN, std=STD), {})
    return model


def computes_the_same(one: VisionMamba, other: VisionMamba) -> bool:
    """Whether two models give the same bits for images of noise."""
    images = parity.probe(other, Manifest("none", (), (), MEAN, STD), None, asked=False).images
    first, second = (parity.outputs(parity.run_of(model), images) for model in (one, other))
    return all(found.absolute == 0 for found in parity.compared(first, second).outputs.values())
