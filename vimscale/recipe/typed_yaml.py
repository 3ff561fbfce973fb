"""YAML files with typed sections: `base` files, dotted overrides, and every fault of a file explained at once."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from vimscale.errors import FileFaults, brief, kind_of, shortened, suggest
from vimscale.storage import addresses

_WORDS = {"yes": True, "on": True, "no": False, "off": False}
Whole = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]
"""An integer; 1e6 is one, too."""
Flag = Annotated[bool, BeforeValidator(lambda v: _WORDS.get(v.lower(), v) if isinstance(v, str) else v)]
"""True or false. Only here yes, no, on and off mean them too; elsewhere these are text."""
UNION = ("\0one", "\0several")
"""Tags of a union's members. Pydantic puts them into the paths of faults; no key of a file has such characters."""
Either = Discriminator(lambda value: UNION[isinstance(value, tuple)])
"""Chooses between one value and a list of them."""
Sides = tuple[Whole, Whole]
"""Two whole numbers, written as a list."""
Size = Annotated[Annotated[Whole, Tag(UNION[0])] | Annotated[Sides, Tag(UNION[1])], Either]
"""One whole number, or two as a list."""
_EXPLAINED = 50
"""Most faults of one file that messages explain."""


def check_address(address: str) -> str:
    """Return a folder or an address that holds no secret: recipes are copied into files, jobs and messages.

    Raises:
        ValueError: the address holds a secret.
    """
    if (what := addresses.secret(address)) is not None:
        raise ValueError(
            f"the address holds {what}, which would end up in files; name an environment variable in its place, as in"
            " https://me:${PASSWORD}@host/train or https://host/train?${SIGNATURE}; for buckets set the store's own,"
            " such as AWS_ACCESS_KEY_ID (in a path, write @ as %40)"
        )
    return address


Address = Annotated[str, AfterValidator(check_address)]
"""A folder or an address, without secrets."""


class Section(BaseModel):
    """A frozen mapping of known keys; an unknown key is a fault."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _frozen(cls, values: Any) -> Any:
        """Turn YAML's lists into tuples, so that the section is immutable."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    @classmethod
    def section_for(cls, tree: Any) -> "type[Section]":
        """The class that validates `tree`, where its content decides which."""
        return cls


File = TypeVar("File", bound=Section)


def check_name(name: str) -> str:
    """Return a name that is safe as a folder, a job and part of a command: nothing in it is special to shells or paths.

    Raises:
        ValueError: the name is not safe.
    """
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
    """Folder of the files that come with the package: next to it in a source tree, inside it in a wheel."""
    either: tuple[str, ...] = ()
    """Keys that exclude each other: what is merged on top with one of them replaces the others."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys by their earlier names, both in dotted form; files and overrides may use either, but not both at once."""
    with_full_paths: Callable[[dict, Path], None] | None = None
    """Changes paths in a file's tree, which are relative to the file's folder, to full ones."""

    def load(self, source: str | Path, overrides: Iterable[str] = ()) -> File:
        """Load the file `source`, or the shipped file of that name, and apply `a.b=c` overrides.

        Raises:
            FileFaults: with every fault of the file and the overrides.
        """
        path = self.find(str(source))
        return self.changed(self._read(path, ()), overrides, self._title(path))

    def changed(self, tree: dict, overrides: Iterable[str], title: str) -> File:
        """Apply overrides to a file's tree; `title` names it in messages.

        Raises:
            FileFaults: with every fault of the tree and the overrides.
        """
        faults: list[str] = []
        changes: dict = {}
        for text in overrides:
            _override(changes, text, faults)
        faults += self._rename(changes)
        if self.with_full_paths is not None:
            self.with_full_paths(changes, Path.cwd())
        tree = self._merge(tree, changes)
        try:
            loaded = self.section.model_validate(tree)
        except ValidationError as error:
            faults += _explain_all(self.section, tree, error)
        if faults:
            raise self.error(title, faults)
        return loaded

    def parse(self, text: str, where: str) -> File:
        """Parse the text of a resolved file, as `dump` writes it; `where` names it in messages.

        Raises:
            FileFaults: with every fault of the text.
        """
        title = f"{self.name} {where}"
        try:
            tree = parse_mapping(text)
        except _Unreadable as error:
            raise self.error(title, [str(error)]) from None
        if faults := self._rename(tree):
            raise self.error(title, faults)
        try:
            return self.section.model_validate(tree)
        except ValidationError as error:
            raise self.error(title, _explain_all(self.section, tree, error)) from None

    def shipped(self) -> dict[str, Path]:
        """List the files that come with the package, by name."""
        folder = Path(str(resources.files("vimscale") / self.folder))
        if not folder.exists():
            folder = Path(__file__).resolve().parents[2] / self.folder
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

    def find(self, source: str) -> Path:
        """Return the path of a shipped file's name or of a file.

        Raises:
            FileFaults: there is neither.
        """
        if source in self.shipped():
            return self.shipped()[source]
        if os.path.isfile(source):
            return Path(source)
        near = suggest(source, self.shipped())
        fault = f"there is no such file, and no {self.name} of that name comes with vimscale{near}"
        raise self.error(f"{self.name} {source}", [fault])

    def _title(self, path: Path) -> str:
        """Name a shipped file by its name and any other by its path: many files are called recipe.yaml."""
        return f"{self.name} {path.stem if path.resolve() in self.shipped().values() else path}"

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict:
        """Return the file's tree, merged over the tree of its `base`; `above`: the files that this one is a base of."""
        title = self._title(path)
        path = path.resolve()
        if path in above:
            chain = " -> ".join(p.stem for p in (*above, path))
            raise self.error(title, [f"base: the {self.name}s build on each other in a circle: {chain}"])
        try:
            with path.open("rb") as file:
                tree = parse_mapping(file.read(_MOST_BYTES + 1).decode())
        except _Unreadable as error:
            raise self.error(title, [f"{path}{error.where}: {error}" if error.where else f"{path} {error}"]) from None
        except UnicodeDecodeError:
            raise self.error(title, [f"{path} is not text in UTF-8"]) from None
        except OSError as error:
            raise self.error(title, [f"{path} cannot be read: {error.strerror}"]) from None
        if faults := self._rename(tree):
            raise self.error(title, faults)
        if self.with_full_paths is not None:
            self.with_full_paths(tree, path.parent)
        base = tree.pop("base", None)
        if base is None:
            return tree
        if not isinstance(base, str):
            raise self.error(title, [f"base: {brief(base)} is neither a {self.name}'s name nor a file"])
        neighbor = path.parent / f"{base.removesuffix('.yaml')}.yaml"
        base_path = neighbor if os.path.isfile(neighbor) else self.find(base)
        return self._merge(self._read(base_path, (*above, path)), tree)

    def _rename(self, tree: dict) -> list[str]:
        """Give `renamed` keys of a tree their names of today; returns a fault for each that is there under both."""
        faults = []
        for old, new in self.renamed.items():
            *parents, old_leaf = old.split(".")
            section: Any = tree
            for parent in parents:
                section = section.get(parent) if isinstance(section, dict) else None
            if not isinstance(section, dict) or old_leaf not in section:
                continue
            new_leaf = new.rpartition(".")[2]
            if new_leaf in section:
                faults.append(f"{old}: this is the earlier name of {new}, which is given too; remove {old}")
            section.setdefault(new_leaf, section.pop(old_leaf))
        return faults

    def _merge(self, base: dict, top: dict) -> dict:
        """Merge `top` over `base`, section by section."""
        given = [key for key in self.either if key in top]
        return _merge({key: value for key, value in base.items() if not given or key not in self.either}, top)


def _merge(base: dict, top: dict) -> dict:
    """Merge `top` over `base`. A section of another `kind` has other options: it replaces the one below."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(value, dict) and isinstance(below, dict) and value.get("kind") in (None, below.get("kind"))
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# ---- reading YAML

_MOST_BYTES = 256 << 10
_MOST_VALUES = 10_000
"""Values in one file; an alias counts as all the values that it stands for."""
_MOST_LEVELS = 20
_DIGITS = r"\d+(?:_\d+)*"
_FORMS = {
    "int": (rf"(?=.{{1,30}}\Z)[-+]?{_DIGITS}\Z", "-+0123456789"),
    "float": (
        rf"(?:[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?|(?=[eE]))|\.{_DIGITS})(?:[eE][-+]?\d+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        "-+.0123456789",
    ),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    "null": (r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
}
"""Pattern of each unquoted value that is not text, and its possible first characters. All digits are decimal (010 is
ten, 1e-3 is a number); 0x10, 0o10, 1:30, 2024-11-30, yes and off are text.
"""


class _Unreadable(ValueError):
    """The text is not YAML, or it is YAML that we do not accept."""

    def __init__(self, why: str, mark: yaml.Mark | None = None):
        super().__init__(why)
        self.where = f", line {mark.line + 1}" if mark is not None else ""


class _Loader(yaml.SafeLoader):
    """Loads YAML without surprises: numbers, true, false, null, text, lists and mappings with distinct keys."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # PyYAML shares them among its classes too
    yaml_constructors: ClassVar[dict] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self._levels = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Number of values in each complete node."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        self._levels += 1
        before, self._values = self._values, self._values + 1
        if self._levels > _MOST_LEVELS:
            raise _Unreadable(f"values are nested more than {_MOST_LEVELS} levels deep", mark)
        node = super().compose_node(parent, index)
        assert node is not None
        if is_alias and node not in self._sizes:
            raise _Unreadable("an alias (*) stands inside the value that it names", mark)
        self._values += self._sizes[node] if is_alias else 0
        if self._values > _MOST_VALUES:
            raise _Unreadable(f"there are more than {_MOST_VALUES:,} values, each alias counted in full", mark)
        self._sizes.setdefault(node, self._values - before)
        self._levels -= 1
        return node


def _checked(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Return a node's text after checking that it fits its tag, also an explicit one (!!int x)."""
    form = _FORMS.get(node.tag.rpartition(":")[2])
    if form is not None and re.match(form[0], node.value, re.ASCII) is None:
        raise _Unreadable(f"{brief(node.value)} is not {node.tag.rpartition(':')[2]}, as its tag says", node.start_mark)
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", node.value):
        raise _Unreadable(f"{brief(node.value)} holds a control character", node.start_mark)
    return node.value


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a dict whose keys are all text, `on` and `1` too."""
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Unreadable("a key is a list or a mapping, not a word", key_node.start_mark)
        key = _checked(loader, key_node)
        if key in found:
            raise _Unreadable(f"key {brief(key)} is given twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _list(loader: _Loader, node: yaml.SequenceNode) -> list:
    return [loader.construct_object(each, deep=True) for each in node.value]


def _refused(loader: _Loader, node: yaml.Node) -> Any:
    raise _Unreadable(
        f"the tag {shortened(node.tag.replace('tag:yaml.org,2002:', '!!'), 80)} is not supported", node.start_mark
    )


_TAG = "tag:yaml.org,2002:"
for _name, (_form, _first) in _FORMS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_form, re.ASCII), list(_first))
_CONSTRUCTORS: dict[str, Callable[[_Loader, Any], Any]] = {
    "str": _checked,
    "int": lambda loader, node: int(_checked(loader, node)),
    "float": lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", _checked(loader, node).lower())),
    "bool": lambda loader, node: _checked(loader, node).lower() == "true",
    "null": lambda loader, node: (_checked(loader, node), None)[1],
    "map": _mapping,
    "seq": _list,
}
for _name, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(_TAG + _name, _construct)
_Loader.add_constructor(None, _refused)  # any other


def _parse(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        _Unreadable: the text is not YAML, or longer than any recipe.
    """
    if len(text) > _MOST_BYTES:
        raise _Unreadable(f"is longer than {_MOST_BYTES >> 10} KiB")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        continues = (error.problem or "").startswith("but ")  # the context is the first half of the sentence
        raise _Unreadable(
            f"{error.context}, {error.problem}" if continues else str(error.problem), error.problem_mark
        ) from None
    except yaml.reader.ReaderError as error:
        raise _Unreadable(f"holds the character {error.character:#04x}, which YAML does not allow") from None


def parse_mapping(text: str) -> dict[str, Any]:
    """As `_parse`, of a text that is a mapping."""
    tree = _parse(text)
    if not isinstance(tree, dict):
        raise _Unreadable("is empty" if tree is None else f"holds {kind_of(tree)}, not sections and keys")
    return tree


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1, YAML 1.2 or our loader would take for something else."""


for _name, (_form, _first) in {**_FORMS, "int": (r"[-+]?(?:\d[\d_]*|0o[0-7]+)\Z", "-+0123456789")}.items():
    Dumper.add_implicit_resolver(_TAG + _name, re.compile(_form, re.ASCII), list(_first))


def dump(tree: dict[str, Any]) -> str:
    """Write plain values as YAML that reads back as the same values."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def _override(tree: dict, text: str, faults: list[str]) -> None:
    """Put the override `text`, such as optim.lr=1e-3, into the tree, or add a fault."""
    key, equals, value = text.partition("=")
    if not equals or not key or not key.isprintable():
        faults.append(f"{brief(text)} is not an override; write section.key=value")
        return
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.setdefault(parent, {}), dict):
            faults.append(f"{key}: {parent} is a value, not a section")
            return
        node = node[parent]
    try:
        node[leaf] = _parse(value)
    except _Unreadable as error:
        faults.append(f"{key}: {brief(value)} is not a YAML value ({error}); quote it")


# ---- explaining faults


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "tuple_type": "a list",
}
_BOUNDS = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")}
_BOUNDS |= {"less_than_equal": ("le", "at most")}


def _explain_all(root: type[Section], tree: dict, error: ValidationError) -> list[str]:
    faults = error.errors(include_url=False)
    lines = [line for fault in faults[:_EXPLAINED] for line in _explain(root, tree, fault)]
    return lines + [f"and {len(faults) - _EXPLAINED:,} more"] * (len(faults) > _EXPLAINED)


def _explain(root: type[Section], tree: dict, fault: Any) -> list[str]:
    """Explain one pydantic error in lines that name key, value, rule and fix; our own validators may report several."""
    path = [part for part in fault["loc"] if part not in (*UNION, "[key]")]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "value_error":
        rules = re.split(r"\n(?! )", str(context["error"]))  # an indented line belongs to the line above
        return [f"{key}: {rule}" if key else rule for rule in rules]
    if kind == "extra_forbidden":
        section = _section(root, tree, path[:-1])
        return [f"{key}: no such key{suggest(str(path[-1]), section.model_fields)}"]
    if kind == "missing" and isinstance(path[-1], int):
        return [f"{key}: missing; {key.rpartition('[')[0]} takes a list of {path[-1] + 1} values"]
    if kind == "missing":
        field: FieldInfo = _section(root, tree, path[:-1]).model_fields[path[-1]]
        about = f": {field.description}" if field.description else ""
        return [f"{key}: missing, and it has no default{about}"]
    if kind == "too_long":
        return [f"{key}: takes {context['max_length']} values, not {context['actual_length']:,}"]
    if kind == "literal_error":
        return [f"{key}: {brief(value)} is not one of {context['expected']}"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return [f"{key}: {brief(value)} must be {words} {f'{bound:g}' if isinstance(bound, float) else f'{bound:,}'}"]
    hint = ""
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        hint = """; quote a number that is meant as text: '"10"' on the command line"""
    elif kind in ("int_type", "float_type") and isinstance(value, str) and re.match(r"[-+]?0[xob]\w", value):
        hint = "; write it in decimal"
    return [f"{key}: {brief(value)} is not {_WANTED.get(kind, fault['msg'])}{hint}"]


def _section(root: type[Section], tree: Any, path: Iterable[str | int]) -> type[Section]:
    """Return the section at `path` in the file's tree."""
    section: type[Section] = root
    for part in path:
        tree = tree[part]
        if isinstance(part, int):  # an index into a list, whose items are all of one section
            continue
        if part not in section.model_fields:  # a key of a mapping, whose values are all of one section
            section = section.section_for(tree)
            continue
        annotation = _innermost(section.model_fields[part].annotation)
        assert annotation is not None
        section = annotation.section_for(tree)
    return section


def _innermost(annotation: Any) -> type[Section] | None:
    """Find the section in an annotation: `Stage` in `tuple[Stage, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _innermost(part)) is not None), None)
