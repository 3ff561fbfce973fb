"""Folders that transformers opens without vimscale: AutoModel, AutoModelForImageClassification, AutoImageProcessor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import starting
from vimscale.export.formats.base import Format, Outputs, Source
from vimscale.export.formats.hf_card import card
from vimscale.export.portable import limits
from vimscale.model import VimConfig, VisionMamba
from vimscale.storage import files, untrusted

PREFIX = "model."
"""Of the names of tensors: transformers' models hold the encoder as `model`."""
CODE = (
    "layers.py",
    "mixers.py",
    "modeling.py",
    "orders.py",
    "configuration_vimscale.py",
    "modeling_vimscale.py",
    "image_processing_vimscale.py",
)
_LONGEST = 1000
_CONFIG, _PREPROCESSOR, _CARD = "config.json", "preprocessor_config.json", "README.md"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CROP = 0.875


class HuggingFace(Format):
    """config.json, model.safetensors, preprocessor_config.json, the code of the model, and a model card."""

    needs = {"transformers": "transformers>=5.23"}  # noqa: RUF012
    tolerance = 1e-5

    def check(self, source: Source) -> None:
        limits.check(source.model, "hf")

    def write(self, folder: Path, source: Source) -> None:
        model = source.model
        halved = model.product_weights() if source.half else set()
        tensors = {
            PREFIX + name: (tensor.to(torch.bfloat16) if name in halved else tensor).contiguous()
            for name, tensor in model.state_dict().items()
        }
        files.save_tensors(folder / _WEIGHTS, tensors)
        for name, tree in ((_CONFIG, _config(source)), (_PREPROCESSOR, preprocessor(source))):
            files.write(folder / name, json.dumps(tree, indent=2) + "\n")
        files.write(folder / _CARD, card(source))
        for name in CODE:
            with files.naming(folder / name):
                shutil.copyfile(Path(limits.__file__).with_name(name), folder / name)

    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        from transformers.utils import logging

        from vimscale.export.portable import modeling_vimscale

        headless = not json.loads((folder / _CONFIG).read_text())["model"]["num_classes"]
        kind = modeling_vimscale.VimscaleModel if headless else modeling_vimscale.VimscaleForImageClassification
        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = kind.from_pretrained(folder).eval()
        finally:
            if shows_progress:
                logging.enable_progress_bar()
        model.model.inner = None  # users without vimscale have no kernels

        def outputs(images: Tensor) -> Outputs:
            with torch.no_grad():
                return model.model(images)

        return outputs

    def read(self, folder: Path) -> Source:
        """As the function `read`."""
        return Source(*read(folder))


def _config(source: Source) -> dict[str, Any]:
    config = source.model.config
    tree: dict[str, Any] = {
        "model_type": "vimscale",
        "architectures": ["VimscaleForImageClassification" if config.num_classes else "VimscaleModel"],
        "auto_map": {
            "AutoConfig": "configuration_vimscale.VimscaleConfig",
            "AutoModel": "modeling_vimscale.VimscaleModel",
            "AutoModelForImageClassification": "modeling_vimscale.VimscaleForImageClassification",
        },
        "dtype": "float32",
        "model": config.to_dict(),
        "backward": source.model.backward,
        "mean": list(source.manifest.mean),
        "std": list(source.manifest.std),
        "about": source.about,
    }
    if config.num_classes:
        names = source.manifest.classes or tuple(map(_unnamed, range(config.num_classes)))
        tree["id2label"] = {str(i): name for i, name in enumerate(names)}
        tree["label2id"] = {name: i for i, name in enumerate(names)}
    return tree


def _unnamed(i: int) -> str:
    """Return transformers' name of a class without one."""
    return f"LABEL_{i}"


def preprocessor(source: Source) -> dict[str, Any]:
    """Describe our preprocessing for our own processor and, without trust_remote_code, as nearly as ViT's can do it."""
    height, width = source.model.config.size
    covered = [int(side / _CROP) for side in (height, width)]
    resized = {"shortest_edge": covered[0]} if height == width else {"height": covered[0], "width": covered[1]}
    return {
        "auto_map": {"AutoImageProcessor": "image_processing_vimscale.VimscaleImageProcessor"},
        "image_processor_type": "ViTImageProcessor",
        "crop_pct": _CROP,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": resized,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.manifest.mean),
        "image_std": list(source.manifest.std),
    }


# ---- reading


def read(folder: Path) -> tuple[VisionMamba, Manifest, dict[str, Any]]:
    """Read a folder that `HuggingFace.write` or, later, transformers' `save_pretrained` wrote: the model on the CPU,
    ready to evaluate, classes with mean and std, and `about`. Runs no code of the folder.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    try:
        tree = untrusted.loads(untrusted.read(folder / _CONFIG))
        if not isinstance(tree, dict) or tree.get("model_type") != "vimscale":
            raise ValueError(f"{_CONFIG} is not that of a model with model_type vimscale")
        paths = _weights(folder)
        shapes = {_own(name): shape for path in paths for name, shape in starting.header(path).items()}
        classes = shapes.get("head.bias", (0,))[0]
        config = VimConfig.from_dict({**starting.object_of(tree, "model"), "num_classes": classes})
        with torch.device("meta"):  # check before allocating whatever the config says
            _check(shapes, {name: tuple(t.shape) for name, t in VisionMamba(config).state_dict().items()})
        _, mean, std = starting.preprocessing_of({**tree, "classes": []})
        names = _classes(tree, classes)
        model = VisionMamba(config)
        model.backward = starting.backward_of(tree)
        model.load_state_dict({_own(name): t for path in paths for name, t in load_file(path).items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold a model for transformers: {str(error)[:_LONGEST]}") from None
    about = tree.get("about")
    manifest = Manifest(name=folder.name[:60], classes=names, shards=(), mean=mean, std=std)
    return model.eval(), manifest, about if isinstance(about, dict) else {}


def _own(name: str) -> str:
    return name.removeprefix(PREFIX)


def _check(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        shown = ", ".join(f"{name[:60]} is {found.get(name)}, not {wanted.get(name)}" for name in names[:3])
        raise ValueError(f"{len(names)} tensors do not fit the config: {shown}")


def _weights(folder: Path) -> list[Path]:
    """List the files of tensors: transformers writes several for large models."""
    if (folder / _WEIGHTS).exists() or not (folder / _INDEX).exists():
        return [folder / _WEIGHTS]
    tree = untrusted.loads(untrusted.read(folder / _INDEX))
    names = sorted({str(name) for name in starting.object_of(tree, "weight_map").values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{_INDEX} names files elsewhere")
    return [folder / name for name in names]


def _classes(tree: dict[str, Any], count: int) -> tuple[str, ...]:
    """Return the names of the classes; none if the model has no head or transformers made the names up."""
    labels = starting.object_of({"id2label": {}, **tree}, "id2label")
    names: tuple[Any, ...] = tuple(labels.get(str(i)) for i in range(count))
    if names == tuple(map(_unnamed, range(count))):
        return ()
    if (len(labels) != count and count) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"id2label names {len(labels)} classes, and the head has {count}")
    return names
