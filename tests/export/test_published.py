"""Published Vision Mambas come in and go out: every mode of their code, bit by bit, and nothing unsafe is read."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import published
from tests.support.shell import Shell
from vimscale.data.dataset import Dataset
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import published as hustvl
from vimscale.export import safetensors, starting, unwrap
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.arguments import complete, config_of
from vimscale.model.published.quirks import PublishedVim, build
from vimscale.model.published.weights import PUBLISHED, from_published, guess, named, published_config, to_published

VIM = {"img_size": 16, "patch_size": 4, "stride": 4, "depth": 2, "embed_dim": 16, "d_state": 3, "num_classes": 5}
MAMBAR = {"img_size": 20, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_classes": 5, "num_cls_tokens": 4}
ARM = {
    **{name: value for name, value in VIM.items() if name != "d_state"},
    "bimamba_type": "v3",
    "if_cls_token": True,
    "if_abs_pos_embed": True,
}
PAIRS = {"if_bidirectional": True, "depth": 4}
ROPE = {"if_rope": True, "if_rope_residual": True}
CASES: dict[str, dict[str, Any]] = {
    "v2": {},
    "v2 summed": {"if_devide_out": False},
    "v1": {"bimamba_type": "v1"},
    "v1 by if_bimamba": {"if_bimamba": True},
    "none": {"bimamba_type": "none"},
    "pairs": {**PAIRS, "bimamba_type": "none"},
    "pairs, an odd layer": {**PAIRS, "bimamba_type": "none", "depth": 5},
    "pairs of v2": PAIRS,
    "pairs of v1": {**PAIRS, "bimamba_type": "v1"},
    "pairs, halved": {**PAIRS, "if_bidirectional": "halved"},
    "one layer in pairs": {**PAIRS, "depth": 1},
    "first class token": {"use_middle_cls_token": False},
    "two class tokens": {"use_double_cls_token": True},
    "moved class token": {"use_middle_cls_token": False, "cls_position": 11},
    "moved class token, mixed up": {"use_middle_cls_token": False, "cls_position": 11, "mixed": True},
    "two class tokens, mixed up": {"use_double_cls_token": True, "mixed": True},
    "last token": {"if_cls_token": False, "final_pool_type": "none"},
    "mean": {"if_cls_token": False, "final_pool_type": "mean"},
    "max of logits": {"if_cls_token": False, "final_pool_type": "max"},
    "max of logits of the class token": {"final_pool_type": "max"},
    "all logits": {"if_cls_token": False, "final_pool_type": "all"},
    "no head": {"num_classes": 0},
    "no position": {"if_abs_pos_embed": False},
    "rope": {"if_rope": True},
    "rope of residual": ROPE,
    "rope of residual without class token": {**ROPE, "if_cls_token": False, "if_abs_pos_embed": False},
    "rope made larger": {**ROPE, "pt_hw_seq_len": 3},
    "rope in pairs": {**ROPE, **PAIRS},
    "flipped": {"flip_img_sequences_ratio": 2.0},
    "flipped, first class token": {"flip_img_sequences_ratio": 2.0, "use_middle_cls_token": False},
    "flipped rope": {**ROPE, "flip_img_sequences_ratio": 2.0},
    "flipped rope in pairs": {**ROPE, **PAIRS, "flip_img_sequences_ratio": 2.0},
    "layer norm": {"rms_norm": False, "norm_epsilon": 1e-3},
    "gamma": {"init_layer_scale": 0.1},
    "stride": {"stride": 2, "img_size": 10},
    "not square": {"img_size": (12, 20)},
    "odd number of patches": {"img_size": 12},
    "one channel": {"channels": 1},
    "ssm_cfg": {"ssm_cfg": {"d_conv": 3, "expand": 1}},
    "slow path": {"ssm_cfg": {"use_fast_path": False}},
    "Mamba-R": {**MAMBAR},
    "Mamba-R with a neck": {**MAMBAR, "rms_norm": True, "cls_reduce": 2, "ssm_cfg": {"d_state": 3}},
    "ARM": {**ARM},
    "ARM, mean": {**ARM, "global_pool": True, "ssm_cfg": {"d_state": 3}, "init_layer_scale": 0.1},
}


def _arguments(case: str) -> tuple[dict[str, Any], int | None]:
    own = dict(CASES[case])
    position = own.pop("cls_position", None)
    own.pop("mixed", None)
    family = {} if "num_cls_tokens" in own or own.get("bimamba_type") == "v3" else VIM
    return complete({**family, **own}), position


def _state(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter off its initial value, so that each matters."""
    torch.manual_seed(0)
    model = build(arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return to_published(model)


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert off < bound, f"{what} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("case", CASES)
def test_every_mode_gives_the_logits_and_gradients_of_the_published_code(case: str) -> None:
    arguments, position = _arguments(case)
    state = _state(arguments)
    size = arguments["img_size"]
    images = torch.randn(2, arguments["channels"], *(size if isinstance(size, tuple) else (size, size)))
    order = None
    if "mixed" in CASES[case]:
        order = torch.randperm(state["pos_embed"].shape[1])
    model = from_published(arguments, state, cls_position=position, token_order=order)
    logits = model(images)
    theirs = {key: value.clone().requires_grad_() for key, value in state.items()}
    flipped = arguments.get("flip_img_sequences_ratio", -1) > 1
    expected = published.forward(theirs, arguments, images, cls_position=position, token_order=order, flipped=flipped)
    # fp32 sums in another order: 1e-5 of the largest value, 1e-4 for gradients, which sum over more
    _close(logits.detach(), expected.detach(), 1e-5, "logits")

    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = _gradients(model)
    for key, value in theirs.items():
        if not key.startswith("rope."):
            _close(gradients[key], torch.zeros_like(value) if value.grad is None else value.grad, 1e-4, key)


def _gradients(model: VisionMamba) -> dict[str, Tensor]:
    """The gradients of a model, under published names."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_published(model)


@pytest.mark.parametrize("case", CASES)
def test_every_mode_goes_in_and_out_bit_by_bit(case: str) -> None:
    arguments, _ = _arguments(case)
    state = {key: torch.randn_like(value) for key, value in _state(arguments).items()}  # rotations too
    model = from_published(arguments, state)
    again = to_published(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    other = from_published(published_config(model), again)
    assert type(other) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_only_a_quirk_makes_another_model() -> None:
    for case in ("v2", "v1", "none", "first class token", "mean", "gamma", "layer norm", "stride", "Mamba-R", "ARM"):
        assert type(build(_arguments(case)[0])) is VisionMamba, case
    for case in ("pairs", "rope", "flipped", "all logits", "no head", "one channel", "slow path"):
        assert type(build(_arguments(case)[0])) is PublishedVim, case


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_are_told_by_their_states(name: str) -> None:
    with torch.device("meta"):
        state = to_published(build(complete(PUBLISHED[name])))
    assert named(name, state) == complete(PUBLISHED[name])
    found, _ = guess(state)
    assert {key: value.shape for key, value in state.items()} == _meta_shapes(found)


def _meta_shapes(arguments: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in to_published(build(arguments)).items()}


def test_quirks_take_images_of_one_size() -> None:
    model = build(_arguments("pairs")[0])
    with pytest.raises(ValueError, match="takes images of one size"):
        model([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)])


@pytest.mark.parametrize("what", ["cls_position", "token_order"])
def test_random_places_are_drawn_anew(what: str) -> None:
    arguments, _ = _arguments("moved class token")
    model = from_published(arguments, _state(arguments), **{what: "random"}).eval()
    image = torch.randn(1, 3, 16, 16)
    torch.manual_seed(0)
    drawn = torch.stack([model(image) for _ in range(8)])
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.stack([model(image) for _ in range(8)]))
    assert len(drawn.detach().unique(dim=0)) > 1


@pytest.mark.parametrize("case", ["v2", "two class tokens", "Mamba-R", "ARM", "rope of residual"])
def test_a_checkpoint_is_resized_with_its_extra_tokens_at_their_places(case: str) -> None:
    arguments, _ = _arguments(case)
    state = _state(arguments)
    larger = complete(arguments | {"img_size": 2 * arguments["img_size"]})
    model = from_published(arguments, state, resize_to=larger["img_size"])
    out = to_published(model)
    assert {key: value.shape for key, value in out.items()} == {k: v.shape for k, v in _state(larger).items()}
    assert all(torch.equal(out[key], state[key]) for key in state if "pos_embed" not in key and "rope" not in key)
    images = torch.randn(1, 3, larger["img_size"], larger["img_size"])
    if "if_rope" not in CASES[case]:
        expected = from_published(arguments, state)(images)  # resizes as it goes
        assert torch.equal(model(images), expected)
    if "pos_embed_cls" in state:
        assert torch.equal(out["pos_embed_cls"], state["pos_embed_cls"])


@pytest.mark.parametrize("case", CASES)
def test_what_keys_and_shapes_tell_is_told_right(case: str) -> None:
    arguments, _ = _arguments(case)
    if arguments["img_size"] == (12, 20):
        with pytest.raises(CheckpointError, match="15 patches do not form a square"):
            guess(_state(arguments))
        return
    found, taken = guess(_state(arguments))
    unseen = {
        "drop_path_rate",
        "init_layer_scale",
        "if_bimamba",
        "residual_in_fp32",
        "fused_add_norm",
        "if_rope_residual",
    }
    unseen |= {"if_bidirectional", "use_middle_cls_token", "final_pool_type", "pt_hw_seq_len", "if_divide_out"}
    unseen |= {"flip_img_sequences_ratio", "norm_epsilon", "global_pool", "if_devide_out"}
    if case == "v1 by if_bimamba":
        unseen |= {"bimamba_type"}
    if case == "stride":  # below 224 pixels nothing tells
        unseen |= {"img_size", "stride"}
    if case == "slow path":
        unseen |= {"ssm_cfg"}
    if case == "no position":
        unseen |= {"img_size"}
        assert "img_size 224" in taken
    assert {k: v for k, v in found.items() if k not in unseen} == {
        k: v for k, v in arguments.items() if k not in unseen
    }
    assert "norm_epsilon 1e-5" in taken


def test_a_stride_is_told_by_images_of_224_pixels() -> None:
    arguments = complete(VIM | {"img_size": 224, "patch_size": 32, "stride": 16})
    found, taken = guess(_state(arguments))
    assert (found["img_size"], found["stride"]) == (224, 16)
    assert "img_size 224 with stride 16" in taken


@pytest.mark.parametrize("case", ["pairs of v1", "flipped rope", "two class tokens, mixed up", "v2"])
def test_maps_show_the_image_as_it_lies(case: str) -> None:
    """Without layers' work, the map after the last one is that of the embedding."""
    arguments, _ = _arguments(case)
    state = _state(arguments)
    for key, value in state.items():
        if "out_proj" in key or "pos_embed" in key:
            value.zero_()
        if key.startswith("rope."):
            value.fill_(float("cos" in key))
    model = from_published(arguments, state, token_order="random" if "mixed" in CASES[case] else None)
    images = torch.randn(1, 3, 16, 16)
    doubled = 2 if arguments["if_bidirectional"] else 1  # a pair, of which the residual comes out twice
    (shown,) = model.forward_features(images, layers=[1])
    torch.testing.assert_close(shown, doubled * model.patch_embed(images))


# ---- what is wrong is said


WRONG_ARGUMENTS = {
    "unknown names": (
        {"if_bimbamba": True, "embed": 3},
        "embed, if_bimbamba: the published vim constructor has no such argument",
    ),
    "contradiction": ({"if_divide_out": True, "if_devide_out": False}, "are the same argument"),
    "unknown type": ({"bimamba_type": "v4"}, "bimamba_type is 'v4'; known: none, v1, v2"),
    "unknown pool": ({"final_pool_type": "sum"}, "final_pool_type is 'sum'"),
    "image of no patches": ({"img_size": 18}, "image_size 18 is not a multiple of patch_size 4; use 16 or 20"),
    "rope and a stride": ({"if_rope": True, "stride": 2}, "the table is for 16 tokens"),
    "rope and two class tokens": (
        {"if_rope": True, "use_double_cls_token": True},
        "the published code fails there too",
    ),
    "dt rank": ({"ssm_cfg": {"dt_rank": 5, "bias": True}}, "ssm_cfg.dt_rank is 5; only 'auto'"),
    "state twice": ({"ssm_cfg": {"d_state": 5}}, "fails if it is given twice"),
    "ARM of odd sides": (
        {**ARM, "d_state": None, "img_size": 12},
        "d_state: the published arm constructor has no such argument",
    ),
    "no registers": ({"num_cls_tokens": 0}, "the published mambar constructor has no such argument"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    change, message = WRONG_ARGUMENTS[case]
    with pytest.raises(CheckpointError, match=message):
        from_published(VIM | change, {})


def test_arms_columns_need_an_even_square() -> None:
    with pytest.raises(CheckpointError, match="need a square grid with an even number of rows, not 3 x 3"):
        from_published(ARM | {"img_size": 12}, {})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="vim_tiny is not a published model; known: vim_tiny_patch16_224"):
        from_published("vim_tiny", {})


def test_a_wrong_state_dict_is_one_error_with_the_first_of_each_kind() -> None:
    state = _state(complete(VIM))
    state["head.weight"] = state["head.weight"][:3]
    state["layers.0.mixer.B"] = state.pop("layers.0.mixer.A_log")
    with pytest.raises(CheckpointError) as caught:
        from_published(VIM, state)
    message = str(caught.value)
    assert "1 missing: layers.0.mixer.A_log" in message
    assert "1 unexpected: layers.0.mixer.B" in message
    assert "1 with the wrong shape: head.weight (3, 16), not (5, 16)" in message
    assert "check depth, embed_dim, bimamba_type, class token and num_classes" in message


def test_a_position_embedding_of_another_image_size_is_said() -> None:
    with pytest.raises(CheckpointError, match="img_size 32 needs 65 positions, but there are 17: give the img_size"):
        from_published(VIM | {"img_size": 32}, _state(complete(VIM)))


OURS = VimConfig(num_classes=5, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
NOT_THEIRS = {
    "layers of kind attn": {"directions": "attn*2", "d_head": 8},
    "layers of several kinds": {"directions": "bi fwd"},
    "layers of kind pair": {"directions": "pair*2"},
    "layers of kind cross: only bi": {"directions": "cross bi"},
    "fuse gate: only mean or sum": {"fuse": "gate"},
    "fuse concat": {"fuse": "concat"},
    "fuse mean in layers of kind shared": {"directions": "shared*2"},
    "stem conv: only patch": {"stem": "conv"},
    "scans in the order column": {"directions": "bi@column*2"},
    "registers 2: only 0": {"registers": 2},
    "pool max: only mean or last": {"cls_token": "none", "pool": "max"},
    "pool mean: only cls": {"pool": "mean"},
    "ssm_norm True": {"ssm_norm": True},
    "backward_gate True": {"backward_gate": True},
    "expand 2: only 1": {"directions": "cross*2", "mlp": "swiglu", "norm": "layer"},
}


@pytest.mark.parametrize("message", NOT_THEIRS)
def test_what_the_published_code_cannot_express_is_named(message: str) -> None:
    model = VisionMamba(dataclasses.replace(OURS, **NOT_THEIRS[message]))
    with pytest.raises(CheckpointError, match="cannot express this model\n(.*\n)*  " + message):
        to_published(model)


def test_a_model_within_its_backward_ramp_stays_here() -> None:
    model = VisionMamba(OURS)
    model.backward = 0.5
    with pytest.raises(CheckpointError, match=r"have a factor of 0.5"):
        to_published(model)


# ---- files


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    state = _state(complete(VIM))
    for i, content in enumerate(({"model": state, "args": _Trap(tmp_path / "made")}, _Trap(tmp_path / "made"))):
        torch.save(content, tmp_path / f"{i}.pth")
        with pytest.raises(CheckpointError, match=r"holds \w+\.mkdir, and a checkpoint .* could run code"):
            unwrap.read(tmp_path / f"{i}.pth")
    assert not (tmp_path / "made").exists()


def test_the_command_line_kept_in_a_file_is_let_in(tmp_path: Path) -> None:
    state = _state(complete(VIM))
    args = argparse.Namespace(model="vim", drop_path=np.float64(0.5), output_dir=tmp_path, sizes=[1, (2, None)])
    torch.save({"model": state, "args": args, "epoch": np.int64(3), "rng": np.random.get_state()}, tmp_path / "a.pth")
    found = unwrap.read(tmp_path / "a.pth")
    assert found.args == args
    assert found.state.keys() == state.keys()


def test_a_bare_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    state = _state(complete(VIM))
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pth")
    for name in ("a.pth", "a.safetensors", "wrapped.pth"):
        found, args, _ = unwrap.read(tmp_path / name)
        assert args is None
        assert all(torch.equal(found[key], state[key]) for key in state)


UNREADABLE = {
    "a list": ([torch.ones(1)], "holds a list, not a dict of tensors"),
    "no tensors": ({"model": {"w": 3, "v": [1]}}, r"holds w \(int\), v \(list\); a state dict of tensors"),
    "nothing": ({}, "holds nothing"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_of_something_else_are_refused_by_type(case: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[case]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        unwrap.read(tmp_path / "a.pth")


def test_damaged_and_missing_files_are_said(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            unwrap.read(tmp_path / name)
        (tmp_path / name).write_bytes(b"no checkpoint at all")
        with pytest.raises(CheckpointError, match="is text, not a checkpoint"):
            unwrap.read(tmp_path / name)


@pytest.mark.parametrize("case", CASES)
def test_every_mode_survives_folders_of_both_formats(case: str, tmp_path: Path) -> None:
    arguments, _ = _arguments(case)
    model = from_published(arguments, _state(arguments)).eval()
    manifest = _manifest(arguments["num_classes"])
    safetensors.write(tmp_path / "ours", model, manifest, {})
    hustvl.write(tmp_path / "theirs", model, manifest)
    for folder, load in ((tmp_path / "ours", safetensors.load), (tmp_path / "theirs", hustvl.load)):
        again = load(folder)
        assert type(again) is type(model)
        assert published_config(again) == published_config(model)
    assert safetensors.largest_difference(tmp_path / "ours", model) == 0
    assert hustvl.largest_difference(tmp_path / "theirs", model) == 0


def _manifest(classes: int) -> Manifest:
    names = tuple(map(str, range(classes)))
    return Manifest(name="test", classes=names, shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_published_quirks_are_no_starting_weights(tmp_path: Path) -> None:
    arguments, _ = _arguments("pairs of v2")
    model = from_published(arguments, _state(arguments))
    safetensors.write(tmp_path, model, _manifest(5), {})
    with pytest.raises(CheckpointError, match="what no recipe trains: if_bidirectional"):
        safetensors.starting_weights(tmp_path, model.config, _manifest(5))


# ---- commands


def test_import_tells_the_model_and_writes_it(shell: Shell) -> None:
    state = _state(complete(VIM))
    torch.save({"model": state}, shell.folder / "v2.pth")
    output = shell.run("import", "v2.pth")
    assert "those of a vim" in output
    assert "if_divide_out True, the class token in the middle" in output
    assert "loaded again, it gives the same logits on 8 images" in output
    out = to_published(safetensors.load(shell.folder / "v2"))
    assert all(torch.equal(out[key], state[key]) for key in state)
    config = json.loads((shell.folder / "v2/config.json").read_text())
    assert config["classes"] == ["0", "1", "2", "3", "4"]
    assert config["mean"] == [0.485, 0.456, 0.406]


def test_import_takes_arguments_with_quirks_from_json(shell: Shell) -> None:
    arguments, _ = _arguments("flipped rope in pairs")
    save_file(_state(arguments), shell.folder / "pairs.safetensors")
    (shell.folder / "pairs.json").write_text(json.dumps(arguments))
    shell.run("import", "pairs.safetensors", "--model", "pairs.json", "--output", "out")
    assert published_config(safetensors.load(shell.folder / "out")) == arguments


def test_import_takes_the_name_that_the_file_tells(tmp_path: Path) -> None:
    name = "mambar_tiny_patch16_224"
    state = to_published(VisionMamba(config_of(complete(PUBLISHED[name] | {"num_classes": 7, "img_size": 96}))))
    args = argparse.Namespace(model=name, input_size=96, drop_path=0.2)
    arguments, notes = hustvl.arguments_for(state, args, None)
    assert notes == [f"the file says it is a {name}"]
    assert arguments == complete(PUBLISHED[name] | {"num_classes": 7, "img_size": 96, "drop_path_rate": 0.2})
    assert hustvl.arguments_for(state, None, name)[0] == arguments | {"drop_path_rate": 0.1}
    assert from_published(arguments, state).config.num_classes == 7


def test_import_refuses_a_trap_with_one_message(shell: Shell) -> None:
    torch.save(_Trap(shell.folder / "made"), shell.folder / "trap.pth")
    output = shell.run("import", "trap.pth", expect=2)
    assert "could run code" in output
    assert "Traceback" not in output
    assert not (shell.folder / "made").exists()


def test_a_run_is_exported_for_the_published_code_and_started_from(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.run("launch", "small.yaml", "--no-ray", "--workers", "1", "steps=6")
    output = shell.run("export", "small", "--to", "hustvl", "--output", "theirs")
    assert "loaded again, it gives the same logits on 8 images" in output
    state = unwrap.read(shell.folder / "theirs/model.pth").state
    arguments = json.loads((shell.folder / "theirs/config.json").read_text())
    assert arguments["embed_dim"] == 32
    assert from_published(arguments, state).config.cls_token == "middle"
    kept = json.loads((shell.folder / "theirs/preprocessing.json").read_text())
    assert kept["classes"] == [str(digit) for digit in range(10)]
    assert kept["mean"] == [0.3053] * 3
    output = shell.run("import", "theirs/model.pth", "--output", "back", "--image-size", "48")
    assert "same logits" in output
    assert "classes, mean and std are those of theirs/preprocessing.json" in output
    assert safetensors.load(shell.folder / "back").config.image_size == 48
    config = json.loads((shell.folder / "back/config.json").read_text())
    assert {key: config[key] for key in kept} == kept

    shell.run("export", "small")
    monkeypatch.setenv("XDG_CACHE_HOME", shell.env["XDG_CACHE_HOME"])
    manifest = Dataset.open("digits:train").manifest
    exported = safetensors.load(shell.folder / "runs/small/export").state_dict()
    for folder in ("back", "runs/small", "runs/small/export"):
        source = starting.read(shell.folder / folder)
        assert (source.classes, source.mean, source.std) == (manifest.classes, manifest.mean, manifest.std)
        weights, _ = safetensors.starting_weights(shell.folder / folder, source.config, manifest)
        assert all(torch.equal(weights[name], exported[name]) for name in exported if name != "pos_embed")
    output = shell.run("launch", "small.yaml", "--no-ray", "--workers", "1", "name=b", "steps=6", "model.weights=back")
    assert "model.weights: image_size, stride: the grid goes from 6 x 6 patches" in output
