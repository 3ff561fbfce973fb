"""Published checkpoints as files: model.pth as hustvl/Vim's code writes and reads it, and config.json with the
constructor's arguments.
"""

import argparse
import io
import json
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale import files
from vimscale.errors import CheckpointError
from vimscale.export.safetensors import difference
from vimscale.model import VisionMamba
from vimscale.model.hustvl import from_published, guess, named, published_config, to_published
from vimscale.model.published import DEFAULTS, PUBLISHED, complete, family

_ALLOWED: list[Any] = [argparse.Namespace, pathlib.PosixPath]
"""What may stand in a file besides tensors and plain values: the command line that published runs keep there."""


def read_published(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], argparse.Namespace | None]:
    """(state dict, arguments of the training run if they are there) of a `.pth` or `.safetensors` file.

    A `.pth` is a pickle, which can hold any code: only tensors, plain values and argparse.Namespace are let in.
    `ema`: take the moving average, kept as model_ema, where there is one.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path), None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    whole = _unpickled(path)
    if not isinstance(whole, dict):
        raise CheckpointError(f"{path} holds a {_type(whole)}, not a dict of tensors")
    names = ("model_ema", "model") if ema else ("model", "model_ema")
    state = next((whole[name] for name in names if isinstance(whole.get(name), dict)), whole)
    strange = {key: _type(value) for key, value in state.items() if not isinstance(value, Tensor)}
    if strange or not state:
        found = ", ".join(f"{key} ({kind})" for key, kind in list(strange.items())[:4]) or "nothing"
        raise CheckpointError(f"{path} holds {found}; a state dict of tensors must be there, by itself or as model")
    args = whole.get("args") if state is not whole else None
    if all(key.startswith("module.") for key in state):  # of a model that was wrapped for several GPUs
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state), args if isinstance(args, argparse.Namespace) else None


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        refused = re.search(r"(?:GLOBAL |class |function )[`'\"]?([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is no checkpoint that torch can read: {_first_line(error)}") from None
        raise CheckpointError(
            f"{path} holds {refused[1]}, and a checkpoint that is read here holds tensors, plain values and"
            " argparse.Namespace only: unpickling anything else could run code. Where you trust the file, load it"
            " elsewhere and save its state dict alone"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def write(folder: Path, model: VisionMamba) -> None:
    """Write `model` to `folder`.

    Raises:
        CheckpointError: the published code cannot express the model.
        OSError: with a file's name; what was there before stays.
    """
    arguments, state = published_config(model), to_published(model)
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"model": state}, content)  # to a full disk it would say nothing of what happened
    files.write(folder / "model.pth", content.getvalue())
    files.write(folder / "config.json", json.dumps(arguments, indent=1) + "\n")


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    state, _ = read_published(folder / "model.pth")
    return from_published(read_arguments(folder / "config.json"), state).eval()


def read_arguments(path: Path) -> dict[str, Any]:
    """Published constructor arguments from JSON.

    Raises:
        CheckpointError: the file does not hold any.
    """
    try:
        arguments = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path} holds a {_type(arguments)}, not the constructor's arguments by name")
    return arguments


def arguments_for(
    state: dict[str, Tensor], args: argparse.Namespace | None, model: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The published arguments of a state dict, and lines that say where they are from: `model`, a name or a file of
    JSON; else the training run's own `args`; else keys and shapes.

    Raises:
        CheckpointError: the model cannot be told.
    """
    if model is not None and model.endswith(".json"):
        return complete(read_arguments(Path(model))), [f"arguments from {model}"]
    if model is not None:
        return named(model, state), [f"a {model}"]
    name = getattr(args, "model", None)
    if name in PUBLISHED:
        arguments = named(name, state)
        given = {ours: getattr(args, theirs, None) for theirs, ours in _FROM_ARGS.items() if ours in arguments}
        arguments |= {ours: value for ours, value in given.items() if value is not None}
        return arguments, [f"the file says it is a {name}"]
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
