"""Remove backward paths whose gates have closed: a smaller model that computes nearly the same."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.mixer import PATH_PARAMETERS, Mamba, Scans
from vimscale.model.schedule import Layer, compact, second_of_pairs


def closed(model: VisionMamba, threshold: float) -> list[int]:
    """Indices of the layers that can lose their backward path: |gate| is below the threshold.

    Raises:
        CheckpointError: the model has no gates.
    """
    gates = {
        i: abs(float(block.mixer.backward_gate.detach())) * model.backward
        for i, block in enumerate(model.blocks)
        if isinstance(block.mixer, Scans) and block.mixer.backward_gate is not None
    }
    if not gates:
        raise CheckpointError("the model has no gates to prune by; train it with model.backward_gate: true")
    return [i for i, gate in gates.items() if gate < threshold and _has_half(model.config, i)]


def without_half(config: VimConfig) -> str | None:
    """Say which layers keep their backward paths whatever their gates are; None if there are none."""
    kinds = {config.layers[i].kind for i in config.optional if not _has_half(config, i)}
    reasons = {
        "cross": "cross layers (two scans would be left)",
        "ssd": "ssd layers of form quasiseparable (there is no such layer with one scan)",
    }
    return "; ".join(reasons[kind] for kind in sorted(kinds)) or None


def _has_half(config: VimConfig, i: int) -> bool:
    """Whether there is a kind of layer with the forward paths of layer i alone."""
    layer = config.layers[i]
    return layer.kind != "cross" and not (layer.is_ssd and config.ssd_form == "quasiseparable")


def pruned(model: VisionMamba, layers: list[int]) -> VisionMamba:
    """The model with forward paths only in `layers`; a pair loses its second layer. Where the two paths were averaged,
    the output projection of the remaining path is halved, unless a norm precedes it: a norm undoes any factor, up to
    its epsilon.

    Raises:
        CheckpointError: a layer's norm spans paths with separate weights, or two layers.
    """
    old = model.config
    seconds = second_of_pairs(old.layers)
    gone = {i for i in layers if i in seconds}
    forward = {i - 1 if i in seconds else i for i in layers}
    kept = [i for i in range(len(old.layers)) if i not in gone]
    kinds = [_halved(old.layers[i]) if i in forward else old.layers[i] for i in kept]
    config = _config(old, gone, kinds)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(("blocks.", "merges."))}
    for new, i in enumerate(kept):
        block = model.blocks[i]
        assert isinstance(block, nn.Module)
        own: dict[str, Tensor] = {}
        if i in forward:
            assert isinstance(block.mixer, Scans)
            own = _forward_only(block.mixer, paired=i + 1 in gone, fuse=old.fuse)
        for name, t in block.state_dict().items():
            value = own.get(name.removeprefix("mixer."), t) if name.startswith("mixer.") else t
            state[f"blocks.{new}.{name}"] = value
    for at, merge in model.merges.items():
        state |= {f"merges.{kept.index(int(at))}.{name}": t for name, t in merge.state_dict().items()}
    smaller = VisionMamba(config)
    wanted = smaller.state_dict()
    smaller.load_state_dict({name: t for name, t in state.items() if name in wanted})
    smaller.backward = model.backward
    return smaller.train(model.training)


def _config(old: VimConfig, gone: set[int], kinds: list[Layer]) -> VimConfig:
    stages, at, begin = [], 0, 0
    for stage in old.parts:
        depth = sum(i not in gone for i in range(at, at + stage.depth))
        stages.append(dataclasses.replace(stage, depth=depth, directions=compact(kinds[begin : begin + depth])))
        at, begin = at + stage.depth, begin + depth
    if old.stages:
        config = dataclasses.replace(old, stages=tuple(stages))
    else:
        assert stages[0].directions is not None
        config = dataclasses.replace(old, depth=stages[0].depth, directions=stages[0].directions)
    return config if config.optional else dataclasses.replace(config, backward_gate=False)


def _halved(layer: Layer) -> Layer:
    return dataclasses.replace(layer, kind="ssd_fwd" if layer.is_ssd else "fwd")


def _forward_only(mixer: Scans, *, paired: bool, fuse: str) -> dict[str, Tensor]:
    """Parameters of a mixer without its second path, by name."""
    names = PATH_PARAMETERS if isinstance(mixer, Mamba) else mixer.path_parameters
    with torch.no_grad():
        state = {name: getattr(mixer, name)[:1].clone() for name in names}
        out, e, norm = mixer.out_proj.weight.clone(), mixer.config.expand * mixer.in_proj.in_features, mixer.ssm_norm
        if fuse == "mean" and norm is None:
            out *= 0.5
        if mixer.fuse == "concat":
            out = out[:, :e]
        if mixer.fuse_logits is not None:
            out *= mixer.fuse_logits.softmax(dim=0)[0]
        if norm is not None:
            layer_norm = mixer.ssm_norm_bias is not None
            if paired or mixer.fuse == "gate" or (mixer.fuse == "concat" and layer_norm):
                raise CheckpointError("a norm after the scan (ssm_norm) spans both paths: such layers cannot be pruned")
            # the zeros of the dropped path halve the mean square
            state["ssm_norm"] = norm[:e] * (math.sqrt(2) if mixer.fuse == "concat" else 1)
            if mixer.ssm_norm_bias is not None:
                state["ssm_norm_bias"] = mixer.ssm_norm_bias.clone()
    return state | {"out_proj.weight": out}
