"""The sections of a recipe except `model`: what each key means and which values it takes."""

import inspect
import os
import re
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from vimscale.recipe.typed_yaml import UNION, Address, Either, Flag, Section, Size, Whole
from vimscale.storage import own_code

Count = Annotated[Whole, Field(ge=1, le=2**24)]
"""A number of images, of steps in a window, and the like."""
Step = Annotated[Whole, Field(ge=1, le=10**9)]
"""A number of optimizer steps."""


def _check_size(text: str) -> str:
    if size_bytes(text) is None:
        raise ValueError(f"{text!r} is not a size; write 500MB, 100GB or 2TB")
    return text


def size_bytes(text: str) -> int | None:
    """Convert 500MB, 8GB or 2TB to bytes; return None for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(MB|GB|TB)", text, re.ASCII)
    return int(float(found[1]) * {"MB": 10**6, "GB": 10**9, "TB": 10**12}[found[2]]) if found else None


MIX_BLOCK = 4096
"""Images after which a mixture has drawn its exact fraction from each source."""


class Source(Section):
    """One data set of a mixture."""

    data: Address
    """Folder or address of the data set."""
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Its fraction of the images is this weight over the sum of all weights."""


class Reweight(Section):
    """New weights of a mixture, from a step on."""

    step: Step
    """The step from which these weights hold."""
    weights: tuple[Annotated[float, Field(le=1e9)], ...]
    """One weight per source; 0 leaves the source out."""


class Data(Section):
    """Data sets of tar shards: folders or addresses with a manifest.json, or an embedded set (digits:train)."""

    train: Annotated[Annotated[Address, Tag(UNION[0])] | Annotated[tuple[Source, ...], Tag(UNION[1])], Either]
    """One data set, or a mixture of several."""
    reweight: tuple[Reweight, ...] = ()
    """Changes of a mixture's weights, each from a given step on."""
    val: Address | None = None
    """The data set to evaluate on. default: none, and no evaluations."""
    workers: Annotated[Whole, Field(ge=0, le=1024)] = 0
    """Processes per rank that read and decode ahead; with 0, the rank itself reads between steps."""
    window: Count = 16
    """Shards whose samples are shuffled with each other; the cache must have room for all of them."""
    lanes: Count = 1
    """Equal parts of an epoch that each batch draws from in parallel, so that a node needs only the shards of its
    parts. Set at least the number of nodes for remote data, 1 for a disk that all nodes share.
    """
    cache: Annotated[str, AfterValidator(_check_size)] = "100GB"
    """Largest size of a node's cache of remote shards."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Fraction of the images that may be unreadable, and are replaced by others, before the run stops."""
    max_tiles: Count | None = None
    """With model.tiles, the most tiles of an image that the model gets: in training drawn at random, in evaluations
    evenly spread. default: all.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> "Data":
        faults = []
        count = len(self.sources)
        if not count:
            faults.append("train: the mixture is empty; give at least one source")
        if self.reweight and count < 2:
            faults.append("reweight: there is only one source, so there is nothing to weigh; leave it out")
        elif any(len(change.weights) != count for change in self.reweight):
            faults.append(f"reweight: each change needs {count} weights, one for each source")
        elif any(min(change.weights) < 0 or sum(change.weights) <= 0 for change in self.reweight):
            faults.append("reweight: weights must be 0 or more, and not all 0")
        all_weights = [[source.weight for source in self.sources], *(change.weights for change in self.reweight)]
        for weights in all_weights:
            if any(0 < weight * MIX_BLOCK < sum(weights) for weight in weights):
                faults.append(f"weights {weights}: one is below 1/{MIX_BLOCK} of their sum; raise it, or leave it out")
        steps = [change.step for change in self.reweight]
        if steps != sorted(set(steps)):
            faults.append("reweight: the steps must increase")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture's data sets; a single data set is a mixture of one."""
        return (Source(data=self.train),) if isinstance(self.train, str) else self.train


class RandAugment(NamedTuple):
    """The parsed form of a policy such as rand-m9-mstd0.5-inc1."""

    magnitude: float
    """0 to 10."""
    std: float = 0.0
    """Standard deviation of each operation's magnitude."""
    operations: int = 2
    """Operations per image."""
    increasing: bool = False
    """Whether every operation gets more severe with the magnitude."""


def randaugment(policy: str) -> RandAugment | None:
    """Parse a policy in timm's notation; return None if it is not a RandAugment."""
    kind, *parts = policy.split("-")
    found = [re.fullmatch(r"(mstd|m|n|inc)(\d{1,9}(?:\.\d{1,9})?)", part, re.ASCII) for part in parts]
    values = {match[1]: float(match[2]) for match in found if match}
    integers = all(values.get(key, 1.0).is_integer() for key in ("n", "inc"))
    if kind != "rand" or None in found or len(values) < len(parts) or "m" not in values or not integers:
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


class OwnOptions(Section):
    """A section whose `kind` decides which other keys it has: a class in a user's own file defines them."""

    kind: str

    @classmethod
    def read(cls, tree: Any) -> Any:
        """The options that a section gives, as an object of the class of its kind; anything that is no section stays as
        it is.

        Raises:
            ValidationError: the kind is unknown, its file cannot be imported, or an option is wrong.
        """
        return cls.section_for(tree).model_validate(tree) if isinstance(tree, dict) else tree


def own_options(tree: dict, base: type[OwnOptions], what: str, parent: str) -> type[OwnOptions]:
    """The class `Options` of the user's own class that the section `tree` names.

    Args:
        base: what `Options` derives from.
        what: what the user's class is, with its article, for messages.
        parent: the class to derive it from.

    Raises:
        ValidationError: there is no such file or class, or the class is something else or incomplete.
    """
    kind = tree["kind"]
    try:
        own = own_code.load(kind)
        options = getattr(own, "Options", None)
        if not (isinstance(options, type) and issubclass(options, base)):
            section = f"{base.__module__}.{base.__name__}"
            raise ValueError(f"{kind} is not {what}: derive it from {parent}, and its class Options from {section}")
        if missing := sorted(getattr(own, "__abstractmethods__", ())):
            raise ValueError(f"{kind} does not define {', '.join(missing)}; see {parent}")
    except ValueError as error:
        raise fault_of_kind(kind, error) from None
    return options


def fault_of_kind(kind: str, error: ValueError) -> ValidationError:
    fault = InitErrorDetails(type="value_error", loc=("kind",), input=kind, ctx={"error": error})
    return ValidationError.from_exception_data("kind", [fault])


def own_schema(about: str) -> dict[str, Any]:
    """JSON schema of a section whose options a user's own class defines."""
    return {
        "type": "object",
        "description": about,
        "properties": {"kind": {"type": "string", "pattern": r"\.py:"}},
        "required": ["kind"],
    }


class _FromFile(OwnOptions):
    """Options of what only a class in a user's own file can be."""

    what: ClassVar[str]
    """What the user's class is, with its article."""
    parent: ClassVar[str]
    """The class to derive it from."""
    example: ClassVar[str]

    def __reduce__(self) -> tuple:
        """Another process imports the user's own file again."""
        mine = (each for each in type(self).__mro__ if issubclass(each, OwnOptions))
        return next(each for each in mine if _FromFile in each.__bases__).read, (self.model_dump(),)

    @classmethod
    def section_for(cls, tree: Any) -> type[Section]:
        if _FromFile not in cls.__bases__ or not isinstance(tree.get("kind"), str):
            return cls  # reports what is wrong with the kind
        if own_code.split(tree["kind"]) is None:
            fault = f"{tree['kind']!r} is not a class in a file; write {cls.example}"
            raise fault_of_kind(tree["kind"], ValueError(fault))
        return own_options(tree, cls, cls.what, cls.parent)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return own_schema(inspect.cleandoc(cls.__doc__ or "")) if _FromFile in cls.__bases__ else handler(schema)


class AugmentationOptions(_FromFile):
    """A user's own augmentation. `kind` is a class in a file such as mine.py:Posterize, relative to the recipe's file;
    the other keys are its options.
    """

    what = "an augmentation"
    parent = "vimscale.data.images.own.Augmentation"
    example = "mine.py:Posterize"


class LayerOptions(_FromFile):
    """A user's own kind of layer. `kind` is a class in a file such as mine.py:GatedConv, relative to the recipe's file;
    the other keys are its options.
    """

    what = "a kind of layer"
    parent = "vimscale.model.own.Mixer"
    example = "mine.py:GatedConv"


class Augment(Section):
    """How training images are cropped, changed and mixed."""

    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest fraction of the image's area that a random crop keeps; 1 turns cropping off."""
    aspect_max: Annotated[float, Field(ge=1, le=100)] = 4 / 3
    """Largest factor by which a crop is stretched, in either direction."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Chance of a horizontal flip."""
    policy: Annotated[str, AfterValidator(_check_policy)] | None = None
    """A RandAugment such as rand-m9-mstd0.5-inc1 (magnitude m, its deviation mstd, n operations, inc: increasing), or
    3-augment (gray, solarize or blur).
    """
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    own: Annotated[SerializeAsAny[AugmentationOptions] | None, BeforeValidator(AugmentationOptions.read)] = None
    """A class in a file of yours that changes the image after the steps above, with its options:
    {kind: mine.py:Posterize, bits: 4}.
    """
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Chance that noise replaces a rectangle of the image."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Beta parameter for blending two images; 0 is off. With both mixup and cutmix, each pair of images draws one."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Beta parameter for swapping a rectangle between two images; 0 is off."""
    repeats: Count = 1
    """Differently augmented copies of each image in a batch (repeated augmentation)."""
    buckets: Annotated[Whole, Field(ge=1, le=256)] = 1
    """Number of aspect ratios that images may keep, from 1:2 to 2:1, all with about the same number of tokens; the
    model packs them into rows. With 1, every image has the size model.image_size.
    """

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


class Phase(Section):
    """What changes at a step of progressive training; everything else stays as it is."""

    step: Annotated[Whole, Field(ge=0, le=10**9)]
    """The step that the phase starts at."""
    image_size: Size | None = None
    """Size of training images. default: the phase before, and at first model.image_size."""
    batch: Count | None = None
    """Images per step, in as many micro-steps as the recipe's own batch. default: the phase before, and at first the
    recipe's batch.
    """


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Annotated[float, Field(gt=0, lt=1e38)] = 1e-3
    """Peak learning rate, for `batch` images per step."""
    min_lr: Annotated[float, Field(ge=0, lt=1e38)] = 1e-5
    """Lowest learning rate of the schedule."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.05
    """Decoupled weight decay: a step shrinks the weights by the learning rate times this."""
    weight_decay_end: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """What weight_decay changes to over the run, along a cosine. default: it stays."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's average of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of AdamW's average of squared gradients."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """What AdamW adds to the root of the averaged squares, so that it does not divide by zero."""
    warmup: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps of linear warm-up."""
    warmup_from: Annotated[float, Field(ge=0, lt=1e38)] | None = None
    """Learning rate of the first step of the warm-up, whose last step has lr. default: lr / warmup."""
    schedule: Literal["cosine", "constant", "rise"] = "cosine"
    """Learning rate after the warm-up. cosine: from lr down to min_lr; constant: lr; rise: exponentially from min_lr up
    to lr (`lr-range`).
    """
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient over all parameters; null does not clip."""
    clip_by: Literal["norm", "parameter"] = "norm"
    """What clip limits. norm: the norm over all parameters; parameter: that of each parameter by itself, as DINO does.
    """
    decay: Literal["fixed", "published", "all"] = "fixed"
    """What weight decay shrinks. fixed: only matrices; published: A_log too, as in every published Vim run; all: every
    parameter, as in FastVim's masked pretraining.
    """
    gate_decay: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Weight decay of the factors of `model.backward_gate`. default: weight_decay."""
    backward_lr: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Factor on the learning rate for the backward paths' own parameters."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one below it: the head has lr, the last layer lr times this,
    and the patch embedding the least, as in MAE's fine-tuning.
    """
    layer_decay_group: Count = 1
    """Neighboring layers that `layer_decay` counts as one. FastVim uses 2: a Vim has twice the layers of a ViT."""
    head_lr: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Factor on the learning rate for the classifier's head."""
    freeze: tuple[str, ...] = ()
    """Parameters to leave as they are: names of parameters or modules, or patterns, such as patch_embed, blocks.0 or
    blocks.[0-7].*; encoder stands for everything but the head. They need no gradients and no optimizer states.
    """
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, approached as (1 + step) / (10 + step); null keeps no average."""


def _check_recompute(rule: str) -> str:
    if rule not in ("none", "scan", "block") and recompute_every(rule) is None and size_bytes(rule) is None:
        raise ValueError(f"{rule!r} is not none, scan, block, block/2 (every second layer) or a size such as 8GB")
    return rule


def recompute_every(rule: str) -> int | None:
    """Return the k of block/k; None for any other rule."""
    found = re.fullmatch(r"block/([1-9]\d{0,4})", rule, re.ASCII)
    return int(found[1]) if found else None


class Parallel(Section):
    """How the model and the batch are divided among ranks, and what is kept in memory."""

    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    persist: Annotated[Whole, Field(ge=0, le=10**12)] = 100_000
    """At stage 3, every rank keeps parameters with fewer elements than this unsharded."""
    context: Count = 1
    """Neighboring ranks that share each image, for long sequences: each holds a range of its tokens through all layers.
    Works for layers of kind fwd, bwd, bi, shared, pair and attn in order row or snake.
    """
    micro_batch: Count | None = None
    """Images that a rank computes at once; gradient accumulation follows from it. default: a rank's part of the batch,
    in one micro-step.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: bf16 matrix products (autocast); parameters, states and scans stay fp32."""
    graphs: Literal["auto", "off"] = "auto"
    """auto: on CUDA, replay the forward and backward pass of a micro-step as CUDA graphs; micro-steps of images of
    several sizes or of bags of tiles, and stage 3, run without.
    """
    recompute: Annotated[str, AfterValidator(_check_recompute)] = "none"
    """What the backward pass recomputes instead of keeping. none; scan: convolution, dt and scan of every layer; block:
    all but a layer's input; block/2: block in every second layer; a size such as 8GB: block or scan in as few layers as
    it takes for a rank to keep no more than that.
    """


class Checkpoint(Section):
    """When checkpoints are written, and which of them are kept."""

    every: Step = 1_000
    """Steps between checkpoints; the run also writes one at its end and on request."""
    keep: Count = 3
    """Number of newest checkpoints to keep."""
    keep_every: Step | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    mirror: Address | None = None
    """A folder or an address such as s3://bucket/runs. The run copies its newest checkpoint there in the background,
    and writes there directly if it cannot write its own folder. A relative folder starts from the working directory
    in which the recipe is read.
    """

    @field_validator("mirror")
    @classmethod
    def _absolute(cls, mirror: str | None) -> str | None:
        """Ranks, and later commands that read the run folder's recipe, may have another working directory."""
        return mirror if mirror is None or "://" in mirror else os.path.abspath(mirror)


class Guard(Section):
    """What the run does when losses or gradients jump or are not finite."""

    spike: Annotated[float, Field(gt=0)] | None = 10.0
    """Robust z-score (distance from the median in units of 1.4826 median absolute deviations) from which a loss or a
    gradient norm is a spike; with null, only values that are not finite are bad.
    """
    window: Annotated[Whole, Field(ge=10, le=100_000)] = 100
    """Number of steps that the median is taken over; the guard reports no spike before that many."""
    skips: Annotated[Whole, Field(ge=0, le=10**9)] = 3
    """Bad steps in a row whose updates are skipped. After one more, the run rolls back to its last checkpoint and skips
    the data of those steps.
    """
    rollbacks: Annotated[Whole, Field(ge=0, le=10**9)] = 3
    """Most rollbacks before the run ends."""
    lower_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for `lower_steps` steps after a rollback."""
    lower_steps: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps after a rollback with `lower_lr`."""


class Evaluate(Section):
    """When the run evaluates on data.val."""

    every: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """Steps between evaluations; with 0, only at the end."""
    asynchronous: Flag = False
    """Whether the launcher evaluates checkpoints while the run trains, instead of the ranks between two steps: on a GPU
    that the ranks leave free, else on CPUs. `every` must be a multiple of checkpoint.every.
    """
    knn: Address | None = None
    """A data set with labels, whose nearest images vote for the classes of those of data.val: the figure knn_top1, for
    any objective. data.val needs the same classes.
    """
    knn_k: Count = 20
    """Number of nearest images that vote."""


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Log(Section):
    """How often the run reports progress, and where to. metrics.jsonl in its folder always has all figures."""

    every: Step = 20
    """Steps between progress lines. The loss of every step is kept in any case."""
    to: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get the figures too: tensorboard, wandb, mlflow, trackio; [] for none. Addresses and keys come from
    their own environment variables, such as WANDB_API_KEY and MLFLOW_TRACKING_URI.
    """
    project: Annotated[str, Field(pattern=r"^[\w][\w.-]{0,99}$")] = "vimscale"
    """The project of W&B and Trackio and the experiment of MLflow that the run belongs to."""
    images: Flag = False
    """Whether trackers also get pictures: the first batch after augmentation, and the batches that the guard finds bad.
    """

    @field_validator("to")
    @classmethod
    def _once(cls, to: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(to)) < len(to):
            raise ValueError("a tracker is named twice; name each once")
        return to
