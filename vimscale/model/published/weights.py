"""Published Vision Mamba checkpoints as models of ours, and models of ours as published checkpoints, bit by bit.

A published tensor is a part of one of our parameters: paths of a layer lie in one tensor here and in several, told
apart by a suffix, there.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vimscale.errors import CheckpointError
from vimscale.model.mixer import Mamba
from vimscale.model.published.arguments import PUBLISHED, Arguments, arguments_of, complete, config_of, family
from vimscale.model.published.quirks import PublishedVim, build
from vimscale.model.tokens import layout, resized
from vimscale.model.vim import VisionMamba

__all__ = ["PUBLISHED", "PublishedVim", "from_published", "guess", "published_config", "to_published"]

_SHOWN = 4
"""Keys of each kind that an error names."""


def from_published(
    arguments: Mapping[str, Any] | str,
    state: Mapping[str, Tensor],
    *,
    resize_to: int | tuple[int, int] | None = None,
    cls_position: int | Literal["random"] | None = None,
    token_order: Tensor | Literal["random"] | None = None,
) -> VisionMamba:
    """The model that the published constructor makes of `arguments` (or of a name in PUBLISHED) and `state` fills.

    `resize_to`: image size that the model is made for, in place of `img_size`; the position embedding is interpolated
    in the plane, with class token and registers at their places. `cls_position` and
    `token_order`: as in `PublishedVim`; "random" is what the published forward pass calls if_random_cls_token_position
    and if_random_token_rank.

    Raises:
        CheckpointError: arguments, keys or shapes that do not belong to such a model.
    """
    if isinstance(arguments, str):
        if arguments not in PUBLISHED:
            raise CheckpointError(f"{arguments} is no published model; known: {', '.join(PUBLISHED)}")
        arguments = PUBLISHED[arguments]
    whole = complete(dict(arguments))
    make = partial(build if cls_position is None and token_order is None else PublishedVim, whole)
    config_of(whole)
    if state and (found := _depth(state)) != whole["depth"]:
        raise CheckpointError(
            f"the state dict is of another model\n  it has {found} layers, not depth {whole['depth']}"
        )
    with torch.device("meta"):  # before room is made for whatever the arguments say
        _check(make(), state)
    model = make()
    _fill(model, state)
    if resize_to is not None:
        model = _resized(model, whole, resize_to)
    if isinstance(model, PublishedVim):
        model.cls_position, model.token_order = cls_position, token_order
    return model


def to_published(model: VisionMamba) -> dict[str, Tensor]:
    """The state dict that the published code loads strictly: copies, under its names and in its shapes.

    Raises:
        CheckpointError: no published code expresses this model.
    """
    own = model.state_dict()
    return {slot.key: slot.read(own).clone() for slot in _slots(model)}


def published_config(model: VisionMamba) -> Arguments:
    """The published constructor's arguments that make this model, all of them.

    Raises:
        CheckpointError: no published code expresses this model.
    """
    if isinstance(model, PublishedVim):
        return dict(model.arguments)
    if model.backward != 1:
        raise CheckpointError(
            f"the backward paths of this model are in by {model.backward:.2g}, and the published code has all of them:"
            " train on to the end of backward_ramp"
        )
    return arguments_of(model.config)


# ---- where each tensor belongs


class _Slot(NamedTuple):
    """A published tensor, and the part of one of ours that it is."""

    key: str
    name: str
    part: Any = ...
    """Index of the part in ours."""
    axis: int | None = None
    """Of size one, which the published tensor has besides."""

    def read(self, own: Mapping[str, Tensor]) -> Tensor:
        value = own[self.name].detach()[self.part]
        return value if self.axis is None else value.unsqueeze(self.axis)

    def write(self, own: Mapping[str, Tensor], value: Tensor) -> None:
        own[self.name][self.part] = value if self.axis is None else value.squeeze(self.axis)


_SUFFIXES = ("", "_b", "_c", "_c_b")
"""Of a layer's paths: forward, backward, down the columns, up the columns."""
_BY_PATH = {
    "conv1d{}.weight": ("conv_weight", 1),
    "conv1d{}.bias": ("conv_bias", None),
    "x_proj{}.weight": ("x_proj", None),
    "dt_proj{}.weight": ("dt_proj", None),
    "dt_proj{}.bias": ("dt_bias", None),
    "D{}": ("D", None),
}


def _slots(model: VisionMamba) -> Iterator[_Slot]:
    arguments = published_config(model)
    kind, config = family(arguments), model.config
    yield _Slot("patch_embed.proj.weight", "patch_embed.weight")
    yield _Slot("patch_embed.proj.bias", "patch_embed.bias")
    where = layout(config, config.grid)
    if kind == "mambar":
        image = [place for start, end in where.image for place in range(start, end)]
        yield _Slot("cls_token", "registers", axis=0)
        yield _Slot("pos_embed", "pos_embed", image, axis=0)
        yield _Slot("pos_embed_cls", "pos_embed", list(where.registers), axis=0)
    elif config.pos_embed:
        yield _Slot("pos_embed", "pos_embed", axis=0)
    if config.cls_tokens == 1:
        yield _Slot("cls_token", "cls_token", axis=0)
    elif config.cls_tokens == 2:
        yield _Slot("cls_token_head", "cls_token", slice(0, 1), axis=0)
        yield _Slot("cls_token_tail", "cls_token", slice(1, 2), axis=0)
    if arguments.get("if_rope"):
        yield _Slot("rope.freqs_cos", "rope_cos")
        yield _Slot("rope.freqs_sin", "rope_sin")
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        assert isinstance(mixer, Mamba)
        inside = "norm1" if kind == "arm" else "norm"
        yield from _norm(model, f"layers.{i}.{inside}", f"blocks.{i}.norm")
        for slot in _mixer(mixer):
            yield slot._replace(key=f"layers.{i}.mixer.{slot.key}", name=f"blocks.{i}.mixer.{slot.name}")
        if kind == "arm":
            yield from _norm(model, f"layers.{i}.norm2", f"blocks.{i}.mlp_norm")
            for name in ("w1.weight", "w1.bias", "w2.weight", "w2.bias", "w3.weight", "w3.bias"):
                yield _Slot(f"layers.{i}.mlp.{name}", f"blocks.{i}.mlp.{name}")
    yield from _norm(model, "norm_f", "norm")
    if model.neck is not None:
        yield _Slot("neck.weight", "neck.weight")
        yield from _norm(model, "norm_neck", "neck_norm")
    if arguments["num_classes"] > 0:
        yield _Slot("head.weight", "head.weight")
        yield _Slot("head.bias", "head.bias")


def _mixer(mixer: Mamba) -> Iterator[_Slot]:
    yield _Slot("in_proj.weight", "in_proj.weight")
    yield _Slot("out_proj.weight", "out_proj.weight")
    for path in range(len(mixer.paths)):
        yield _Slot(f"A{_SUFFIXES[path]}_log", "A_log", path)
    for path in range(len(mixer.D)):  # one set where directions share it
        for key, (name, axis) in _BY_PATH.items():
            yield _Slot(key.format(_SUFFIXES[path]), name, path, axis)
    if mixer.layer_scale is not None:
        yield _Slot("gamma", "layer_scale")


def _norm(model: VisionMamba, key: str, name: str) -> Iterator[_Slot]:
    yield _Slot(f"{key}.weight", f"{name}.weight")
    if model.config.norm == "layer":
        yield _Slot(f"{key}.bias", f"{name}.bias")


@torch.no_grad()
def _fill(model: VisionMamba, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for slot in _slots(model):
        slot.write(own, state[slot.key])


def _check(model: VisionMamba, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    shapes = {slot.key: tuple(slot.read(own).shape) for slot in _slots(model)}
    missing = [key for key in shapes if key not in state]
    unexpected = [key for key in state if key not in shapes]
    wrong = [
        f"{key} {tuple(state[key].shape)}, not {shape}"
        for key, shape in shapes.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    faults = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{' ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if not faults:
        return
    position = state.get("pos_embed")
    if position is not None and "pos_embed" in shapes and tuple(position.shape) != shapes["pos_embed"]:
        size = model.config.image_size
        faults.append(
            f"img_size {size} asks for {shapes['pos_embed'][1]} positions, and there are {position.shape[1]}: give the"
            " img_size and stride that the checkpoint was trained with, and resize_to for another one"
        )
    else:
        faults.append(f"check depth, embed_dim, bimamba_type, class token and num_classes; they say {_about(model)}")
    raise CheckpointError("the state dict is of another model\n" + "\n".join(f"  {fault}" for fault in faults))


def _about(model: VisionMamba) -> str:
    arguments = published_config(model)
    names = ("depth", "embed_dim", "bimamba_type", "num_cls_tokens", "if_cls_token", "num_classes")
    return ", ".join(f"{name} {arguments[name]}" for name in names if name in arguments)


@torch.no_grad()
def _resized(model: VisionMamba, arguments: Arguments, size: int | tuple[int, int]) -> VisionMamba:
    larger = arguments | {"img_size": size}
    other = PublishedVim(larger) if isinstance(model, PublishedVim) else build(larger)
    state = model.state_dict()
    if model.pos_embed is not None:
        state["pos_embed"] = resized(model.pos_embed, model.config, other.config.grid)
    state |= {name: value for name, value in other.state_dict().items() if name.startswith("rope_")}
    other.load_state_dict(state)
    return other


# ---- what model a state dict is of


def guess(state: Mapping[str, Tensor]) -> tuple[Arguments, list[str]]:
    """The published arguments that keys and shapes tell, and what they do not tell, taken as published, for people.

    Raises:
        CheckpointError: these are not the keys of a published Vision Mamba.
    """
    try:
        patch, A = state["patch_embed.proj.weight"], state["layers.0.mixer.A_log"]
        inner = state["layers.0.mixer.conv1d.weight"]
        norm = state["norm_f.weight"]
    except KeyError as error:
        raise CheckpointError(f"the state dict is of no published Vision Mamba: it has no {error}") from None
    for key, rank in _RANKS.items():
        if key in state and (state[key].dim() != rank or 0 in state[key].shape):
            raise CheckpointError(f"the state dict is of no published Vision Mamba: {key} is {tuple(state[key].shape)}")
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
    taken = ["norm_epsilon 1e-5"]
    ssm = {"d_conv": inner.shape[-1]} if inner.shape[-1] != 4 else {}
    if "pos_embed_cls" in state and "pos_embed" in state:
        neck = state.get("neck.weight")
        arguments |= {"num_cls_tokens": state["pos_embed_cls"].shape[1]}
        arguments |= {"cls_reduce": 1 if neck is None else d // len(neck)}
        patches = state["pos_embed"].shape[1]
    else:
        more, also_taken, patches = _guess_tokens(state)
        arguments, taken = arguments | more, taken + also_taken
    if family(arguments) == "vim":
        arguments["d_state"] = A.shape[1]
    elif A.shape[1] != 16:
        ssm["d_state"] = A.shape[1]
    if family(arguments) != "arm" and len(inner) != 2 * d:
        ssm["expand"] = len(inner) // d
    size, stride = _guess_size(patches, patch.shape[-1], fixed=family(arguments) == "mambar")
    arguments |= {"img_size": size, "ssm_cfg": ssm or None}
    if stride != patch.shape[-1]:
        taken.append(f"img_size {size} with stride {stride}")
    if family(arguments) != "mambar":
        arguments["stride"] = stride
    return complete(arguments), taken


_RANKS = {
    "patch_embed.proj.weight": 4,
    "layers.0.mixer.A_log": 2,
    "layers.0.mixer.conv1d.weight": 3,
    "norm_f.weight": 1,
}
_RANKS |= {"head.weight": 2, "pos_embed": 3, "pos_embed_cls": 3, "neck.weight": 2, "rope.freqs_cos": 2}


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("layers.")})


def _guess_tokens(state: Mapping[str, Tensor]) -> tuple[Arguments, list[str], int]:
    """(arguments, what was taken as published, number of patches) of a vim or arm."""
    prefix = "layers.0.mixer."
    kinds = {"v3": "A_c_log", "v2": "conv1d_b.weight", "v1": "A_b_log"}
    kind = next((kind for kind, key in kinds.items() if prefix + key in state), "none")
    cls = 2 if "cls_token_head" in state else int("cls_token" in state)
    more: Arguments = {
        "bimamba_type": kind,
        "if_abs_pos_embed": "pos_embed" in state,
        "if_cls_token": cls > 0,
        "use_double_cls_token": cls == 2,
        "use_middle_cls_token": True,
        "final_pool_type": "mean",
        "if_rope": "rope.freqs_cos" in state,
    }
    if prefix + "gamma" in state:
        more["init_layer_scale"] = 1e-5  # where it started does not matter any more
    taken = []
    if kind == "v3":
        taken.append("global_pool False: the class token is read")
    else:
        taken.append("if_bidirectional False")
        if kind == "v2":
            more["if_divide_out"] = True
            taken.append("if_divide_out True")
        if cls == 1:
            taken.append("the class token in the middle")
        elif cls == 0:
            taken.append("final_pool_type mean")
        if more["if_rope"]:
            taken.append("if_rope_residual False")
    if "pos_embed" in state:
        return more, taken, state["pos_embed"].shape[1] - cls
    if more["if_rope"]:
        return more, taken, len(state["rope.freqs_cos"])
    taken.append("img_size 224")
    return more, taken, (224 // state["patch_embed.proj.weight"].shape[-1]) ** 2


def _guess_size(patches: int, patch: int, *, fixed: bool) -> tuple[int, int]:
    """(image size, stride) of a square of so many patches: 224 pixels if a stride below the patch gives them, else
    patches side by side.
    """
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches < 1:
        raise CheckpointError(f"{patches} patches are no square: give img_size, with the other published arguments")
    if not fixed and side > 1 and side * patch > 224 and (224 - patch) % (side - 1) == 0:
        return 224, (224 - patch) // (side - 1)
    return side * patch, patch


def named(name: str, state: Mapping[str, Tensor]) -> Arguments:
    """The published model `name`, with the image size and number of classes that the state dict is for."""
    if name not in PUBLISHED:
        raise CheckpointError(f"{name} is no published model; known: {', '.join(PUBLISHED)}")
    arguments, _ = guess(state)
    own = complete(PUBLISHED[name])
    if "stride" in own and own["stride"] != own["patch_size"]:
        return own | {"num_classes": arguments["num_classes"]}
    return own | {key: arguments[key] for key in ("img_size", "num_classes")}
