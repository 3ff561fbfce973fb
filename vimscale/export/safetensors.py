"""Models as model.safetensors, with config.json for everything else that inference needs."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale.checkpoint.load import read_train_state
from vimscale.checkpoint.restore import OF_OBJECTIVE, restore
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import expand, starting
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.published.arguments import complete, config_of
from vimscale.model.published.quirks import PublishedVim
from vimscale.model.tokens import resized, sincos
from vimscale.runtime.run_folder import RunFolder
from vimscale.storage import files, own_code

_SHOWN, _NAME, _LONGEST = 5, 60, 1000


def write(folder: Path, model: VisionMamba, manifest: Manifest, about: dict[str, Any], *, half: bool = False) -> None:
    """Write `model` to `folder`. `about`: where the weights come from, for human readers. `half`: see `stored`.

    Raises:
        OSError: names the file; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.save_tensors(folder / "model.safetensors", stored(model, half=half))
    for own in model.config.kinds:
        own_code.copy(own.kind, folder)
    shape = model.config.with_own_classes(own_code.without_folder)
    config = {"format": 1, "model": shape.to_dict(), "backward": model.backward}
    config |= {**preprocessing(manifest), "about": about}
    if model.config.num_classes == 0:
        config["classes"] = []
    if isinstance(model, PublishedVim):
        config["published"] = model.arguments
    files.write(folder / "config.json", json.dumps(config, indent=1) + "\n")


def stored(model: VisionMamba, *, half: bool) -> dict[str, Tensor]:
    """The model's tensors as a file holds them. `half`: those of `product_weights` in bf16."""
    products = model.product_weights() if half else set()
    return {
        name: (value.bfloat16() if name in products else value).contiguous()
        for name, value in model.state_dict().items()
    }


def preprocessing(manifest: Manifest) -> dict[str, Any]:
    """What inference needs besides the model: names of classes, and mean and std of the channels."""
    tree = asdict(manifest)
    return {key: tree[key] for key in ("classes", "mean", "std")}


def load(folder: Path, *, run_own_code: bool = False) -> VisionMamba:
    """The model that `write` wrote, on the CPU, ready to evaluate. `run_own_code`: import the Python files in the
    folder that define a user's own kinds of layers. They run with your rights; check them first.

    Raises:
        CheckpointError: the folder does not hold one, or has files of code and `run_own_code` is false.
    """
    try:
        tree = starting.read_config(folder)
        if "published" in tree:  # quirks that our own config does not cover
            arguments = complete(starting.object_of(tree, "published"))
            config = config_of(arguments)
            make: Callable[[], VisionMamba] = partial(PublishedVim, arguments)
        else:
            config = starting.config_in(folder, tree)
            if config.kinds and not run_own_code:
                names = ", ".join(dict.fromkeys(own.kind for own in config.kinds))
                raise ValueError(
                    f"the model needs the code {names}, which would run with your rights; if you trust it, give"
                    " --run-own-code, or call load(folder, run_own_code=True)"
                )
            make = partial(VisionMamba, config)
        backward = starting.backward_of(tree)
        found = starting.header(folder / starting.WEIGHTS)
        layers = {name.split(".")[1] for name in found if name.startswith("blocks.")}
        if len(layers) != len(config.layers):
            raise ValueError(f"{starting.WEIGHTS} has {len(layers)} layers, {starting.CONFIG} {len(config.layers)}")
        with torch.device("meta"):  # check before allocating whatever the config says
            _check(found, {name: tuple(value.shape) for name, value in make().state_dict().items()})
        model = make()
        model.backward = backward
        model.load_state_dict(load_file(folder / starting.WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold an exported model: {str(error)[:_LONGEST]}") from None
    return model.eval()


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if tensors are missing, superfluous or of another shape."""
    faults = [f"{name[:_NAME]} is not in the model" for name in found if name not in wanted]
    faults += [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{n} is {found[n]}, not {shape}" for n, shape in wanted.items() if n in found and found[n] != shape]
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise ValueError("weights and config are of different models\n  " + "\n  ".join([*faults[:_SHOWN], *more]))


def starting_weights(
    folder: Path,
    config: VimConfig,
    manifest: Manifest,
    grow: Literal["copy"] | None = None,
    change: Collection[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt the weights of an exported or imported model, or of a run, to a new model of shape `config` on images of
    the training set `manifest`: (weights, notes on what was adapted, for human readers). `grow`, `change`: those
    of the recipe's `model` section. `grow` copies the scans that the old model lacks (`expand`).

    This resizes the position embedding, orders the rows of the head by the names of their classes (or leaves the head
    out if the classes differ), and converts the patch embedding to the set's mean and std. With these weights the new
    model gives for an image what the old one gave.

    Raises:
        CheckpointError: there are no weights, or the two models do not compute the same.
    """
    source = starting.read(folder)
    notes = starting.compare(source, config, manifest, grow, change)
    old = restore(RunFolder(folder), raw=False, step=None)[0] if source.is_run else load(folder, run_own_code=True)
    state = {name: value.detach() for name, value in old.state_dict().items()}
    if config.pos_embed is True and old.config.pos_embed in (True, "sincos"):
        state["pos_embed"] = _positions(old, config)
    if grow == "copy":
        state = expand.state(state, old.config, config)
    rows = starting.rows(source, config, manifest)
    for name in ("head.weight", "head.bias"):
        value = state.pop(name, None)
        if value is not None and rows is not None:
            state[name] = value[rows]
    if config.stem == "patch":
        state |= _renormalised(state, source, manifest)
    if change:
        with torch.device("meta"):
            wanted = {name: value.shape for name, value in VisionMamba(config).state_dict().items()}
        state = {name: value for name, value in state.items() if wanted.get(name) == value.shape}
    return state, notes


def groups(folder: Path, config: VimConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """What `starting_weights` did with each parameter, in four lines: loaded, resized, left out, new.

    Raises:
        CheckpointError, OSError, ValueError: the folder changed since.
    """
    if (folder / "recipe.yaml").is_file():
        newest = RunFolder(folder).newest_checkpoint(None)
        old = {name: tuple(shape) for name, shape in read_train_state(newest).shapes.items()}
    else:
        old = starting.header(folder / starting.WEIGHTS)
    with torch.device("meta"):
        new = [name for name, _ in VisionMamba(config).named_parameters()]
    resized = [name for name in weights if name in old and old[name] != tuple(weights[name].shape)]
    found = {
        "loaded": [name for name in new if name in weights and name not in resized],
        "resized": resized,
        "left out": [name for name in old if name not in weights],
        "new": [name for name in new if name not in weights],
    }
    return [f"{what}: {_modules(names)}" for what, names in found.items()]


def _modules(names: list[str]) -> str:
    counts = Counter(".".join(name.split(".")[: 2 if name.startswith(OF_OBJECTIVE) else 1]) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items()) or "nothing"


def _positions(old: VisionMamba, config: VimConfig) -> Tensor:
    """The position embedding for a model `config`; zeros for class tokens and registers that the old model lacks."""
    learned, grid = old.pos_embed, old.config.grid
    patches = sincos(old.config, grid, old.drop_rates) if learned is None else learned.detach()
    patches = resized(patches, old.config, config.grid)
    if (old.config.cls_token, old.config.registers) == (config.cls_token, config.registers):
        return patches
    extra = torch.zeros(config.cls_tokens + config.registers, patches.shape[1])
    if old.config.cls_tokens or old.config.registers:
        before = layout(old.config, config.grid)
        if old.config.cls_tokens == config.cls_tokens:
            extra[: config.cls_tokens] = patches[list(before.cls)]
        if old.config.registers == config.registers:
            extra[config.cls_tokens :] = patches[list(before.registers)]
        patches = before.image_tokens(patches[None])[0]
    return layout(config, config.grid).insert(patches[None], extra)[0]


def _renormalised(state: dict[str, Tensor], source: starting.Source, manifest: Manifest) -> dict[str, Tensor]:
    """The patch embedding for images normalised by the manifest's mean and std instead of the source's.

    For a pixel x: (x - m) / s = (x - m') / s' * s'/s + (m' - m) / s, and a convolution without padding is linear.
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
