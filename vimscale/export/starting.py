"""Weights that a run starts from (`model.weights`): their model, and whether the recipe's model computes the same.

Without torch: `vimscale launch` checks this before it starts any rank. `safetensors.starting_weights` then reads the
weights.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vimscale.checkpoint.mirror import open_mirror
from vimscale.data.shards.manifest import Manifest
from vimscale.data.training_set import TrainingSet
from vimscale.errors import CheckpointError, DataError, UserError, brief
from vimscale.export import expand
from vimscale.model.presets import VimConfig
from vimscale.model.published.arguments import complete, quirks
from vimscale.model.schedule import compact
from vimscale.recipe.pretrained import CONFIG, WEIGHTS, not_ours, object_of, read_config
from vimscale.recipe.recipe import Recipe
from vimscale.runtime.run_folder import RunFolder, checkpoints, step_of
from vimscale.storage import own_code, untrusted

Triple = tuple[float, float, float]
_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """What is known about weights before they are read."""

    folder: Path
    config: VimConfig
    classes: tuple[str, ...] | None
    """None: an imported model whose class names are unknown."""
    mean: Triple
    std: Triple
    backward: float
    """Factor of the backward paths, from 0 to 1 (`model.backward_ramp`)."""

    @property
    def is_run(self) -> bool:
        return (self.folder / "recipe.yaml").is_file()


# ---- every field of a VimConfig falls into one of three groups for loaded weights


def _plain(config: VimConfig, value: Any) -> Any:
    return None if len(config.parts) > 1 else value


def _kinds(config: VimConfig) -> set[str]:
    return {layer.kind for layer in config.layers}


def _scans(config: VimConfig, value: Any) -> Any:
    return value if _kinds(config) - {"attn"} else None


_SSD = {"ssd", "ssd_fwd", "ssd_bwd"}
MEANING: dict[str, Callable[[VimConfig], Any]] = {
    "patch_size": lambda c: c.patch_size,
    "stem": lambda c: c.stem,
    "stages": lambda c: [(s.depth, s.d_model, i and s.downsample) for i, s in enumerate(c.parts)] * (len(c.parts) > 1),
    "d_model": lambda c: _plain(c, c.parts[0].d_model),
    "depth": lambda c: _plain(c, c.parts[0].depth),
    "directions": lambda c: compact(c.layers),
    "kinds": lambda c: [
        (own.name, own_code.identity(own.kind), own.options) for own in c.kinds if own.name in _kinds(c)
    ],
    "d_state": lambda c: c.d_state if _kinds(c) - {"attn", *_SSD} else None,
    "d_conv": lambda c: _scans(c, c.d_conv),
    "expand": lambda c: _scans(c, c.expand),
    "fuse": lambda c: c.fuse if any(len(x.paths) > 1 or x.kind == "pair" for x in c.layers) else None,
    "window": lambda c: c.window if any(layer.order == "window" for layer in c.layers) else None,
    "d_head": lambda c: c.d_head if _kinds(c) & {"attn", *_SSD} else None,
    "ssd_state": lambda c: c.ssd_state if _kinds(c) & _SSD else None,
    "ssd_form": lambda c: c.ssd_form if _kinds(c) & _SSD else None,
    "mlp": lambda c: c.mlp,
    "norm": lambda c: c.norm,
    "norm_eps": lambda c: c.norm_eps,
    "ssm_norm": lambda c: _scans(c, c.ssm_norm),
    "cls_token": lambda c: c.cls_token,
    "registers": lambda c: c.registers,
    "pool": lambda c: c.pooling if c.num_classes else None,
    "register_reduce": lambda c: c.register_reduce,
    "pos_embed": lambda c: c.pos_embed,
}
"""Fields that decide what the model computes or the shapes of its weights, and must be the same; None: no effect."""
OWN_RULE = frozenset({"num_classes", "image_size", "tiles", "stride", "layer_scale", "backward_gate", "backward_ramp"})
"""Fields with a rule in `compare`: the weights can be adapted to some of their values."""
TRAINING = frozenset({"drop_path", "backward_drop", "init"})
"""Fields that affect training only, not existing weights."""


def compare(
    source: Source,
    config: VimConfig,
    manifest: Manifest,
    grow: Literal["copy"] | None = None,
    change: Collection[str] = (),
) -> list[str]:
    """List how the weights are adapted to the recipe's model `config` and training set, for human readers. `grow`,
    `change`: those of the recipe's `model` section.

    Raises:
        CheckpointError: the recipe's model would compute something else with them. It lists every difference.
    """
    old = source.config
    faults, notes = [], []
    if grow == "copy":
        if old.layers != config.layers and len(old.layers) == len(config.layers):
            faults += expand.faults(old, config)
            notes += [] if faults else [expand.note(old, config)]
        notes += _growth_notes(old, config)
    for name, effective in MEANING.items():
        theirs, ours = effective(old), effective(config)
        if grow == "copy" and name in _GROWS and (name == "directions" or _GROWS[name](old, config)):
            continue  # `expand` has judged the directions
        if theirs != ours and theirs is not None and ours is not None:
            changeable = name in _CHANGEABLE and _CHANGEABLE[name](old, config)
            if changeable and name in change:
                notes.append(f"{name}: {_text(theirs)} becomes {_text(ours)}, as model.change allows")
                continue
            fix = f"set model.{name}={_value(theirs)}"
            if grow is None and name in _GROWS and _GROWS[name](old, config):
                fix += f", or model.grow=copy, and {_GROWN[name]}"
            if changeable:
                fix += f", or model.change=[{', '.join([*change, name])}] if the weights should be used differently"
            if name in ("stages", "directions") and len(old.parts) > 1:
                fix = f"set model.stages as {source.folder / CONFIG} has them"
            elif name == "kinds":
                fix = f"set model.kinds to classes of the files in {source.folder}, with the same options"
            faults.append(f"{name}: the weights have {_text(theirs)}, the recipe {_text(ours)}; {fix}")
    if (old.layer_scale is None) != (config.layer_scale is None):
        faults.append(
            f"layer_scale: the weights have {_text(old.layer_scale)}, the recipe {_text(config.layer_scale)};"
            + (" leave it out" if old.layer_scale is None else f" set model.layer_scale={old.layer_scale}")
        )
    if old.backward_gate and not config.backward_gate and old.optional:
        faults.append("backward_gate: the weights have gates, the recipe has none; set model.backward_gate=true")
    elif config.backward_gate and not old.backward_gate and config.optional:
        notes.append("backward_gate: every gate starts at 1, as if there were none")
    if old.optional and source.backward != config.backward_at(0):
        if source.backward != 1:
            faults.append(
                f"backward_ramp: the weights are of a run with its backward paths at {source.backward:.2g}; train that"
                " run to the end of its ramp"
            )
        else:
            notes.append("backward_ramp: the weights are of a model with its backward paths at 1; here they start over")
    if source.mean != manifest.mean or source.std != manifest.std:
        change = f"mean {_text(source.mean)} and std {_text(source.std)} of the weights' data"
        to = f"those of {manifest.name[:60]}, {_text(manifest.mean)} and {_text(manifest.std)}"
        if old.stem == "patch":
            notes.append(f"{change} are not {to}: patch_embed is converted, so that an image gives the same result")
        else:
            faults.append(
                f"{change} are not {to}, and a conv stem cannot be converted; write the weights' mean and std into"
                " manifest.json of the training set and of the validation set"
            )
    if faults:
        more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
        raise CheckpointError(
            f"model.weights {source.folder}: the weights are of another model than the recipe's (without model.preset,"
            " a recipe takes theirs)\n  " + "\n  ".join([*faults[:12], *more])
        )
    if old.grid != config.grid or old.step != config.step:
        grids = " to ".join(f"{c.grid[0]} x {c.grid[1]} patches, one every {c.step} pixels" for c in (old, config))
        how = (
            "its position embedding is resized"
            if config.pos_embed is True
            else "it has no learned position embedding to resize"
        )
        notes.append(f"image_size, stride: the grid goes from {grids}; {how}")
    if old.tiles != config.tiles:
        what = ["images" if c.tiles is None else f"bags of tiles of {c.tiles} pixels" for c in (old, config)]
        notes.append(f"tiles: the weights have seen {what[0]}, here the model sees {what[1]}")
    return notes + _head_notes(source, config, manifest)


_GROWS: dict[str, Callable[[VimConfig, VimConfig], bool]] = {
    "directions": lambda old, new: len(old.layers) == len(new.layers) and not expand.faults(old, new),
    "cls_token": lambda old, new: old.cls_token == "none",
    "registers": lambda old, new: old.registers == 0,
    "pool": lambda old, new: new.cls_tokens > old.cls_tokens or new.registers > old.registers,
    "pos_embed": lambda old, new: old.pos_embed == "sincos" and new.pos_embed is True,
}
"""Fields that may differ with `model.grow`, if the test on the two configs holds. `expand` judges the directions."""
_CHANGEABLE: dict[str, Callable[[VimConfig, VimConfig], bool]] = {
    **dict.fromkeys(
        ("cls_token", "registers", "pool", "pos_embed", "window", "d_head", "norm_eps"), lambda old, new: True
    ),
    "directions": lambda old, new: [layer.kind for layer in old.layers] == [layer.kind for layer in new.layers],
    "fuse": lambda old, new: {old.fuse, new.fuse} <= {"mean", "sum"},
}
"""Fields that may differ with `model.change`, if the test on the two configs holds."""
_GROWN = {
    "directions": "the new scans start as copies",
    "cls_token": "the class token starts from random values",
    "registers": "they start from random values",
    "pool": "the head starts from random values",
    "pos_embed": "the learned positions start as the fixed ones",
}


def _growth_notes(old: VimConfig, config: VimConfig) -> list[str]:
    notes = []
    if config.cls_tokens > old.cls_tokens:
        notes.append("cls_token: starts from random values, because the weights have none")
    if config.registers and not old.registers:
        notes.append("registers: start from random values, because the weights have none")
    if _GROWS["pos_embed"](old, config):
        notes.append("pos_embed: learned positions start as the fixed ones of the weights, and new tokens' as zeros")
    return notes


def rows(source: Source, config: VimConfig, manifest: Manifest) -> list[int] | None:
    """Row of the weights' head for each class of the training set; None: the head starts from random values, or the
    recipe's model `config` has none.
    """
    if not source.config.num_classes or not config.num_classes or source.config.pooling != config.pooling:
        return None
    if source.classes is None:
        same = source.config.num_classes == len(manifest.classes)
        return list(range(len(manifest.classes))) if same else None
    index = {name: i for i, name in enumerate(source.classes)}
    distinct = len(index) == len(source.classes) == len(manifest.classes)
    if not distinct or index.keys() != set(manifest.classes):
        return None
    return [index[name] for name in manifest.classes]


def _head_notes(source: Source, config: VimConfig, manifest: Manifest) -> list[str]:
    taken = rows(source, config, manifest)
    have = source.config.num_classes
    if not config.num_classes:
        return ["head: left out, because the objective needs none"] if have else []
    if not have:
        return ["head: starts from random values, because the weights have none"]
    if source.config.pooling != config.pooling:
        return [f"head: starts from random values, because it read {source.config.pooling}, not {config.pooling}"]
    if taken is None:
        new = [name for name in manifest.classes if name not in (source.classes or ())]
        what = f"{have:,} classes, not {len(manifest.classes):,}"
        if source.classes is not None and have == len(manifest.classes):
            what = f"other classes: no {', '.join(name[:40] for name in new[:_SHOWN])}"
        return [f"head: starts from random values, because the weights are of {what}"]
    if source.classes is None:
        return [
            f"head: kept; the names of its {len(taken):,} classes are not known, so class 0 is assumed to be"
            f" {manifest.classes[0][:40]}, and so on"
        ]
    if taken != list(range(len(taken))):
        return ["head: its classes are in another order; its rows are reordered by name to match the training set"]
    return []


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return json.dumps(value)[:150] if isinstance(value, list | tuple) else str(value)[:150]


def _value(value: Any) -> str:
    """As an override on the command line."""
    text = _text(value)
    return f'"{text}"' if " " in text else text


# ---- reading


def check(recipe: Recipe, folder: RunFolder, manifest: Manifest) -> None:
    """Refuse `model.weights` that this run could not start from; a run that resumes needs none.

    Raises:
        CheckpointError: they are missing, or of another model.
    """
    if recipe.model.weights is None or checkpoints(folder.checkpoints) or _elsewhere(recipe):
        return
    source = read(Path(recipe.model.weights))
    compare(source, recipe.shape(len(manifest.classes)), manifest, recipe.model.grow, recipe.model.change)


def _elsewhere(recipe: Recipe) -> bool:
    """Whether the mirror may have a checkpoint; if it cannot be reached, the ranks find out."""
    try:
        store = open_mirror(recipe.checkpoint.mirror, recipe.name)
        return store is not None and bool(store.names())
    except (OSError, DataError):
        return True


def read(folder: Path) -> Source:
    """Describe the weights in an exported or imported folder, or in a run's.

    Raises:
        CheckpointError: it holds no weights to start from. It says what the folder is, and the fix.
    """
    if (folder / "recipe.yaml").is_file():
        return _of_run(folder)
    if (fix := not_ours(folder)) is not None:
        raise CheckpointError(f"model.weights {folder} does not hold an exported model: {fix}")
    try:
        source = described(folder, read_config(folder))
        header(folder / WEIGHTS)
        return source
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model.weights {folder} does not hold an exported model: {_short(error)}") from None


def described(folder: Path, tree: dict[str, Any]) -> Source:
    """Raises:
    ValueError: the config does not describe a model.
    CheckpointError: it describes one that no recipe trains.
    """
    found = quirks(complete(object_of(tree, "published"))) if "published" in tree else []
    headless = found == ["num_classes"]
    if "published" in tree and not headless:
        options = ", ".join(found) or "cls_position"
        raise CheckpointError(
            f"model.weights {folder} is a published model with options that no recipe has: {options}; to use its"
            " weights nevertheless, import it with --model and arguments without these"
        )
    config = config_in(folder, tree)
    names, mean, std = preprocessing_of(tree)
    if headless:
        config, names = replace(config, num_classes=0), ()
    if config.num_classes and len(names) != config.num_classes:
        raise ValueError(f"{CONFIG} names {len(names):,} classes, its model has {config.num_classes:,}")
    about = tree.get("about")
    unnamed = isinstance(about, dict) and "published" in about and about.get("unnamed", True)
    return Source(folder, config, None if unnamed else names, mean, std, backward_of(tree))


def config_in(folder: Path, tree: dict[str, Any]) -> VimConfig:
    """The model's config, with full paths of the files in the folder that define a user's own kinds of layers.

    Raises:
        ValueError: the config does not describe a model, or names files elsewhere.
    """
    config = VimConfig.from_dict(object_of(tree, "model"))
    for own in config.kinds:
        parts = own_code.split(own.kind)
        if parts is None or parts[0].name != str(parts[0]):
            raise ValueError(f"kinds: {brief(own.kind)} does not name a class in a file of this folder")
    return config.with_own_classes(lambda reference: own_code.absolute(reference, folder))


def preprocessing_of(tree: dict[str, Any]) -> tuple[tuple[str, ...], Triple, Triple]:
    """(classes, mean, std); raises ValueError."""
    names = tree.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes is {brief(names)}, not a list of names")
    mean, std = (_triple(tree, key) for key in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError(f"std is {_text(std)}, and images are divided by it")
    return tuple(names), mean, std


def backward_of(tree: dict[str, Any]) -> float:
    value = tree.get("backward", 1.0)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"backward is {brief(value)}, not a number from 0 to 1")
    return float(value)


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; reads the header only.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a safetensors file, or is cut short.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        total = path.stat().st_size
        if not 2 <= size <= min(total - 8, untrusted.SMALL):
            raise ValueError(f"{path.name} is not a safetensors file, or is cut short at {total:,} bytes")
        tree = untrusted.loads(file.read(size))
    try:
        entries = {name: entry for name, entry in tree.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        if end + size + 8 != total:
            raise ValueError(f"{path.name} has {total:,} bytes, not the {end + size + 8:,} that its header says")
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path.name} has a header of another format") from None
    return shapes


def _of_run(folder: Path) -> Source:
    run = RunFolder(folder)
    recipe = run.recipe()
    if not checkpoints(run.checkpoints):
        raise CheckpointError(f"model.weights {folder} is a run without a checkpoint; launch that one first")
    newest = checkpoints(run.checkpoints)[0]
    try:
        about = json.loads((newest / "trainer.json").read_bytes()).get("training_set", {})
        manifest = TrainingSet.recorded(about, recipe)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"model.weights {newest}: trainer.json is damaged") from None
    except UserError as error:
        raise CheckpointError(f"model.weights {folder}: {error}") from None
    config = recipe.shape(len(manifest.classes))
    backward = config.backward_at(step_of(newest.name))
    classes = manifest.classes if config.num_classes else ()
    return Source(folder, config, classes, manifest.mean, manifest.std, backward)


def _triple(tree: dict[str, Any], key: str) -> Triple:
    value = tree.get(key)
    if not isinstance(value, list) or len(value) != 3 or any(type(x) not in (int, float) for x in value):
        raise ValueError(f"{key} is {brief(value)}, not three numbers")
    return (value[0], value[1], value[2])


def _short(error: Exception) -> str:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return text.replace("\n", "; ")[:500]
