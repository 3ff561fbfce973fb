"""YAML files whose sections are typed: `base` files, dotted overrides, and every fault of one explained at once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from vimscale.errors import FileFaults, suggest

Whole = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
"""An integer that may be written 1e6."""
UNION = ("one", "several")
"""Tags of a union's members, which pydantic puts into the places of faults."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _frozen(cls, values: Any) -> Any:
        """YAML has lists; what is frozen has tuples."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


File = TypeVar("File", bound=Section)


def check_name(name: str) -> str:
    """Names become folders, jobs and parts of commands: nothing that a shell or a path gives a meaning to."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: use letters, digits, '.', '_', '-', and a letter or digit first"
        )
    return name


@dataclass(frozen=True)
class Kind(Generic[File]):
    """One kind of file that a user writes."""

    name: str
    """For messages."""
    section: type[File]
    error: type[FileFaults]
    folder: str
    """Beside the package in a source tree and inside it in a wheel: where those that come with it are."""
    either: tuple[str, ...] = ()
    """Keys that exclude each other: one laid over another replaces it."""

    def load(self, source: str | Path, overrides: Iterable[str] = ()) -> File:
        """The file `source`, or the shipped one of that name, with `a.b=c` overrides put on top.

        Raises:
            FileFaults: with every fault that was found.
        """
        path = self.find(str(source))
        faults: list[str] = []
        changes: dict = {}
        for text in overrides:
            _override(changes, text, faults)
        tree = self._lay_over(self._read(path, ()), changes)
        try:
            loaded = self.section.model_validate(tree)
        except ValidationError as error:
            faults += [line for fault in error.errors() for line in _explain(self.section, fault)]
        if faults:
            raise self.error(f"{self.name} {path.stem}", faults)
        return loaded

    def shipped(self) -> dict[str, Path]:
        """Those that come with the package, by name."""
        folder = Path(str(resources.files("vimscale") / self.folder))
        if not folder.exists():
            folder = Path(__file__).resolve().parent.parent / self.folder
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

    def find(self, source: str) -> Path:
        if source in self.shipped():
            return self.shipped()[source]
        path = Path(source)
        if path.is_file():
            return path
        near = suggest(source, self.shipped())
        fault = f"there is no such file, and no shipped {self.name} of that name{near}"
        raise self.error(f"{self.name} {source}", [fault])

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict:
        """The file's tree, laid over the tree of its `base`."""
        path = path.resolve()
        title = f"{self.name} {path.stem}"
        if path in above:
            chain = " -> ".join(p.stem for p in (*above, path))
            raise self.error(title, [f"base: the {self.name}s build on each other in a circle: {chain}"])
        try:
            tree = yaml.load(path.read_text(), _Loader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise self.error(title, [f"{path}, line {line}: {error.problem}"]) from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise self.error(title, [f"{path} cannot be read: {error}"]) from None
        if not isinstance(tree, dict):
            raise self.error(title, [f"{path} holds {type(tree).__name__}, not sections and keys"])
        base = tree.pop("base", None)
        if base is None:
            return tree
        beside = path.parent / f"{str(base).removesuffix('.yaml')}.yaml"
        return self._lay_over(self._read(beside if beside.is_file() else self.find(str(base)), (*above, path)), tree)

    def _lay_over(self, base: dict, top: dict) -> dict:
        """`top` over `base`, section by section."""
        given = [key for key in self.either if key in top]
        merged = {key: value for key, value in base.items() if not given or key not in self.either}
        return _lay_over(merged, top)


def _lay_over(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _lay_over(merged[key], value) if both else value
    return merged


# ---- reading YAML


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number and 1:4 as text, and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
for _digit in "0123456789":  # YAML 1.1 has 1:4 for minutes and seconds, 64
    _words = ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$"))
    _Loader.yaml_implicit_resolvers[_digit] = [_words, *_Loader.yaml_implicit_resolvers[_digit]]


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


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


def _explain(whole: type[Section], fault: Any) -> list[str]:
    """One pydantic error as lines that name key, value, rule and way out; a validator of ours may report several."""
    place = [part for part in fault["loc"] if part not in UNION]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "value_error":
        broken = re.split(r"\n(?! )", str(context["error"]))  # indented lines belong to the one above
        return [f"{key}: {rule}" if key else rule for rule in broken]
    if kind == "extra_forbidden":
        section = _section(whole, place[:-1])
        return [f"{key}: no such key{suggest(str(place[-1]), section.model_fields)}"]
    if kind == "missing":
        field: FieldInfo = _section(whole, place[:-1]).model_fields[place[-1]]
        about = f": {field.description}" if field.description else ""
        return [f"{key}: missing, and it has no default{about}"]
    if kind == "literal_error":
        return [f"{key}: {value!r} is not one of {context['expected']}"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return [f"{key}: {value!r} must be {words} {context[name]}"]
    return [f"{key}: {value!r} is not {_WANTED.get(kind, fault['msg'])}"]


def _section(whole: type[Section], location: Iterable[str | int]) -> type[BaseModel]:
    """The section that a location in the file's tree lies in."""
    section: type[BaseModel] = whole
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
