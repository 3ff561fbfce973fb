"""Read files of torch.save without unpickling: this module interprets the opcodes and calls nothing that they name.

A pickle is a program that builds objects by calling whatever it names. Here, a name becomes a `Name`, and a call a
lookup in a table of what checkpoints consist of. A tensor becomes a `Stored`, which says where its numbers are in the
file. torch's own `weights_only` reader calls more than that, hashes keys of any depth, and trusts a storage's size.
"""

import argparse
import io
import math
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_MOST_STEPS = 3_000_000
"""Most opcodes of a pickle; that of Vim-B with moving average and optimizer has a tenth of this."""
_SMALL = 1 << 16
"""A tensor of up to this many elements may have more than its storage does (if it is expanded)."""


class Refused(Exception):
    """The pickle names something that is not in the table."""

    def __init__(self, name: str):
        super().__init__(name[:100])


class Damaged(Exception):
    """The file is not one that torch.save writes."""


class Name(str):
    """The full name of a class or function in a pickle."""


class Opaque(str):
    """A value that nobody needs, by the name of its type."""


@dataclass(frozen=True)
class Stored:
    """A tensor in the file."""

    key: str
    """The key of its storage."""
    dtype: torch.dtype
    numel: int
    """The size of its storage, in elements of dtype."""
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    """None: untyped bytes."""
    key: str
    numel: int


@dataclass
class _Dtype:
    """A dtype of numpy."""

    code: str
    order: str = "<"


@dataclass(frozen=True)
class _Latin:
    """Bytes as protocol 2 writes them: text in Latin-1."""

    text: str


class Archive:
    """An open file of torch.save."""

    def __init__(self, path: Path):
        """Raises:
        Refused: it holds something other than tensors, plain values and argparse.Namespace.
        Damaged: it cannot be read.
        OSError: likewise.
        """
        self._records: dict[str, tuple[int, int]] = {}
        """(offset, bytes) in the file of each storage."""
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            self.content: Any = self._zip(path) if self._bytes[:2] == b"PK" else self._legacy()
        except (Refused, Damaged):
            raise
        except Exception as error:  # any error on foreign bytes means that they are damaged
            raise Damaged(f"{type(error).__name__}: {str(error)[:100]}") from None

    def tensor(self, stored: Stored) -> Tensor:
        """Read a tensor as a view of the file's bytes.

        Raises:
            Damaged: they are not all there.
        """
        offset, size = self._records.get(stored.key, (0, -1))
        itemsize = stored.dtype.itemsize
        if size < 0 or stored.numel * itemsize > size:
            raise Damaged(f"storage {stored.key[:40]} of {stored.numel:,} elements has {max(size, 0):,} bytes")
        if 0 in stored.size:
            return torch.empty(stored.size, dtype=stored.dtype)
        last = stored.offset + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
        claimed = math.prod(stored.size)
        if last >= stored.numel or claimed > max(stored.numel, _SMALL):
            raise Damaged(f"a tensor of {claimed:,} elements lies in a storage of {stored.numel:,}")
        buffer: Any = self._bytes
        if offset % itemsize:
            buffer, offset = bytearray(self._bytes[offset : offset + size]), 0
        flat = torch.frombuffer(buffer, dtype=stored.dtype, count=stored.numel, offset=offset)
        return flat.as_strided(stored.size, stored.stride, stored.offset)

    def _zip(self, path: Path) -> Any:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
        main = next((name for name in infos if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if main is None:
            raise Damaged("a zip file without a data.pkl in it")
        root = main.removesuffix("data.pkl")
        if f"{root}constants.pkl" in infos:
            raise Damaged("a TorchScript program, not a checkpoint; load it elsewhere and save its state_dict()")
        for name, info in infos.items():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Damaged("a zip file that torch did not write: what is in it is compressed")
            if name.startswith(f"{root}data/"):
                self._records[name.removeprefix(f"{root}data/")] = self._locate(info)
        order = infos.get(f"{root}byteorder")
        if order is not None and self._read(order) != b"little":
            raise Damaged("written on a machine of the other byte order")
        return _Machine(io.BytesIO(self._read(infos[main]))).run()

    def _locate(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        """(offset, bytes) of a member, computed here because torch may write members without zip checksums."""
        head = self._bytes[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + sum(int.from_bytes(head[i : i + 2], "little") for i in (26, 28))
        if len(head) < 30 or start + info.file_size > len(self._bytes):
            raise Damaged(f"{info.filename[:60]} reaches beyond the file's end")
        return start, info.file_size

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        start, size = self._locate(info)
        return self._bytes[start : start + size]

    def _legacy(self) -> Any:
        """Read the format before torch 1.6: a magic number, the version, type sizes of the machine, the object, the
        storages' keys, then for each storage the number of elements and the elements.
        """
        file: Any = self._bytes
        file.seek(0)
        if _Machine(file).run() != 0x1950A86A20F9469CFC6C:
            raise Damaged("a pickle that torch.save did not write")
        _Machine(file).run()
        machine: dict[str, Any] = _Machine(file).run()
        if not machine.get("little_endian", True):
            raise Damaged("written on a machine of the other byte order")
        body = _Machine(file)
        content = body.run()
        for key in _Machine(file).run():
            numel = int.from_bytes(file.read(8), "little")
            size = numel * body.storages[key].itemsize
            if file.tell() + size > len(self._bytes):
                raise Damaged(f"storage {key[:40]} reaches beyond the file's end")
            self._records[key] = file.tell(), size
            file.seek(size, 1)
        return content


class _Machine:
    """Interprets one pickle."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, torch.dtype] = {}

    def run(self) -> Any:
        steps: Iterator[tuple[Any, Any, Any]] = pickletools.genops(self._file)
        for count, (opcode, argument, _) in enumerate(steps):
            if count > _MOST_STEPS:
                raise Damaged(f"a pickle of more than {_MOST_STEPS:,} steps")
            name = opcode.name
            if name in _PUSHED:
                self._stack.append(argument)
            elif name in _MADE:
                self._stack.append(_MADE[name]())
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                parts = argument.split(" ", 1) if name == "GLOBAL" else self._pop(2)
                if not all(isinstance(part, str) for part in parts):
                    raise Damaged("it names something by a value that is not text")
                self._stack.append(_name(".".join(parts)))
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self._stack.append(self._memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self._memo[argument] = self._stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif name == "MARK":
                self._marks.append(self._stack)
                self._stack = []
            elif name == "STOP":
                return self._stack.pop()
            elif name not in ("PROTO", "FRAME"):
                self._step(name)
        raise Damaged("it ends in the middle")

    def _pop(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise Damaged("a step takes what no step made")
        taken = tuple(self._stack[-count:])
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _step(self, name: str) -> None:
        stack = self._stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self._pop(int(name[-1])))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            self._stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else list(self._pop(1))
            if isinstance(self._stack[-1], list):
                self._stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else list(self._pop(2))
            if isinstance(self._stack[-1], dict):
                self._stack[-1].update(_pairs(items))
        elif name == "ADDITEMS":
            self._since_mark()
        elif name == "FROZENSET":
            self._since_mark()
            self._stack.append(Opaque("frozenset"))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            _set_state(stack[-1], state)
        elif name == "BINPERSID":
            (identity,) = self._pop(1)
            stack.append(self._storage(identity))
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise Damaged(f"its pickle has a step {name}, which torch.save does not write")

    def _storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", Name() as kind, str() as key, str(), int() as numel, *rest) if numel >= 0:
                if any(part is not None for part in rest):
                    raise Damaged("it has views of storages")
                storage = _Storage(_STORAGES[kind], key, numel)
                self.storages[key] = storage.dtype or torch.uint8
                return storage
        raise Damaged("it refers to something that is not a storage")


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Opaque("set"),
}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dict of alternating keys and values. A key that is not a plain value becomes an object that equals no other:
    hashing a tuple of tuples may take forever.
    """
    if len(items) % 2:
        raise Damaged("a key without a value")
    keys = [key if _plain(key) else object() for key in items[::2]]
    return dict(zip(keys, items[1::2], strict=True))


def _plain(key: Any) -> bool:
    return type(key) in (str, float, bool, bytes, type(None)) or (type(key) is int and abs(key) < 2**63)


# ---- what a pickle may name


_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES: dict[str, torch.dtype | None] = {
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in (
            ("Double", torch.float64),
            ("Float", torch.float32),
            ("Half", torch.float16),
            ("BFloat16", torch.bfloat16),
            ("Long", torch.int64),
            ("Int", torch.int32),
            ("Short", torch.int16),
            ("Char", torch.int8),
            ("Byte", torch.uint8),
            ("Bool", torch.bool),
            ("ComplexFloat", torch.complex64),
            ("ComplexDouble", torch.complex128),
            ("QInt8", torch.qint8),
            ("QUInt8", torch.quint8),
            ("QInt32", torch.qint32),
        )
    },
    **dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), None),
}


def _name(name: str) -> Name:
    if name not in _CALLS and name not in _STORAGES and name not in _DTYPES:
        raise Refused(name)
    return Name(name)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple) or function not in _CALLS:
        raise Damaged("it calls what cannot be called")
    if len(arguments) > 20:
        raise Damaged(f"it calls {function} with {len(arguments)} arguments")
    return _CALLS[function](*arguments)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> Any:
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or not len(size) == len(stride) <= 16:
        raise Damaged("a tensor of no possible size")
    if dtype is None or any(type(n) is not int or not 0 <= n < 2**62 for n in (offset, *size, *stride)):
        raise Damaged("a tensor of no possible size")
    numel = storage.numel if storage.dtype is not None else storage.numel // dtype.itemsize
    return Stored(storage.key, dtype, numel, offset, tuple(size), tuple(stride))


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    return _tensor(storage, offset, size, stride, dtype=_DTYPES[str.__str__(dtype)])


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a subclass."""
    return _call(function, arguments)


def _number(dtype: Any, content: Any = b"") -> Any:
    """A numpy scalar."""
    import numpy as np

    content = content.text.encode("latin1") if isinstance(content, _Latin) and len(content.text) < 64 else content
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes) or dtype.code[:1] not in tuple("biufc"):
        return Opaque("numpy.generic")
    return np.frombuffer(content, np.dtype(dtype.order + dtype.code))[0].item()


def _opaque(name: str) -> Callable[..., Any]:
    return lambda *arguments: Opaque(name)


def _dict(*arguments: Any) -> dict[Any, Any]:
    given = arguments[0] if arguments and isinstance(arguments[0], list) else []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in given):
        raise Damaged("a dict of something other than pairs")
    return _pairs([part for pair in given for part in pair])


_PATHS = [
    f"{m}.{c}Path"
    for m in ("pathlib", "pathlib._local")
    for c in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")
]
_NUMPY = [f"{package}.multiarray" for package in ("numpy.core", "numpy._core")]
_BUILTINS = ("list", "dict", "set", "frozenset", "int", "float", "bool", "complex", "bytearray", "slice", "range")
_OPAQUE = (
    *(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in _BUILTINS),
    *("collections.Counter", "datetime.datetime", "datetime.timedelta", "torch.device", "torch.Tensor"),
    *("numpy.ndarray", *(f"{module}._reconstruct" for module in _NUMPY)),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    *(f"torch._utils._rebuild_{kind}" for kind in ("sparse_tensor", "qtensor", "nested_tensor", "wrapper_subclass")),
    *(f"torch._utils._rebuild_device_tensor_from_{where}" for where in ("numpy", "cpu_tensor")),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch.serialization._get_layout"),
    *("torch.per_tensor_affine", "torch.per_channel_affine"),
)
_CALLS: dict[str, Callable[..., Any]] = {
    **{name: _opaque(name) for name in _OPAQUE},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.nn.parameter.Parameter": lambda data, *rest: data,
    "torch.Size": lambda sizes=(): sizes,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *arguments: {},
    "argparse.Namespace": lambda *arguments: argparse.Namespace(),
    "_codecs.encode": lambda text, *rest: _Latin(text),
    "numpy.dtype": lambda code, *rest: _Dtype(str.__str__(code)),
    **{f"{module}.scalar": _number for module in _NUMPY},
    **{name: lambda *parts: PurePosixPath(*parts) for name in _PATHS},
}
"""What replaces a call of each name; a pickle may name nothing else."""


def _set_state(target: Any, state: Any) -> None:
    """Set the values of a Namespace and the byte order of a numpy dtype; the state of anything else does not matter."""
    if isinstance(target, argparse.Namespace) and isinstance(state, dict):
        target.__dict__ = state  # not a copy: copies of one dict that is set many times add up
    elif isinstance(target, _Dtype) and isinstance(state, tuple) and len(state) > 1:
        target.order = state[1] if state[1] in ("<", ">", "|", "=") else "<"
