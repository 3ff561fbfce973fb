"""The sections of a recipe: what each key means, and which values it takes."""

import dataclasses
import inspect
import os
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from vimscale.errors import suggest
from vimscale.model import presets, schedule
from vimscale.model.presets import PRESETS, ClassToken, Fuse, Pool, VimConfig
from vimscale.recipe import own_code
from vimscale.recipe.typed_yaml import UNION, Address, Flag, Section, Whole

Count = Annotated[Whole, Field(ge=1, le=2**24)]
"""Images, steps of a window, and the like."""
Step = Annotated[Whole, Field(ge=1, le=10**9)]
"""A number of optimizer steps."""
_Either = Discriminator(lambda value: UNION[isinstance(value, tuple)])
Sides = tuple[Whole, Whole]
"""Two whole numbers, written as a list."""
Size = Annotated[Annotated[Whole, Tag(UNION[0])] | Annotated[Sides, Tag(UNION[1])], _Either]
"""One whole number or two."""


class Stage(Section):
    """One resolution of a hierarchical model."""

    depth: Whole
    d_model: Whole
    directions: str | None = None
    downsample: Whole = 2
    """How much smaller each side of the token grid is than in the stage before."""


class Model(Section):
    """A preset, and what is changed of it; keys mean what `vimscale.model.presets.VimConfig` says."""

    preset: str = "vim_small"
    weights: Address | None = None
    """The folder of an exported or imported model, or of a run, to start from. Its model must compute the same as this
    one; the position embedding is resized, the head follows the names of the classes or starts again.
    """
    image_size: Size | None = None
    """Side of the square image the model sees, or [height, width], in pixels; a multiple of patch_size."""
    patch_size: Whole | None = None
    stride: Whole | None = None
    """Pixels from one patch to the next; less than patch_size makes patches overlap."""
    stem: Literal["patch", "conv"] | None = None
    d_model: Whole | None = None
    depth: Whole | None = None
    d_state: Whole | None = None
    d_conv: Whole | None = None
    expand: Whole | None = None
    directions: str | None = None
    """What each layer is: "bi*24", "fwd*12 bi*12", "(fwd bwd)*12", "(bi bi@column)*12". Kinds: fwd, bwd, bi, shared,
    pair, cross, attn; orders: row, column, snake, window. Follows `depth` where absent.
    """
    stages: tuple[Stage, ...] | None = None
    """A hierarchical model, instead of depth, d_model and directions."""
    fuse: Fuse | None = None
    """How the paths of a layer meet."""
    window: Whole | None = None
    d_head: Whole | None = None
    mlp: Literal["none", "swiglu"] | None = None
    norm: Literal["rms", "layer"] | None = None
    norm_eps: float | None = None
    ssm_norm: Flag | None = None
    layer_scale: float | None = None
    cls_token: ClassToken | None = None
    registers: Whole | None = None
    pool: Pool | None = None
    register_reduce: Whole | None = None
    pos_embed: Flag | None = None
    drop_path: float | None = None
    init: Literal["fixed", "published"] | None = None
    backward_gate: Flag | None = None
    """A learned factor a layer on the backward path."""
    backward_drop: float | None = None
    """Chance that a layer does without its backward path in a step."""
    backward_ramp: Sides | None = None
    """[first, last] step over which the backward path comes in."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Model":
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known{suggest(self.preset, PRESETS)}")
        plain = [key for key in ("depth", "d_model", "directions") if getattr(self, key) is not None]
        if self.stages and plain:
            raise ValueError(f"stages have a depth, d_model and directions each: leave out {', '.join(plain)}")
        self.shape(classes=1)
        return self

    def shape(self, classes: int) -> VimConfig:
        """The model's shape, for that many classes."""
        changes = {
            key: value
            for key in type(self).model_fields
            if key not in ("preset", "weights", "stages") and (value := getattr(self, key)) is not None
        }
        if self.stages is not None:
            changes["stages"] = tuple(presets.Stage(**stage.model_dump()) for stage in self.stages)
        preset = PRESETS[self.preset]
        if self.depth is not None and self.directions is None:
            changes["directions"] = f"{_only_kind(preset)}*{self.depth}"
        if self.directions is not None and self.depth is None:
            changes["depth"] = len(schedule.parse(self.directions))
        return dataclasses.replace(preset, num_classes=classes, **changes)


def _only_kind(preset: VimConfig) -> str:
    (kind,) = set(map(str, preset.layers))  # the presets are of one kind each
    return kind


def _check_size(text: str) -> str:
    if size_bytes(text) is None:
        raise ValueError(f"{text!r} is not a size; write 500MB, 100GB or 2TB")
    return text


def size_bytes(text: str) -> int | None:
    """Bytes of 500MB, 8GB or 2TB; None of anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(MB|GB|TB)", text, re.ASCII)
    return int(float(found[1]) * {"MB": 10**6, "GB": 10**9, "TB": 10**12}[found[2]]) if found else None


MIX_BLOCK = 4096
"""Images in which a mixture has its exact shares."""


class Source(Section):
    """One data set of a mixture."""

    data: Address
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Its share of the images, over the sum of all weights."""


class Reweight(Section):
    step: Step
    weights: tuple[Annotated[float, Field(le=1e9)], ...]
    """One for each source, from this step on; 0 leaves one out."""


class Data(Section):
    """Data sets of tar shards: folders or addresses with a manifest.json, or an embedded set (digits:train)."""

    train: Annotated[Annotated[Address, Tag(UNION[0])] | Annotated[tuple[Source, ...], Tag(UNION[1])], _Either]
    """One data set, or a mixture of several."""
    reweight: tuple[Reweight, ...] = ()
    """Other weights of a mixture from given steps on."""
    val: Address | None = None
    workers: Annotated[Whole, Field(ge=0, le=1024)] = 0
    """Processes a rank that read and decode ahead; 0 reads between steps, in the rank itself."""
    window: Count = 16
    """Shards whose samples are shuffled with each other; so many must fit into the cache."""
    lanes: Count = 1
    """Equal parts of an epoch that a batch is drawn from side by side, so that a node needs only its own parts' shards:
    at least the number of nodes for remote data, 1 for a disk that all nodes share.
    """
    cache: Annotated[str, AfterValidator(_check_size)] = "100GB"
    """Largest size of the node's cache of remote shards."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the images that may be unreadable, and replaced by others, before the run stops."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Data":
        faults = []
        count = len(self.sources)
        if not count:
            faults.append("train: the mixture is empty; give at least one source")
        if self.reweight and count < 2:
            faults.append("reweight: there is one source, so nothing to weigh; leave it out")
        elif any(len(change.weights) != count for change in self.reweight):
            faults.append(f"reweight: each change needs {count} weights, one for each source")
        elif any(min(change.weights) < 0 or sum(change.weights) <= 0 for change in self.reweight):
            faults.append("reweight: weights are 0 or more, and not all 0")
        all_weights = [[source.weight for source in self.sources], *(change.weights for change in self.reweight)]
        for weights in all_weights:
            if any(0 < weight * MIX_BLOCK < sum(weights) for weight in weights):
                faults.append(f"weights {weights}: one is below 1/{MIX_BLOCK} of their sum; raise it, or leave it out")
        steps = [change.step for change in self.reweight]
        if steps != sorted(set(steps)):
            faults.append("reweight: the steps must rise")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source(data=self.train),) if isinstance(self.train, str) else self.train


class RandAugment(NamedTuple):
    """rand-m9-mstd0.5-inc1, read."""

    magnitude: float
    """0 to 10."""
    std: float = 0.0
    """Standard deviation of each operation's magnitude."""
    operations: int = 2
    """So many an image."""
    increasing: bool = False
    """Whether every operation gets more severe with the magnitude."""


def randaugment(policy: str) -> RandAugment | None:
    """What a policy's text says, in timm's notation; None if it is no RandAugment."""
    kind, *parts = policy.split("-")
    found = [re.fullmatch(r"(mstd|m|n|inc)(\d{1,9}(?:\.\d{1,9})?)", part, re.ASCII) for part in parts]
    values = {match[1]: float(match[2]) for match in found if match}
    whole = all(values.get(key, 1.0).is_integer() for key in ("n", "inc"))
    if kind != "rand" or None in found or len(values) < len(parts) or "m" not in values or not whole:
        return None
    rule = RandAugment(values["m"], values.get("mstd", 0.0), int(values.get("n", 2)), bool(values.get("inc", 0)))
    return rule if rule.magnitude <= 10 and rule.std <= 10 and 1 <= rule.operations <= 100 else None


def _check_policy(text: str) -> str:
    if text != "3-augment" and randaugment(text) is None:
        raise ValueError(
            f"{text!r} is neither 3-augment nor a RandAugment such as rand-m9-mstd0.5-inc1"
            " (magnitude m and its deviation mstd 0 to 10, n operations 1 to 100; mstd, n and inc may be left out)"
        )
    return text


class Augment(Section):
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least share of the image's area that a random crop keeps; 1 switches cropping off."""
    aspect_max: Annotated[float, Field(ge=1, le=100)] = 4 / 3
    """Crops are stretched by at most this factor, in either direction."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Chance of a horizontal flip."""
    policy: Annotated[str, AfterValidator(_check_policy)] | None = None
    """rand-m9-mstd0.5-inc1 and its like (RandAugment: magnitude, its deviation, n operations, increasing), or
    3-augment (grey, solarize or blur).
    """
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that a rectangle of the image is replaced by noise."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Beta parameter by which two images are blended; 0 is off. With both mixup and cutmix, each pair draws one."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Beta parameter by which two images swap a rectangle; 0 is off."""
    repeats: Count = 1
    """Differently augmented copies of each image in its batch (repeated augmentation)."""
    buckets: Annotated[Whole, Field(ge=1, le=256)] = 1
    """Aspect ratios that images may keep, from 1:2 to 2:1, about as many tokens each; the model packs them into rows.
    1 makes all of them model.image_size.
    """

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Phase(Section):
    """What changes at a step of progressive training; the rest stays as it was."""

    step: Annotated[Whole, Field(ge=0, le=10**9)]
    image_size: Size | None = None
    """Of training images; model.image_size at first."""
    batch: Count | None = None
    """Images a step, cut into as many micro-steps as the recipe's own, which it is at first."""


class ObjectiveOptions(Section):
    """What the model is trained for. `kind` is classification, or a class in a file such as mine.py:MyLoss, relative to
    the recipe's file; the other keys are the options of that kind.
    """

    headline: ClassVar[str] = "loss"
    """The figure of an evaluation that runs of this kind are compared by."""
    kind: str

    def __reduce__(self) -> tuple:
        """Another process imports a user's own file again."""
        return objective_options, (self.model_dump(),)

    @classmethod
    def section_for(cls, tree: Any) -> type[Section]:
        return cls if cls is not ObjectiveOptions else _options_class(tree)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if cls is not ObjectiveOptions:
            return handler(schema)
        own = {
            "type": "object",
            "description": "A user's own objective, with its own options.",
            "properties": {"kind": {"type": "string", "pattern": r"\.py:"}},
            "required": ["kind"],
        }
        kinds = [*(handler(kind.__pydantic_core_schema__) for kind in OBJECTIVES.values()), own]
        return {"description": inspect.cleandoc(cls.__doc__ or ""), "anyOf": kinds}


class ClassificationOptions(ObjectiveOptions):
    """Cross entropy over the classes of the training set, with the encoder's own head."""

    headline: ClassVar[str] = "top1"
    kind: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of each target that is spread evenly over all classes."""


OBJECTIVES: dict[str, type[ObjectiveOptions]] = {"classification": ClassificationOptions}
"""The objectives that come with the package, by kind."""


def objective_options(tree: Any) -> Any:
    """The options that a recipe's `objective` section gives, as an object of the class of its kind; anything that is no
    section stays as it is.

    Raises:
        ValidationError: the kind is unknown, its file cannot be imported, or an option is wrong.
    """
    return _options_class(tree).model_validate(tree) if isinstance(tree, dict) else tree


def _options_class(tree: Any) -> type[ObjectiveOptions]:
    kind = tree.get("kind", "classification")
    if not isinstance(kind, str):
        return ClassificationOptions  # reports the type
    if kind in OBJECTIVES:
        return OBJECTIVES[kind]
    try:
        if own_code.split(kind) is None:
            raise ValueError(
                f"{kind!r} is not {' or '.join(OBJECTIVES)}, nor a class in a file such as mine.py:MyLoss"
                f"{suggest(kind, OBJECTIVES)}"
            )
        options = getattr(own_code.load(kind), "Options", None)
        if not (isinstance(options, type) and issubclass(options, ObjectiveOptions)):
            raise ValueError(f"{kind} is not an objective: derive it from vimscale.objectives.base.Objective")
    except ValueError as error:
        fault = InitErrorDetails(type="value_error", loc=("kind",), input=kind, ctx={"error": error})
        raise ValidationError.from_exception_data("objective", [fault]) from None
    return options


AnyObjective = Annotated[SerializeAsAny[ObjectiveOptions], BeforeValidator(objective_options)]


class Optim(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, lt=1e38)] = 1e-3
    """Peak learning rate, at `batch` images a step."""
    min_lr: Annotated[float, Field(ge=0, lt=1e38)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.05
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    warmup: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant", "rise"] = "cosine"
    """After the warm-up: a cosine from lr down to min_lr, lr, or exponentially from min_lr up to lr (`lr-range`)."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient over all parameters; null does not clip."""
    decay: Literal["fixed", "published"] = "fixed"
    """What weight decay shrinks: matrices alone, or A_log too, as in every published Vim run."""
    gate_decay: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Weight decay of `model.backward_gate`'s factors; absent: weight_decay."""
    backward_lr: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Learning rate of the backward paths' own parameters, in units of everything else's."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, approached as (1 + step) / (10 + step); null keeps none."""


def _check_recompute(rule: str) -> str:
    if rule not in ("none", "scan", "block") and recompute_every(rule) is None and size_bytes(rule) is None:
        raise ValueError(f"{rule!r} is not none, scan, block, block/2 (every second layer) or a size such as 8GB")
    return rule


def recompute_every(rule: str) -> int | None:
    """The k of block/k."""
    found = re.fullmatch(r"block/([1-9]\d{0,4})", rule, re.ASCII)
    return int(found[1]) if found else None


class Parallel(Section):
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    persist: Annotated[Whole, Field(ge=0, le=10**12)] = 100_000
    """At stage 3, parameters with fewer elements stay whole on every rank."""
    micro_batch: Count | None = None
    """Images a rank computes at once; accumulation follows from it. Absent: all of a rank's share."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: fp32 parameters, states and scans, bf16 matrix products (autocast)."""
    recompute: Annotated[str, AfterValidator(_check_recompute)] = "none"
    """What the backward pass computes again instead of keeping: none; scan (convolution, dt and scan of every layer);
    block (all but a layer's input); block/2 (every second layer); or a size a rank such as 8GB, for which as few layers
    as need be do so.
    """


class Checkpoint(Section):
    every: Step = 1_000
    """Steps between checkpoints; one is also written at the end and on request."""
    keep: Count = 3
    """How many of the newest to keep."""
    keep_every: Step | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    second: Address | None = None
    """A second place, a folder or an address such as s3://bucket/runs: the newest checkpoint is copied there in the
    background, and written there if the run's own folder cannot be. A relative folder is one of the working directory
    that the recipe is read in.
    """

    @field_validator("second")
    @classmethod
    def _of_here(cls, second: str | None) -> str | None:
        """Ranks may work in other directories, and later commands, which read the recipe of the run's folder."""
        return second if second is None or "://" in second else os.path.abspath(second)


class Guard(Section):
    """What is done about losses and gradients that are not finite, or jump."""

    spike: Annotated[float, Field(gt=0)] | None = 10.0
    """Robust z-score (distance from the median in units of 1.4826 median absolute deviations) from which a loss or a
    gradient norm is a spike; null looks for what is not finite alone.
    """
    window: Annotated[Whole, Field(ge=10, le=100_000)] = 100
    """Steps that the median is of; no spike is seen before so many."""
    skips: Annotated[Whole, Field(ge=0, le=10**9)] = 3
    """Bad steps in a row whose updates are left out; at one more the run goes back to its last checkpoint, and past the
    data of those steps.
    """
    rollbacks: Annotated[Whole, Field(ge=0, le=10**9)] = 3
    """How often it does that before the run ends."""
    lower_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate for `lower_steps` steps after going back."""
    lower_steps: Annotated[Whole, Field(ge=0, le=10**9)] = 0


class Evaluate(Section):
    every: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps between evaluations; 0 evaluates at the end only."""


class Log(Section):
    every: Step = 20
    """Steps between lines of progress. The loss of every step is kept in any case."""
