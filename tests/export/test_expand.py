"""Directions are expanded by exact copies: a layer of copies is the average of one scan in several directions."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.shell import Shell
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import expand, published, safetensors, starting, unwrap
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.mixer import PATH_PARAMETERS
from vimscale.model.schedule import parse
from vimscale.model.tokens import sincos
from vimscale.objectives.autoregressive import Autoregressive
from vimscale.objectives.base import Learner
from vimscale.objectives.published import arm
from vimscale.recipe.reconstruction import AutoregressiveOptions

NAMES = ("ant", "bee", "cat", "dog")
HALF = (0.5, 0.5, 0.5)
MANIFEST = Manifest(name="set", classes=NAMES, shards=(), mean=HALF, std=HALF)
OURS = VimConfig(
    num_classes=0,
    image_size=16,
    patch_size=4,
    d_model=16,
    depth=2,
    d_state=4,
    directions="fwd*2",
    cls_token="none",
    pos_embed="sincos",
)


def _model(config: VimConfig = OURS) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _with(directions: str, **changes: Any) -> VimConfig:
    return dataclasses.replace(OURS, directions=directions, depth=len(parse(directions)), **changes)


COPIES = {
    ("fwd*2", "bi*2"): (0, 0),
    ("fwd*2", "cross*2"): (0, 0, 0, 0),
    ("fwd*2", "fwd bi"): (0, 0),
    ("bwd*2", "bi*2"): (0, 0),
    ("fwd@column*2", "bi@column*2"): (0, 0),
    ("fwd@column*2", "cross*2"): (0, 0, 0, 0),
    ("bi*2", "cross*2"): (0, 1, 0, 1),
}
"""Paths of the old layer that those of the new one copy."""


@pytest.mark.parametrize(("before", "after"), COPIES)
def test_every_path_is_an_exact_copy(before: str, after: str) -> None:
    model = _model(_with(before))
    larger = expand.expanded(model, after)
    old, new = model.blocks[1].mixer, larger.blocks[1].mixer
    for name in PATH_PARAMETERS:
        values, copies = getattr(old, name), getattr(new, name)
        assert len(copies) == len(new.paths)
        for path, source in zip(copies, COPIES[before, after], strict=True):
            assert torch.equal(path, values[source])
    others = [name for name in model.state_dict() if name.rpartition(".")[2] not in PATH_PARAMETERS]
    assert all(torch.equal(larger.state_dict()[name], model.state_dict()[name]) for name in others)
    assert str(larger.config.layers[0]) == after[: len(str(larger.config.layers[0]))]


@pytest.mark.parametrize("after", ["bi*2", "cross*2"])
def test_copies_average_the_same_scan_in_every_direction(after: str) -> None:
    model = _model()
    larger = expand.expanded(model, after)
    tokens = model._row_tokens((4, 4), torch.zeros(1))
    u = torch.randn(2, 16, 16)

    def one_way(x: Tensor) -> Tensor:
        return model.blocks[0].mixer(x, tokens)

    def transposed(x: Tensor) -> Tensor:
        return x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)

    with torch.no_grad():
        ways = [one_way(u), one_way(u.flip(1)).flip(1)]
        if after == "cross*2":
            columns = transposed(u)
            ways += [transposed(one_way(columns)), transposed(one_way(columns.flip(1)).flip(1))]
        ours = larger.blocks[0].mixer(u, tokens)
        torch.testing.assert_close(ours, torch.stack(ways).mean(dim=0), rtol=1e-5, atol=1e-6)
        palindrome = torch.cat([u[:, :8], u[:, :8].flip(1)], dim=1)
        if after == "bi*2":
            both = larger.blocks[0].mixer(palindrome, tokens)
            torch.testing.assert_close(both, both.flip(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fwd*2", "bwd*2"),
        ("fwd*2", "bi@column*2"),
        ("fwd*2", "pair*2"),
        ("fwd*2", "shared*2"),
        ("bi*2", "fwd*2"),
        ("shared*2", "bi*2"),
        ("attn*2", "bi*2"),
        ("fwd*2", "bi attn"),
        ("fwd*2", "ssd*2"),
        ("ssd_fwd*2", "ssd@column*2"),
    ],
)
def test_what_cannot_be_copied_is_refused(before: str, after: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be expanded by copying; a layer keeps its scans and gets more"):
        expand.expanded(_model(_with(before, d_head=8)), after)


def test_another_depth_and_a_sum_of_paths_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"--directions: .*"):
        expand.expanded(_model(), "bi*3")
    with pytest.raises(CheckpointError, match=r"fuse: sum would multiply what copies give; set model\.fuse=mean"):
        expand.expanded(_model(_with("bi*2", fuse="sum")), "cross*2")
    assert expand.expanded(_model(_with("fwd*2", fuse="sum")), "bi*2").config.fuse == "mean"


def test_a_learned_combination_starts_as_the_mean() -> None:
    mean, gate = (expand.expanded(_model(_with("fwd*2", fuse=fuse)), "bi*2") for fuse in ("mean", "gate"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(gate(images, features=True), mean(images, features=True))


# ---- runs that start from weights


TARGET = dataclasses.replace(OURS, num_classes=4, directions="bi*2", cls_token="middle", pos_embed=True)


def test_weights_grow_when_asked_and_the_notes_say_what_is_new(tmp_path: Path) -> None:
    model = _model()
    safetensors.write(tmp_path, model, MANIFEST, {})
    with pytest.raises(CheckpointError) as caught:
        safetensors.starting_weights(tmp_path, TARGET, MANIFEST)
    assert "set model.directions=fwd*2, or model.grow=copy, and the new scans start as copies" in str(caught.value)
    assert "set model.cls_token=none, or model.grow=copy, and the class token starts from" in str(caught.value)
    weights, notes = safetensors.starting_weights(tmp_path, TARGET, MANIFEST, "copy")
    assert [note.split(":")[0] for note in notes] == ["directions", "cls_token", "pos_embed", "head"]
    assert weights.keys() == VisionMamba(TARGET).state_dict().keys() - {"cls_token", "head.weight", "head.bias"}
    assert torch.equal(weights["blocks.0.mixer.D"], model.blocks[0].mixer.D.expand(2, -1))
    table = sincos(OURS, (4, 4), torch.zeros(1))
    assert torch.equal(weights["pos_embed"], torch.cat([table[:8], torch.zeros(1, 16), table[8:]]))


def test_positions_of_another_size_are_interpolated_and_fixed_ones_are_not_stored(tmp_path: Path) -> None:
    safetensors.write(tmp_path, _model(), MANIFEST, {})
    larger = dataclasses.replace(TARGET, image_size=24)
    weights, notes = safetensors.starting_weights(tmp_path, larger, MANIFEST, "copy")
    assert weights["pos_embed"].shape == (37, 16)
    assert not weights["pos_embed"][18].any()
    assert any("its position embedding is resized" in note for note in notes)
    fixed = dataclasses.replace(larger, pos_embed="sincos")
    weights, _ = safetensors.starting_weights(tmp_path, fixed, MANIFEST, "copy")
    assert "pos_embed" not in weights


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"directions": "bwd*2"}, "directions: fwd to bwd cannot be expanded"),
        ({"fuse": "sum"}, "fuse: sum would multiply"),
        ({"d_model": 32}, "d_model: the weights have 16, the recipe 32"),
        ({"directions": "bi*3", "depth": 3}, "depth: the weights have 2, the recipe 3"),
        ({"pos_embed": False}, "pos_embed: the weights have sincos, the recipe false"),
    ],
)
def test_growing_does_not_hide_other_differences(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    source = starting.Source(tmp_path, OURS, None, HALF, HALF, 1.0)
    with pytest.raises(CheckpointError, match=re.escape(fault)):
        starting.compare(source, dataclasses.replace(TARGET, **change), MANIFEST, "copy")


def test_equal_models_need_no_growth() -> None:
    source = starting.Source(Path("w"), TARGET, NAMES, HALF, HALF, 1.0)
    assert starting.compare(source, TARGET, MANIFEST, "copy") == []


# ---- ARM's pretraining checkpoints


def _pretrained() -> Learner:
    shape = VimConfig(
        num_classes=0,
        image_size=32,
        patch_size=4,
        d_model=16,
        depth=5,
        directions="fwd*5",
        expand=1,
        mlp="swiglu",
        norm="layer",
        cls_token="none",
        pos_embed="sincos",
    )
    torch.manual_seed(0)
    options = AutoregressiveOptions(decoder_width=8, decoder_heads=1)
    return Learner(Autoregressive(options, shape), VisionMamba(shape)).eval()


def _file(path: Path, learner: Learner) -> Path:
    mask = torch.zeros(48, 48).masked_fill(torch.ones(48, 48).triu(1).bool(), float("-inf"))
    args = argparse.Namespace(model="arm_base_pz16", lr=1e-3)
    torch.save({"model": arm.to_published(learner) | {"mask": mask}, "epoch": 3, "args": args}, path)
    return path


def test_pretraining_checkpoints_of_arm_become_encoders(tmp_path: Path) -> None:
    learner = _pretrained()
    state, _, _ = unwrap.read(_file(tmp_path / "checkpoint-1599.pth", learner))
    encoder, arguments, _ = published.pretrained_arm(state, None, None)
    assert arguments["embed_dim"] == 16
    assert encoder.head is None
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images, features=True), learner.encoder(images, features=True))
    resized, _, _ = published.pretrained_arm(state, None, 48)
    assert resized.config.grid == (12, 12)
    with pytest.raises(CheckpointError, match="the file is of another model, of img_size 32, "):
        published.pretrained_arm(state, "arm_base_pz16", None)
    with pytest.raises(CheckpointError, match="2 missing: norm_4"):
        arm.encoder({key: value for key, value in state.items() if not key.startswith("norm_4")})


def test_the_command_line_imports_expands_and_starts_from_them(shell: Shell) -> None:
    _file(shell.folder / "checkpoint-1599.pth", _pretrained())
    told = shell.run("import", "checkpoint-1599.pth")
    assert "it gives the same features for 8 images" in told
    told = shell.run("export", "checkpoint-1599", "--directions", "cross*5")
    assert "fwd*5 to cross*5; the new scans of every layer start as copies" in told
    model = safetensors.load(shell.folder / "checkpoint-1599_expanded")
    assert model.config.directions == "cross*5"
    source = starting.read(shell.folder / "checkpoint-1599_expanded")
    assert source.mean == (0.485, 0.456, 0.406)
    told = shell.run("export", "checkpoint-1599", "--directions", "bwd*5", expect=2)
    assert "fwd to bwd cannot be expanded by copying" in told
