"""Find the one state dict of tensors in a published checkpoint's file, whatever wraps it."""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vimscale.errors import CheckpointError, brief
from vimscale.export.pickles import Archive, Damaged, Opaque, Refused, Stored
from vimscale.recipe.formats import PROGRAMS
from vimscale.storage import untrusted

_ANCHOR = "patch_embed.proj.weight"
"""Every published Vision Mamba has it; a longer name shows the prefix of a wrapper."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch.compile, FSDP and recomputation insert anywhere in names."""
_ATTENTION_MASK, _ARM = "mask", "ar_token"
"""A buffer of 0 and -inf in ARM's pretraining checkpoints, which is no weight; and a key that only they have."""
_COUNTERS = {"n_averaged", "num_updates", "updates", "decay"}
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa|teacher)($|[._])", re.IGNORECASE)
_OURS = re.compile(r"(model\.)?blocks\.\d+\.mixer\.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEEPEST, _SHOWN, _NAME, _LONGEST = 5, 4, 60, 200
_LARGEST_INDEX = 64 << 20


class Published(NamedTuple):
    state: dict[str, Tensor]
    args: argparse.Namespace | None
    """Arguments of the training run, if the file has them."""
    notes: list[str]
    """What was used and what was left out, for human readers."""


def read(path: Path, *, ema: bool = False) -> Published:
    """Read the model in a `.pth`, `.bin` or `.safetensors` file, or in the shards that an `.index.json` lists.

    The content decides the format, not the file's name. `ema`: use the moving average if there is one.

    Raises:
        CheckpointError: the file cannot be read, or holds something else; names what it holds.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, ema)
    _check_complete(path)
    tree, tensor, args = _open(path)
    return _unwrap(path, tree, tensor, args, ema)


def _open(path: Path) -> tuple[Any, Callable[[Any], Tensor], argparse.Namespace | None]:
    """(content of the file, function that reads a tensor of it, the training run's arguments)."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} cannot be read: it is {_not_a_file(path)}")
        with path.open("rb") as file:
            head = file.read(4096)
        size = path.stat().st_size
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:  # text never begins like this
            return load_file(path), lambda value: value, None
        if (found := _other_format(head)) is not None:
            raise CheckpointError(f"{path} {found}")
        if path.suffix in PROGRAMS:
            raise CheckpointError(
                f"{path} is {PROGRAMS[path.suffix]}, and its weights cannot be read back; use the run that it is of, or"
                " that run's export --to safetensors or hf"
            )
        archive = Archive(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:_LONGEST]}") from None
    except Refused as name:
        raise CheckpointError(
            f"{path} holds {name}, and a checkpoint may hold only tensors, plain values and argparse.Namespace:"
            " unpickling anything else could run code. If you trust the file, load it elsewhere and save only its"
            " state dict"
        ) from None
    except Damaged as error:
        short = head[:2] == b"PK" and "BadZipFile" in str(error)
        what = f"it is cut short or damaged, at {size:,} bytes: fetch it again" if short else error
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {what}") from None
    content = archive.content
    args = content.get("args", content.get("hyper_parameters")) if isinstance(content, dict) else None
    if isinstance(args, dict):
        args = argparse.Namespace(**{key: value for key, value in args.items() if isinstance(key, str)})
    return content, archive.tensor, args if isinstance(args, argparse.Namespace) else None


def _not_a_file(path: Path) -> str:
    if not path.is_dir():
        return "not a file but a pipe or a device"
    inside = sorted(p.name for p in path.iterdir() if re.search(r"\.(pth?|bin|ckpt|safetensors|index\.json)$", p.name))
    inside.sort(key=lambda name: not name.endswith(".index.json"))
    return "a folder" + (f"; give a file of it: {', '.join(inside[:_SHOWN])}"[:_LONGEST] if inside else "")


_MAGIC = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`",
    b"\x1f\x8b": "is a gzip archive; unpack it, and give the file in it",
    b"\xfd7zXZ": "is an xz archive; unpack it, and give the file in it",
    b"7z\xbc\xaf": "is a 7z archive; unpack it, and give the file in it",
    b"\x89HDF": "is an HDF5 file, not a checkpoint of torch",
    b"%PDF": "is a PDF",
}


def _other_format(head: bytes) -> str | None:
    """The format of a file that is not a checkpoint, by how it begins."""
    if not head:
        return "is empty: fetch it again"
    if (known := next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)) is not None:
        return known
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it, and give the file in it"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<" and re.match(rb"<(!doctype|html|\?xml|head|body|!--)", text, re.IGNORECASE):
        return "is a web page, not a checkpoint: the server sent a page instead of the file; fetch it again"
    try:
        words = head.decode("utf-8", "strict" if len(head) < 4096 else "ignore")
    except UnicodeDecodeError:
        return None
    if any(ord(letter) < 32 and letter not in "\t\r\n\f" for letter in words):
        return None
    if text[:1] in (b"{", b"["):
        return "is JSON, not a checkpoint; an index of shards is called ....index.json"
    if re.match(rb"(---|#[^\n]*\n|[\w.-]+:(\s|$))", text):
        return "is YAML, not a checkpoint"
    return "is text, not a checkpoint"


def _check_complete(path: Path) -> None:
    if found := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", path.name):
        raise CheckpointError(
            f"{path} is shard {int(found[2])} of {int(found[3])}; give the index of all of them,"
            f" {found[1]}{found[4]}.index.json"
        )


def _read_shards(path: Path, ema: bool) -> Published:
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise CheckpointError(f"{path} is too large for an index of shards: {path.stat().st_size:,} bytes")
        weight_map = untrusted.loads(path.read_bytes())["weight_map"]
        files = dict.fromkeys(weight_map.values())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map from names to files") from None
    try:
        for name in files:
            if untrusted.file_name(name).startswith("."):
                raise ValueError(f"{brief(name)} is hidden")
    except ValueError as error:
        raise CheckpointError(f"{path} names a shard that is not a file next to it: {error}") from None
    tree: dict[str, Tensor] = {}
    for name in files:
        content, tensor, _ = _open(path.with_name(name))
        if not isinstance(content, dict):
            raise CheckpointError(f"{path.with_name(name)} holds a {_type(content)}, not a dict of tensors")
        for key, value in content.items():
            if weight_map.get(key) == name and isinstance(value, Stored | Tensor):
                tree[key] = _read(path.with_name(name), key, value, tensor)
    if missing := [key for key in weight_map if key not in tree]:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are not in the shards it names: {_listed(missing)}; fetch the shards again"
        )
    published = _unwrap(path, tree, lambda value: value, None, ema)
    return published._replace(notes=[f"{len(files)} shards", *published.notes])


# ---- which of the models in a file


@dataclass(frozen=True)
class _Found:
    """A model in a checkpoint."""

    tree: dict[str, Any]
    path: tuple[str, ...]
    """Keys that lead to `tree`."""
    prefix: str
    """The prefix of its names there."""
    others: tuple[str, ...]
    """Longer prefixes there, of other models."""

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.prefix.rstrip("."))).strip(".")

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(self.name)) or "n_averaged" in self.tree


def _unwrap(
    path: Path, content: Any, tensor: Callable[[Any], Tensor], args: argparse.Namespace | None, ema: bool
) -> Published:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {_type(content)}, not a dict of tensors")
    chosen, notes = _choose(path, content, ema)
    values: dict[str, Any] = {}
    left = []
    for key, value in chosen.tree.items():
        if not isinstance(key, str) or not key.isprintable() or len(key) > _LONGEST:
            shown = ascii(key[:_NAME]) if isinstance(key, str) else f"a value of type {_type(key)}"
            raise CheckpointError(f"{path} names a tensor by {shown}; names are printable, and short")
        if not key.startswith(chosen.prefix) or key.startswith(chosen.others) or key in _COUNTERS:
            left.append(key)
            continue
        name = ".".join(part for part in key.removeprefix(chosen.prefix).split(".") if part not in _WRAPPERS)
        if name == _ATTENTION_MASK and f"{chosen.prefix}{_ARM}" in chosen.tree:
            continue
        if name in values:
            raise CheckpointError(f"{path} holds {name[:_NAME]} twice, once inside a wrapper")
        values[name] = value
    strange = {key: _type(value) for key, value in values.items() if not isinstance(value, Stored | Tensor)}
    if strange or not values:
        found = ", ".join(f"{key[:_NAME]} ({kind})" for key, kind in list(strange.items())[:_SHOWN]) or "nothing"
        raise CheckpointError(f"{path} holds {found}; a state dict of tensors is needed, by itself or under model")
    if chosen.name:
        notes.insert(0, f"the weights are those under {chosen.name[:_NAME]}")
    if left:
        notes.append(f"left out: {_listed(left)}")
    claimed = sum(value.bytes if isinstance(value, Stored) else value.nbytes for value in values.values())
    if not path.name.endswith(".json") and claimed > 4 * path.stat().st_size + (1 << 20):
        raise CheckpointError(f"{path} claims {claimed:,} bytes of tensors, in {path.stat().st_size:,} of file")
    return Published({key: _read(path, key, value, tensor) for key, value in values.items()}, args, notes)


def _choose(path: Path, content: dict[Any, Any], ema: bool) -> tuple[_Found, list[str]]:
    found = []
    for at, tree in _dicts(content):
        prefixes = [
            key.removesuffix(_ANCHOR)
            for key, value in tree.items()
            if isinstance(key, str) and isinstance(value, Stored | Tensor) and _anchored(key)
        ]
        for prefix in prefixes:
            longer = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
            found.append(_Found(tree, at, prefix, longer))
    if not found:  # not a published model: later checks say what it is instead
        if any(isinstance(key, str) and _OURS.match(key) for key in content):
            raise CheckpointError(
                f"{path} holds weights under vimscale's own names, and what model they are of is in the config.json"
                " that was written with them; give the folder of both"
            )
        names = ("model_ema", "model", "state_dict") if ema else ("model", "state_dict", "model_ema")
        inner = next((name for name in names if isinstance(content.get(name), dict)), None)
        return _Found(content if inner is None else content[inner], () if inner is None else (inner,), "", ()), []
    wanted = [one for one in found if one.averaged == ema]
    taken = wanted or found
    if len(taken) > 1:
        shown = ", ".join(one.name[:_NAME] or "the file itself" for one in taken[:_SHOWN])
        raise CheckpointError(f"{path} holds {len(taken)} models, under {shown}; save the one you mean by itself")
    (chosen,) = taken
    others = [one.name[:_NAME] for one in found if one is not chosen]
    notes = []
    if others:
        notes.append(f"{_listed(others)} is left out; {'without --ema' if ema else '--ema'} takes it instead")
    if not wanted:
        notes.append("there is no moving average in the file" if ema else "the file holds only a moving average")
    return chosen, notes


def _anchored(key: str) -> bool:
    return key == _ANCHOR or key.endswith(f".{_ANCHOR}")


def _dicts(content: dict[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yield every dict in nested dicts once, with the keys that lead to it."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), content)]
    while waiting:
        at, tree = waiting.pop(0)
        if id(tree) in seen or len(seen) > 1000:
            continue
        seen.add(id(tree))
        yield at, tree
        if len(at) < _DEEPEST:
            inside = [(key, value) for key, value in tree.items() if isinstance(key, str) and isinstance(value, dict)]
            waiting += [((*at, key), value) for key, value in inside]


def _read(path: Path, key: str, value: Any, tensor: Callable[[Any], Tensor]) -> Tensor:
    """Read a tensor, and check that it can be a weight."""
    name = key[:_NAME]
    if value.dtype not in _FLOATS:
        raise CheckpointError(f"{path}: {name} is {value.dtype}; weights are floating point numbers")
    try:
        read = tensor(value)
    except Damaged as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None
    if read.numel() and not all(map(math.isfinite, map(float, read.aminmax()))):  # NaN is both minimum and maximum
        bad = int((~read.isfinite()).sum())
        raise CheckpointError(
            f"{path}: {bad:,} of {read.numel():,} numbers of {name} are not finite: the run that saved it diverged"
        )
    return read


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(str(name)[:_NAME] for name in names[:_SHOWN]) + more


def _type(value: Any) -> str:
    if isinstance(value, Opaque):
        return str(value).removeprefix("builtins.").removeprefix("__builtin__.").removeprefix("torch._utils._rebuild_")
    kind = "tensor" if isinstance(value, Stored | Tensor) else type(value).__name__
    return kind.removeprefix("_").lower() if kind.startswith("_") else kind
