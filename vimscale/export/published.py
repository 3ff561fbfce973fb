"""Published checkpoints as files: model.pth as hustvl/Vim's code writes and reads it, config.json with its
constructor's arguments, and preprocessing.json with what that code does not keep: classes, mean and std.
"""

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError, brief
from vimscale.export import starting, unwrap
from vimscale.export.safetensors import difference, preprocessing
from vimscale.model import VisionMamba
from vimscale.model.published.arguments import DEFAULTS, PUBLISHED, complete, family
from vimscale.model.published.weights import from_published, guess, named, published_config, to_published
from vimscale.storage import files, untrusted

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and std that published models were trained with; their files do not say."""
_ARGUMENTS, _PREPROCESSING = "config.json", "preprocessing.json"


def write(folder: Path, model: VisionMamba, manifest: Manifest) -> None:
    """Write `model`, trained on the set of that manifest, to `folder`.

    Raises:
        CheckpointError: the published code cannot express the model.
        OSError: with a file's name; what was there before stays.
    """
    arguments, state = published_config(model), to_published(model)
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"model": state}, content)  # to a full disk it would say nothing of what happened
    files.write(folder / "model.pth", content.getvalue())
    for name, tree in ((_ARGUMENTS, arguments), (_PREPROCESSING, preprocessing(manifest))):
        files.write(folder / name, json.dumps(tree, indent=1) + "\n")


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    state = unwrap.read(folder / "model.pth").state
    return from_published(read_arguments(folder / _ARGUMENTS), state).eval()


def read_arguments(path: Path) -> dict[str, Any]:
    """Published constructor arguments from JSON.

    Raises:
        CheckpointError: the file does not hold any.
    """
    try:
        arguments = untrusted.loads(untrusted.read(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path} holds {brief(arguments)}, not the constructor's arguments by name")
    return arguments


def manifest_for(file: Path, classes: int) -> tuple[Manifest, dict[str, Any], str]:
    """(classes, mean and std of the published checkpoint `file`, what a folder says of their origin, a line to print):
    those that `write` put next to it, else ImageNet's mean and std and classes that are numbers.

    Raises:
        CheckpointError: what stands there does not fit.
    """
    numbers = tuple(map(str, range(classes)))
    plain = Manifest(name=file.stem[:60], classes=numbers, shards=(), mean=_IMAGENET[0], std=_IMAGENET[1])
    path = file.with_name(_PREPROCESSING)
    if not path.is_file():
        return plain, {"unnamed": True}, "mean and std are taken to be ImageNet's, and classes are called by number"
    tree = read_arguments(path)
    try:
        names, mean, std = starting.preprocessing_of(tree)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if len(names) != classes:
        raise CheckpointError(f"{path} names {len(names):,} classes, and the checkpoint has {classes:,}")
    return (
        replace(plain, classes=names, mean=mean, std=std),
        {"unnamed": False},
        f"classes, mean and std are those of {path}",
    )


def arguments_for(
    state: dict[str, Tensor], args: argparse.Namespace | None, model: str | None, beside: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The published arguments of a state dict, and lines that say where they are from: `model`, a name or a file of
    JSON; else, where `write` wrote the file `beside`, the arguments it put there; else the training run's own `args`;
    else keys and shapes.

    Raises:
        CheckpointError: the model cannot be told.
    """
    if model is None and beside is not None and beside.with_name(_PREPROCESSING).is_file():
        model = str(beside.with_name(_ARGUMENTS))  # `write` put it there
    if model is not None and model.endswith(".json"):
        return complete(read_arguments(Path(model))), [f"arguments from {model}"]
    if model is not None:
        return named(model, state), [f"a {model}"]
    name = getattr(args, "model", None)
    if isinstance(name, str) and name in PUBLISHED:
        arguments = named(name, state)
        given = {ours: getattr(args, theirs, None) for theirs, ours in _FROM_ARGS.items() if ours in arguments}
        arguments |= {ours: value for ours, value in given.items() if value is not None}
        return complete(arguments), [f"the file says it is a {name}"]
    arguments, taken = guess(state)
    whole = ", ".join(f"{key} {value}" for key, value in arguments.items() if value != DEFAULTS[family(arguments)][key])
    return arguments, [
        f"keys and shapes are those of a {family(arguments)}: {whole}",
        f"what they do not tell is taken as published: {', '.join(taken)}; give --model where that is wrong",
    ]


_FROM_ARGS = {
    "input_size": "img_size",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "global_pool": "global_pool",
}
"""Published constructor arguments by the training command's options."""


def largest_difference(folder: Path, model: VisionMamba) -> float:
    """Load what was written and compare logits with `model`: the largest difference."""
    return difference(load(folder), model)
