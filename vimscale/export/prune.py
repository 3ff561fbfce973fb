"""Remove backward paths whose gates have closed: a smaller model that computes nearly the same."""

import dataclasses

import torch
from torch import Tensor, nn

from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.mixer import PATH_PARAMETERS, Mamba
from vimscale.model.schedule import Layer, compact, second_of_pairs


def closed(model: VisionMamba, threshold: float) -> list[int]:
    """Indices of the layers that can lose their backward path: |gate| is below the threshold.

    Raises:
        CheckpointError: the model has no gates.
    """
    gates = {
        i: abs(float(block.mixer.backward_gate.detach())) * model.backward
        for i, block in enumerate(model.blocks)
        if isinstance(block.mixer, Mamba) and block.mixer.backward_gate is not None
    }
    if not gates:
        raise CheckpointError("the model has no gates to prune by; train it with model.backward_gate: true")
    # a cross layer would keep two scans, and there is no such kind of layer
    return [i for i, gate in gates.items() if gate < threshold and model.config.layers[i].kind != "cross"]


def pruned(model: VisionMamba, layers: list[int]) -> VisionMamba:
    """The model with forward paths only in `layers`; a pair loses its second layer. Where the two paths were averaged,
    the output projection of the remaining path is halved.

    Raises:
        CheckpointError: a layer's ssm_norm spans both paths.
    """
    old = model.config
    seconds = second_of_pairs(old.layers)
    gone = {i for i in layers if i in seconds}
    forward = {i - 1 if i in seconds else i for i in layers}
    kept = [i for i in range(len(old.layers)) if i not in gone]
    kinds = [dataclasses.replace(old.layers[i], kind="fwd") if i in forward else old.layers[i] for i in kept]
    config = _config(old, gone, kinds)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(("blocks.", "merges."))}
    for new, i in enumerate(kept):
        block = model.blocks[i]
        assert isinstance(block, nn.Module)
        own: dict[str, Tensor] = {}
        if i in forward:
            assert isinstance(block.mixer, Mamba)
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


def _forward_only(mixer: Mamba, *, paired: bool, fuse: str) -> dict[str, Tensor]:
    """Parameters of a mixer without its second path, by name."""
    with torch.no_grad():
        state = {name: getattr(mixer, name)[:1].clone() for name in PATH_PARAMETERS}
        out = mixer.out_proj.weight.clone()
        if fuse == "mean":
            out *= 0.5
        if mixer.fuse == "concat":
            out = out[:, : mixer.D.shape[-1]]
        if mixer.fuse_logits is not None:
            out *= mixer.fuse_logits.softmax(dim=0)[0]
        if mixer.ssm_norm is not None:
            if mixer.fuse != "sum" or paired:
                raise CheckpointError("a norm after the scan (ssm_norm) spans both paths: such layers cannot be pruned")
            state["ssm_norm"] = mixer.ssm_norm.clone()
            if mixer.ssm_norm_bias is not None:
                state["ssm_norm_bias"] = mixer.ssm_norm_bias.clone()
    return state | {"out_proj.weight": out}
