"""The section `objective` of a recipe: what the model is trained for, and the options of each kind."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny, model_validator

from vimscale.errors import suggest
from vimscale.model.presets import VimConfig
from vimscale.recipe.sections import Augment, OwnOptions, fault_of_kind, own_options, own_schema
from vimscale.recipe.typed_yaml import Section, Whole
from vimscale.storage import own_code


class ObjectiveOptions(OwnOptions):
    """What the model is trained for. `kind` is classification, or a class in a file such as mine.py:MyLoss, relative to
    the recipe's file; the other keys are the options of that kind.
    """

    headline: ClassVar[str] = "loss"
    """The figure of an evaluation that runs of this kind are compared by."""
    classifies: ClassVar[bool] = True
    """Whether it needs labels and the encoder's own head. If not, data sets need no labels, and the encoder has no
    head.
    """
    divisible: ClassVar[bool] = True
    """Whether ranks may share its images (parallel.context)."""

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers, counted from 0, whose outputs the objective reads in addition to the encoder's."""
        return ()

    def with_layers(self, layers: tuple[int, ...]) -> "ObjectiveOptions":
        """Return the options for a plan's shorter model, in which the objective reads these layers."""
        raise NotImplementedError

    def __reduce__(self) -> tuple:
        """Another process imports a user's own file again."""
        return ObjectiveOptions.read, (self.model_dump(),)

    def faults(self, config: VimConfig, augment: Augment, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        """Yield what of a recipe this objective cannot be trained with. `sizes`: the heights and widths of the training
        images, and what messages call them.
        """
        return iter(())

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


class AutoregressiveOptions(ObjectiveOptions):
    """Predict the pixels of each cluster of patches from the clusters before it, for a model that scans forward only
    (ARM, arXiv:2406.07537). It needs no labels.
    """

    classifies: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
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

    def with_layers(self, layers: tuple[int, ...]) -> "AutoregressiveOptions":
        return self.model_copy(update={"taps": tuple(layer + 1 for layer in layers)})

    def _default_layers(self, depth: int) -> tuple[int, ...]:
        if depth < 6:  # a second half has no four layers
            return tuple(range(depth))[-4:]
        return tuple(round(depth * (3 + i) / 6) - 1 for i in range(4))

    def faults(self, config: VimConfig, augment: Augment, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        what, depth = "objective autoregressive", len(config.layers)
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
                f"{what} predicts patches from those before them, so every layer must scan forward, and nothing else"
                f" may see later patches; set {' '.join(fix for fix, needed in fixes.items() if needed)}"
            )
            return
        if self.taps is not None and self.taps[-1] != depth:
            yield (
                f"{what}: taps {list(self.taps)} must end with the last of {depth} layers, because layers behind the"
                f" last tap would not be trained; use {[layer + 1 for layer in self._default_layers(depth)]}"
            )
        if augment.buckets > 1:
            yield f"{what}: images of several shapes (augment.buckets) have several grids; use augment.buckets=1"
        if augment.mixes:
            yield f"{what}: mixup and cutmix mix labels, and none are used; set augment.mixup=0 augment.cutmix=0"
        for (height, width), name in sizes.items():
            rows, columns = config.grid_of(height, width)
            if rows % self.cluster or columns % self.cluster:
                unit = self.cluster * config.patch_size
                near = [max(round(side / unit), 2) * unit for side in (height, width)]
                yield (
                    f"{what}: {name} {height} x {width} has {rows} x {columns} patches, which clusters of"
                    f" {self.cluster} x {self.cluster} do not fill; use {near[0]} x {near[1]} pixels or another"
                    " objective.cluster"
                )
            elif rows * columns == self.cluster**2:
                yield (
                    f"{what}: {name} {height} x {width} is one cluster of {self.cluster} x {self.cluster} patches, and"
                    " nothing is left to predict; use a smaller objective.cluster or larger images"
                )


OBJECTIVES: dict[str, type[ObjectiveOptions]] = {
    "classification": ClassificationOptions,
    "autoregressive": AutoregressiveOptions,
}
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
