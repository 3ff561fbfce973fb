"""The `model` section of a recipe. Its keys come from the fields of `vimscale.model.presets.VimConfig`: one source for
names, types, defaults and documentation.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from functools import reduce
from operator import or_
from textwrap import dedent
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model, model_validator

from vimscale.errors import suggest
from vimscale.model import presets, schedule
from vimscale.model.presets import PRESETS, VimConfig
from vimscale.recipe import pretrained
from vimscale.recipe.sections import LayerOptions
from vimscale.recipe.typed_yaml import Address, Flag, Section, Sides, Size, Whole

S = TypeVar("S", bound=Section)
Change = Literal["cls_token", "registers", "pool", "pos_embed", "directions", "fuse", "window", "d_head", "norm_eps"]
"""What `change` allows: none of these changes the shapes of the weights that are kept."""


def _keys_of(config: type, *, preset: bool = False, leave_out: tuple[str, ...] = ()) -> Callable[[type[S]], type[S]]:
    """Class decorator: adds a key for each field of the dataclass `config`, with its type, default and docstring. With
    `preset` every key is optional: None keeps the preset's value.
    """

    def add(section: type[S]) -> type[S]:
        hints, docs = get_type_hints(config), _field_docs(config)
        keys: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            if not field.init or field.name in leave_out:
                continue
            kind = _yaml_type(hints[field.name])
            default = None if preset else ... if field.default is dataclasses.MISSING else field.default
            about = Field(default, description=docs.get(field.name))
            keys[field.name] = (kind | None if preset else kind, about)
        module, text = section.__module__, section.__doc__
        return create_model(section.__name__, __base__=section, __module__=module, __doc__=text, **keys)

    return add


def _field_docs(config: type) -> dict[str, str]:
    """Read the docstrings under a dataclass's fields; empty where its source is not installed."""
    try:
        (definition,) = ast.parse(dedent(inspect.getsource(config))).body
    except OSError:
        return {}
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return docs


def _yaml_type(hint: Any) -> Any:
    """Convert a field's type to the one that reads it from YAML: 1e6 for 1000000, yes for true, lists for tuples."""
    if hint == int | tuple[int, int]:
        return Size
    if hint == tuple[int, int]:
        return Sides
    if hint is presets.Stage:
        return Stage
    if hint in (int, bool):
        return Whole if hint is int else Flag
    parts = tuple(part if part in (NoneType, Ellipsis) else _yaml_type(part) for part in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, parts)
    return GenericAlias(tuple, parts) if get_origin(hint) is tuple else hint


@_keys_of(presets.Stage)
class Stage(Section):
    """One resolution of a hierarchical model."""


@_keys_of(VimConfig, preset=True, leave_out=("num_classes", "kinds"))
class Model(Section):
    """A preset, or the architecture of `weights`, and what to change in it. Keys that are left out keep its values."""

    preset: str = "vim_small"
    """Name of the model to start from; `vimscale presets` lists them."""
    weights: Address | None = None
    """Folder of an exported or imported model, or of a run, to start from. Without a preset, the model is that of the
    weights, with the changes that this section makes. It must compute the same.
    The position embedding is resized; the head follows the names of the classes or starts again.
    """
    change: tuple[Change, ...] = ()
    """Keys of this section that may differ from the weights although that changes what the weights compute: [pool].
    default: the model must compute the same.
    """
    grow: Literal["copy"] | None = None
    """Let the model have more than its weights. copy: layers with one scan become layers with several (fwd to bi or
    cross), each a copy of the first; class token and registers may be added, and fixed positions become learned ones.
    `expand: copy` means the same, with the preset's inner width. default: the model must compute the same.
    """

    kinds: dict[str, Annotated[SerializeAsAny[LayerOptions], BeforeValidator(LayerOptions.read)]] | None = None
    """Kinds of layers that classes in files of yours define, by the name that `directions` uses:
    {gate: {kind: mine.py:GatedConv, taps: 3}}.
    """

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("expand") == "copy":
            values = {key: value for key, value in values.items() if key != "expand"} | {"grow": "copy"}
        if values.get("preset", ...) is None:
            values = {key: value for key, value in values.items() if key != "preset"}
        if isinstance(values.get("weights"), str) and "preset" not in values:
            values = pretrained.with_architecture(values)
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "Model":
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known{suggest(self.preset, PRESETS)}")
        changes = self._changes()
        plain = [key for key in ("depth", "d_model", "directions") if key in changes]
        if changes.get("stages") and plain:
            raise ValueError(f"stages have a depth, d_model and directions each: leave out {', '.join(plain)}")
        side, given = changes.get("tiles"), changes.get("image_size")
        if side is not None and given not in (None, side, (side, side)):
            raise ValueError(f"image_size {given}: the model reads tiles of {side} pixels; leave image_size out")
        if self.grow is not None and self.weights is None:
            raise ValueError("grow: there are no weights to grow from; set model.weights, or leave it out")
        if self.change and self.weights is None:
            raise ValueError("change: there are no weights to differ from; set model.weights, or leave it out")
        self.shape(classes=1)
        return self

    def _changes(self) -> dict[str, Any]:
        """Return the fields of VimConfig that the recipe sets."""
        values = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(VimConfig)}
        return {name: value for name, value in values.items() if value is not None}

    def shape(self, classes: int) -> VimConfig:
        """Return the model's shape, for this many classes."""
        changes = self._changes()
        if "stages" in changes:
            changes["stages"] = tuple(presets.Stage(**stage.model_dump()) for stage in changes["stages"])
        own = self.kinds or {}
        if own:
            changes["kinds"] = tuple(
                presets.OwnKind(name=name, kind=options.kind, options=options.model_dump_json(exclude={"kind"}))
                for name, options in sorted(own.items())
            )
        if "tiles" in changes:
            changes = {"image_size": changes["tiles"], "pos_embed": "coordinates"} | changes
        preset = PRESETS[self.preset]
        if "depth" in changes and "directions" not in changes:
            changes["directions"] = f"{_only_kind(preset)}*{changes['depth']}"
        if "directions" in changes and "depth" not in changes:
            changes["depth"] = len(schedule.parse(changes["directions"], own=own))
        return dataclasses.replace(preset, num_classes=classes, **changes)


def _only_kind(preset: VimConfig) -> str:
    (kind,) = set(map(str, preset.layers))  # each preset has layers of one kind
    return kind
