"""The section `objective` of a recipe: what the model is trained for, and the options of each kind."""

import inspect
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny, model_validator

from vimscale.errors import suggest
from vimscale.recipe.sections import Count, OwnOptions, fault_of_kind, own_options, own_schema
from vimscale.recipe.typed_yaml import Flag, Section, Whole
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
    mixable: ClassVar[bool] = True
    """Whether images may be mixed in pairs (augment.mixup, augment.cutmix)."""

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


def _check_caption(source: str) -> str:
    if not re.fullmatch(r"json:.+|[^/:\s]+", source, re.DOTALL):
        raise ValueError(f"{source!r} is not a member such as txt, a field such as json:caption, or class")
    return source


def _check_template(text: str) -> str:
    if text.count("{}") != 1 or text.count("{") != 1 or text.count("}") != 1:
        raise ValueError(f"{text!r} does not say where the class goes; write {{}} there, once")
    return text


Template = Annotated[str, AfterValidator(_check_template)]
"""A text with {} for the name of a class."""


class ContrastiveOptions(ObjectiveOptions):
    """Images and their captions: features of a pair become similar, those of different pairs do not. All other pairs of
    the step are compared, on whatever ranks and in whatever micro-batches they are.
    """

    headline: ClassVar[str] = "top1"
    classifies: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    kind: Literal["contrastive"] = "contrastive"
    loss: Literal["siglip", "clip"] = "siglip"
    """siglip: each pair of the step is judged alone, as matching or not. clip: each image chooses among all texts, and
    each text among all images.
    """
    features: Count = 512
    """Width of the features that images and texts are compared by."""
    scale: Annotated[float, Field(ge=1, le=100)] | None = None
    """First value of the learned factor on cosines, which stays between 1 and 100. default: 10 for siglip, 1 / 0.07 for
    clip.
    """
    bias: Annotated[float, Field(ge=-1000, le=1000)] = -10.0
    """First value of what siglip adds to all cosines, after the factor; learned."""
    width: Count = 512
    """Of the text tower."""
    depth: Count = 12
    """Layers of the text tower."""
    heads: Count = 8
    context: Annotated[Whole, Field(ge=3, le=2**16)] = 77
    """Tokens that the text tower reads, start and end included."""
    causal: Flag = True
    """Whether a token sees only those before it. The end token's features are the text's in either case."""
    tokenizer: Literal["clip", "bytes"] = "clip"
    """clip: CLIP's byte-pair encoding, 49,408 entries, lower case. bytes: one token per byte of UTF-8."""
    caption: Annotated[str, AfterValidator(_check_caption)] = "txt"
    """Where captions come from. txt, or another extension: that member of a sample; json:FIELD: a field of its member
    json, one of several at random if it is a list; class: the name of its class in one of `class_captions`, at random.
    """
    class_captions: Annotated[tuple[Template, ...], Field(min_length=1)] = ("a photo of a {}.",)
    """Captions of a class, with {} for its name."""
    missing: Literal["replace", "refuse"] = "replace"
    """What to do with a sample whose caption is missing or empty. replace: use another sample, as for images that
    cannot be read; data.max_bad limits how many. refuse: end the run.
    """
    too_long: Literal["cut", "refuse"] = "cut"
    """What to do with a caption of more than `context` tokens. cut: drop its end; `cut` in metrics.jsonl is the
    fraction of captions cut. refuse: end the run.
    """
    evaluation: Literal["zero-shot", "retrieval"] = "zero-shot"
    """What an evaluation asks. zero-shot: which class of data.val an image shows, by the texts of all classes, in
    `templates`; labels are needed and captions are not. retrieval: which caption of data.val belongs to an image.
    """
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )
    """Texts that stand for a class in zero-shot evaluations, with {} for its name; the mean of their features does.
    default: seven of CLIP's templates for ImageNet.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> "ContrastiveOptions":
        if self.width % self.heads:
            near = next(n for n in range(self.heads, 0, -1) if self.width % n == 0)
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; use heads: {near}")
        return self


OBJECTIVES: dict[str, type[ObjectiveOptions]] = {
    "classification": ClassificationOptions,
    "contrastive": ContrastiveOptions,
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
