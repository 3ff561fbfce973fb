"""Tokens, maps, heads, depths and image sizes of a VisionMamba, by timm's names."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.test_model import EVERY_KIND, FAMILY, SMALL
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.presets import Stage
from vimscale.model.tokens import resized

THREE_STAGES = dataclasses.replace(
    SMALL,
    cls_token="none",
    stages=(
        Stage(depth=2, d_model=16, directions="fwd bi@column"),
        Stage(depth=1, d_model=16),
        Stage(depth=2, d_model=32, directions="pair*2"),
    ),
)
TOKENS: dict[str, VimConfig] = {
    "none": dataclasses.replace(SMALL, cls_token="none"),
    "first": dataclasses.replace(SMALL, cls_token="first"),
    "middle": SMALL,
    "last token read": dataclasses.replace(SMALL, cls_token="none", pool="last"),
    "both": dataclasses.replace(SMALL, cls_token="both"),
    "both, last token read": dataclasses.replace(SMALL, cls_token="both", pool="last"),
    "registers": dataclasses.replace(SMALL, registers=3),
    "registers alone": dataclasses.replace(SMALL, cls_token="none", registers=4, pool="registers", register_reduce=2),
    "as many registers as patches": dataclasses.replace(SMALL, registers=16, pool="mean"),
    "other orders": dataclasses.replace(EVERY_KIND, registers=2),
    "stages": THREE_STAGES,
}


def _model(config: VimConfig = SMALL) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def _images(height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


MEMBERS = (
    TOKENS
    | {name: FAMILY[name] for name in ("convolutional stem", "overlapping patches", "ARM's block")}
    | {f"positions {kind}": dataclasses.replace(SMALL, pos_embed=kind) for kind in ("sincos", "coordinates", False)}
)


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: Any) -> VimConfig:
    return request.param


def _streams(model: VisionMamba, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The residual stream after every layer, in the sequence's order, and the normalized tokens: what the norms see."""
    into: list[tuple[Tensor, Tensor | None]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: into.append(arguments))
        for module in (*(block.norm for block in model.blocks), model.norm)
    ]
    out: list[Tensor] = []
    hooks.append(model.norm.register_forward_hook(lambda _, __, result: out.append(result[0])))
    with torch.no_grad():
        model(images, features=True)
    for hook in hooks:
        hook.remove()
    return [x if residual is None else residual + x for x, residual in into[1:]], out[0]


# ---- tokens


@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
def test_the_head_of_the_tokens_is_the_model(member: VimConfig, size: tuple[int, int]) -> None:
    model, images = _model(member), _images(*size)
    tokens = model.forward_features(images)
    grid = member.grid_of(*size)
    shrink = model.feature_info[-1]["reduction"] // member.step
    count = grid[0] * grid[1] // shrink**2 + model.num_prefix_tokens
    assert tokens.shape == (2, count, model.num_features)
    assert torch.equal(model.forward_head(tokens), model(images))
    read = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(read, model(images, features=True))
    assert read.shape[1] == model.head_hidden_size


@pytest.mark.parametrize("name", TOKENS)
def test_class_tokens_and_then_registers_come_first(name: str) -> None:
    config = TOKENS[name]
    model, images = _model(config), _images(16, 32)
    _, normed = _streams(model, images)
    shrink = model.feature_info[-1]["reduction"] // config.step
    slots = layout(config, (4 // shrink, 8 // shrink))
    image = [position for start, end in slots.image for position in range(start, end)]
    assert torch.equal(model.forward_features(images), normed[:, [*slots.cls, *slots.registers, *image]])


def test_too_few_tokens_for_the_head_are_refused() -> None:
    model = _model(dataclasses.replace(SMALL, registers=2))
    with pytest.raises(ValueError, match="4 tokens, 3 of them no patch"):
        model.forward_head(torch.zeros(1, 4, 16))


def test_drop_path_and_backward_factors_reach_tokens_and_maps() -> None:
    config = dataclasses.replace(SMALL, drop_path=0.5)
    model, images = _model(config).train(), _images()
    draws, factors = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.1, 0.9]]), [0.5, 1.0, 0.25]
    expected = model(images, draws, factors)
    assert torch.equal(model.forward_head(model.forward_features(images, draws, factors)), expected)
    tokens, _ = model.forward_intermediates(images, draws=draws, backward=factors)
    assert torch.equal(model.forward_head(tokens), expected)
    assert not torch.equal(model(images), expected)


# ---- maps


@pytest.mark.parametrize("name", [name for name in TOKENS if name != "stages"])
@pytest.mark.parametrize("norm", [False, True])
def test_maps_are_the_streams_after_the_layers(name: str, norm: bool) -> None:
    config = TOKENS[name]
    model, images = _model(config), _images(16, 24)
    streams, normed = _streams(model, images)
    pairs = {i for i in range(len(streams)) if i + 1 in model._paired}  # the first layer of a pair has no stream alone
    slots = layout(config, (4, 6))
    tokens, found = model.forward_intermediates(images, return_prefix_tokens=True, norm=norm)
    assert torch.equal(tokens, model.forward_features(images))
    found = found if model.num_prefix_tokens else [(each, None) for each in found]
    assert len(found) == len(model.feature_info) == len(model.blocks)
    for i, (map_, prefix) in enumerate(found):
        stream = streams[i + 1 if i in pairs else i]
        if norm:
            stream, _ = model.norm(stream, None)
        assert map_.shape == (2, 16, 4, 6)
        assert torch.equal(map_.flatten(2).mT, slots.image_tokens(stream))
        if prefix is not None:
            assert torch.equal(prefix, stream[:, [*slots.cls, *slots.registers]])
    if norm:
        torch.testing.assert_close(found[-1][0].flatten(2).mT, slots.image_tokens(normed), rtol=1e-6, atol=1e-6)


def test_a_pairs_layers_share_their_map() -> None:
    _, maps = _model(EVERY_KIND).forward_intermediates(_images())
    assert torch.equal(maps[2], maps[3])


@pytest.mark.parametrize(
    ("indices", "layers"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([-1, 0, 2], [0, 2]), ((1,), [1])]
)
def test_indices_are_counted_as_in_timm(indices: Any, layers: list[int]) -> None:
    model, images = _model(), _images()
    _, every = model.forward_intermediates(images)
    some = model.forward_intermediates(images, indices, intermediates_only=True)
    assert len(some) == len(layers)
    assert all(torch.equal(each, every[layer]) for each, layer in zip(some, layers, strict=True))


def test_formats_and_dictionaries_hold_the_same_maps() -> None:
    config = dataclasses.replace(SMALL, registers=2)
    model, images = _model(config), _images(8, 16)
    tokens, maps = model.forward_intermediates(images)
    flat = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert [tuple(each.shape) for each in maps] == [(2, 16, 2, 4)] * 3
    assert all(torch.equal(a.flatten(2).mT, b) for a, b in zip(maps, flat, strict=True))
    assert all(each.is_contiguous() for each in maps)
    named = model.forward_intermediates(images, return_prefix_tokens=True, output_dict=True)
    assert list(named) == ["image_intermediates", "image_intermediates_prefix", "image_features"]
    assert torch.equal(named["image_features"], tokens)
    assert all(torch.equal(a, b) for a, b in zip(named["image_intermediates"], maps, strict=True))
    assert {tuple(each.shape) for each in named["image_intermediates_prefix"]} == {(2, 3, 16)}
    named = model.forward_intermediates(images, output_dict=True, intermediates_only=True)
    assert list(named) == ["image_intermediates"]


def test_get_intermediate_layers_are_maps_in_dinos_form() -> None:
    model, images = _model(), _images()
    expected = model.forward_intermediates(images, 2, norm=True, intermediates_only=True)
    flat = model.get_intermediate_layers(images, 2, norm=True)
    pairs = model.get_intermediate_layers(images, [1, 2], reshape=True, return_prefix_tokens=True, norm=True)
    assert all(torch.equal(a, b.flatten(2).mT) for a, b in zip(flat, expected, strict=True))
    assert all(torch.equal(a, b) for (a, _), b in zip(pairs, expected, strict=True))
    assert torch.equal(torch.cat([pairs[-1][1], flat[-1]], dim=1), model.forward_features(images))
    assert len(model.get_intermediate_layers(images)) == 1


def test_stopping_early_leaves_the_later_layers_out() -> None:
    model, images = _model(), _images()
    streams, _ = _streams(model, images)
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    tokens, maps = model.forward_intermediates(images, [0], stop_early=True)
    assert (ran, len(maps)) == ([0], 1)
    normed, _ = model.norm(streams[0], None)
    expected = torch.cat([normed[:, 8:9], normed[:, :8], normed[:, 9:]], dim=1)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    ran.clear()
    full, _ = model.forward_intermediates(images, [0])
    assert ran == [0, 1, 2]
    assert torch.equal(full, model.forward_features(images))


def test_the_stages_of_a_hierarchical_model_have_a_map_each() -> None:
    model, images = _model(THREE_STAGES), _images()
    assert model.feature_info == [
        {"num_chs": 16, "reduction": 4, "module": "blocks.1"},
        {"num_chs": 16, "reduction": 8, "module": "blocks.2"},
        {"num_chs": 32, "reduction": 16, "module": "blocks.4"},
    ]
    tokens, maps = model.forward_intermediates(images, norm=True)
    assert [tuple(each.shape) for each in maps] == [(2, 16, 4, 4), (2, 16, 2, 2), (2, 32, 1, 1)]
    plain = model.forward_intermediates(images, intermediates_only=True)
    same = [torch.equal(a, b) for a, b in zip(maps, plain, strict=True)]
    assert same == [True, True, False], "the last norm is for the last stage"
    torch.testing.assert_close(maps[-1].flatten(2).mT, tokens, rtol=1e-6, atol=1e-6)
    early, _ = model.forward_intermediates(images, [1], stop_early=True)
    assert torch.equal(early, plain[1].flatten(2).mT)


def test_info_describes_the_maps(member: VimConfig) -> None:
    model = _model(member)
    _, maps = model.forward_intermediates(_images(16, 32))
    for info, map_ in zip(model.feature_info, maps, strict=True):
        assert map_.shape[1] == info["num_chs"]
        assert model.get_submodule(info["module"])
        if member.step == member.patch_size:
            assert (map_.shape[2] * info["reduction"], map_.shape[3] * info["reduction"]) == (16, 32)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3], "no layer 3: count from 0 to 2, or from the end"),
        ([-4], "no layer -4"),
        (4, "the last 4 layers are not among 3: use 1 to 3"),
        (0, "use 1 to 3"),
        ([], "no layer is chosen"),
    ],
)
def test_layers_that_do_not_exist_are_refused(indices: Any, message: str) -> None:
    model = _model()
    for call in (lambda: model.forward_intermediates(_images(), indices), lambda: _prune(model, indices)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"no stage -4|last 4 stages|no stage 3|last 0 stages|no stage is chosen"):
        _model(THREE_STAGES).forward_intermediates(_images(), indices)


def test_lists_and_unknown_formats_are_refused() -> None:
    model = _model()
    for call in (model.forward_features, model.forward_intermediates, model.get_intermediate_layers):
        with pytest.raises(ValueError, match=r"need images of one size: pass a tensor"):
            call([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)])  # type: ignore[operator]
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'; use NCHW or NLC"):
        model.forward_intermediates(_images(), output_fmt="NHWC")  # type: ignore[arg-type]


def test_gradients_of_a_map_reach_the_stem() -> None:
    model = _model().train()
    model.set_grad_checkpointing()
    (map_,) = model.get_intermediate_layers(_images(), [1], reshape=True)
    map_.square().sum().backward()
    assert model.patch_embed.weight.grad.abs().sum() > 0
    assert model.blocks[2].mixer.in_proj.weight.grad is None


# ---- depth


def _prune(model: VisionMamba, indices: Any, **arguments: bool) -> list[int]:
    return model.prune_intermediate_layers(indices, **arguments)


def test_a_pruned_model_has_the_maps_and_a_valid_config() -> None:
    model, images = _model(dataclasses.replace(EVERY_KIND, drop_path=0.4)), _images()
    expected = model.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
    assert _prune(model, [0, 2]) == [0, 2]
    assert len(model.blocks) == len(model.drop_rates) == len(model.recompute) == 4, "a pair stays complete"
    found = model.forward_intermediates(images, [0, 2], norm=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(model(images), model(images, features=True)), "without a head"
    again = VisionMamba(model.config).eval()
    torch.testing.assert_close(again.drop_rates, model.drop_rates)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_the_norm_can_go_and_the_head_can_stay() -> None:
    model, images = _model(), _images()
    (expected,) = model.get_intermediate_layers(images, [1], return_prefix_tokens=True)
    assert _prune(model, [1], prune_norm=True, prune_head=False) == [1]
    assert torch.equal(model.forward_features(images), torch.cat([expected[1], expected[0]], dim=1))
    assert torch.equal(model(images), model.head(expected[1].mean(dim=1)))  # type: ignore[misc]
    assert not [name for name in model.state_dict() if name.startswith("norm.")]


def test_a_hierarchical_model_is_pruned_by_stages() -> None:
    model, images = _model(THREE_STAGES), _images()
    expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    with pytest.raises(ValueError, match="set prune_norm and prune_head"):
        _prune(model, [0, 1])
    assert _prune(model, [0, 1], prune_norm=True) == [0, 1]
    assert (len(model.blocks), list(model.merges), model.num_features) == (3, ["2"], 16)
    tokens, maps = model.forward_intermediates(images)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert torch.equal(tokens, maps[-1].flatten(2).mT)


# ---- head


@pytest.mark.parametrize(
    ("config", "pool", "kept"),
    [
        (SMALL, None, "cls"),
        (SMALL, "avg", "mean"),
        (SMALL, "max", "max"),
        (dataclasses.replace(SMALL, pool="mean"), "token", "cls"),
        (TOKENS["registers alone"], None, "registers"),
        (TOKENS["registers alone"], "avg", "mean"),
        (TOKENS["registers"], "registers", "registers"),
    ],
)
def test_a_new_head_trains_and_the_config_follows(config: VimConfig, pool: str | None, kept: str) -> None:
    model, images = _model(config).train(), _images()
    before = model.forward_features(images)
    model.reset_classifier(3, pool)
    assert (model.config.pooling, model.num_classes) == (kept, 3)
    assert torch.equal(model.forward_features(images), before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.tensor([0, 2])
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    again = VisionMamba(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    assert model.get_classifier() is model.head


def test_without_classes_the_model_returns_what_the_head_read() -> None:
    model, images = _model(), _images()
    read = model(images, features=True)
    model.reset_classifier(0)
    assert torch.equal(model(images), read)
    assert torch.equal(model.forward_head(model.forward_features(images)), read)
    assert isinstance(model.get_classifier(), nn.Identity)
    headless = VisionMamba(model.config)
    headless.load_state_dict(model.state_dict())
    assert isinstance(headless.get_classifier(), nn.Identity)


def test_impossible_heads_are_refused_and_change_nothing() -> None:
    model = _model(TOKENS["none"])
    for pool, message in (("token", "pool cls needs a class token"), ("map", "'map' is unknown; known: avg, token")):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(3, pool)
    with pytest.raises(ValueError, match="call forward_features for tokens"):
        model.reset_classifier(0, "")
    assert (model.config, model.get_classifier().out_features) == (TOKENS["none"], 5)


# ---- size


@pytest.mark.parametrize("size", [32, (16, 32), 16])
def test_a_resized_model_is_one_that_was_built_at_that_size(member: VimConfig, size: Any) -> None:
    model = _model(member)
    images = _images(*((size, size) if isinstance(size, int) else size))
    expected = model(images)
    config = dataclasses.replace(member, image_size=size)
    built = VisionMamba(config).eval()
    state = model.state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = resized(state["pos_embed"], member, config.grid)
    built.load_state_dict(state)
    model.set_input_size(size)
    assert model.config == config
    assert torch.equal(model(images), expected), "as the forward pass resizes for such images"
    assert torch.equal(model(images), built(images))
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in built.named_parameters()
    }


def test_frozen_positions_stay_frozen_and_odd_sizes_are_refused() -> None:
    model = _model()
    model.pos_embed.requires_grad_(False)  # type: ignore[union-attr]
    model.set_input_size(24, patch_size=4)
    assert not model.pos_embed.requires_grad  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4; use 16 or 20"):
        model.set_input_size(18)
    with pytest.raises(ValueError, match="patch_size is 4 and cannot become 8"):
        model.set_input_size(24, 8)
    assert model.config.size == (24, 24)


# ---- groups of parameters


def _group(name: str, matcher: dict[str, Any]) -> tuple[float, ...]:
    """A parameter's group as timm's `group_with_matcher` orders it."""
    for number, (_, patterns) in enumerate(matcher.items()):
        for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
            if match := re.match(pattern, name):
                return (number, *map(float, match.groups()), *(suffix or ()))
    return (float("inf"),)


def _groups(model: VisionMamba, coarse: bool = False) -> dict[str, int]:
    keys = {name: _group(name, model.group_matcher(coarse)) for name, _ in model.named_parameters()}
    order = sorted(set(keys.values()))
    return {name: order.index(key) for name, key in keys.items()}


def test_groups_are_stem_layers_and_head() -> None:
    groups = _groups(_model(dataclasses.replace(SMALL, registers=2, pool="registers", register_reduce=2)))
    assert {name: group for name, group in groups.items() if not name.startswith("blocks.")} == {
        "cls_token": 0,
        "registers": 0,
        "pos_embed": 0,
        "patch_embed.weight": 0,
        "patch_embed.bias": 0,
        "norm.weight": 4,
        "neck.weight": 4,
        "neck_norm.weight": 4,
        "head.weight": 4,
        "head.bias": 4,
    }
    of_blocks = {name: group for name, group in groups.items() if name.startswith("blocks.")}
    assert of_blocks == {name: int(name.split(".")[1]) + 1 for name in of_blocks}
    assert _groups(_model(dataclasses.replace(SMALL, pos_embed="coordinates")))["coordinates.scale"] == 0
    eleven = _groups(_model(EVERY_KIND))
    assert (eleven["blocks.1.norm.weight"], eleven["blocks.10.norm.weight"], eleven["head.bias"]) == (2, 11, 12)


def test_coarse_groups_are_stages() -> None:
    model = _model(THREE_STAGES)
    fine, coarse = _groups(model), _groups(model, coarse=True)
    names = ["patch_embed.weight", "blocks.1.norm.weight", "merges.2.project.weight", "blocks.2.norm.weight"]
    names += ["merges.3.norm.weight", "blocks.4.norm.weight", "norm.weight"]
    assert [fine[name] for name in names] == [0, 2, 3, 3, 4, 5, 6]
    assert [coarse[name] for name in names] == [0, 1, 2, 2, 3, 3, 4]
