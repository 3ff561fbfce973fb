"""The architecture of weights that a recipe starts from, as keys of its `model` section: `model: {weights: PATH}` alone
is a complete model. Reads descriptions, no weights.
"""

import dataclasses
from pathlib import Path
from typing import Any

from vimscale.errors import brief
from vimscale.model.presets import PRESETS, VimConfig
from vimscale.recipe.formats import PROGRAMS, READ_BACK, written_in
from vimscale.recipe.typed_yaml import parse_mapping
from vimscale.storage import untrusted

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_NOT_ARCHITECTURE = ("weights", "grow", "change", "drop_path", "backward_drop", "init", "backward_ramp")
"""Keys of a run's `model` section that say how it was trained."""
_LAYERS = ("depth", "directions", "d_model")
"""Keys that `stages` replace."""


def with_architecture(values: dict[str, Any]) -> dict[str, Any]:
    """A `model` section that names `weights` and no preset, completed by the architecture of the weights. Keys that the
    section sets stay; null is as if a key were left out.

    Raises:
        ValueError: the folder does not describe a model.
    """
    own = {key: value for key, value in values.items() if value is not None}
    folder = Path(own["weights"])
    try:
        below = _of_run(folder) if (folder / "recipe.yaml").is_file() else _of_export(folder, own)
    except (OSError, ValueError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"weights {folder} do not say what model they are of: {text[:500]}; give other weights, or a preset (a run"
            " that has started no longer needs them: launch the recipe.yaml in its folder)"
        ) from None
    replaced = set(own)
    if "stages" in own:
        replaced |= {*_LAYERS}
    if "directions" in own:
        replaced.add("depth")
    if "tiles" in own:
        replaced.add("image_size")
    return {key: value for key, value in below.items() if key not in replaced} | own


def _of_run(folder: Path) -> dict[str, Any]:
    model = parse_mapping((folder / "recipe.yaml").read_text()).get("model", {})
    if not isinstance(model, dict):
        raise ValueError(f"model in its recipe.yaml is {brief(model)}, not a section")
    return {key: value for key, value in model.items() if value is not None and key not in _NOT_ARCHITECTURE}


def _of_export(folder: Path, own: dict[str, Any]) -> dict[str, Any]:
    """As changes of the preset that needs the fewest."""
    if (fault := not_ours(folder)) is not None:
        raise ValueError(fault)
    config = VimConfig.from_dict(object_of(read_config(folder), "model"))
    if config.kinds and "kinds" not in own:
        code = ", ".join(dict.fromkeys(brief(kind.kind) for kind in config.kinds))
        raise ValueError(
            f"its layers need the code {code}, which would run with your rights; if you trust it, name it under"
            " model.kinds"
        )
    left_out = {*_NOT_ARCHITECTURE, "num_classes", "kinds"} | ({*_LAYERS} if config.stages else set())
    names = [f.name for f in dataclasses.fields(VimConfig) if f.init and f.name not in left_out]
    fewest: dict[str, Any] | None = None
    for preset, other in PRESETS.items():
        changes = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(other, name)}
        if "directions" in changes:
            changes.pop("depth", None)
        expressible = not any(value is None or value == () for value in changes.values())
        if expressible and (fewest is None or len(changes) < len(fewest) - 1):
            fewest = {"preset": preset} | changes
    assert fewest is not None, "vim_tiny has no optional values"
    if "stages" in fewest:
        fewest["stages"] = [dataclasses.asdict(stage) for stage in config.stages]
    return fewest


def read_config(folder: Path) -> dict[str, Any]:
    """Raises:
    OSError, ValueError: there is none, or it is not JSON of an export.
    """
    tree = untrusted.loads(untrusted.read(folder / CONFIG))
    if not isinstance(tree, dict):
        raise ValueError(f"{CONFIG} holds {brief(tree)}, not a model's description")
    if tree.get("format") != 1:
        found = brief(tree.get("format"))
        raise ValueError(f"{CONFIG} has format {found}, this version reads 1")
    return tree


def not_ours(folder: Path) -> str | None:
    """What the folder is instead, if people often give such a thing."""
    if not folder.exists():
        return "it is not there"
    if folder.is_file():
        if folder.suffix in PROGRAMS:
            return f"it is {PROGRAMS[folder.suffix]}, and its weights cannot be read back; give the run that it is of"
        if folder.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            return f"it is a file; `vimscale import {folder}` makes a folder of a published checkpoint"
        return "it is a file; give the folder that it is in"
    if (folder / "model.pth").is_file():
        return (
            f"it is for the published code; `vimscale import {folder / 'model.pth'}` makes one that a run starts from"
        )
    if not (folder / CONFIG).is_file():
        exports = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        near = f"; perhaps {folder / exports[0]} is meant" if exports else ""
        return f"it has no {CONFIG}{near}"
    to = written_in(folder)
    if to is not None and to != "safetensors":
        if not READ_BACK[to]:
            return f"it is an export --to {to}, and its weights cannot be read back; give the run that it is of"
        return f"it is an export --to {to}; `vimscale import {folder}` makes one that a run starts from"
    if not (folder / WEIGHTS).is_file():
        return f"it has no {WEIGHTS}"
    return None


def object_of(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key; raises ValueError if there is none."""
    value = tree.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {brief(value)}, not a mapping")
    return value
