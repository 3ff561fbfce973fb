"""Seeded noise for the readers of other people's files: each gives a model or one short message, and no code runs.

`pytest -m slow tests/export/test_importer_fuzz.py` continues for a minute, with other seeds.
"""

import copy
import io
import json
import os
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vimscale.checkpoint.load import consolidated
from vimscale.data.shards.manifest import MANIFEST, Manifest
from vimscale.errors import UserError
from vimscale.export import published, safetensors, starting, unwrap
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import build
from vimscale.model.published.weights import from_published, to_published
from vimscale.runtime import manifest

ARGUMENTS = complete(
    {"img_size": 8, "patch_size": 4, "stride": 4, "depth": 1, "embed_dim": 16, "d_state": 2, "num_classes": 3}
)
CASES = 40
"""Cases of each kind in `make test`."""
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "\0", "\ud800", "none", "é" * 3, "x" * 100_000, "bi*" + "9" * 5000, "(" * 3000, "../../etc/passwd"),
    *([], [[]], [1, 2], [1, 2, 3], [None] * 3, ["a", "b", "c"], {}, {"a": 1}, {"": None}, [[[[[[1]]]]]]),
]


class _Trap:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os._exit, (99,)


def _once(attempt: Callable[[], object]) -> bool:
    """Whether it worked; anything but one short message fails the test."""
    message = None
    try:
        attempt()
    except UserError as error:
        message = str(error)
    assert message is None or 0 < len(message) < 2048, message
    return message is None


def _state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return to_published(build(ARGUMENTS))


def _imported(path: Path) -> None:
    """As `vimscale import` does."""
    found = unwrap.read(path)
    arguments, _ = published.arguments_for(found.state, found.args, None, path)
    from_published(arguments, found.state)


# ---- damaged bytes of valid files


def _damaged(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at, kind = chance.randrange(len(data)), chance.randrange(6)
        at = min(at, 4000) if chance.random() < 0.7 else at  # where the structure is
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + 4] = chance.randbytes(4)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<q", chance.choice([0, -1, 2**31, 2**62, 10**12]))
        elif kind == 3:
            del data[at : at + chance.randrange(1, 100)]
        elif kind == 4:
            data[at:at] = data[: chance.randrange(200)]
        else:
            del data[at + 1 :]
    return bytes(data)


def _bytes(chance: random.Random, folder: Path) -> None:
    path, file = folder / chance.choice(["a.pth", "a.safetensors", "a"]), io.BytesIO()
    kind = chance.randrange(4)
    if kind == 0:
        save_file(_state(), folder / "right")
        file.write((folder / "right").read_bytes())
    else:
        content = {"model": _state(), "args": None, "epoch": 3}
        torch.save(content, file, pickle_protocol=chance.choice([2, 4]), _use_new_zipfile_serialization=kind > 1)
    path.write_bytes(_damaged(file.getvalue(), chance))
    _once(lambda: _imported(path))


# ---- contents that torch.save writes


def _value(chance: random.Random) -> Any:
    make: list[Callable[[], Any]] = [
        lambda: chance.choice(ODD),
        lambda: torch.full((3, 4), float("nan")),
        lambda: torch.zeros(1).expand(2, 3, 4),
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.ones(3, dtype=chance.choice([torch.int64, torch.bool, torch.complex64, torch.float16])),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, 10**15, device="meta"),
        lambda: torch.zeros([1] * chance.randrange(0, 20)),
        lambda: torch.nn.Parameter(torch.ones(2)),
        lambda: torch.zeros(0, 5),
        lambda: chance.choice(
            [b"x", bytearray(5), {1, 2}, frozenset({1}), 3 + 4j, range(3), slice(1), torch.Size([1])]
        ),
        lambda: _Trap(),
        lambda: {"model": _value(chance), "state_dict": {"patch_embed.proj.weight": torch.ones(1)}},
    ]
    return chance.choice(make)()


def _contents(chance: random.Random, folder: Path) -> None:
    state: dict[Any, Any] = dict(_state())
    keys = list(state)
    for _ in range(chance.choice([0, 1, 1, 3])):
        where = chance.randrange(4)
        if where == 0:
            state[chance.choice(keys)] = _value(chance)
        elif where == 1:
            odd = chance.choice(
                [None, 3, 2.5, b"k", "a\0b", "k" * 10_000, ("a", 1), frozenset(), "layers.", "", "layers.9.x"]
            )
            state[odd] = torch.ones(2)
        elif where == 2:
            state.pop(chance.choice(keys), None)
        else:
            key = chance.choice(keys)
            if isinstance(state.get(key), Tensor):
                state[key] = state[key].reshape(-1)[None] if chance.random() < 0.5 else state[key].flatten()[0]
    content: Any = chance.choice([state, {"model": state, "args": _value(chance)}, {"ema": {"module": state}}, [state]])
    torch.save(content, folder / "a.pth")
    _once(lambda: _imported(folder / "a.pth"))


# ---- pickles of random steps


def _steps(chance: random.Random, folder: Path) -> None:
    names = [b"torch FloatStorage", b"torch._utils _rebuild_tensor_v2", b"collections OrderedDict", b"os system"]
    names += [b"builtins eval", b"argparse Namespace", b"_codecs encode", b"numpy dtype", b"torch float32"]
    names += [b"numpy.core.multiarray scalar", b"torch._tensor _rebuild_from_type_v2", b"builtins bytearray"]
    steps: list[Callable[[], bytes]] = [
        lambda: b"c" + chance.choice(names).replace(b" ", b"\n") + b"\n",
        lambda: chance.choice(
            [b"(", b")", b"t", b"}", b"]", b"l", b"d", b"u", b"s", b"a", b"e", b"\x85", b"\x86", b"\x87"]
        ),
        lambda: chance.choice(
            [b"R", b"b", b"\x81", b"Q", b"0", b"1", b"2", b"N", b"\x88", b"\x8f", b"\x90", b"\x91", b"o"]
        ),
        lambda: b"J" + struct.pack("<i", chance.choice([0, 1, -1, 2**31 - 1])),
        lambda: b"X" + struct.pack("<I", 7) + chance.choice([b"storage", b"a.b.c.d", b"cpu\0cpu"]),
        lambda: b"\x8a\x09" + (10**20).to_bytes(9, "little"),
        lambda: b"r" + struct.pack("<I", chance.choice([0, 1, 2**32 - 1])) if chance.random() < 0.5 else b"q\x00",
        lambda: b"h\x00",
        lambda: b"X" + struct.pack("<I", 2**32 - 1),
        lambda: b"I" + b"9" * chance.choice([3, 5000]) + b"\n",
        lambda: b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQ",
    ]
    program = b"\x80\x02" + b"".join(chance.choice(steps)() for _ in range(chance.randrange(1, 40))) + b"."
    with zipfile.ZipFile(folder / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", bytes(64))
        archive.writestr("a/version", b"3\n")
    _once(lambda: _imported(folder / "a.pth"))


# ---- JSON


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD))


def _mutated(tree: Any, chance: random.Random) -> Any:
    """JSON with one to three of its values changed, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randrange(1, 4)):
        node = tree
        while True:
            inside = [
                value
                for value in (node.values() if isinstance(node, dict) else node)
                if value and isinstance(value, dict | list)
            ]
            if not inside or chance.random() < 0.5:
                break
            node = chance.choice(inside)
        at: Any = chance.choice(list(node)) if isinstance(node, dict) and node else chance.randrange(len(node) or 1)
        if isinstance(node, dict):
            node.pop(at, None) if chance.random() < 0.2 else node.update({at: _odd(chance)})
            if chance.random() < 0.1:
                node[chance.choice(["", "x" * 5000, "\0", "layers", "device"])] = _odd(chance)
        elif node:
            node[at] = _odd(chance)
    return _odd(chance) if chance.random() < 0.03 else tree


def _text(tree: Any, chance: random.Random) -> bytes:
    text = json.dumps(tree).encode()
    odd = [b"", b"[" * 50_000, b"9" * 10_000, b"\xff\xfe", b'{"a": 1e999, "a": -1e999}', b"NaN", text[: len(text) // 2]]
    return chance.choice(odd) if chance.random() < 0.1 else text


def _arguments(chance: random.Random, folder: Path) -> None:
    (folder / "a.json").write_bytes(_text(_mutated(ARGUMENTS, chance), chance))
    state = _state()
    _once(lambda: from_published(published.arguments_for(state, None, str(folder / "a.json"))[0], state))


MANIFEST_OF_DATA = Manifest(name="a", classes=("x", "y", "z"), shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
OURS = VimConfig(num_classes=3, image_size=8, patch_size=4, d_model=16, depth=1, d_state=2, directions="bi*1")


def _exports(chance: random.Random, folder: Path) -> None:
    model = VisionMamba(OURS) if chance.random() < 0.7 else build(complete(ARGUMENTS | {"if_bidirectional": True}))
    safetensors.write(folder, model, MANIFEST_OF_DATA, {})
    path = folder / "config.json"
    path.write_bytes(_text(_mutated(json.loads(path.read_text()), chance), chance))
    if chance.random() < 0.3:
        path = folder / "model.safetensors"
        path.write_bytes(_damaged(path.read_bytes(), chance))
    _once(lambda: safetensors.load(folder))
    _once(lambda: starting.compare(starting.read(folder), OURS, MANIFEST_OF_DATA))


def _indexes(chance: random.Random, folder: Path) -> None:
    state = _state()
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    save_file(halves[0], folder / "0.safetensors")
    torch.save(halves[1], folder / "1.bin")
    weight_map = {key: name for half, name in zip(halves, ("0.safetensors", "1.bin"), strict=True) for key in half}
    path = folder / "a.index.json"
    path.write_bytes(_text(_mutated({"metadata": {}, "weight_map": weight_map}, chance), chance))
    _once(lambda: _imported(path))


def _checkpoints(chance: random.Random, folder: Path) -> None:
    shapes = {"head.weight": [3, 16]}
    fields = {"step": 3, "stream": {"data": "x"}, "updates": 3, "shapes": shapes, "world": 1, "zero": 0, "ema": False}
    save_file({"weight/head.weight@0": torch.ones(48)}, folder / "state-00000-of-00001.safetensors")
    path = folder / "state-00000-of-00001.safetensors"
    if chance.random() < 0.5:
        odd = chance.choice(["weight@0", "x", "weight/head.weight@-1", "weight/head.weight@x", "weight/head.weight@5"])
        save_file({odd: torch.ones(chance.choice([(48,), (3, 16), (0,), ()]))}, path)
    (folder / "trainer.json").write_bytes(_text(_mutated(fields, chance), chance))
    manifest.write(folder, [manifest.seal(path)])
    _once(lambda: consolidated(folder, "weight"))


def _manifests(chance: random.Random, folder: Path) -> None:
    (folder / "a").write_bytes(b"x")
    entries = _mutated([manifest.seal(folder / "a")], chance)
    (folder / manifest.NAME).write_bytes(manifest.text(entries))  # sealed nevertheless
    _once(lambda: list(manifest.faults(folder)))
    (folder / manifest.NAME).write_bytes(_text(_mutated(json.loads(manifest.text([])), chance), chance))
    _once(lambda: list(manifest.faults(folder)))


def _data(chance: random.Random, folder: Path) -> None:
    tree = json.loads(MANIFEST_OF_DATA.to_json())
    tree |= {"samples": 8, "shards": [{"name": "0.tar", "samples": 8, "bytes": 10240, "sha256": "0" * 64}]}
    (folder / MANIFEST).write_bytes(_text(_mutated(tree, chance), chance))
    _once(lambda: Manifest.from_json((folder / MANIFEST).read_bytes(), "a"))


KINDS = [_bytes, _contents, _steps, _arguments, _exports, _indexes, _checkpoints, _manifests, _data]


@pytest.mark.parametrize("kind", KINDS)
def test_any_file_gives_a_model_or_one_short_message(kind: Callable, tmp_path: Path) -> None:
    for seed in range(CASES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kind(random.Random(seed), folder)


@pytest.mark.slow
def test_any_file_gives_a_model_or_one_short_message_for_a_minute(tmp_path: Path) -> None:
    until, seed = time.monotonic() + 60, 1_000_000
    while time.monotonic() < until:
        for kind in KINDS:
            folder = tmp_path / f"{kind.__name__}{seed % 100}"
            folder.mkdir(exist_ok=True)
            kind(random.Random(seed), folder)
        seed += 1
