"""Options of the objectives that compare features: `distillation` and `contrastive`."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from vimscale.model.presets import VimConfig
from vimscale.recipe.objective import ObjectiveOptions
from vimscale.recipe.sections import Count, Step
from vimscale.recipe.typed_yaml import Flag, Whole
from vimscale.storage import own_code

Part = Annotated[float, Field(gt=0, le=1)]
Chance = Annotated[float, Field(ge=0, le=1)]


class DistillationOptions(ObjectiveOptions):
    """Self-distillation: the encoder learns to give crops of an image what a slowly moving copy of it, the teacher,
    gives other crops (DINO, arXiv:2104.14294), with the switches of iBOT, Sinkhorn-Knopp and KoLeo (DINOv2). Needs no
    labels. The global crops have the size model.image_size.
    """

    classifies: ClassVar[bool] = False
    divisible: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    mixable: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False
    most_zero: ClassVar[int] = 2
    kind: Literal["distillation"] = "distillation"
    local_crops: Annotated[Whole, Field(ge=0, le=64)] = 8
    """Small crops of each image, in addition to the two global ones."""
    local_size: Annotated[Whole, Field(ge=1, le=4096)] = 96
    """Side of the small crops, in pixels."""
    global_area: tuple[Part, Part] = (0.4, 1.0)
    """Smallest and largest fraction of the image's area in a global crop."""
    local_area: tuple[Part, Part] = (0.05, 0.4)
    """The same for a small crop."""
    flip: Chance = 0.5
    """Chance that a crop is flipped horizontally."""
    jitter: Chance = 0.8
    """Chance that brightness, contrast, saturation (by up to 0.4, 0.4, 0.2) and hue (0.1) of a crop change."""
    gray: Chance = 0.2
    """Chance that a crop loses its colors."""
    blur: Chance = 1.0
    """Factor on the chances of a blur: 1 for the first global crop, 0.1 for the second, 0.5 for small ones."""
    solarize: Chance = 0.2
    """Chance that the second global crop is solarized."""
    prototypes: Annotated[Whole, Field(ge=2, le=2**20)] = 65_536
    """Outputs of the head, over which student and teacher are compared."""
    head_layers: Annotated[Whole, Field(ge=1, le=8)] = 3
    """Linear layers of the head before the prototypes."""
    hidden: Annotated[Whole, Field(ge=1, le=2**16)] = 2048
    """Width of the head's hidden layers."""
    bottleneck: Annotated[Whole, Field(ge=1, le=2**14)] = 256
    """Width of what is compared with the prototypes."""
    prototype_norm: Literal["fixed", "trained"] = "fixed"
    """Length of the prototypes. fixed: 1; trained: learned, which DINO does for its small models without collapse."""
    prototypes_from: Step = 1
    """The step, counted from 1, that updates the prototypes for the first time. Published: after one epoch."""
    student_temperature: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Temperature of the student's outputs; above that of the teacher."""
    teacher_temperature: Annotated[float, Field(gt=0, le=10)] = 0.04
    """Lower ones make sharper targets. Above 0.07 training is unstable, as published."""
    teacher_temperature_from: Annotated[float, Field(gt=0, le=10)] | None = None
    """The teacher's temperature at the first step. default: teacher_temperature."""
    teacher_warmup: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps in which the teacher's temperature changes linearly from teacher_temperature_from to
    teacher_temperature.
    """
    momentum: float | None = 0.996
    """How much of itself the teacher keeps in the first step; rises to 1 over the run, along a cosine. Small batches
    want more: published, 0.9995 for 256 images.
    """
    targets: Literal["centering", "sinkhorn"] = "centering"
    """How the teacher's targets are kept from collapsing. centering: subtract a moving mean of its outputs; sinkhorn:
    three iterations of Sinkhorn-Knopp over the images of a step, on all ranks.
    """
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of itself the center keeps in each step."""
    ibot: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of iBOT's loss: the student predicts the teacher's targets for patches that are hidden from it. 0: off."""
    ibot_head: Literal["shared", "separate"] = "shared"
    """Whether iBOT compares patches by the head of the images, or has its own."""
    mask_ratio: tuple[Part, Part] = (0.1, 0.5)
    """Smallest and largest fraction of a masked crop's patches that iBOT hides."""
    mask_chance: Part = 0.5
    """Chance that a global crop is masked."""
    koleo: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of KoLeo's loss, which keeps the features of a step's images apart. 0: off. Costs another forward pass of
    the global crops.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillationOptions":
        faults = []
        if self.momentum is None or not 0 <= self.momentum < 1:
            given = "null" if self.momentum is None else f"{self.momentum:g}"
            faults.append(
                f"momentum {given}: the teacher needs a schedule from 0 or more and below 1 up to 1, or it never moves;"
                " use 0.996, or 0.9995 for small batches"
            )
        for name in ("global_area", "local_area", "mask_ratio"):
            least, most = getattr(self, name)
            if least > most:
                faults.append(f"{name} {least:g} to {most:g}: the smallest is above the largest; swap them")
        if self.teacher_temperature >= self.student_temperature:
            faults.append(
                f"teacher_temperature {self.teacher_temperature:g} must be below student_temperature"
                f" {self.student_temperature:g}: targets must be sharper than what learns them"
            )
        if self.teacher_warmup and self.teacher_temperature_from is None:
            faults.append(
                f"teacher_warmup {self.teacher_warmup:,}: there is nothing to warm up; set teacher_temperature_from,"
                " or leave it out"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def grids(self, config: VimConfig) -> tuple[tuple[int, int], ...]:
        return (config.grid,) * 2 + (config.grid_of(self.local_size, self.local_size),) * self.local_crops

    def faults(self, config: VimConfig, sizes: Mapping[tuple[int, int], str]) -> Iterator[str]:
        if config.stages:
            yield "crops are packed into rows, which hierarchical models cannot be; leave out model.stages"
            return
        if config.tiles is not None:
            yield "crops are made of images, and the model takes tiles; leave out model.tiles"
            return
        kinds = {layer.kind for layer in config.layers}
        yield from (
            f"crops are packed into rows, and {own.kind} does not keep images in a row apart (`packs` is false);"
            " define it, or use other layers"
            for own in config.kinds
            if own.name in kinds and not getattr(own_code.load(own.kind), "packs", False)
        )
        side = self.local_size
        if self.local_crops and side > min(config.size):
            yield (
                f"local_size {side}: the small crops are larger than the global ones, {config.size[0]} x"
                f" {config.size[1]} pixels (model.image_size); use {min(config.size) // 2 or 1} or so"
            )
        elif self.local_crops and (fitting := config.fitting_sides(side)):
            near = " or ".join(str(each) for each in fitting if each)
            yield f"local_size {side}: patches of {config.patch_size} pixels do not fill it; use {near}"
        if self.ibot and self.ibot_head == "shared" and config.features != config.widths[-1]:
            yield (
                f"ibot_head shared: images have {config.features} features and patches {config.widths[-1]};"
                " use ibot_head: separate"
            )
        if self.ibot and not int(config.patches * self.mask_ratio[0]):
            yield (
                f"mask_ratio {self.mask_ratio[0]:g} of {config.patches} patches is less than one; raise it above"
                f" {1 / config.patches:.2g}"
            )


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
    """Attention heads of the text tower."""
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

    @property
    def headline(self) -> str:  # type: ignore[override]  # a constant of other kinds
        return "top1" if self.evaluation == "zero-shot" else "recall1"
