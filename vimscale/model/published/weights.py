"""Converts published Vision Mamba checkpoints to our models and our models to published checkpoints, bit for bit.

A published tensor is a slice of one of our parameters: we keep the paths of a layer in one tensor, the published code
in several, distinguished by a suffix.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vimscale.errors import CheckpointError
from vimscale.model.layout import layout
from vimscale.model.mixer import Mamba
from vimscale.model.presets import VimConfig
from vimscale.model.published.arguments import (
    FORMATS,
    PUBLISHED,
    Arguments,
    Family,
    arguments_of,
    complete,
    config_of,
    family,
)
from vimscale.model.published.quirks import PublishedVim, build
from vimscale.model.tokens import resized
from vimscale.model.vim import VisionMamba

__all__ = ["PUBLISHED", "PublishedVim", "from_published", "guess", "published_config", "to_published"]

_OTHER_MODEL = "the state dict belongs to another model"
_NOT_PUBLISHED = "the state dict does not belong to a published Vision Mamba"
_SHOWN = 4
"""Keys of each kind that an error lists."""


def from_published(
    arguments: Mapping[str, Any] | str,
    state: Mapping[str, Tensor],
    *,
    resize_to: int | tuple[int, int] | None = None,
    cls_position: int | Literal["random"] | None = None,
    token_order: Tensor | Literal["random"] | None = None,
) -> VisionMamba:
    """Build the model that the published constructor makes from `arguments` (or a name in PUBLISHED); load `state`.

    `resize_to`: make the model for this image size instead of `img_size`. The position embedding is interpolated in the
    plane; class token and registers keep their part of it. `cls_position` and `token_order`: as in `PublishedVim`;
    "random" is what the published forward pass calls if_random_cls_token_position and if_random_token_rank.

    Raises:
        CheckpointError: arguments, keys or shapes do not belong to such a model.
    """
    if isinstance(arguments, str):
        arguments = _by_name(arguments)
    arguments = complete(dict(arguments))
    make = partial(build if cls_position is None and token_order is None else PublishedVim, arguments)
    config_of(arguments)
    if state and (found := _depth(state)) != arguments["depth"]:
        raise CheckpointError(f"{_OTHER_MODEL}\n  it has {found} layers, not depth {arguments['depth']}")
    with torch.device("meta"):  # check before allocating memory for whatever the arguments say
        _check(make(), state)
    model = make()
    _fill(model, state)
    if resize_to is not None:
        model = _resized(model, arguments, resize_to)
    if isinstance(model, PublishedVim):
        model.cls_position, model.token_order = cls_position, token_order
    return model


def _by_name(name: str) -> Arguments:
    if name not in PUBLISHED:
        raise CheckpointError(f"{name} is not a published model; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def to_published(model: VisionMamba, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copy the model's state dict to the names and shapes that the published code loads strictly. `own`: other tensors
    of the same names and shapes.

    Raises:
        CheckpointError: no published code expresses this model.
    """
    own = model.state_dict() if own is None else own
    return {slot.key: slot.read(own).clone() for slot in _slots(model)}


def published_config(model: VisionMamba, of: Family | None = None) -> Arguments:
    """Return all the published constructor's arguments for this model. `of`: the family; default: whichever it is.

    Raises:
        CheckpointError: no published code, or none of that family, expresses this model.
    """
    if isinstance(model, PublishedVim):
        if of is not None and (found := family(model.arguments)) != of:
            raise CheckpointError(f"this model is of the published {found} code, not {of}: use --to {FORMATS[found]}")
        return dict(model.arguments)
    if model.backward != 1:
        raise CheckpointError(
            f"the backward paths of this model have a factor of {model.backward:.2g}, which the published code cannot"
            " express: train to the end of backward_ramp"
        )
    return arguments_of(model.config, of)


# ---- which slice of our parameters each published tensor is


class Slot(NamedTuple):
    """A published tensor, and the slice of our parameter that it corresponds to."""

    key: str
    """Name of the published tensor."""
    name: str
    """Name of our parameter."""
    part: Any = ...
    """Index of the slice in our parameter."""
    axis: int | None = None
    """An axis of size 1 that only the published tensor has."""

    def read(self, own: Mapping[str, Tensor]) -> Tensor:
        value = own[self.name].detach()[self.part]
        return value if self.axis is None else value.unsqueeze(self.axis)

    def write(self, own: Mapping[str, Tensor], value: Tensor) -> None:
        own[self.name][self.part] = value if self.axis is None else value.squeeze(self.axis)


_SUFFIXES = ("", "_b", "_c", "_c_b")
"""Suffixes of a layer's paths: forward, backward, down the columns, up the columns."""
_BY_PATH = {
    "conv1d{}.weight": ("conv_weight", 1),
    "conv1d{}.bias": ("conv_bias", None),
    "x_proj{}.weight": ("x_proj", None),
    "dt_proj{}.weight": ("dt_proj", None),
    "dt_proj{}.bias": ("dt_bias", None),
    "D{}": ("D", None),
}
"""Published keys of a path, each with our parameter and the axis that only the published tensor has."""


def _slots(model: VisionMamba) -> Iterator[Slot]:
    arguments = published_config(model)
    kind, config = family(arguments), model.config
    yield Slot("patch_embed.proj.weight", "patch_embed.weight")
    yield Slot("patch_embed.proj.bias", "patch_embed.bias")
    positions = layout(config, config.grid)
    if kind == "mambar":
        image = [position for start, end in positions.image for position in range(start, end)]
        yield Slot("cls_token", "registers", axis=0)
        yield Slot("pos_embed", "pos_embed", image, axis=0)
        yield Slot("pos_embed_cls", "pos_embed", list(positions.registers), axis=0)
    elif config.pos_embed:
        yield Slot("pos_embed", "pos_embed", axis=0)
    if config.cls_tokens == 1:
        yield Slot("cls_token", "cls_token", axis=0)
    elif config.cls_tokens == 2:
        yield Slot("cls_token_head", "cls_token", slice(0, 1), axis=0)
        yield Slot("cls_token_tail", "cls_token", slice(1, 2), axis=0)
    if arguments.get("if_rope"):
        yield Slot("rope.freqs_cos", "rope_cos")
        yield Slot("rope.freqs_sin", "rope_sin")
    yield from layer_slots(model)
    yield from norm_slots(config, "norm_f", "norm")
    if model.neck is not None:
        yield Slot("neck.weight", "neck.weight")
        yield from norm_slots(config, "norm_neck", "neck_norm")
    if arguments["num_classes"] > 0:
        yield Slot("head.weight", "head.weight")
        yield Slot("head.bias", "head.bias")


def layer_slots(model: VisionMamba) -> Iterator[Slot]:
    """Yield the slots of all layers; those with an MLP are named as in ARM."""
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        assert isinstance(mixer, Mamba)
        norm = "norm" if model.config.mlp == "none" else "norm1"
        yield from norm_slots(model.config, f"layers.{i}.{norm}", f"blocks.{i}.norm")
        for slot in mixer_slots(mixer):
            yield slot._replace(key=f"layers.{i}.mixer.{slot.key}", name=f"blocks.{i}.mixer.{slot.name}")
        if model.config.mlp != "none":
            yield from norm_slots(model.config, f"layers.{i}.norm2", f"blocks.{i}.mlp_norm")
            for name in ("w1.weight", "w1.bias", "w2.weight", "w2.bias", "w3.weight", "w3.bias"):
                yield Slot(f"layers.{i}.mlp.{name}", f"blocks.{i}.mlp.{name}")


def mixer_slots(mixer: Mamba) -> Iterator[Slot]:
    """Yield the published tensors of a mixer, by their names in it."""
    yield Slot("in_proj.weight", "in_proj.weight")
    yield Slot("out_proj.weight", "out_proj.weight")
    for path in range(len(mixer.paths)):
        yield Slot(f"A{_SUFFIXES[path]}_log", "A_log", path)
    for path in range(len(mixer.D)):  # a layer of kind shared has one set for both directions
        for key, (name, axis) in _BY_PATH.items():
            yield Slot(key.format(_SUFFIXES[path]), name, path, axis)
    if mixer.ssm_norm_bias is not None:  # FastVim's
        yield Slot("layernorm.weight", "ssm_norm")
        yield Slot("layernorm.bias", "ssm_norm_bias")
    if mixer.layer_scale is not None:
        yield Slot("gamma", "layer_scale")


def norm_slots(config: VimConfig, key: str, name: str) -> Iterator[Slot]:
    yield Slot(f"{key}.weight", f"{name}.weight")
    if config.norm == "layer":
        yield Slot(f"{key}.bias", f"{name}.bias")


@torch.no_grad()
def _fill(model: VisionMamba, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for slot in _slots(model):
        slot.write(own, state[slot.key])


def _check(model: VisionMamba, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    shapes = {slot.key: tuple(slot.read(own).shape) for slot in _slots(model)}
    faults = differences(shapes, state)
    if not faults:
        return
    position = state.get("pos_embed")
    if position is not None and "pos_embed" in shapes and tuple(position.shape) != shapes["pos_embed"]:
        size = model.config.image_size
        faults.append(
            f"img_size {size} needs {shapes['pos_embed'][1]} positions, but there are {position.shape[1]}: give the"
            " img_size and stride of the checkpoint's training, and resize_to for another size"
        )
    else:
        faults.append(f"check depth, embed_dim, bimamba_type, class token and num_classes; they are {_about(model)}")
    raise CheckpointError("\n".join([_OTHER_MODEL, *(f"  {fault}" for fault in faults)]))


def differences(shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """List how a published state dict differs from the keys and shapes that it should have."""
    missing = [key for key in shapes if key not in state]
    unexpected = [key for key in state if key not in shapes]
    wrong = [
        f"{key} {tuple(state[key].shape)}, not {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    return [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("with the wrong shape", wrong))
        if keys
    ]


def _about(model: VisionMamba) -> str:
    arguments = published_config(model)
    names = ("depth", "embed_dim", "bimamba_type", "num_cls_tokens", "if_cls_token", "num_classes")
    return ", ".join(f"{name} {arguments[name]}" for name in names if name in arguments)


@torch.no_grad()
def _resized(model: VisionMamba, arguments: Arguments, size: int | tuple[int, int]) -> VisionMamba:
    new_arguments = arguments | {"img_size": size}
    new = PublishedVim(new_arguments) if isinstance(model, PublishedVim) else build(new_arguments)
    state = model.state_dict()
    if model.pos_embed is not None:
        state["pos_embed"] = resized(model.pos_embed, model.config, new.config.grid)
    state |= {name: value for name, value in new.state_dict().items() if name.startswith("rope_")}
    new.load_state_dict(state)
    return new


# ---- which model a state dict belongs to


def guess(state: Mapping[str, Tensor]) -> tuple[Arguments, list[str]]:
    """Infer the published arguments from keys and shapes. Return them, and for people a list of the arguments that keys
    and shapes do not determine, which are assumed to be as published.

    Raises:
        CheckpointError: these are not the keys of a published Vision Mamba.
    """
    try:
        patch, A = state["patch_embed.proj.weight"], state["layers.0.mixer.A_log"]
        inner = state["layers.0.mixer.conv1d.weight"]
        norm = state["norm_f.weight"]
    except KeyError as error:
        raise CheckpointError(f"{_NOT_PUBLISHED}: it has no {error}") from None
    if A.dim() == 1:
        raise CheckpointError(f"{_mamba2(state)}: docs/published.md says what is missing")
    for key, rank in _RANKS.items():
        if key in state and (state[key].dim() != rank or 0 in state[key].shape):
            raise CheckpointError(f"{_NOT_PUBLISHED}: {key} is {tuple(state[key].shape)}")
    d, depth = len(norm), _depth(state)
    head = state.get("head.weight")
    arguments: Arguments = {
        "embed_dim": d,
        "depth": depth,
        "patch_size": patch.shape[-1],
        "channels": patch.shape[1],
        "num_classes": 0 if head is None else len(head),
        "rms_norm": "norm_f.bias" not in state,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }
    assumed = ["norm_epsilon 1e-5"]
    ssm = {"d_conv": inner.shape[-1]} if inner.shape[-1] != 4 else {}
    if "pos_embed_cls" in state and "pos_embed" in state:
        neck = state.get("neck.weight")
        arguments |= {"num_cls_tokens": state["pos_embed_cls"].shape[1]}
        arguments |= {"cls_reduce": 1 if neck is None else d // len(neck)}
        patches = state["pos_embed"].shape[1]
    else:
        token_arguments, token_assumed, patches = _guess_tokens(state)
        arguments, assumed = arguments | token_arguments, assumed + token_assumed
    if family(arguments) == "vim":
        arguments["d_state"] = A.shape[1]
    elif A.shape[1] != 16:
        ssm["d_state"] = A.shape[1]
    if family(arguments) != "arm" and len(inner) != 2 * d:
        ssm["expand"] = len(inner) // d
    size, stride = _guess_size(patches, patch.shape[-1], fixed=family(arguments) == "mambar")
    arguments |= {"img_size": size, "ssm_cfg": ssm or None}
    if stride != patch.shape[-1]:
        assumed.append(f"img_size {size} with stride {stride}")
    if family(arguments) != "mambar":
        arguments["stride"] = stride
    return complete(arguments), assumed


def _mamba2(state: Mapping[str, Tensor]) -> str:
    """Say whose weights these are, with Mamba-2's one A per head, and why no model of ours computes what they do."""
    if "layers.0.mixer.norm_b.weight" in state:
        return "these are Dino-Mamba's weights, and its layers normalize each direction by itself, which ours do not"
    if "layers.0.norm_mlp.weight" in state:
        return "these are Adventurer's weights, and its layers put the mean of all tokens first, which ours do not"
    return "these weights have layers of Mamba-2, and no published vision model with them can be imported yet"


_RANKS = {
    "patch_embed.proj.weight": 4,
    "layers.0.mixer.A_log": 2,
    "layers.0.mixer.conv1d.weight": 3,
    "norm_f.weight": 1,
}
_RANKS |= {"head.weight": 2, "pos_embed": 3, "pos_embed_cls": 3, "neck.weight": 2, "rope.freqs_cos": 2}
"""Number of axes of the tensors that `guess` reads."""


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("layers.")})


def _guess_tokens(state: Mapping[str, Tensor]) -> tuple[Arguments, list[str], int]:
    """Return (arguments, what is assumed to be as published, number of patches) of a vim or arm."""
    prefix = "layers.0.mixer."
    kinds = {"v3": "A_c_log", "v2": "conv1d_b.weight", "v1": "A_b_log"}
    kind = next((kind for kind, key in kinds.items() if prefix + key in state), "none")
    cls = 2 if "cls_token_head" in state else int("cls_token" in state)
    arguments: Arguments = {
        "bimamba_type": kind,
        "if_abs_pos_embed": "pos_embed" in state,
        "if_cls_token": cls > 0,
        "use_double_cls_token": cls == 2,
        "use_middle_cls_token": True,
        "final_pool_type": "mean",
        "if_rope": "rope.freqs_cos" in state,
    }
    if prefix + "gamma" in state:
        arguments["init_layer_scale"] = 1e-5  # trained weights replace the initial value
    assumed = []
    if kind == "v3":
        assumed.append("global_pool False: the head reads the class token")
    else:
        assumed.append("if_bidirectional False")
        if kind == "v2":
            arguments["if_divide_out"] = True
            assumed.append("if_divide_out True")
        if cls == 1:
            assumed.append("the class token in the middle")
        elif cls == 0:
            assumed.append("final_pool_type mean")
        if arguments["if_rope"]:
            assumed.append("if_rope_residual False")
    if "pos_embed" in state:
        return arguments, assumed, state["pos_embed"].shape[1] - cls
    if arguments["if_rope"]:
        return arguments, assumed, len(state["rope.freqs_cos"])
    assumed.append("img_size 224")
    return arguments, assumed, (224 // state["patch_embed.proj.weight"].shape[-1]) ** 2


def _guess_size(patches: int, patch: int, *, fixed: bool) -> tuple[int, int]:
    """Guess (image size, stride) of a square image with this many patches: 224 pixels if a stride below the patch size
    yields them, else patches that do not overlap. `fixed`: the stride is the patch size.

    Raises:
        CheckpointError: the patches do not form a square.
    """
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches < 1:
        raise CheckpointError(
            f"{patches} patches do not form a square: give img_size and the other published arguments"
        )
    if not fixed and side > 1 and side * patch > 224 and (224 - patch) % (side - 1) == 0:
        return 224, (224 - patch) // (side - 1)
    return side * patch, patch


def named(name: str, state: Mapping[str, Tensor]) -> Arguments:
    """Return the arguments of the published model `name`, with the state dict's image size and number of classes.

    Raises:
        CheckpointError: there is no such model, or these are not the keys of a published Vision Mamba.
    """
    arguments = complete(_by_name(name))
    guessed, _ = guess(state)
    if "stride" in arguments and arguments["stride"] != arguments["patch_size"]:
        return arguments | {"num_classes": guessed["num_classes"]}
    return arguments | {key: guessed[key] for key in ("img_size", "num_classes")}
