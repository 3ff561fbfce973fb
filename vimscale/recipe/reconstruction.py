"""Options of the objectives that predict pixels: `masked` and `autoregressive`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vimscale.model.presets import VimConfig
from vimscale.recipe.objective import ObjectiveOptions
from vimscale.recipe.typed_yaml import Whole


class MaskedOptions(ObjectiveOptions):
    """Masked autoencoding: the encoder sees a few patches of an image, and a small decoder predicts the pixels of the
    others (arXiv:2111.06377).
    """

    classifies: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    kind: Literal["masked"] = "masked"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the patches that are hidden from the encoder."""
    decoder_width: Annotated[Whole, Field(ge=4, le=2**16, multiple_of=4)] = 512
    """Width of the decoder's layers."""
    decoder_depth: Annotated[Whole, Field(ge=1, le=1000)] = 2
    """Number of the decoder's layers, which are bidirectional."""
    norm_pix: bool = True
    """Whether to predict each patch's pixels normalized by their mean and variance."""

    def faults(self, config: VimConfig, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        if config.stages:
            yield "stages merge tokens of a grid that has gaps; leave them out"
        if config.tiles is not None:
            yield "bags of tiles (model.tiles) have no grid of patches to hide; leave model.tiles out"
        if ordered := dict.fromkeys(str(x) for x in config.layers if x.order != "row" or x.kind == "cross"):
            yield (
                f"patches that are kept are scanned row by row, and {', '.join(ordered)} needs a complete grid;"
                " use fwd, bwd, bi, shared, pair or attn without another order"
            )
        if config.step != config.patch_size:
            yield f"stride {config.step} shows pixels of hidden patches in others; leave model.stride out"
        if config.stem == "conv":
            yield "stem conv mixes pixels of hidden patches into others; use model.stem=patch"
        if config.register_reduce > 1:
            yield (
                f"nothing trains what register_reduce {config.register_reduce} projects registers with; use"
                " model.register_reduce=1"
            )
        for size, name in sizes.items() if config.tiles is None and not config.stages else ():
            rows, columns = config.grid_of(*size)
            patches, kept = rows * columns, kept_patches(rows * columns, self.mask_ratio)
            if not max(config.registers, 1) <= kept < patches:
                has = f"keeps {kept} of the {patches} patches of {name} {size[0]} x {size[1]}"
                least = f"one for each of {config.registers} registers" if config.registers > 1 else "one"
                yield f"mask_ratio {self.mask_ratio:g} {has}; keep at least {least}, and hide at least one"

    def grids(self, config: VimConfig) -> tuple[tuple[int, int], ...]:
        return ((1, kept_patches(config.patches, self.mask_ratio)),)

    def decoder(self, encoder: VimConfig) -> VimConfig:
        """Return the shape of the decoder's layers, which are like those of an encoder but for width, depth and
        directions.
        """
        return VimConfig(
            num_classes=0,
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            d_model=self.decoder_width,
            depth=self.decoder_depth,
            directions=f"bi*{self.decoder_depth}",
            d_state=encoder.d_state,
            d_conv=encoder.d_conv,
            expand=encoder.expand,
            layer_scale=encoder.layer_scale,
            fuse=encoder.fuse if encoder.fuse in ("mean", "sum") else "mean",
            norm=encoder.norm,
            norm_eps=encoder.norm_eps,
            ssm_norm=encoder.ssm_norm,
            init=encoder.init,
            cls_token="none",
            pos_embed="sincos",
        )


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return how many patches of an image are kept. As in the original code, 0.9 of 100 keeps 9: 100 * (1 - 0.9) is
    9.999999999999998.
    """
    return int(patches * (1 - mask_ratio))


class AutoregressiveOptions(ObjectiveOptions):
    """Predict the pixels of each cluster of patches from the clusters before it, for a model that scans forward only
    (ARM, arXiv:2406.07537). It needs no labels.
    """

    classifies: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    kind: Literal["autoregressive"] = "autoregressive"
    cluster: Annotated[Whole, Field(ge=1, le=1024)] = 4
    """Side of a cluster, in patches."""
    taps: tuple[Annotated[Whole, Field(ge=1)], ...] | None = None
    """Layers, counted from 1, whose outputs the decoder reads; the last one is the last layer. default: four layers,
    evenly over the second half, as published: 6, 8, 10, 12 of 12, and 12, 16, 20, 24 of 24.
    """
    decoder_depth: Annotated[Whole, Field(ge=1, le=100)] = 4
    """Blocks of cross-attention in the decoder."""
    decoder_width: Annotated[Whole, Field(ge=4, le=2**16)] = 512
    """Width of the decoder; a multiple of 4."""
    decoder_heads: Annotated[Whole, Field(ge=1)] | None = None
    """Attention heads of each block. default: one for every 64 of decoder_width."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of the decoder's MLPs, in units of decoder_width."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AutoregressiveOptions":
        faults = []
        if self.taps is not None and list(self.taps) != sorted(set(self.taps)):
            faults.append(f"taps {list(self.taps)} must increase")
        if self.taps == ():
            faults.append("taps [] leaves the decoder nothing to read; name layers, or leave it out")
        if self.decoder_width % 4:
            faults.append(f"decoder_width {self.decoder_width} is not a multiple of 4")
        if self.decoder_width % self.heads:
            faults.append(f"decoder_width {self.decoder_width} is not a multiple of decoder_heads {self.heads}")
        if round(self.decoder_width * self.mlp_ratio) < 1:
            faults.append(
                f"mlp_ratio {self.mlp_ratio:g} leaves the MLPs of decoder_width {self.decoder_width} no width"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def heads(self) -> int:
        return self.decoder_heads or max(self.decoder_width // 64, 1)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self._default_layers(depth) if self.taps is None else tuple(tap - 1 for tap in self.taps)

    def _default_layers(self, depth: int) -> tuple[int, ...]:
        if depth < 6:  # a second half has no four layers
            return tuple(range(depth))[-4:]
        return tuple(round(depth * (3 + i) / 6) - 1 for i in range(4))

    def grids(self, config: VimConfig) -> tuple[tuple[int, int], ...]:
        return ((1, config.patches - self.cluster**2),)

    def faults(self, config: VimConfig, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        depth = len(config.layers)
        fixes = {
            "model.stages=null": bool(config.stages),
            "model.tiles=null": config.tiles is not None,
            f"model.directions=fwd*{depth}": {str(layer) for layer in config.layers} != {"fwd"},
            "model.cls_token=none": config.cls_token != "none",
            "model.registers=0": config.registers > 0,
            "model.pool=mean": config.pool in ("cls", "registers"),
            "model.stem=patch": config.stem != "patch",
            f"model.stride={config.patch_size}": config.step != config.patch_size,
        }
        if any(fixes.values()):
            yield (
                f"it predicts patches from those before them, so every layer must scan forward, and nothing else"
                f" may see later patches; set {' '.join(fix for fix, needed in fixes.items() if needed)}"
            )
            return
        if self.taps is not None and self.taps[-1] != depth:
            yield (
                f"taps {list(self.taps)} must end with the last of {depth} layers, because layers behind the"
                f" last tap would not be trained; use {[layer + 1 for layer in self._default_layers(depth)]}"
            )
        for (height, width), name in sizes.items():
            rows, columns = config.grid_of(height, width)
            if rows % self.cluster or columns % self.cluster:
                unit = self.cluster * config.patch_size
                near = [max(round(side / unit), 2) * unit for side in (height, width)]
                yield (
                    f"{name} {height} x {width} has {rows} x {columns} patches, which clusters of"
                    f" {self.cluster} x {self.cluster} do not fill; use {near[0]} x {near[1]} pixels or another"
                    " objective.cluster"
                )
            elif rows * columns == self.cluster**2:
                yield (
                    f"{name} {height} x {width} is one cluster of {self.cluster} x {self.cluster} patches, and"
                    " nothing is left to predict; use a smaller objective.cluster or larger images"
                )
