"""FastVim's masked autoencoder with a plain Vim (insitro/FastVim, models/mae/fastvim_mae.py: MaskedAutoencoderViM).

What it does by accident and ours does not: docs/pretraining.md. Letters: l patches, d width of the encoder, w width of
the decoder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import Grid, layout
from vimscale.model.published.weights import Slot, mixer_slots, norm_slots
from vimscale.model.tokens import plane_sincos
from vimscale.objectives.base import Learner
from vimscale.objectives.masked import Decoder, Masked
from vimscale.recipe.reconstruction import MaskedOptions

DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "channels": 3,
    "decoder_embed_dim": 512,
    "decoder_depth": 8,
    "norm_pix_loss": True,
    "ssm_cfg": None,
    "norm_epsilon": 1e-5,
    "rms_norm": False,
    "init_layer_scale": None,
    "use_norm_after_ssm": True,
}
"""Arguments of the constructor that decide what is computed, with its defaults."""
_WITHOUT_EFFECT = {"residual_in_fp32", "fused_add_norm", "drop_rate", "initializer_cfg", "in_chans", "device", "dtype"}
_SSM: dict[str, Any] = {"d_state": 16, "d_conv": 4, "expand": 2}
"""Arguments of the mixer that `ssm_cfg` may change, with their defaults."""


def learner(arguments: Mapping[str, Any], state: Mapping[str, Tensor], mask_ratio: float = 0.75) -> Learner:
    """Build our encoder and decoder from the constructor's `arguments` and the state dict of the original.

    Tables of positions that are not the exact sines and cosines are kept: the encoder then has `pos_embed: true`, and
    `positions` of the decoder is set.

    Raises:
        CheckpointError: the arguments, keys or shapes are not those of such a model.
    """
    config, options = shapes(arguments, mask_ratio)
    tables = {name: state[name] for name in ("pos_embed", "decoder_pos_embed") if name in state}
    widths = {"pos_embed": config.d_model, "decoder_pos_embed": options.decoder_width}
    for name, width in widths.items():
        if name not in tables or tables[name].shape != (1, config.patches + 1, width):
            found = tuple(tables[name].shape) if name in tables else "missing"
            raise CheckpointError(f"{name} is {found}, not {(1, config.patches + 1, width)}: check img_size and widths")
    changed = {name: not _is_sincos(table[0], config.grid) for name, table in tables.items()}
    if changed["pos_embed"]:
        config = VimConfig(**config.to_dict() | {"pos_embed": True})
    made = Learner(PublishedMasked(options, config), VisionMamba(config))
    own = made.state_dict()
    slots = list(_slots(made))
    faults = [f"{slot.key} is missing" for slot in slots if slot.key not in state]
    faults += [f"{key} is unexpected" for key in sorted(state.keys() - {slot.key for slot in slots} - tables.keys())]
    faults += [
        f"{slot.key} is {tuple(state[slot.key].shape)}, not {tuple(slot.read(own).shape)}"
        for slot in slots
        if slot.key in state and state[slot.key].shape != slot.read(own).shape
    ]
    if faults:
        raise CheckpointError("\n  ".join(["the state dict belongs to another model", *faults[:4]]))
    with torch.no_grad():
        for slot in slots:
            slot.write(own, state[slot.key])
        if changed["decoder_pos_embed"]:
            decoder = made["decoder"]
            assert isinstance(decoder, PublishedDecoder)
            table = tables["decoder_pos_embed"][0]
            decoder.positions = torch.cat([table[1:], table[:1]])  # the class token follows the patches
    return made


def published_state(model: Learner, of: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copy the trained parameters of a `learner` to their original names and shapes. `of`: other tensors of the same
    names and shapes as `model.state_dict()`, such as gradients.
    """
    own = model.state_dict() if of is None else of
    return {slot.key: slot.read(own).clone() for slot in _slots(model) if slot.key != "pos_embed"}


def shapes(arguments: Mapping[str, Any], mask_ratio: float) -> tuple[VimConfig, MaskedOptions]:
    """Convert the constructor's arguments to the shape of our encoder and to our options.

    Raises:
        CheckpointError: ours has no such model.
    """
    given = {name: value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    unknown = sorted(given.keys() - DEFAULTS.keys())
    full = DEFAULTS | given
    faults = [f"{name}: there is no such argument" for name in unknown]
    ssm = dict(full["ssm_cfg"] or {})
    faults += [f"ssm_cfg.{name}: only {', '.join(_SSM)} are supported" for name in sorted(ssm.keys() - _SSM.keys())]
    if full["channels"] != 3:
        faults.append(f"channels {full['channels']}: only 3")
    if full["stride"] != full["patch_size"]:
        faults.append(f"stride {full['stride']}: patches of {full['patch_size']} pixels would overlap")
    if faults:
        raise CheckpointError("\n  ".join(["the arguments do not make a masked autoencoder of ours", *faults]))
    depth = full["depth"]
    try:
        config = VimConfig(
            num_classes=0,
            image_size=full["img_size"],
            patch_size=full["patch_size"],
            d_model=full["embed_dim"],
            depth=depth,
            directions=f"bi*{depth}",
            **_SSM | ssm,
            layer_scale=full["init_layer_scale"],
            norm="rms" if full["rms_norm"] else "layer",
            norm_eps=full["norm_epsilon"],
            ssm_norm="layer" if full["use_norm_after_ssm"] else False,
            pos_embed="sincos",
        )
        options = MaskedOptions(
            mask_ratio=mask_ratio,
            decoder_width=full["decoder_embed_dim"],
            decoder_depth=full["decoder_depth"],
            norm_pix=full["norm_pix_loss"],
        )
    except ValueError as error:
        raise CheckpointError(f"the arguments do not make a masked autoencoder of ours\n  {error}") from None
    return config, options


class PublishedDecoder(Decoder):
    """A decoder with a fixed table of positions, if one is set."""

    positions: Tensor | None = None
    """(l + 1, w), the class token's last; None: sines and cosines, and zero for the class token."""

    def positioned(self, x: Tensor, grid: Grid) -> Tensor:
        if self.positions is None:
            return super().positioned(x, grid)
        return x + self.positions.to(x)


class PublishedMasked(Masked):
    def modules(self) -> dict[str, nn.Module]:
        return {"decoder": PublishedDecoder(self.config, self.options.decoder(self.config))}


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    """Whether a table (1 + l, width), the class token first, is the fixed one."""
    exact = torch.zeros(table.shape, dtype=torch.float64)
    exact[1:] = torch.from_numpy(plane_sincos(grid, table.shape[1]))
    return bool((table.double() - exact).abs().max() < 1e-6)


def _slots(model: Learner) -> Iterator[Slot]:
    """Which slice of our parameters each of the original's tensors is."""
    config, encoder = model.encoder.config, "encoder."
    yield Slot("patch_embed.proj.weight", f"{encoder}patch_embed.weight")
    yield Slot("patch_embed.proj.bias", f"{encoder}patch_embed.bias")
    yield Slot("cls_token", f"{encoder}cls_token", axis=0)
    if config.pos_embed is True:  # the class token's row is the first one there, and in the middle here
        (middle,) = layout(config, config.grid).cls
        rows = [middle, *(i for i in range(config.tokens) if i != middle)]
        yield Slot("pos_embed", f"{encoder}pos_embed", rows, axis=0)
    yield from _layers("layers", f"{encoder}blocks", model.encoder.blocks, config)
    yield from norm_slots(config, "norm_f", f"{encoder}norm")
    ours = "added.decoder."
    yield Slot("mask_token", f"{ours}mask_token", (None, None))
    for key, name in (("decoder_embed", "embed"), ("decoder_pred", "pixels")):
        yield Slot(f"{key}.weight", f"{ours}{name}.weight")
        yield Slot(f"{key}.bias", f"{ours}{name}.bias")
    decoder = model["decoder"]
    assert isinstance(decoder, Decoder)
    yield from _layers("decoder_blocks", f"{ours}blocks", decoder.blocks, config)
    yield from norm_slots(config, "decoder_norm", f"{ours}norm")


def _layers(key: str, name: str, blocks: nn.ModuleList, config: VimConfig) -> Iterator[Slot]:
    for i, block in enumerate(blocks):
        yield from norm_slots(config, f"{key}.{i}.norm", f"{name}.{i}.norm")
        for slot in mixer_slots(block.mixer):  # type: ignore[arg-type]  # all layers are bi
            yield slot._replace(key=f"{key}.{i}.mixer.{slot.key}", name=f"{name}.{i}.mixer.{slot.name}")
