"""ARM's pretraining code (OliverRensu/ARM, `models_pretrain.py`): its arguments and state dicts to and from ours.

Its memory projection interleaves the decoder's blocks (block k of 4 reads channels k, k + 4, ...); ours has them one
after the other. Its `norm_4`, of the last tap, is our encoder's last norm. Its tables of positions become sines and
cosines that are not stored, if that is what they hold.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.weights import Slot, differences, layer_slots, norm_slots
from vimscale.model.tokens import plane_sincos
from vimscale.objectives.autoregressive import Autoregressive, Decoder
from vimscale.objectives.base import Learner
from vimscale.recipe.reconstruction import AutoregressiveOptions

_SIZES = {"arm_base_pz16": (768, 12), "arm_large_pz16": (1024, 24), "arm_huge_pz16": (1536, 24)}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"img_size": 192, "patch_size": 16, "embed_dim": d, "depth": depth, "dec_embed_dim": 512}
    | {"if_abs_pos_embed": True}
    for name, (d, depth) in _SIZES.items()
}
"""Arguments that each published function sets, by its name."""
_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "channels": 3,
    "depth": 24,
    "embed_dim": 192,
    "dec_embed_dim": 192,
    "ssm_cfg": None,
    "drop_rate": 0.0,
    "init_layer_scale": None,
    "bimamba_type": "none",
}
"""Of the constructor; what is not here has no effect."""


def is_pretraining(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of ARM's pretraining model; its fine-tuned models are another layout."""
    return "ar_token" in state and "enc2dec.weight" in state


def learner(
    arguments: Mapping[str, Any] | str,
    state: Mapping[str, Tensor],
    *,
    taps: tuple[int, ...] | None = None,
    decoder_heads: int | None = None,
    cluster: int = 4,
) -> Learner:
    """Build the model that the constructor makes from `arguments` (or a name in PUBLISHED), with its decoder, and load
    `state`, without the buffer `mask`.

    `taps`, counted from 1, `decoder_heads` and `cluster` are constants of the original: 6, 8, 10, 12 of 12 layers or
    12, 16, 20, 24 of 24; one head for every 64 of dec_embed_dim; 4.

    Raises:
        CheckpointError: arguments or state are not those of such a model.
    """
    if isinstance(arguments, str):
        if arguments not in PUBLISHED:
            raise CheckpointError(f"{arguments} is not a published model; known: {', '.join(PUBLISHED)}")
        arguments = PUBLISHED[arguments]
    state = {key: value for key, value in state.items() if key != "mask"}
    config, options = _config(arguments, state), _options(arguments, state, taps, decoder_heads, cluster)
    if faults := list(options.faults(config, {config.size: "img_size"})):
        raise CheckpointError("\n  ".join([_NO_MODEL, *faults]))
    made = Learner(Autoregressive(options, config), VisionMamba(config))
    wanted = {slot.key: tuple(slot.read(dict(made.trained())).shape) for slot in _slots(made)}
    wanted |= {key: tuple(value.shape) for key, value in _tables(made).items()}
    if faults := differences(wanted, state):
        raise CheckpointError("\n  ".join(["the state dict belongs to another model than the arguments", *faults]))
    with torch.no_grad():
        own = {name: parameter.detach() for name, parameter in made.trained()}
        for slot in _slots(made):
            slot.write(own, state[slot.key])
    positions = state["dec_pos_embed"][0]
    if not _is_sincos(positions):
        made["decoder"].positions = positions.clone()
    return made


def encoder(state: Mapping[str, Tensor]) -> VisionMamba:
    """Build the encoder of a pretraining checkpoint, without a head, from its keys and shapes.

    Raises:
        CheckpointError: they are not those of such a model, or it has taps that only its code knows.
    """
    arguments = arguments_of(state)
    depth = arguments["depth"]
    # which layers are tapped does not matter to the encoder, except that the last one is
    return learner(arguments, state, taps=None if depth in (12, 24) else (*range(1, depth)[-3:], depth)).encoder


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor's arguments that keys and shapes of a state dict show.

    Raises:
        CheckpointError: they are not those of a pretraining model.
    """
    try:
        patch, A, conv = (state[key] for key in ("patch_embed.proj.weight", *_OF_SSM))
        patches, dec = state["pos_embed"].shape[1], state["ar_token"].shape[-1]
        d_state, d_conv = A.shape[1], conv.shape[2]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{_NO_MODEL}\n  its state dict has no usable {error}") from None
    ssm = {"d_state": d_state} if d_state != 16 else {}
    ssm |= {"d_conv": d_conv} if d_conv != 4 else {}
    return {
        "img_size": math.isqrt(patches) * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "stride": patch.shape[-1],
        "depth": len({key.split(".")[1] for key in state if key.startswith("layers.")}),
        "embed_dim": len(patch),
        "dec_embed_dim": dec,
        "channels": patch.shape[1],
        "ssm_cfg": ssm or None,
        "init_layer_scale": 1e-5 if "layers.0.mixer.gamma" in state else None,
        "bimamba_type": "v2" if "layers.0.mixer.A_b_log" in state else "None",
    }


_OF_SSM = ("layers.0.mixer.A_log", "layers.0.mixer.conv1d.weight")
_NO_MODEL = "this is not a model of ARM's pretraining that can be read"


def to_published(model: Learner, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of the original for a model that `learner` makes, without the buffer `mask`; or other
    `values` by the names of `model.trained()`, such as gradients, under its names, without tables of positions.
    """
    if values is not None:
        return {slot.key: slot.read(values).clone() for slot in _slots(model)}
    return {slot.key: slot.read(dict(model.trained())).clone() for slot in _slots(model)} | _tables(model)


def _config(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> VimConfig:
    given = _DEFAULTS | dict(arguments)
    ssm = dict(given["ssm_cfg"] or {})
    faults = [
        f"{name} is {given[name]}; only {wanted} is supported"
        for name, wanted in {"stride": given["patch_size"], "channels": 3, "drop_rate": 0}.items()
        if given[name] != wanted
    ]
    if str(given["bimamba_type"]).lower() != "none":
        faults.append(f"bimamba_type {given['bimamba_type']} sees what it should predict; only none is supported")
    faults += [f"ssm_cfg.{name}: only d_state and d_conv are supported" for name in ssm.keys() - {"d_state", "d_conv"}]
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3:
        faults.append("its state dict has no pos_embed of shape (1, patches, width)")
    if faults:
        raise CheckpointError("\n  ".join([_NO_MODEL, *faults]))
    assert positions is not None
    learned = not _is_sincos(positions[0])
    try:
        return VimConfig(
            num_classes=0,
            image_size=given["img_size"],
            patch_size=given["patch_size"],
            d_model=given["embed_dim"],
            depth=given["depth"],
            directions=f"fwd*{given['depth']}",
            expand=1,
            mlp="swiglu",
            norm="layer",
            cls_token="none",
            layer_scale=given["init_layer_scale"],
            pos_embed=True if learned else "sincos",
            **ssm,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{_NO_MODEL}\n  {error}") from None


def _options(
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    taps: tuple[int, ...] | None,
    heads: int | None,
    cluster: int,
) -> AutoregressiveOptions:
    given = _DEFAULTS | dict(arguments)
    depth, width = given["depth"], given["dec_embed_dim"]
    if taps is None and depth not in (12, 24):
        raise CheckpointError(f"{_NO_MODEL}\n  depth {depth}: its code knows the taps of 12 and 24 layers; give `taps`")
    hidden = state.get("dec_block.0.mlp.fc1.bias", torch.empty(4 * width))
    try:
        return AutoregressiveOptions(
            cluster=cluster,
            taps=taps,
            decoder_depth=len({key.split(".")[1] for key in state if key.startswith("dec_block.")}) or 4,
            decoder_width=width,
            decoder_heads=heads,
            mlp_ratio=len(hidden) / width,
        )
    except ValueError as error:
        raise CheckpointError(f"{_NO_MODEL}\n  {error}") from None


def _slots(model: Learner) -> Iterator[Slot]:
    config, decoder = model.encoder.config, model["decoder"]
    assert isinstance(decoder, Decoder)
    yield Slot("patch_embed.proj.weight", "patch_embed.weight")
    yield Slot("patch_embed.proj.bias", "patch_embed.bias")
    if config.pos_embed is True:
        yield Slot("pos_embed", "pos_embed", axis=0)
    yield from layer_slots(model.encoder)
    own = "objective.decoder"
    last = len(decoder.norms)
    for i in range(last):
        yield from norm_slots(config, f"norm_{i + 1}", f"{own}.norms.{i}")
    yield from norm_slots(config, f"norm_{last + 1}", "norm")
    depth, width = len(decoder.blocks), len(decoder.query)
    rows = [k * width + channel for channel in range(width) for k in range(depth)]
    for kind in ("weight", "bias"):
        yield Slot(f"enc2dec.{kind}", f"{own}.memory.{kind}", rows)
        for theirs, ours in _OUTSIDE.items():
            yield Slot(f"{theirs}.{kind}", f"{own}.{ours}.{kind}")
        for block in range(depth):
            for theirs, ours in _OF_BLOCK.items():
                yield Slot(f"dec_block.{block}.{theirs}.{kind}", f"{own}.blocks.{block}.{ours}.{kind}")
    yield Slot("ar_token", f"{own}.query", (None, None))


_OUTSIDE = {"ar_norm": "norm", "ar_pred": "pixels"}
_OF_BLOCK = {
    "norm2_1": "norm",
    "norm2_2": "memory_norm",
    "norm2": "mlp_norm",
    "attn2.q": "q",
    "attn2.kv": "kv",
    "attn2.proj": "out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
"""Their modules and ours: of the decoder, and of a block of it."""


def _tables(model: Learner) -> dict[str, Tensor]:
    """Return the tables of positions that the original stores, and we do not."""
    config, decoder = model.encoder.config, model["decoder"]
    assert isinstance(decoder, Decoder)
    query, positions = decoder.query, decoder.positions
    tables = {"dec_pos_embed": _sincos(config.grid, len(query)).to(query) if positions is None else positions}
    if config.pos_embed == "sincos":
        tables["pos_embed"] = _sincos(config.grid, config.d_model).to(query)
    return {key: value[None] for key, value in tables.items()}


def _sincos(grid: tuple[int, int], width: int) -> Tensor:
    return torch.tensor(plane_sincos(grid, width), dtype=torch.float32)


def _is_sincos(table: Tensor) -> bool:
    """Whether a table (l, d) of a square image holds sines and cosines, up to rounding."""
    side, width = math.isqrt(len(table)), table.shape[1]
    if side * side != len(table) or width % 4:
        return False
    return torch.allclose(table.float(), _sincos((side, side), width), rtol=0, atol=2e-6)
