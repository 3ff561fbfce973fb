"""Folders that timm opens without vimscale: a package that registers the model, its weights and its config."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vimscale.export.formats.base import Format, Outputs, Source
from vimscale.export.portable import limits
from vimscale.storage import files

PACKAGE = "timm_vimscale"
CODE = {"timm_vimscale.py": "__init__.py"} | {
    name: name for name in ("layers.py", "mixers.py", "modeling.py", "orders.py")
}


class Timm(Format):
    """config.json and model.safetensors as timm's local-dir source reads them, and the package timm_vimscale."""

    needs = {"timm": "timm"}  # noqa: RUF012
    tolerance = 1e-5

    def check(self, source: Source) -> None:
        limits.check(source.model, "timm")

    def write(self, folder: Path, source: Source) -> None:
        model, config = source.model, source.model.config
        classes = source.manifest.classes
        halved = model.product_weights() if source.half else set()
        tensors = {
            name: (tensor.to(torch.bfloat16) if name in halved else tensor).contiguous()
            for name, tensor in model.state_dict().items()
        }
        files.save_tensors(folder / "model.safetensors", tensors)
        tree = {
            "architecture": "vimscale",
            "num_classes": config.num_classes,
            "num_features": config.widths[-1],
            **({"label_names": list(classes)} if classes and config.num_classes else {}),
            "model_args": {"model": config.to_dict(), "backward": model.backward},
            "pretrained_cfg": {
                "num_classes": config.num_classes,
                "input_size": [3, *config.size],
                "fixed_input_size": False,
                "pool_size": None,
                "crop_pct": 0.875,
                "crop_mode": "center",
                "interpolation": "bicubic",
                "mean": list(source.manifest.mean),
                "std": list(source.manifest.std),
                "first_conv": "patch_embed" if config.stem == "patch" else "patch_embed.0",
                "classifier": "head",
            },
            "about": source.about,
        }
        files.write(folder / "config.json", json.dumps(tree, indent=2) + "\n")
        (folder / PACKAGE).mkdir()
        for name, copy in CODE.items():
            target = folder / PACKAGE / copy
            with files.naming(target):
                shutil.copyfile(Path(limits.__file__).with_name(name), target)

    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        import timm  # type: ignore[import-not-found, unused-ignore]

        importlib.import_module("vimscale.export.portable.timm_vimscale")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        model.inner = None  # users without vimscale have no kernels

        def outputs(images: Tensor) -> Outputs:
            with torch.no_grad():
                tokens = model.forward_features(images)
                out = {"features": model.forward_head(tokens, pre_logits=True)}
                return out | ({} if model.head is None else {"logits": model.forward_head(tokens)})

        return outputs
