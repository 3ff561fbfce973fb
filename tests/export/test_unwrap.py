"""Published weights are found in any wrapper; a message names the format of a file that is not a checkpoint."""

import argparse
import json
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vimscale.errors import CheckpointError
from vimscale.export import unwrap
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import build
from vimscale.model.published.weights import to_published

VIM = complete(
    {"img_size": 8, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 16, "d_state": 2, "num_classes": 3}
)


def _state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return to_published(build(VIM))


STATE, OTHER = _state(), _state(1)


def _under(prefix: str, state: dict[str, Tensor] = STATE, **more: Any) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()} | more


def _compiled_blocks() -> dict[str, Tensor]:
    return {re.sub(r"^layers\.(\d+)\.", r"layers.\1._orig_mod.", key): value for key, value in STATE.items()}


def _averaged_by_torch() -> dict[str, Any]:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = torch.nn.Module()
            self.patch_embed.proj = torch.nn.Conv2d(3, 16, 4)

    return dict(torch.optim.swa_utils.AveragedModel(Holder()).state_dict())


COUNT = torch.tensor(7)
WRAPPED: dict[str, Any] = {
    "bare": STATE,
    "an OrderedDict with metadata": OrderedDict(STATE),
    "model": {"model": STATE, "epoch": 3, "optimizer": {"state": {0: {"step": COUNT, "exp_avg": torch.ones(3)}}}},
    "state_dict": {"state_dict": STATE},
    "module": {"module": STATE, "ds_version": "0.19"},
    "nested": {"checkpoint": {"state_dict": {"model": STATE}}},
    "module.": _under("module."),
    "_orig_mod.": _under("_orig_mod."),
    "encoder.": {"model": _under("encoder.", **{"decoder.weight": torch.ones(2)})},
    "backbone.": {"state_dict": _under("backbone.")},
    "three prefixes": {"model": _under("module._orig_mod.encoder.")},
    "compiled layers": _compiled_blocks(),
    "FSDP": {key.replace("mixer.", "_fsdp_wrapped_module.mixer."): value for key, value in STATE.items()},
    "lightning": {"state_dict": _under("model.net."), "hyper_parameters": {"lr": np.float32(0.5)}, "loops": {}},
    "next to an average": {"model": STATE, "model_ema": OTHER},
    "next to an average with a counter": {"model": STATE, "model_ema": _under("module.", OTHER, n_averaged=COUNT)},
    "next to an average in a dict": {"model": STATE, "ema": {"module": OTHER, "decay": 0.99, "updates": 7}},
    "an average with a prefix": {"state_dict": {**STATE, **_under("model_ema.", OTHER)}},
    "student and teacher": {"student": _under("backbone."), "teacher": _under("backbone.", OTHER)},
    "only an average": {"model_ema": _under("module.", n_averaged=COUNT)},
    "half precision": {"model": {key: value.half() for key, value in STATE.items()}},
    "parameters": {"model": {key: torch.nn.Parameter(value) for key, value in STATE.items()}},
    "the same twice": {"model": STATE, "state_dict": STATE},
    "numpy scalars": {"model": STATE, "best": np.float64(81.5), "ok": np.bool_(True), "rng": np.random.get_state()},
    "a namespace": {"model": STATE, "args": argparse.Namespace(lr=np.float32(0.5), out=Path("x"), dims=(1, [2]))},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", WRAPPED)
def test_weights_are_unwrapped(case: str, legacy: bool, tmp_path: Path) -> None:
    torch.save(WRAPPED[case], tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = unwrap.read(tmp_path / "a.pth")
    expected = WRAPPED[case]["model"] if case == "half precision" else STATE
    assert found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[key], value) for key, value in expected.items())
    if "average" in case or "teacher" in case:
        averaged = unwrap.read(tmp_path / "a.pth", ema=True)
        assert all(torch.equal(averaged.state[key], (STATE if "only" in case else OTHER)[key]) for key in STATE)
        said = "the file holds only a moving average" if "only" in case else "--ema takes it instead"
        assert any(said in note for note in found.notes), found.notes


def test_notes_say_what_was_used_and_what_was_left_out(tmp_path: Path) -> None:
    torch.save(WRAPPED["encoder."], tmp_path / "a.pth")
    assert unwrap.read(tmp_path / "a.pth").notes == [
        "the weights are those under model.encoder",
        "left out: decoder.weight",
    ]
    torch.save({"model": STATE}, tmp_path / "a.pth")
    assert unwrap.read(tmp_path / "a.pth", ema=True).notes[-1] == "there is no moving average in the file"


def test_torchs_own_averages_are_recognised_by_their_counter(tmp_path: Path) -> None:
    torch.save({"model": _averaged_by_torch()}, tmp_path / "a.pth")
    found = unwrap.read(tmp_path / "a.pth", ema=True)
    assert found.state.keys() == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert "there is no moving average in the file" not in found.notes


def test_a_file_with_two_models_is_refused(tmp_path: Path) -> None:
    torch.save({"first": STATE, "second": OTHER}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds 2 models, under first, second; save the one you mean by itself"):
        unwrap.read(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_are_read_bit_by_bit(protocol: int, tmp_path: Path) -> None:
    content = {"model": STATE, "args": argparse.Namespace(lr=np.float64(0.1), out=tmp_path), "rng": np.arange(3)}
    torch.save(content, tmp_path / "a.pth", pickle_protocol=protocol)
    found = unwrap.read(tmp_path / "a.pth")
    assert found.args == content["args"]
    assert all(torch.equal(found.state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_views_of_one_storage_are_read_as_torch_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(600).to(dtype).view(20, 30)
    state = STATE | {"a": base.T, "b": base[3:, ::2], "c": base[:, 0], "d": base.flatten()[1:1], "e": base[0, 0]}
    torch.save(state, tmp_path / "a.pth")
    found, theirs = unwrap.read(tmp_path / "a.pth").state, torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(torch.equal(found[key], theirs[key]) and found[key].dtype == theirs[key].dtype for key in state)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(kind: str, tmp_path: Path) -> None:
    items = list(_under("backbone.").items())
    names = [f"model-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for name, half in zip(names, (dict(items[::2]), dict(items[1::2])), strict=True):
        (save_file if kind == "safetensors" else torch.save)(half, tmp_path / name)
    weight_map = {key: names[i % 2] for i, (key, _) in enumerate(items)}
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    found = unwrap.read(index)
    assert found.notes[0] == "2 shards"
    assert all(torch.equal(found.state[key], STATE[key]) for key in STATE)
    with pytest.raises(CheckpointError, match=rf"is shard 2 of 2; give the index of all of them, .*{index.name}"):
        unwrap.read(tmp_path / names[1])
    with pytest.raises(CheckpointError, match=rf"it is a folder; give a file of it: {index.name}, model-00001"):
        unwrap.read(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"head.more": names[0]}}))
    with pytest.raises(CheckpointError, match=r"1 tensors are not in the shards it names: head\.more"):
        unwrap.read(index)
    for outside in ("../x.bin", "/etc/passwd", "a/b", "", None, 3, ".hidden"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CheckpointError, match="a shard that is not a file next to it"):
            unwrap.read(index)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NOT_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "a git-lfs pointer": (LFS, "is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`"),
    "a page": (b"\n<!DOCTYPE html>\n<html><head>", "is a web page"),
    "an error of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page"),
    "JSON": (b'{"error": "Invalid username or password."}', "is JSON"),
    "YAML": (b"name: small\nsteps: 50\n", "is YAML"),
    "YAML with a comment": ("# Größe\nname: small\n".encode(), "is YAML"),
    "text": (b"Not Found", "is text"),
    "nothing": (b"", "is empty: fetch it again"),
    "gzip": (b"\x1f\x8b\x08\0", "is a gzip archive; unpack it"),
    "tar": (b"a.pth".ljust(257, b"\0") + b"ustar" + bytes(300), "is a tar archive; unpack it"),
    "numbers": (bytes(range(128, 256)) * 10, "is not a checkpoint that can be read"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_a_message_names_the_format_of_a_file_that_is_not_a_checkpoint(case: str, suffix: str, tmp_path: Path) -> None:
    content, said = NOT_WEIGHTS[case]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        unwrap.read(path)
    assert said in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_cut_short_says_so(tmp_path: Path) -> None:
    for name, save in (("a.pth", torch.save), ("a.safetensors", save_file)):
        save(STATE, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"cut short or damaged|incomplete|IncompleteMetadata"):
            unwrap.read(tmp_path / name)


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.pth")
    torch.save(STATE, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert unwrap.read(tmp_path / name).state.keys() == STATE.keys()


def test_pipes_programs_and_zips_of_others_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        unwrap.read(tmp_path / "pipe.pth")
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(CheckpointError, match=r"a zip file without a data.pkl in it"):
        unwrap.read(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as program:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            program.writestr(f"a/{name}", b"")
    with pytest.raises(CheckpointError, match="a TorchScript program, not a checkpoint"):
        unwrap.read(tmp_path / "a.pt")


ODD_TENSORS: dict[str, tuple[Any, str]] = {
    "not finite": (torch.tensor([1.0, float("nan"), float("inf")]), "2 of 3 numbers of x are not finite"),
    "whole numbers": (torch.ones(3, dtype=torch.int64), "x is torch.int64; weights are floating point numbers"),
    "sparse": (torch.eye(3).to_sparse(), r"x \(sparse_tensor\)"),
    "meta": (torch.empty(3, device="meta"), r"x \(meta_tensor_no_storage\)"),
    "expanded to terabytes": (torch.zeros(1).expand(10**12), "a tensor of 1,000,000,000,000 elements|claims"),
}


@pytest.mark.parametrize("case", ODD_TENSORS)
def test_tensors_that_cannot_be_weights_are_named(case: str, tmp_path: Path) -> None:
    value, said = ODD_TENSORS[case]
    torch.save(STATE | {"x": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=said):
        unwrap.read(tmp_path / "a.pth")


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as right, zipfile.ZipFile(tmp_path / "b.pth", "w") as bomb:
        for name in right.namelist():
            bomb.writestr(name, right.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="what is in it is compressed"):
        unwrap.read(tmp_path / "b.pth")


def _pickled(folder: Path, steps: bytes) -> Path:
    with zipfile.ZipFile(folder / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + steps + b".")
        archive.writestr("a/data/0", bytes(64))
    return folder / "a.pth"


DOUBLED = b"Nq\x000" + b"h\x00h\x00\x86q\x000" * 80
"""Slot 0 becomes a tuple of two tuples of two tuples ...: 2^80 leaves in 600 bytes."""
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu%stQ"
TENSOR = b"}X\x17\0\0\0patch_embed.proj.weightctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0%s\x89NtRs"
ODD_PICKLES: dict[str, tuple[bytes, str]] = {
    "a key that takes forever to hash": (b"}" + DOUBLED + b"h\x00K\x01s", "names a tensor by a value of type object"),
    "a path that takes forever to print": (DOUBLED + b"cpathlib\nPosixPath\nh\x00R", "TypeError"),
    "a type that takes forever to print": (DOUBLED + b"cnumpy\ndtype\nh\x00R", "TypeError"),
    "a size that takes forever to hash": (DOUBLED + b"ctorch\nSize\nh\x00\x85R", "holds a tuple"),
    "more arguments than any call": (b"ctorch\nSize\n(" + b"N" * 99 + b"tR", "calls torch.Size with 99 arguments"),
    "a storage larger than its record": (
        TENSOR % (b"J\xff\xff\xff\x7f", b"K\x04\x85K\x01\x85"),
        "storage 0 of 2,147,483,647 elements has 64 bytes",
    ),
    "a tensor beyond its storage": (
        TENSOR % (b"K\x10", b"K\x04\x85K\x10\x85"),
        "a tensor of 4 elements lies in a storage of 16",
    ),
    "negative strides": (TENSOR % (b"K\x10", b"K\x04\x85J\xff\xff\xff\xff\x85"), "a tensor of no possible size"),
    "a slot that takes all memory": (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
    "a text longer than the file": (b"X\xff\xff\xff\xffx", "expected 4294967295 bytes"),
    "a list in itself": (b"]q\x00h\x00a", "holds a list"),
    "a dict in itself": (b"}q\x00X\x01\0\0\0ah\x00s", r"holds a \(dict\)"),
    "steps without values": (b"R", "a step takes what no step made"),
    "code": (b"cos\nsystem\nX\x04\0\0\0true\x85R", "holds os.system, and .* could run code"),
    "code by its attributes": (b"cbuiltins\ngetattr\nNN\x86R", "holds builtins.getattr, and .* could run code"),
    "an attribute of what is let in": (b"cargparse\nNamespace.__init__\n", "holds argparse.Namespace.__init__, and"),
}


@pytest.mark.parametrize("case", ODD_PICKLES)
def test_pickles_that_would_exhaust_time_or_memory_are_refused_at_once(case: str, tmp_path: Path) -> None:
    steps, said = ODD_PICKLES[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        unwrap.read(_pickled(tmp_path, steps))
    assert len(str(caught.value)) < 600
