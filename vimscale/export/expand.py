"""Expand the directions of a model by copying: layers with one scan get more, each with a copy of its parameters.

ARM (arXiv:2406.07537) pretrains layers that scan forward, and fine-tunes layers with four scans. With mean fusing, a
layer of copies is the average of the same scan in several directions. Needs no torch: weights index themselves.

Axes: k paths of a layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vimscale.errors import CheckpointError
from vimscale.model import VimConfig
from vimscale.model.schedule import Layer, compact, parse

if TYPE_CHECKING:
    from torch import Tensor

    from vimscale.model import VisionMamba

_SCANS = {"fwd", "bwd", "bi", "cross"}, {"ssd_fwd", "ssd_bwd", "ssd"}
"""Kinds that expand to one another. shared is not among them: its backward scan reads the forward convolution. So does
ssd_bwd of form shared.
"""


def sources(old: Layer, new: Layer) -> tuple[int, ...] | None:
    """Return the path of layer `old` that each path of layer `new` is a copy of: itself, if `old` has it; else the one
    in the same direction, if there is one; else the first. None if `new` cannot be made by copying: it lacks a path of
    `old`, or is not made of scans.
    """
    if not any({old.kind, new.kind} <= kinds for kinds in _SCANS) or not set(old.paths) <= set(new.paths):
        return None
    reverses = [reverse for _, reverse in old.paths]
    return tuple(
        old.paths.index(path) if path in old.paths else reverses.index(path[1]) if path[1] in reverses else 0
        for path in new.paths
    )


def faults(old: VimConfig, new: VimConfig) -> list[str]:
    """List why weights of a model `old` cannot be expanded to the directions of `new`, which has as many layers."""
    pairs = zip(old.layers, new.layers, strict=True)
    bad = {f"{ours} to {theirs}": None for ours, theirs in pairs if ours != theirs and sources(ours, theirs) is None}
    found = []
    if bad:
        found.append(
            f"directions: {', '.join(bad)} cannot be expanded by copying; a layer keeps its scans and gets more: fwd or"
            " bwd to bi or cross, bi to cross, ssd_fwd or ssd_bwd to ssd, in the same order"
        )
    elif changed(old, new) and new.fuse not in ("mean", "gate"):
        found.append(f"fuse: {new.fuse} would multiply what copies give; set model.fuse=mean")
    return found


def changed(old: VimConfig, new: VimConfig) -> list[int]:
    """Return the indices of the layers that are expanded."""
    return [i for i, (ours, theirs) in enumerate(zip(old.layers, new.layers, strict=True)) if ours != theirs]


def note(old: VimConfig, new: VimConfig) -> str:
    count = len(changed(old, new))
    what = "every layer" if count == len(old.layers) else f"{count} of {len(old.layers)} layers"
    return f"directions: {compact(old.layers)} to {compact(new.layers)}; the new scans of {what} start as copies"


def state(own: "Mapping[str, Tensor]", old: VimConfig, new: VimConfig) -> "dict[str, Tensor]":
    """Return the weights `own` of a model `old` with the paths of `new`, which has no `faults`."""
    from vimscale.model.mixer import PATH_PARAMETERS  # imports torch
    from vimscale.model.ssd import PATH_PARAMETERS_OF

    expanded = dict(own)
    for i in changed(old, new):
        paths = sources(old.layers[i], new.layers[i])
        assert paths is not None
        prefix = f"blocks.{i}.mixer."
        for name in PATH_PARAMETERS_OF[new.ssd_form] if new.layers[i].is_ssd else PATH_PARAMETERS:
            expanded[prefix + name] = own[prefix + name][list(paths)]
        if new.fuse == "gate":
            D = expanded[f"{prefix}D"]
            logits = own.get(f"{prefix}fuse_logits")
            expanded[f"{prefix}fuse_logits"] = D * 0 if logits is None else logits[list(paths)]
    return expanded


def expanded(model: "VisionMamba", directions: str) -> "VisionMamba":
    """Return a model with other directions, whose new paths are copies.

    Raises:
        CheckpointError: the directions cannot be made by copying; says which can.
    """
    from vimscale.model import VisionMamba

    old = model.config
    try:
        if old.stages:
            layers = parse(directions, len(old.layers), [own.name for own in old.kinds])
            stages, at = [], 0
            for stage in old.stages:
                stages.append(dataclasses.replace(stage, directions=compact(layers[at : at + stage.depth])))
                at += stage.depth
            config = dataclasses.replace(old, stages=tuple(stages))
        else:
            config = dataclasses.replace(old, directions=directions)
    except ValueError as error:
        raise CheckpointError(f"--directions: {error}") from None
    if old.fuse == "sum" and not any(len(layer.paths) > 1 for layer in old.layers):
        config = dataclasses.replace(config, fuse="mean")  # of single scans, it had no effect
    if found := faults(old, config):
        raise CheckpointError("\n  ".join([f"--directions {directions}: the model cannot be expanded", *found]))
    larger = VisionMamba(config)
    weights = state(model.state_dict(), old, config)
    wanted = larger.state_dict()
    weights |= {name: wanted[name] for name in wanted if name.endswith("backward_gate") and name not in weights}
    larger.load_state_dict(weights)
    larger.backward = model.backward if old.optional else 1.0
    return larger.train(model.training)
