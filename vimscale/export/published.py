"""Published checkpoints as files: model.pth as the code of hustvl/Vim writes and reads it, config.json with the
arguments of its constructor, and preprocessing.json with what that code does not save: classes, mean and std.
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
from vimscale.export.safetensors import preprocessing, stored
from vimscale.model import VisionMamba
from vimscale.model.published.arguments import DEFAULTS, PUBLISHED, complete, family
from vimscale.model.published.weights import from_published, guess, named, published_config, to_published
from vimscale.model.tokens import resized
from vimscale.objectives.published import arm
from vimscale.storage import files, untrusted

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and std of the data of published models; their files do not include them."""
_ARGUMENTS, _PREPROCESSING = "config.json", "preprocessing.json"


def write(folder: Path, model: VisionMamba, manifest: Manifest, *, half: bool = False) -> None:
    """Write `model`, trained on the set of `manifest`, to `folder`. `half`: see `safetensors.stored`.

    Raises:
        CheckpointError: the published code cannot express the model.
        OSError: names the file; what was there before stays.
    """
    arguments, state = published_config(model), to_published(model, stored(model, half=half))
    about = preprocessing(manifest) | ({} if model.config.num_classes else {"classes": []})
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"model": state}, content)  # torch does not name the error when a disk is full
    files.write(folder / "model.pth", content.getvalue())
    for name, tree in ((_ARGUMENTS, arguments), (_PREPROCESSING, about)):
        files.write(folder / name, json.dumps(tree, indent=1) + "\n")


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    state = unwrap.read(folder / "model.pth").state
    return from_published(read_arguments(folder / _ARGUMENTS), state).eval()


def read(
    file: Path, model: str | None = None, *, ema: bool = False, image_size: int | None = None
) -> tuple[VisionMamba, Manifest, dict[str, Any], list[str]]:
    """Read a published checkpoint, pretrained by ARM too: (the model, on the CPU, ready to evaluate; a manifest with
    its classes, mean and std; what to record about its origin; lines that say how it was read).

    Args:
        model: name of a published model, or a JSON file of its arguments. default: what the file says.
        ema: take the moving average, if the file has one.
        image_size: resize the position embedding for images of this size.

    Raises:
        CheckpointError: the file cannot be read, or its model cannot be identified.
    """
    state, args, notes = unwrap.read(file, ema=ema)
    if arm.is_pretraining(state):
        found, arguments, reasons = pretrained_arm(state, model, image_size)
    else:
        arguments, reasons = arguments_for(state, args, model, file)
        found = from_published(arguments, state, resize_to=image_size).eval()
    manifest, about, origin = manifest_for(file, arguments.get("num_classes", 0))
    about = {"file": str(file), "published": arguments, **about}
    return found, manifest, about, [*notes, *reasons, origin]


def read_arguments(path: Path) -> dict[str, Any]:
    """Read published constructor arguments from JSON.

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
    """Find classes, mean and std of the published checkpoint `file`: those that `write` put next to it, or else
    ImageNet's mean and std, with numbers as class names.

    Returns:
        (manifest with them, what to record about their origin, a line to print).

    Raises:
        CheckpointError: the file next to it does not fit.
    """
    numbers = tuple(map(str, range(classes)))
    plain = Manifest(name=file.stem[:60], classes=numbers, shards=(), mean=_IMAGENET[0], std=_IMAGENET[1])
    path = file.with_name(_PREPROCESSING)
    if not path.is_file():
        return plain, {"unnamed": True}, "mean and std are assumed to be ImageNet's, and numbers serve as class names"
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
    state: dict[str, Tensor], args: argparse.Namespace | None, model: str | None, file: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Find the published arguments of a state dict: (arguments, lines that say where they come from).

    The sources, in this order: `model`, a name or a JSON file; the arguments next to the checkpoint `file`, if `write`
    wrote it; the training run's own `args`; keys and shapes.

    Raises:
        CheckpointError: the model cannot be identified.
    """
    if model is None and file is not None and file.with_name(_PREPROCESSING).is_file():
        model = str(file.with_name(_ARGUMENTS))
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
    arguments, assumed = guess(state)
    defaults = DEFAULTS[family(arguments)]
    different = ", ".join(f"{key} {value}" for key, value in arguments.items() if value != defaults[key])
    return arguments, [
        f"keys and shapes are those of a {family(arguments)}: {different}",
        f"what they do not show is assumed to be as published: {', '.join(assumed)}; give --model if that is wrong",
    ]


def pretrained_arm(
    state: dict[str, Tensor], model: str | None, image_size: int | None
) -> tuple[VisionMamba, dict[str, Any], list[str]]:
    """Take the encoder of ARM's pretraining: (the encoder, without a head; arguments of the original's constructor;
    lines that say what was taken). `image_size`: that of the new model, in place of the original's.

    Raises:
        CheckpointError: the state dict is not of such a model, or of another than `model`.
    """
    arguments = arm.arguments_of(state)
    if model is not None:
        wanted = arm.PUBLISHED.get(model)
        if wanted is None:
            raise CheckpointError(
                f"--model {brief(model)}: the file is of ARM's pretraining; its models are"
                f" {', '.join(arm.PUBLISHED)}, and need not be named"
            )
        if different := [key for key, value in wanted.items() if arguments.get(key, value) != value]:
            found = ", ".join(f"{key} {arguments[key]}" for key in different)
            raise CheckpointError(f"--model {model}: the file is of another model, of {found}")
    encoder = arm.encoder(state).eval()
    if image_size is not None:
        config = replace(encoder.config, image_size=image_size)
        own = encoder.state_dict()
        if encoder.pos_embed is not None:
            own["pos_embed"] = resized(encoder.pos_embed.detach(), encoder.config, config.grid)
        encoder = VisionMamba(config).eval()
        encoder.load_state_dict(own)
    return (
        encoder,
        arguments,
        [
            f"ARM's pretraining: {encoder.config.directions}, width {encoder.config.d_model}, no head; its decoder is"
            " left out, and the norm of its last tap becomes the encoder's last norm",
            'to fine-tune: model.weights and model.grow=copy with "cross" or "bi" layers',
        ],
    )


_FROM_ARGS = {
    "input_size": "img_size",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "global_pool": "global_pool",
}
"""Options of the published training command -> constructor arguments."""
