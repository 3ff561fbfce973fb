"""Take features of images with a model from a preset, a run's folder or an exported folder.

    python examples/features.py vim_digits a.png b.png               # a preset: random weights
    python examples/features.py runs/vim_digits_cpu a.png b.png      # a run: its newest checkpoint
    python examples/features.py runs/vim_digits_cpu/export a.png     # what `vimscale export` or `import` wrote

Axes: b images, f features, d model width; the last layer's map has h x w tokens.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vimscale.checkpoint.restore import restore
from vimscale.export.safetensors import load
from vimscale.model import PRESETS, VisionMamba
from vimscale.runtime.run_folder import RunFolder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = tuple[float, float, float]


def open_model(source: str) -> tuple[VisionMamba, Triple, Triple]:
    """(model, mean, std of its images)."""
    if source in PRESETS:
        return VisionMamba(PRESETS[source]).eval(), *IMAGENET
    if (Path(source) / "recipe.yaml").is_file():
        model, _, manifest, _ = restore(RunFolder.of(source), raw=False, step=None)
        return model, manifest.mean, manifest.std
    config = json.loads((Path(source) / "config.json").read_text())
    return load(Path(source)), tuple(config["mean"]), tuple(config["std"])


def read_image(path: str, size: tuple[int, int], mean: Triple, std: Triple) -> Tensor:
    """A normalized image (3, h, w)."""
    height, width = size
    pixels = np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC), np.float32)
    normalized = (pixels / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)  # (h, w, 3)
    return torch.from_numpy(normalized).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset's name, or the folder of a run or of an export")
    parser.add_argument("images", nargs="+", help="image files")
    arguments = parser.parse_args()

    model, mean, std = open_model(arguments.model)
    images = torch.stack([read_image(path, model.config.size, mean, std) for path in arguments.images])
    with torch.inference_mode():
        features = model(images, features=True)  # (b, f)
        (last,) = model.get_intermediate_layers(images, reshape=True)  # (b, d, h, w)
    print(f"features {tuple(features.shape)}, map of the last layer {tuple(last.shape)}")
    for path, row in zip(arguments.images, F.normalize(features, dim=1) @ F.normalize(features, dim=1).T, strict=True):
        print(path, *(f"{similarity:.3f}" for similarity in row.tolist()))


if __name__ == "__main__":
    main()
