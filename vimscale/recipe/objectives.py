"""The section `objective` of a recipe: what the model is trained for, and the options of each kind."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny

from vimscale.errors import suggest
from vimscale.model import cost
from vimscale.model.presets import VimConfig
from vimscale.recipe.sections import Augment, OwnOptions, fault_of_kind, own_options, own_schema
from vimscale.recipe.typed_yaml import Section, Whole
from vimscale.storage import own_code


class ObjectiveOptions(OwnOptions):
    """What the model is trained for. `kind` is classification, masked, or a class in a file such as mine.py:MyLoss,
    relative to the recipe's file; the other keys are the options of that kind.
    """

    headline: ClassVar[str] = "loss"
    """The figure of an evaluation that runs of this kind are compared by."""
    classifies: ClassVar[bool] = True
    """Whether it needs labels and the encoder's own head. If not, data sets need no labels, and the encoder has no
    head.
    """
    divisible: ClassVar[bool] = True
    """Whether ranks may share its images (parallel.context)."""

    def __reduce__(self) -> tuple:
        """Another process imports a user's own file again."""
        return ObjectiveOptions.read, (self.model_dump(),)

    def faults(self, config: VimConfig, augment: Augment, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        """Yield what of a recipe this objective cannot be trained with. `sizes`: the heights and widths of the training
        images, and what messages call them.
        """
        return iter(())

    def flops(self, config: VimConfig) -> int:
        """Count the operations of the forward pass of one image of the config's size."""
        return cost.flops(config)

    @classmethod
    def section_for(cls, tree: Any) -> type[Section]:
        return cls if cls is not ObjectiveOptions else _options_class(tree)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if cls is not ObjectiveOptions:
            return handler(schema)
        own = own_schema("A user's own objective, with its own options.")
        kinds = [*(handler(kind.__pydantic_core_schema__) for kind in OBJECTIVES.values()), own]
        return {"description": inspect.cleandoc(cls.__doc__ or ""), "anyOf": kinds}


class ClassificationOptions(ObjectiveOptions):
    """Cross entropy over the classes of the training set, with the encoder's own head."""

    headline: ClassVar[str] = "top1"
    kind: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of each target that is spread evenly over all classes."""


class MaskedOptions(ObjectiveOptions):
    """Masked autoencoding: the encoder sees a few patches of an image, and a small decoder predicts the pixels of the
    others (arXiv:2111.06377).
    """

    classifies: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
    kind: Literal["masked"] = "masked"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the patches that are hidden from the encoder."""
    decoder_width: Annotated[Whole, Field(ge=4, le=2**16, multiple_of=4)] = 512
    """Width of the decoder's layers."""
    decoder_depth: Annotated[Whole, Field(ge=1, le=1000)] = 2
    """Number of the decoder's layers, which are bidirectional."""
    norm_pix: bool = True
    """Whether to predict each patch's pixels normalized by their mean and variance."""

    def faults(self, config: VimConfig, augment: Augment, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        what = "objective masked"
        if config.stages:
            yield f"{what}: stages merge tokens of a grid that has gaps; leave them out"
        if config.tiles is not None:
            yield f"{what}: bags of tiles (model.tiles) have no grid of patches to hide; leave model.tiles out"
        if ordered := dict.fromkeys(str(x) for x in config.layers if x.order != "row" or x.kind == "cross"):
            yield (
                f"{what}: patches that are kept are scanned row by row, and {', '.join(ordered)} needs a complete grid;"
                " use fwd, bwd, bi, shared, pair or attn without another order"
            )
        if config.step != config.patch_size:
            yield f"{what}: stride {config.step} shows pixels of hidden patches in others; leave model.stride out"
        if config.stem == "conv":
            yield f"{what}: stem conv mixes pixels of hidden patches into others; use model.stem=patch"
        if config.register_reduce > 1:
            yield (
                f"{what}: nothing trains what register_reduce {config.register_reduce} projects registers with; use"
                " model.register_reduce=1"
            )
        if augment.buckets > 1:
            yield f"{what}: images of several shapes (augment.buckets) cannot be masked; use augment.buckets=1"
        if augment.mixes:
            yield f"{what}: mixup and cutmix mix labels, and none are used; set augment.mixup=0 augment.cutmix=0"
        for size, name in sizes.items() if config.tiles is None and not config.stages else ():
            rows, columns = config.grid_of(*size)
            patches, kept = rows * columns, kept_patches(rows * columns, self.mask_ratio)
            if not max(config.registers, 1) <= kept < patches:
                has = f"keeps {kept} of the {patches} patches of {name} {size[0]} x {size[1]}"
                least = f"one for each of {config.registers} registers" if config.registers > 1 else "one"
                yield f"{what}: mask_ratio {self.mask_ratio:g} {has}; keep at least {least}, and hide at least one"

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

    def flops(self, config: VimConfig) -> int:
        patch, patches, extra = config.patch_size, config.patches, config.tokens - config.patches
        kept, width, decoder = kept_patches(patches, self.mask_ratio), self.decoder_width, self.decoder(config)

        def of_layers(shape: VimConfig, tokens: int) -> int:
            row = dataclasses.replace(shape, image_size=(patch, patch * tokens))
            return sum(part.flops for part in cost.costs(row) if part.layer is not None)

        embedding = cost.costs(config)[0].flops
        products = 2 * (kept + extra) * config.d_model * width + 2 * patches * width * 3 * patch**2
        return embedding + of_layers(config, kept) + of_layers(decoder, patches + extra) + products


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return how many patches of an image are kept. As in the original code, 0.9 of 100 keeps 9: 100 * (1 - 0.9) is
    9.999999999999998.
    """
    return int(patches * (1 - mask_ratio))


OBJECTIVES: dict[str, type[ObjectiveOptions]] = {"classification": ClassificationOptions, "masked": MaskedOptions}
"""The objectives that come with the package, by kind."""


def _options_class(tree: Any) -> type[OwnOptions]:
    kind = tree.get("kind", "classification")
    if not isinstance(kind, str):
        return ClassificationOptions  # reports the type
    if kind in OBJECTIVES:
        return OBJECTIVES[kind]
    if own_code.split(kind) is None:
        fault = (
            f"{kind!r} is not {' or '.join(OBJECTIVES)}, nor a class in a file such as mine.py:MyLoss"
            f"{suggest(kind, OBJECTIVES)}"
        )
        raise fault_of_kind(kind, ValueError(fault))
    return own_options(tree, ObjectiveOptions, "an objective", "vimscale.objectives.base.Objective")


AnyObjective = Annotated[SerializeAsAny[ObjectiveOptions], BeforeValidator(ObjectiveOptions.read)]
