"""Weights as model.safetensors, and everything else an image needs to meet them as config.json."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vimscale import files
from vimscale.data.shards import Manifest
from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published import complete
from vimscale.model.quirks import PublishedVim, quirks
from vimscale.model.tokens import resized


def write(folder: Path, model: VisionMamba, manifest: Manifest, about: dict[str, Any]) -> None:
    """Write `model` to `folder`. `about`: where the weights come from, for people.

    Raises:
        OSError: with a file's name; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files.save_tensors(folder / "model.safetensors", tensors)
    whole = asdict(manifest)
    preprocessing = {key: whole[key] for key in ("classes", "mean", "std")}
    config = {"format": 1, "model": model.config.to_dict(), "backward": model.backward, **preprocessing, "about": about}
    if isinstance(model, PublishedVim):
        config["published"] = model.arguments
    files.write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def load(folder: Path) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate.

    Raises:
        CheckpointError: the folder does not hold one.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        if "published" in config:  # what our own config does not say
            model: VisionMamba = PublishedVim(complete(config["published"]))
        else:
            model = VisionMamba(VimConfig.from_dict(config["model"]))
        model.backward = config.get("backward", 1.0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {error}") from None
    return model.eval()


def starting_weights(folder: Path, config: VimConfig) -> dict[str, Tensor]:
    """The weights of an exported model for a new one of shape `config`: the position embedding is resized, and the
    head left out where it has other classes.

    Raises:
        CheckpointError: the two models differ in anything else.
    """
    old = load(folder)
    if isinstance(old, PublishedVim):
        asked = ", ".join(quirks(old.arguments)) or "cls_position"
        raise CheckpointError(
            f"model.weights {folder} is a published model with what no recipe trains: {asked}; import it with"
            " --model and arguments without these, if its weights are to be taken all the same"
        )
    state = dict(old.state_dict())
    if old.pos_embed is not None:
        state["pos_embed"] = resized(old.pos_embed.detach(), old.config, config.grid)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in VisionMamba(config).named_parameters()}
    if old.config.num_classes != config.num_classes:
        state = {name: t for name, t in state.items() if not name.startswith("head.")}
    faults = [f"{name} is not in the new model" for name in state if name not in wanted]
    faults += [f"{name} is missing" for name in wanted if name not in state and not name.startswith("head.")]
    faults += [
        f"{name} is {tuple(t.shape)}, wanted {tuple(wanted[name])}"
        for name, t in state.items()
        if name in wanted and t.shape != wanted[name]
    ]
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"model.weights {folder} is of another shape than the recipe's model:\n  "
            + "\n  ".join(faults[:5])
            + more
            + "\nset the recipe's model section as in its config.json"
        )
    return state


def largest_difference(folder: Path, model: VisionMamba) -> float:
    """Load what was written and compare logits with `model`: the largest difference."""
    return difference(load(folder), model)


def difference(one: VisionMamba, other: VisionMamba) -> float:
    """The largest one between the logits of two models on eight images; chance falls for both in the same way."""
    channels = one.arguments["channels"] if isinstance(one, PublishedVim) else 3
    logits = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for model in (one, other):
            torch.manual_seed(0)
            logits.append(model(torch.randn(8, channels, *model.config.size)))
    return float((logits[0] - logits[1]).abs().max())
