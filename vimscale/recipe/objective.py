"""What all kinds of the section `objective` of a recipe have in common, and the options of classification."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, GetJsonSchemaHandler

from vimscale.errors import suggest
from vimscale.model.presets import VimConfig
from vimscale.recipe.sections import OwnOptions, fault_of_kind, own_options, own_schema
from vimscale.recipe.typed_yaml import Section
from vimscale.storage import own_code

OBJECTIVES: dict[str, type["ObjectiveOptions"]] = {}
"""The objectives that come with the package, by kind; `vimscale.recipe.objectives` fills it."""


class ObjectiveOptions(OwnOptions):
    """What the model is trained for. `kind` is classification, masked, autoregressive, distillation, contrastive, or a
    class in a file such as mine.py:MyLoss, relative to the recipe's file; the other keys are the options of that kind.
    """

    headline: ClassVar[str] = "loss"
    """The figure of an evaluation that runs of this kind are compared by."""
    classifies: ClassVar[bool] = True
    """Whether it needs labels and the encoder's own head. If not, data sets need no labels, and the encoder has no
    head.
    """
    divisible: ClassVar[bool] = True
    """Whether ranks may share its images (parallel.context)."""
    packs: ClassVar[bool] = True
    """Whether it takes images of several shapes (augment.buckets)."""
    mixable: ClassVar[bool] = True
    """Whether images may be mixed in pairs (augment.mixup, augment.cutmix)."""
    reads_images: ClassVar[bool] = True
    """Whether training reads `Inputs.images`, which `augment` makes; if not, they are empty."""
    most_zero: ClassVar[int] = 3
    """The highest ZeRO stage that it can be trained at."""

    def faults(self, config: VimConfig, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        """Yield why a model of this shape cannot be trained for it, each with value, rule and fix. `sizes`: the heights
        and widths of the training images, and what messages call them.
        """
        yield from ()

    def grids(self, config: VimConfig) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the patches that training encodes of an image, one for each of its parts in a row of
        tokens. Not asked of models with stages or tiles.
        """
        return (config.grid,)

    def __reduce__(self) -> tuple:
        """Another process imports a user's own file again."""
        return ObjectiveOptions.read, (self.model_dump(),)

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
