"""Published Vision Mambas convert to our models and back: every mode of their code, bit by bit."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import published
from tests.support.published import ARM, CASES, VIM, arguments_of, random_state
from vimscale.errors import CheckpointError
from vimscale.model import VimConfig, VisionMamba
from vimscale.model.published.arguments import complete
from vimscale.model.published.quirks import PublishedVim, build
from vimscale.model.published.weights import PUBLISHED, from_published, guess, named, published_config, to_published
from vimscale.model.tokens import Tokens


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert off < bound, f"{what} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("case", CASES)
def test_every_mode_gives_the_logits_and_gradients_of_the_published_code(case: str) -> None:
    arguments, position = arguments_of(case)
    state = random_state(arguments)
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
def test_every_mode_converts_there_and_back_bit_by_bit(case: str) -> None:
    arguments, _ = arguments_of(case)
    state = {key: torch.randn_like(value) for key, value in random_state(arguments).items()}  # rotations too
    model = from_published(arguments, state)
    again = to_published(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    other = from_published(published_config(model), again)
    assert type(other) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_only_quirks_need_another_model_class() -> None:
    for case in ("v2", "v1", "none", "first class token", "mean", "gamma", "layer norm", "stride", "Mamba-R", "ARM"):
        assert type(build(arguments_of(case)[0])) is VisionMamba, case
    for case in ("pairs", "rope", "flipped", "all logits", "no head", "one channel", "slow path"):
        assert type(build(arguments_of(case)[0])) is PublishedVim, case


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_are_recognised_by_their_states(name: str) -> None:
    with torch.device("meta"):
        state = to_published(build(complete(PUBLISHED[name])))
    assert named(name, state) == complete(PUBLISHED[name])
    found, _ = guess(state)
    assert {key: value.shape for key, value in state.items()} == _meta_shapes(found)


def _meta_shapes(arguments: dict[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in to_published(build(arguments)).items()}


def test_models_with_quirks_take_images_of_one_size() -> None:
    model = build(arguments_of("pairs")[0])
    with pytest.raises(ValueError, match="takes images of one size"):
        model([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)])


@pytest.mark.parametrize("what", ["cls_position", "token_order"])
def test_random_positions_are_drawn_in_every_forward(what: str) -> None:
    arguments, _ = arguments_of("moved class token")
    model = from_published(arguments, random_state(arguments), **{what: "random"}).eval()
    image = torch.randn(1, 3, 16, 16)
    torch.manual_seed(0)
    drawn = torch.stack([model(image) for _ in range(8)])
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.stack([model(image) for _ in range(8)]))
    assert len(drawn.detach().unique(dim=0)) > 1


@pytest.mark.parametrize("case", ["v2", "two class tokens", "Mamba-R", "ARM", "rope of residual"])
def test_resizing_a_checkpoint_keeps_the_positions_of_its_extra_tokens(case: str) -> None:
    arguments, _ = arguments_of(case)
    state = random_state(arguments)
    larger = complete(arguments | {"img_size": 2 * arguments["img_size"]})
    model = from_published(arguments, state, resize_to=larger["img_size"])
    out = to_published(model)
    assert {key: value.shape for key, value in out.items()} == {k: v.shape for k, v in random_state(larger).items()}
    assert all(torch.equal(out[key], state[key]) for key in state if "pos_embed" not in key and "rope" not in key)
    images = torch.randn(1, 3, larger["img_size"], larger["img_size"])
    if "if_rope" not in CASES[case]:
        expected = from_published(arguments, state)(images)  # resizes in forward
        assert torch.equal(model(images), expected)
    if "pos_embed_cls" in state:
        assert torch.equal(out["pos_embed_cls"], state["pos_embed_cls"])


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_guessed_right_from_keys_and_shapes(case: str) -> None:
    arguments, _ = arguments_of(case)
    if arguments["img_size"] == (12, 20):
        with pytest.raises(CheckpointError, match="15 patches do not form a square"):
            guess(random_state(arguments))
        return
    found, taken = guess(random_state(arguments))
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
    if case == "stride":  # below 224 pixels the state does not show it
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


def test_a_stride_is_guessed_for_images_of_224_pixels() -> None:
    arguments = complete(VIM | {"img_size": 224, "patch_size": 32, "stride": 16})
    found, taken = guess(random_state(arguments))
    assert (found["img_size"], found["stride"]) == (224, 16)
    assert "img_size 224 with stride 16" in taken


@pytest.mark.parametrize("case", ["pairs of v1", "flipped rope", "two class tokens, mixed up", "v2"])
def test_maps_show_the_image_in_its_own_order(case: str) -> None:
    """With layers that do nothing, the map after the last one is that of the embedding."""
    arguments, _ = arguments_of(case)
    state = random_state(arguments)
    for key, value in state.items():
        if "out_proj" in key or "pos_embed" in key:
            value.zero_()
        if key.startswith("rope."):
            value.fill_(float("cos" in key))
    model = from_published(arguments, state, token_order="random" if "mixed" in CASES[case] else None)
    images = torch.randn(1, 3, 16, 16)
    doubled = 2 if arguments["if_bidirectional"] else 1  # a pair puts out the residual twice
    (shown,) = model.get_intermediate_layers(images, [1], reshape=True)
    torch.testing.assert_close(shown, doubled * model.patch_embed(images))


def _with_quirks(**arguments: Any) -> PublishedVim:
    torch.manual_seed(0)
    every = complete(VIM | arguments)
    model = from_published(every, random_state(every))
    assert isinstance(model, PublishedVim)
    return model.eval()


@pytest.mark.parametrize(
    "arguments", [{"if_bidirectional": True}, {"if_rope": True}, {"if_bidirectional": True, "depth": 3}]
)
def test_published_models_give_tokens_and_maps(arguments: dict[str, Any]) -> None:
    model, images = _with_quirks(**arguments), torch.randn(2, 3, 16, 16)
    tokens, maps = model.forward_intermediates(images, norm=True)
    assert torch.equal(model.forward_head(tokens), model(images))
    torch.testing.assert_close(maps[-1].flatten(2).mT, tokens[:, 1:], rtol=1e-5, atol=1e-5)
    assert len(maps) == 2, "a layer that the published code leaves out has no map"


def test_published_models_take_a_new_head_and_refuse_the_rest() -> None:
    model, images = _with_quirks(num_classes=0), torch.randn(2, 3, 16, 16)
    read = model(images)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert torch.equal(model(images, features=True), read)
    assert model.arguments["num_classes"] == 7
    with pytest.raises(ValueError, match="leave global_pool out"):
        model.reset_classifier(7, "avg")
    with pytest.raises(ValueError, match="import it with another img_size"):
        model.set_input_size(32)
    with pytest.raises(ValueError, match="import it with a smaller depth"):
        model.prune_intermediate_layers([0])
    flipped = _with_quirks(flip_img_sequences_ratio=1.0)
    with pytest.raises(ValueError, match="because of flip_img_sequences_ratio: call the model instead"):
        flipped.forward_head(flipped.forward_features(images))


# ---- errors


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


def test_a_wrong_state_dict_gives_one_error_with_the_first_fault_of_each_kind() -> None:
    state = random_state(complete(VIM))
    state["head.weight"] = state["head.weight"][:3]
    state["layers.0.mixer.B"] = state.pop("layers.0.mixer.A_log")
    with pytest.raises(CheckpointError) as caught:
        from_published(VIM, state)
    message = str(caught.value)
    assert "1 missing: layers.0.mixer.A_log" in message
    assert "1 unexpected: layers.0.mixer.B" in message
    assert "1 with the wrong shape: head.weight (3, 16), not (5, 16)" in message
    assert "check depth, embed_dim, bimamba_type, class token and num_classes" in message


def test_a_position_embedding_of_another_image_size_is_reported() -> None:
    with pytest.raises(CheckpointError, match="img_size 32 needs 65 positions, but there are 17: give the img_size"):
        from_published(VIM | {"img_size": 32}, random_state(complete(VIM)))


OURS = VimConfig(num_classes=5, image_size=16, patch_size=4, d_model=16, depth=2, d_state=4, directions="bi*2")
NOT_EXPRESSIBLE = {
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
    "ssm_norm layer": {"ssm_norm": "layer"},
    "backward_gate True": {"backward_gate": True},
    "expand 2: only 1": {"directions": "cross*2", "mlp": "swiglu", "norm": "layer"},
}


@pytest.mark.parametrize("message", NOT_EXPRESSIBLE)
def test_what_the_published_code_cannot_express_is_named(message: str) -> None:
    model = VisionMamba(dataclasses.replace(OURS, **NOT_EXPRESSIBLE[message]))
    with pytest.raises(CheckpointError, match="cannot express this model\n(.*\n)*  " + message):
        to_published(model)


def test_a_model_within_its_backward_ramp_is_not_exported() -> None:
    model = VisionMamba(OURS)
    model.backward = 0.5
    with pytest.raises(CheckpointError, match=r"have a factor of 0.5"):
        to_published(model)


@pytest.mark.parametrize(
    ("key", "whose"),
    [("mixer.norm_b.weight", "Dino-Mamba's"), ("norm_mlp.weight", "Adventurer's"), ("mixer.D", "no published vision")],
)
def test_weights_with_layers_of_mamba2_are_named_and_refused(key: str, whose: str) -> None:
    state = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "norm_f.weight": torch.ones(8)}
    state |= {"layers.0.mixer.conv1d.weight": torch.zeros(24, 1, 4), "layers.0.mixer.A_log": torch.zeros(2)}
    state[f"layers.0.{key}"] = torch.ones(8)
    with pytest.raises(CheckpointError, match=f"{whose}.*docs/published.md"):
        guess(state)


@torch.no_grad()
def test_the_mixer_of_adventurer_and_mamba_ssm_is_our_forward_ssd_layer() -> None:
    """A loop over tokens, written from the definition of MambaCustom (wangf3014/Adventurer), with its names."""
    torch.manual_seed(0)
    e, n, h = 16, 4, 2
    shapes = {"in_proj.weight": (2 * e + 2 * n + h, 8), "conv1d.weight": (e + 2 * n, 1, 4), "conv1d.bias": (e + 2 * n,)}
    shapes |= {"dt_bias": (h,), "A_log": (h,), "D": (h,), "norm.weight": (e,), "out_proj.weight": (8, e)}
    theirs = {key: 0.5 * torch.randn(shape) for key, shape in shapes.items()}
    config = VimConfig(d_model=8, depth=1, directions="ssd_fwd", d_head=8, ssd_state=n, image_size=16, patch_size=4)
    model = VisionMamba(config)
    mixer = model.blocks[0].mixer
    names = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "norm.weight": "ssm_norm"}
    own = {names.get(key, key): value for key, value in theirs.items()}
    mixer.load_state_dict({name: own[name].reshape(value.shape) for name, value in mixer.state_dict().items()})

    u = torch.randn(2, 17, 8)
    z, xBC, dt = F.linear(u, theirs["in_proj.weight"]).split([e, e + 2 * n, h], dim=-1)
    padded = F.pad(xBC.mT, (3, 0))
    xBC = F.silu(F.conv1d(padded, theirs["conv1d.weight"], theirs["conv1d.bias"], groups=e + 2 * n)).mT
    x, B, C = xBC.split([e, n, n], dim=-1)
    x, step = x.unflatten(-1, (h, -1)), F.softplus(dt + theirs["dt_bias"])
    state, ys = torch.zeros(2, h, e // h, n), []
    for t in range(17):
        decay = (step[:, t] * -theirs["A_log"].exp()).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bn->bhpn", step[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]) + theirs["D"][:, None] * x[:, t])
    y = F.rms_norm(torch.stack(ys, 1).flatten(2) * F.silu(z), (e,), theirs["norm.weight"], 1e-5)
    _close(mixer(u, Tokens(config, (((4, 4),),), 17, u.device)), F.linear(y, theirs["out_proj.weight"]), 1e-5, "y")
