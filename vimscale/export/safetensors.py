"""Weights as model.safetensors, and everything else an image needs to meet them as config.json."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale.checkpoint.restore import restore
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import starting
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.arguments import complete, config_of
from vimscale.model.published.quirks import PublishedVim
from vimscale.model.tokens import resized
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files

_SHOWN, _NAME, _LONGEST = 5, 60, 1000


def write(folder: Path, model: VisionMamba, manifest: Manifest, about: dict[str, Any]) -> None:
    """Write `model` to `folder`. `about`: where the weights come from, for people.

    Raises:
        OSError: with a file's name; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files.save_tensors(folder / "model.safetensors", tensors)
    config = {"format": 1, "model": model.config.to_dict(), "backward": model.backward}
    config |= {**preprocessing(manifest), "about": about}
    if isinstance(model, PublishedVim):
        config["published"] = model.arguments
    files.write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def preprocessing(manifest: Manifest) -> dict[str, Any]:
    """What an image needs besides the model: what its classes are called, and mean and std of its channels."""
    whole = asdict(manifest)
    return {key: whole[key] for key in ("classes", "mean", "std")}


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    try:
        tree = starting.read_config(folder)
        if "published" in tree:  # what our own config does not say
            arguments = complete(starting.object_of(tree, "published"))
            config = config_of(arguments)
            make: Callable[[], VisionMamba] = partial(PublishedVim, arguments)
        else:
            config = VimConfig.from_dict(starting.object_of(tree, "model"))
            make = partial(VisionMamba, config)
        backward = starting.backward_of(tree)
        found = starting.header(folder / starting.WEIGHTS)
        layers = {name.split(".")[1] for name in found if name.startswith("blocks.")}
        if len(layers) != len(config.layers):
            raise ValueError(f"{starting.WEIGHTS} has {len(layers)} layers, {starting.CONFIG} {len(config.layers)}")
        with torch.device("meta"):  # before room is made for whatever the config says
            _check(found, {name: tuple(value.shape) for name, value in make().state_dict().items()})
        model = make()
        model.backward = backward
        model.load_state_dict(load_file(folder / starting.WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {str(error)[:_LONGEST]}") from None
    return model.eval()


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError: tensors are missing, superfluous or of another shape."""
    faults = [f"{name[:_NAME]} is not in the model" for name in found if name not in wanted]
    faults += [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{n} is {found[n]}, not {shape}" for n, shape in wanted.items() if n in found and found[n] != shape]
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ValueError("weights and config are of different models\n  " + "\n  ".join([*faults[:_SHOWN], *more]))


def starting_weights(folder: Path, config: VimConfig, manifest: Manifest) -> tuple[dict[str, Tensor], list[str]]:
    """(weights, what was done to them, for people) of an exported or imported model, or of a run, for a new model of
    shape `config` on images of the training set `manifest`.

    The position embedding is resized; rows of the head are put in order by the names of their classes, and the head is
    left out where the classes are others; the patch embedding is converted to the set's mean and std. With these the
    new model gives for an image what the old one gave.

    Raises:
        CheckpointError: there are none, or the two models do not compute the same.
    """
    source = starting.read(folder)
    notes = starting.compare(source, config, manifest)
    old = restore(RunFolder(folder), raw=False, step=None)[0] if source.is_run else load(folder)
    state = {name: value.detach() for name, value in old.state_dict().items()}
    if old.pos_embed is not None:
        state["pos_embed"] = resized(state["pos_embed"], old.config, config.grid)
    rows = starting.rows(source, manifest)
    for name in ("head.weight", "head.bias"):
        value = state.pop(name)
        if rows is not None:
            state[name] = value[rows]
    if config.stem == "patch":
        state |= _renormalised(state, source, manifest)
    return state, notes


def _renormalised(state: dict[str, Tensor], source: starting.Source, manifest: Manifest) -> dict[str, Tensor]:
    """The patch embedding of images that are normalised by the manifest's mean and std, not by the source's.

    Of one pixel x: (x - m) / s = (x - m') / s' * s'/s + (m' - m) / s, and a convolution without padding is linear.
    """
    if (source.mean, source.std) == (manifest.mean, manifest.std):
        return {}
    old_mean, old_std, mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (source.mean, source.std, manifest.mean, manifest.std)
    )
    weight, bias = (state[f"patch_embed.{name}"] for name in ("weight", "bias"))  # (d, 3, p, p), (d)
    shift = (weight.double() * ((mean - old_mean) / old_std)).sum(dim=(1, 2, 3))
    scaled = weight.double() * (std / old_std)
    return {"patch_embed.weight": scaled.to(weight.dtype), "patch_embed.bias": (bias + shift).to(bias.dtype)}


def largest_difference(folder: Path, model: VisionMamba) -> float:
    """Load what was written and compare logits with `model`: the largest difference."""
    return difference(load(folder), model)


def difference(one: VisionMamba, other: VisionMamba) -> float:
    """The largest one between the logits of two models on eight images; chance falls for both in the same way.

    Raises:
        CheckpointError: they are not finite.
    """
    channels = one.arguments["channels"] if isinstance(one, PublishedVim) else 3
    logits = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for model in (one, other):
            torch.manual_seed(0)
            logits.append(model(torch.randn(8, channels, *model.config.size)))
    if not all(bool(one.isfinite().all()) for one in logits):
        raise CheckpointError("the model gives logits that are not finite for images of noise: its run had diverged")
    return float((logits[0] - logits[1]).abs().max())
