"""What to train: the typed recipe, and the loader that reports every fault of one at once."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from vimscale.errors import RecipeError
from vimscale.model import presets, schedule
from vimscale.model.presets import PRESETS, ClassToken, Fuse, Pool, VimConfig

Whole = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
"""An integer that may be written 1e6."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Sides = Annotated[tuple[Whole, Whole], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
"""Two whole numbers, written as a list."""


class Stage(_Section):
    """One resolution of a hierarchical model."""

    depth: Whole
    d_model: Whole
    directions: str | None = None
    downsample: Whole = 2
    """How much smaller each side of the token grid is than in the stage before."""


class Model(_Section):
    """A preset, and what is changed of it; keys mean what `vimscale.model.presets.VimConfig` says."""

    preset: str = "vim_small"
    weights: str | None = None
    """The folder of an exported or imported model to start from; its position embedding is resized, its head kept if
    there are as many classes.
    """
    image_size: Whole | Sides | None = None
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
    ssm_norm: bool | None = None
    layer_scale: float | None = None
    cls_token: ClassToken | None = None
    registers: Whole | None = None
    pool: Pool | None = None
    register_reduce: Whole | None = None
    pos_embed: bool | None = None
    drop_path: float | None = None
    init: Literal["fixed", "published"] | None = None
    backward_gate: bool | None = None
    """A learned factor a layer on the backward path."""
    backward_drop: float | None = None
    """Chance that a layer does without its backward path in a step."""
    backward_ramp: Sides | None = None
    """[first, last] step over which the backward path comes in."""

    @field_validator("stages", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Model":
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known{_suggest(self.preset, PRESETS)}")
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


class Data(_Section):
    """Two data sets of tar shards: folders with a manifest.json, or an embedded set (digits:train, digits:val)."""

    train: str
    val: str | None = None
    workers: Annotated[Whole, Field(ge=0)] = 0
    """Processes a rank that read and decode ahead; 0 reads between steps, in the rank itself."""


class Augment(_Section):
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least share of the image's area that a random crop keeps; 1 switches cropping off."""
    aspect_max: Annotated[float, Field(ge=1)] = 4 / 3
    """Crops are stretched by at most this factor, in either direction."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Chance of a horizontal flip."""


class Objective(_Section):
    kind: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Optim(_Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate, at `batch` images a step."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup: Annotated[Whole, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient over all parameters; null does not clip."""
    decay: Literal["fixed", "published"] = "fixed"
    """What weight decay shrinks: matrices alone, or A_log too, as in every published Vim run."""
    gate_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of `model.backward_gate`'s factors; absent: weight_decay."""
    backward_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the backward paths' own parameters, in units of everything else's."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, approached as (1 + step) / (10 + step); null keeps none."""


def _check_recompute(rule: str) -> str:
    if rule not in ("none", "scan", "block") and recompute_every(rule) is None and recompute_budget(rule) is None:
        raise ValueError(f"{rule!r} is not none, scan, block, block/2 (every second layer) or a size such as 8GB")
    return rule


def recompute_every(rule: str) -> int | None:
    """The k of block/k."""
    found = re.fullmatch(r"block/([1-9]\d*)", rule)
    return int(found[1]) if found else None


def recompute_budget(rule: str) -> int | None:
    """Bytes, of a size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB)", rule)
    return int(float(found[1]) * {"MB": 10**6, "GB": 10**9}[found[2]]) if found else None


class Parallel(_Section):
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    persist: Annotated[Whole, Field(ge=0)] = 100_000
    """At stage 3, parameters with fewer elements stay whole on every rank."""
    micro_batch: Annotated[Whole, Field(ge=1)] | None = None
    """Images a rank computes at once; accumulation follows from it. Absent: all of a rank's share."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: fp32 parameters, states and scans, bf16 matrix products (autocast)."""
    recompute: Annotated[str, AfterValidator(_check_recompute)] = "none"
    """What the backward pass computes again instead of keeping: none; scan (convolution, dt and scan of every layer);
    block (all but a layer's input); block/2 (every second layer); or a size a rank such as 8GB, for which as few layers
    as need be do so.
    """


class Checkpoint(_Section):
    every: Annotated[Whole, Field(ge=1)] = 1_000
    """Steps between checkpoints; one is also written at the end and on request."""
    keep: Annotated[Whole, Field(ge=1)] = 3
    """How many of the newest to keep."""


class Evaluate(_Section):
    every: Annotated[Whole, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates at the end only."""


class Log(_Section):
    every: Annotated[Whole, Field(ge=1)] = 20
    """Steps between lines of progress. The loss of every step is kept in any case."""


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: use letters, digits, '.', '_', '-', and a letter or digit first"
        )
    return name


class Recipe(_Section):
    """What to train. Names no machine."""

    name: Annotated[str, AfterValidator(_check_name)]
    """The run's folder under runs/."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    steps: Annotated[Whole, Field(ge=1)] | None = None
    """Length of the run in optimizer steps; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training set, rounded to whole steps."""
    batch: Annotated[Whole, Field(ge=1)] = 1024
    """Images a step over all ranks; gradient accumulation is derived from it."""
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    objective: Objective = Objective()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        faults = []
        if (self.steps is None) == (self.epochs is None):
            given = "both are given" if self.steps else "neither is given"
            faults.append(f"give the length as steps or as epochs; {given}")
        if self.steps is not None and self.optim.warmup >= self.steps:
            faults.append(f"optim.warmup {self.optim.warmup:,} must be below steps {self.steps:,}")
        if self.optim.min_lr > self.optim.lr:
            faults.append(f"optim.min_lr {self.optim.min_lr:g} is above optim.lr {self.optim.lr:g}")
        micro = self.parallel.micro_batch
        if micro is not None and self.batch % micro:
            near = max(self.batch // micro, 1) * micro
            faults.append(f"batch {self.batch} is not a multiple of parallel.micro_batch {micro}; use batch={near}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def length(self, samples: int) -> int:
        """Optimizer steps of the whole run on a training set of that many samples.

        Raises:
            RecipeError: the warm-up would outlast it.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = max(round(self.epochs * samples / self.batch), 1)
        if self.optim.warmup >= steps:
            fault = (
                f"optim.warmup {self.optim.warmup:,} must be below the {steps:,} steps that {self.epochs:g} epochs are"
            )
            raise RecipeError(f"recipe {self.name}", [fault])
        return steps

    def micro_batch(self, world: int) -> tuple[int, int]:
        """(images a rank computes at once, such micro-steps a step) on `world` ranks.

        Raises:
            RecipeError: the batch cannot be divided among them.
        """
        micro = self.parallel.micro_batch
        unit = world if micro is None else world * micro
        if self.batch % unit:
            near = max(round(self.batch / unit), 1) * unit
            sizes = f"{world} ranks" if micro is None else f"{world} ranks x parallel.micro_batch {micro}"
            way_out = (
                f"use batch={near}" + (", another micro_batch" if micro else "") + " or another number of --workers"
            )
            raise RecipeError(f"recipe {self.name}", [f"batch {self.batch} is not a multiple of {sizes}; {way_out}"])
        share = self.batch // world
        return (share, 1) if micro is None else (micro, share // micro)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe `source`, a YAML file or the name of a shipped one, with `a.b=c` overrides put on top.

    Raises:
        RecipeError: with every fault that was found.
    """
    path = find(str(source))
    faults: list[str] = []
    changes: dict = {}
    for text in overrides:
        _override(changes, text, faults)
    tree = _lay_over(_read(path, ()), changes)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [line for fault in error.errors() for line in _explain(fault)]
    if faults:
        raise RecipeError(f"recipe {path.stem}", faults)
    return recipe


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("vimscale") / "recipes"))
    if not folder.exists():  # a source tree: recipes/ stands beside the package
        folder = Path(__file__).resolve().parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(source: str) -> Path:
    if source in shipped():
        return shipped()[source]
    path = Path(source)
    if path.is_file():
        return path
    near = _suggest(source, shipped())
    raise RecipeError(f"recipe {source}", [f"there is no such file, and no shipped recipe of that name{near}"])


# ---- reading YAML


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read(path: Path, above: tuple[Path, ...]) -> dict:
    """The file's tree, laid over the tree of its `base`."""
    path = path.resolve()
    title = f"recipe {path.stem}"
    if path in above:
        chain = " -> ".join(p.stem for p in (*above, path))
        raise RecipeError(title, [f"base: the recipes build on each other in a circle: {chain}"])
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(title, [f"{path}, line {line}: {error.problem}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(title, [f"{path} cannot be read: {error}"]) from None
    if not isinstance(tree, dict):
        raise RecipeError(title, [f"{path} holds {type(tree).__name__}, not sections and keys"])
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / f"{str(base).removesuffix('.yaml')}.yaml"
    return _lay_over(_read(beside if beside.is_file() else find(str(base)), (*above, path)), tree)


def _lay_over(base: dict, top: dict) -> dict:
    """`top` over `base`, section by section. A length given as steps replaces one given as epochs, and vice versa."""
    merged = dict(base)
    if ("steps" in top) != ("epochs" in top):
        merged.pop("epochs" if "steps" in top else "steps", None)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _lay_over(merged[key], value) if both else value
    return merged


def _override(tree: dict, text: str, faults: list[str]) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        faults.append(f"{text!r} is no override; write section.key=value")
        return
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.setdefault(parent, {}), dict):
            faults.append(f"{key}: {parent} is a value, not a section")
            return
        node = node[parent]
    try:
        node[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        faults.append(f"{key}: {value!r} is not a YAML value; quote it")


# ---- explaining faults


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "string_type": "text (quote it if it looks like a number)",
    "bool_type": "true or false",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
}
_BOUNDS = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")}
_BOUNDS |= {"less_than_equal": ("le", "at most")}


def _explain(fault: Any) -> list[str]:
    """One pydantic error as lines that name key, value, rule and way out; a validator of ours may report several."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).removeprefix(".")
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "value_error":
        broken = re.split(r"\n(?! )", str(context["error"]))  # indented lines belong to the one above
        return [f"{key}: {rule}" if key else rule for rule in broken]
    if kind == "extra_forbidden":
        section = _section(fault["loc"][:-1])
        return [f"{key}: no such key{_suggest(str(fault['loc'][-1]), section.model_fields)}"]
    if kind == "missing":
        field: FieldInfo = _section(fault["loc"][:-1]).model_fields[fault["loc"][-1]]
        about = f": {field.description}" if field.description else ""
        return [f"{key}: missing, and it has no default{about}"]
    if kind == "literal_error":
        return [f"{key}: {value!r} is not one of {context['expected']}"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return [f"{key}: {value!r} must be {words} {context[name]}"]
    return [f"{key}: {value!r} is not {_WANTED.get(kind, fault['msg'])}"]


def _section(location: Iterable[str | int]) -> type[BaseModel]:
    """The section that a location in the recipe's tree lies in."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):  # which one of a list: all are alike
            continue
        annotation = section.model_fields[part].annotation
        while get_origin(annotation) in (Union, UnionType, tuple):  # `Stage` of `tuple[Stage, ...] | None`
            annotation = get_args(annotation)[0]
        assert isinstance(annotation, type)
        section = annotation
    return section
