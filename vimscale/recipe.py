"""What to train: the typed recipe, and the loader that reports every fault of one at once."""

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from vimscale.errors import RecipeError, suggest
from vimscale.sections import (
    UNION,
    Augment,
    Checkpoint,
    Data,
    Evaluate,
    Guard,
    Log,
    Model,
    Objective,
    Optim,
    Parallel,
    Phase,
    Section,
    Whole,
)


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: use letters, digits, '.', '_', '-', and a letter or digit first"
        )
    return name


class Recipe(Section):
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
    phases: tuple[Phase, ...] = ()
    """Other image sizes and batches from given steps on: progressive training."""
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    objective: Objective = Objective()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()

    @field_validator("phases", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

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
        starts = [phase.step for phase in self.phases]
        if starts != sorted(set(starts)):
            faults.append(f"phases: their steps must rise; they are {', '.join(map(str, starts))}")
        unit = self.augment.repeats * self.data.lanes
        for batch in sorted({self.batch, *(phase.batch for phase in self.phases if phase.batch is not None)}):
            if batch % unit:
                what = f"augment.repeats {self.augment.repeats} x data.lanes {self.data.lanes}"
                near = max(round(batch / unit), 1) * unit
                faults.append(f"batch {batch} is not a multiple of {what}; use {near} or change those")
        faults += self._phase_faults()
        if self.augment.buckets > 1 and (self.augment.mixes or self.phases):
            faults.append("augment.buckets: images of several shapes can be neither mixed nor resized by phases")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _phase_faults(self) -> Iterator[str]:
        config = self.model.shape(classes=1)
        for phase in self.phases:
            if phase.image_size is not None:
                try:
                    dataclasses.replace(config, image_size=phase.image_size)
                except ValueError as error:
                    yield f"phase at step {phase.step}: {error}"

    def length(self, samples: int) -> int:
        """Optimizer steps of the whole run on a training set of that many samples.

        Raises:
            RecipeError: the warm-up would outlast it.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = max(round(self._step_after(self.epochs * samples)), 1)
        if self.optim.warmup >= steps:
            fault = (
                f"optim.warmup {self.optim.warmup:,} must be below the {steps:,} steps that {self.epochs:g} epochs are"
            )
            raise RecipeError(f"recipe {self.name}", [fault])
        return steps

    def batch_at(self, step: int) -> int:
        """Images of step `step`, counted from 0."""
        return next((p.batch for p in reversed(self.phases) if p.step <= step and p.batch is not None), self.batch)

    def consumed(self, step: int) -> int:
        """Images of the steps before `step`."""
        return sum(batch * (min(step, end) - start) for start, end, batch in self._stretches() if start < step)

    def size_at(self, step: int, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the training images of step `step`; `size`: the model's own."""
        chosen = next((p.image_size for p in reversed(self.phases) if p.step <= step and p.image_size), size)
        return (chosen, chosen) if isinstance(chosen, int) else chosen

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """(first step, step after the last, images a step), until for ever."""
        starts = sorted({0, *(phase.step for phase in self.phases)})
        for start, end in zip(starts, [*starts[1:], sys.maxsize], strict=True):
            yield start, end, self.batch_at(start)

    def _step_after(self, images: float) -> float:
        """The step, and the part of it, by which that many images are consumed."""
        for start, end, batch in self._stretches():
            if images <= batch * (end - start):
                return start + images / batch
            images -= batch * (end - start)
        raise AssertionError("the last stretch has no end")

    def micro_batch(self, world: int, step: int | None = None) -> tuple[int, int]:
        """(images a rank computes at once, such micro-steps a step) on `world` ranks; in step `step`, or by `batch`.

        Raises:
            RecipeError: the batch, or that of a phase, cannot be divided among them.
        """
        micro = self.parallel.micro_batch
        unit = world if micro is None else world * micro
        sizes = f"{world} ranks" if micro is None else f"{world} ranks x parallel.micro_batch {micro}"
        accumulation = 1 if micro is None else max(self.batch // unit, 1)
        faults = []
        if self.batch % unit:
            near = max(round(self.batch / unit), 1) * unit
            way_out = (
                f"use batch={near}" + (", another micro_batch" if micro else "") + " or another number of --workers"
            )
            faults.append(f"batch {self.batch} is not a multiple of {sizes}; {way_out}")
        cuts = world * accumulation
        for phase in self.phases:
            if phase.batch is not None and phase.batch % cuts:
                near = max(round(phase.batch / cuts), 1) * cuts
                what = f"phase at step {phase.step}: batch {phase.batch}"
                faults.append(f"{what} is not a multiple of {world} ranks x {accumulation} micro-steps; use {near}")
        if not faults and self.augment.mixes:
            odd = [batch for _, _, batch in self._stretches() if batch // cuts % 2]
            faults += [
                f"mixup and cutmix mix pairs, and micro-batches of {batch // cuts} images are odd; change the batch,"
                " parallel.micro_batch or the number of --workers"
                for batch in odd
            ]
        if faults:
            raise RecipeError(f"recipe {self.name}", faults)
        return (self.batch if step is None else self.batch_at(step)) // cuts, accumulation

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
    near = suggest(source, shipped())
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


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "string_type": "text (quote it if it looks like a number)",
    "bool_type": "true or false",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "tuple_type": "a list",
}
_BOUNDS = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")}
_BOUNDS |= {"less_than_equal": ("le", "at most")}


def _explain(fault: Any) -> list[str]:
    """One pydantic error as lines that name key, value, rule and way out; a validator of ours may report several."""
    place = [part for part in fault["loc"] if part not in UNION]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "value_error":
        broken = re.split(r"\n(?! )", str(context["error"]))  # indented lines belong to the one above
        return [f"{key}: {rule}" if key else rule for rule in broken]
    if kind == "extra_forbidden":
        section = _section(place[:-1])
        return [f"{key}: no such key{suggest(str(place[-1]), section.model_fields)}"]
    if kind == "missing":
        field: FieldInfo = _section(place[:-1]).model_fields[place[-1]]
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
        annotation = _innermost(annotation)
        assert annotation is not None
        section = annotation
    return section


def _innermost(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation: `Stage` of `tuple[Stage, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _innermost(part)) is not None), None)
