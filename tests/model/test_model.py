"""VisionMamba: published sizes, parts of the model, and configurations that are refused."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vimscale.kernels.torch_op import registered
from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.cost import costs, flops, parameters
from vimscale.model.layout import layout
from vimscale.model.mixer import Mamba
from vimscale.model.presets import Stage
from vimscale.model.tokens import resized, scan_order
from vimscale.ops import causal_conv1d, selective_scan

SMALL = VimConfig(
    num_classes=5, image_size=16, patch_size=4, d_model=16, depth=3, d_state=4, directions="bi fwd bwd", d_head=8
)
EVERY_KIND = dataclasses.replace(
    SMALL, depth=11, directions="bi@column shared@snake pair*2 attn cross bwd@window fwd shared pair@window*2", window=3
)
FAMILY: dict[str, VimConfig] = {
    "as published": SMALL,
    "every kind of layer": EVERY_KIND,
    "paths in a learned combination": dataclasses.replace(SMALL, depth=2, directions="cross bi", fuse="gate"),
    "concatenated paths": dataclasses.replace(SMALL, depth=2, directions="cross bi", fuse="concat"),
    "LayerNorm before the gate": dataclasses.replace(EVERY_KIND, ssm_norm="layer"),
    "LayerNorm of concatenated paths": dataclasses.replace(
        SMALL, depth=2, directions="cross bi", fuse="concat", ssm_norm="layer"
    ),
    "sums": dataclasses.replace(SMALL, depth=4, directions="cross shared pair*2", fuse="sum"),
    "class tokens at both ends": dataclasses.replace(SMALL, cls_token="both", registers=3),
    "ARM's block": dataclasses.replace(SMALL, norm="layer", mlp="swiglu", expand=1, layer_scale=0.1, ssm_norm=True),
    "the head reads registers": dataclasses.replace(
        SMALL, cls_token="none", registers=4, pool="registers", register_reduce=2
    ),
    "convolutional stem": dataclasses.replace(SMALL, cls_token="first", registers=2, pool="mean", stem="conv"),
    "overlapping patches": dataclasses.replace(SMALL, cls_token="none", pool="max", stride=2),
    "the head reads the last token": dataclasses.replace(SMALL, cls_token="none", pool="last", directions="bi bwd fwd"),
    "not square": dataclasses.replace(SMALL, pos_embed=False, image_size=(16, 24)),
    "hierarchical": dataclasses.replace(
        SMALL, cls_token="none", stages=(Stage(depth=2, d_model=16, directions="fwd bi"), Stage(depth=2, d_model=32))
    ),
    "ssd": dataclasses.replace(SMALL, directions="ssd ssd@column bi", ssd_state=4),
    "ssd with one convolution": dataclasses.replace(
        SMALL, depth=2, directions="ssd*2", ssd_state=4, ssd_form="shared", ssm_norm="layer", fuse="gate"
    ),
    "quasiseparable ssd": dataclasses.replace(
        SMALL, depth=2, directions="ssd*2", ssd_state=4, ssd_form="quasiseparable", layer_scale=0.1
    ),
    "concatenated ssd": dataclasses.replace(
        SMALL, depth=2, directions="ssd*2", ssd_state=4, fuse="concat", backward_gate=True
    ),
    "gated": dataclasses.replace(SMALL, depth=6, directions="bi shared pair*2 fwd cross", backward_gate=True),
}


def _model(config: VimConfig = SMALL) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(config)


def _images(config: VimConfig, b: int = 2) -> torch.Tensor:
    return torch.randn(b, 3, *config.size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILY.values(), ids=FAMILY)
def member(request: Any) -> VimConfig:
    return request.param


# ---- the family


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("vim_tiny", 7_148_008),
        ("vim_small", 25_796_584),
        ("vim_base", 97_598_440),
        ("mambar_large", 341_200_000),  # published as 341.2 M
        ("arm_huge", 662_700_000),  # published as 662.7 M
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, published: int) -> None:
    with torch.device("meta"):
        built = sum(p.numel() for p in VisionMamba(PRESETS[preset]).parameters())
    assert built == parameters(PRESETS[preset])
    assert built == published or (abs(built - published) < 50_000 and published % 100_000 == 0)


@pytest.mark.parametrize("preset", ["vim_large", "vim_huge_reg", "vim_giant", "vim_7b", "vim_7b_reg"])
def test_large_models_are_built_without_memory_and_counted_layer_by_layer(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = VisionMamba(config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    parts = {part.name: part.parameters for part in costs(config)}
    for i, block in enumerate(model.blocks):
        assert sum(p.numel() for p in block.parameters()) == parts[f"layer {i}"]
    assert sum(p.numel() for p in model.parameters()) == sum(parts.values()) == parameters(config)


def test_counts_are_those_of_the_built_model(member: VimConfig) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionMamba(member).parameters()) == parameters(member)


def test_every_parameter_takes_part_and_learns(member: VimConfig) -> None:
    model = _model(member)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    logits = model(_images(member))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_flops_agree_with_a_count_of_the_matrix_products(member: VimConfig) -> None:
    """torch counts products, but not those inside registered ops: subtract what mixers and attention do there."""
    with registered(), FlopCounterMode(display=False) as counter, torch.no_grad():
        _model(member)(_images(member, 1))
    ours = flops(member)
    for part in costs(member):
        if part.layer is None:
            continue
        e, n, r = member.expand * part.d_model, member.d_state, member.dt_rank(part.d_model)
        paths = len(part.layer.paths)
        inside = paths * e * (9 * n + 2 * member.d_conv + 2 * (r + 2 * n) + 2 * r)
        if part.layer.kind == "shared":  # its projections are outside the fused op
            inside = e * (2 * 9 * n + 2 * member.d_conv)
        elif part.layer.kind == "attn":
            inside = 4 * part.tokens * part.d_model
        elif part.layer.kind == "ssd":
            n, sets = member.ssd_state, 1 if member.ssd_form == "shared" else paths
            convolved = e + 2 * n * (2 if member.ssd_form == "quasiseparable" else 1)
            inside = paths * 5 * e * n + sets * 2 * member.d_conv * convolved
        ours -= part.tokens * inside
    assert abs(ours - counter.get_total_flops()) <= 0.01 * ours


def test_configs_survive_json(member: VimConfig) -> None:
    assert VimConfig.from_dict(json.loads(json.dumps(member.to_dict()))) == member


# ---- tokens


@pytest.mark.parametrize(
    ("cls_token", "registers", "cls", "taken"),
    [
        ("none", 0, (), ()),
        ("first", 0, (0,), ()),
        ("middle", 0, (8,), ()),
        ("both", 0, (0, 17), ()),
        ("middle", 3, (9,), (4, 10, 15)),  # 16 patches: a register after every 4, the class token after 8
    ],
)
def test_class_token_and_registers_are_at_the_configured_positions(
    cls_token: Any, registers: int, cls: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    config = dataclasses.replace(SMALL, cls_token=cls_token, registers=registers)
    slots = layout(config, (4, 4))
    assert (slots.cls, slots.registers, slots.tokens) == (cls, taken, config.tokens)
    image, extra = torch.arange(16.0).view(1, 16, 1), -1 - torch.arange(float(len(cls) + registers)).view(-1, 1)
    sequence = slots.insert(image, extra if len(extra) else None)
    assert torch.equal(slots.image_tokens(sequence), image)
    assert [sequence[0, position, 0].item() for position in (*cls, *taken)] == extra.flatten().tolist()


def test_scan_orders_visit_the_grid_as_their_names_say() -> None:
    config = dataclasses.replace(SMALL, cls_token="none", window=2)

    def order(name: Any) -> list[int]:
        return scan_order(name, config, (3, 4)).tolist()

    assert order("row") == list(range(12))
    assert order("column") == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert order("snake") == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert order("window") == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    middle = dataclasses.replace(config, cls_token="middle")
    assert scan_order("column", middle, (2, 2)).tolist() == [0, 3, 2, 1, 4]  # the class token keeps its position


@pytest.mark.parametrize("order", ["column", "snake", "window"])
def test_an_order_is_the_plain_scan_of_permuted_patches(order: str) -> None:
    config = dataclasses.replace(
        SMALL, depth=2, directions=f"bi@{order}*2", cls_token="none", pos_embed=False, window=3
    )
    plain = dataclasses.replace(config, directions="bi*2")
    model, other = _model(config), _model(plain)
    images = _images(config)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (b, 3, l, 4, 4)
    moved = patches[:, :, scan_order(order, config, config.grid)]  # type: ignore[arg-type]
    again = moved.unflatten(2, (4, 4)).transpose(3, 4).flatten(2, 3).flatten(3, 4)
    torch.testing.assert_close(model(images), other(again))


def test_the_position_embedding_is_resized_around_the_class_token() -> None:
    config = dataclasses.replace(SMALL, cls_token="middle", registers=1)
    rows = torch.arange(4.0).repeat_interleave(4).view(16, 1).expand(16, 2)
    before = layout(config, (4, 4))
    position = before.insert(rows[None], torch.tensor([[100.0, 100.0], [-100.0, -100.0]]))[0]
    larger = resized(position, config, (8, 4))
    after = layout(config, (8, 4))
    assert larger[after.cls[0]].tolist() == [100, 100]
    assert larger[after.registers[0]].tolist() == [-100, -100]
    plane = after.image_tokens(larger[None]).view(8, 4, 2)
    assert torch.equal(plane[:, :1].expand_as(plane), plane), "equal columns stay equal"
    # in the middle of a ramp, bicubic interpolation is close to the ramp, at half-pixel centers
    torch.testing.assert_close(plane[3:5, 0, 0], torch.tensor([1.25, 1.75]), rtol=0, atol=0.05)
    assert torch.equal(resized(position, config, (4, 4)), position)


@pytest.mark.parametrize("size", [(8, 8), (16, 32), (24, 16)])
def test_a_model_takes_images_of_any_size(member: VimConfig, size: tuple[int, int]) -> None:
    model = _model(member)
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5)


def test_an_image_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="resize or pad 18 to 16 or 20"):
        _model()(torch.zeros(1, 3, 16, 18))


def test_packed_images_give_the_logits_of_each_image_alone(member: VimConfig) -> None:
    model = _model(member).eval()
    images = [torch.randn(3, *size) for size in ((16, 24), (24, 24), (8, 8), (16, 16))]
    if member.stages:
        with pytest.raises(ValueError, match="cannot be packed"):
            model(images)
        return
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, config in FAMILY.items() if not config.stages])
def test_drop_path_drops_all_tokens_of_an_image_in_a_pack(name: str) -> None:
    config = dataclasses.replace(FAMILY[name], drop_path=0.5)
    model = _model(config)
    images = [torch.randn(3, *size) for size in ((16, 24), (8, 8), (16, 16))]
    draws = torch.tensor([[0.9], [0.1], [0.9]]).expand(3, len(config.layers))
    alone = torch.cat([model(image[None], draw[None]) for image, draw in zip(images, draws, strict=True)])
    torch.testing.assert_close(model(images, draws), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # to a cached function, which dynamo traces
@pytest.mark.slow
def test_a_model_compiles_as_one_graph() -> None:
    model, images = _model(EVERY_KIND), _images(EVERY_KIND)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


# ---- directions


def test_directions_decide_which_paths_a_layer_has() -> None:
    mixers = [block.mixer for block in _model(EVERY_KIND).blocks]
    reverses = [[reverse for _, reverse in m.paths] if isinstance(m, Mamba) else None for m in mixers]
    both, forward, back = [False, True], [False], [True]
    assert reverses == [both, both, forward, back, None, both * 2, back, forward, both, forward, back]
    assert [len(m.A_log) for m in mixers if isinstance(m, Mamba)] == [2, 2, 1, 1, 4, 1, 1, 2, 1, 1]
    assert [len(m.D) for m in mixers if isinstance(m, Mamba)] == [2, 1, 1, 1, 4, 1, 1, 1, 1, 1]  # shared: one set


def test_a_forward_layer_does_not_let_early_tokens_see_late_ones() -> None:
    model = _model(dataclasses.replace(SMALL, directions="fwd*3", cls_token="first"))
    before = model(torch.zeros(1, 3, 16, 16))
    late = torch.zeros(1, 3, 16, 16)
    late[..., 12:, 12:] = 1
    torch.testing.assert_close(model(late), before)


def _without_backward_paths(config: VimConfig, directions: str) -> tuple[VisionMamba, VisionMamba]:
    """Return a model, and one with `directions` and the same weights where it has them."""
    full = _model(config)
    part = _model(dataclasses.replace(config, directions=directions))
    state = {}
    for name, p in part.named_parameters():
        weight = full.get_parameter(name)
        state[name] = weight if weight.shape == p.shape else weight[: len(p)]
    part.load_state_dict(state)
    return full, part


@pytest.mark.parametrize("kind", ["bi", "shared"])
@pytest.mark.parametrize("fuse", ["mean", "sum"])
def test_a_backward_path_with_factor_zero_leaves_the_forward_path(kind: str, fuse: Any) -> None:
    config = dataclasses.replace(SMALL, directions=f"{kind}*3", fuse=fuse)
    model, forward_only = _without_backward_paths(config, "fwd*3")
    if fuse == "mean":  # half of it: a path that a mean lacks counts as zero
        for block in forward_only.blocks:
            block.mixer.out_proj.weight.data /= 2  # type: ignore[union-attr]
    images = _images(config)
    torch.testing.assert_close(model(images, backward=[0.0] * 3), forward_only(images))
    torch.testing.assert_close(model(images, backward=[1e-6] * 3), forward_only(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", ["bi*2", "shared*2", "pair*2", "cross*2"])
def test_a_gate_is_a_factor_on_the_backward_path(directions: str) -> None:
    config = dataclasses.replace(SMALL, depth=2, directions=directions)
    plain, gated = _model(config), _model(dataclasses.replace(config, backward_gate=True))
    gated.load_state_dict(plain.state_dict(), strict=False)
    images = _images(config)
    torch.testing.assert_close(gated(images), plain(images))
    for name, p in gated.named_parameters():
        if name.endswith("backward_gate"):
            p.data.fill_(0.25)
    torch.testing.assert_close(gated(images), plain(images, backward=[0.25] * 2))
    assert not torch.allclose(gated(images), plain(images))


def test_the_ramp_scales_the_backward_path_from_zero_to_one() -> None:
    config = dataclasses.replace(SMALL, backward_ramp=(10, 20))
    assert [config.backward_at(step) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]


def test_published_init_zeroes_the_backward_step_bias_and_ours_does_not() -> None:
    mixer = _model().blocks[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    forward, backward = _model(dataclasses.replace(SMALL, init="published")).blocks[0].mixer.dt_bias
    assert backward.abs().sum() == 0
    assert forward.abs().sum() > 0


# ---- stability


def test_drop_path_drops_the_images_that_the_draws_select(member: VimConfig) -> None:
    config = dataclasses.replace(member, drop_path=0.5)
    model, images = _model(config), _images(config, 4)
    kept = torch.ones(4, len(config.layers))
    dropped = kept.clone()
    dropped[1, -1] = 0.0
    differs = (model(images, dropped) != model(images, kept)).any(dim=1)
    assert differs.tolist() == [False, True, False, False]
    assert model.drop_rates[[0, -1]].tolist() == [0.0, 0.5]


@pytest.mark.parametrize("fuse", ["mean", "concat"])
def test_the_norm_layer_precedes_the_gate(fuse: Any) -> None:
    config = dataclasses.replace(SMALL, depth=1, directions="bi", fuse=fuse, ssm_norm="layer")
    model, images = _model(config), _images(config)
    mixer: Any = model.blocks[0].mixer
    torch.nn.init.normal_(mixer.ssm_norm)
    torch.nn.init.normal_(mixer.ssm_norm_bias)
    seen: dict[str, torch.Tensor] = {}
    mixer.in_proj.register_forward_hook(lambda _, __, xz: seen.update(xz=xz))
    mixer.out_proj.register_forward_pre_hook(lambda _, into: seen.update(into=into[0]))
    model(images)
    x, z = seen["xz"].chunk(2, dim=-1)
    parts = []
    for path, reverse in enumerate((False, True)):
        c = causal_conv1d(x, mixer.conv_weight[path], mixer.conv_bias[path], reverse=reverse, activation="silu")
        dt, B, C = torch.nn.functional.linear(c, mixer.x_proj[path]).split([1, 4, 4], dim=-1)
        A = -mixer.A_log[path].exp()
        dt = torch.nn.functional.linear(dt, mixer.dt_proj[path])
        parts.append(selective_scan(c, dt, A, B, C, mixer.D[path], None, mixer.dt_bias[path], reverse=reverse))
    y = sum(parts) / 2 if fuse == "mean" else torch.cat(parts, dim=-1)
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gate = torch.nn.functional.silu(torch.cat([z] * (y.shape[-1] // z.shape[-1]), dim=-1))
    torch.testing.assert_close(seen["into"], (normed * mixer.ssm_norm + mixer.ssm_norm_bias) * gate)


def test_weight_decay_leaves_the_scans_parameters_alone() -> None:
    config = dataclasses.replace(
        SMALL, backward_gate=True, registers=2, layer_scale=0.1, ssm_norm="layer", norm="layer"
    )
    not_decayed = _model(config).no_weight_decay()
    assert {"pos_embed", "cls_token", "registers", "norm.weight", "norm.bias", "head.bias"} <= not_decayed
    of_mixer = {"A_log", "D", "dt_bias", "conv_bias", "layer_scale", "ssm_norm", "ssm_norm_bias"}
    assert {f"blocks.0.mixer.{name}" for name in of_mixer} <= not_decayed
    decayed = {"head.weight", "patch_embed.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.x_proj"}
    assert not (decayed | {"blocks.0.mixer.backward_gate"}) & not_decayed


def test_probes_report_steps_states_and_gates_and_change_nothing() -> None:
    config = dataclasses.replace(EVERY_KIND, backward_gate=True)
    model, images = _model(config), _images(config)
    before = model(images)
    model.probes = {}
    assert torch.equal(model(images), before)
    probes, model.probes = model.probes, None
    assert list(probes) == list(range(11))
    assert {"rms", "dt_min", "dt_max", "state", "gate"} == set(probes[0])
    assert set(probes[4]) == {"rms"}  # attention
    for probe in probes.values():
        assert all(torch.isfinite(value) and value.ndim == 0 for value in probe.values())
    assert 0 < probes[0]["dt_min"] < probes[0]["dt_max"]


def test_bf16_autocast_keeps_the_scan_in_fp32_and_the_logits_close(member: VimConfig) -> None:
    model, images = _model(member), _images(member)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert rounded.dtype == torch.float32
    # logits around 0.1 are sums of a few products, each rounded to 8 bits
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)


# ---- what is refused


def test_faults_of_a_configuration_are_reported_together() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size") as caught:
        VimConfig(image_size=30, patch_size=16, depth=2, directions="bi*3", drop_path=1.5)
    assert len([line for line in str(caught.value).splitlines() if not line.startswith(" ")]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "cls", "cls_token": "none"}, "cls_token is none: use cls_token: middle or pool: mean"),
        ({"pool": "registers"}, "there are none: use registers: 12"),
        ({"register_reduce": 2}, "register_reduce needs pool: registers"),
        ({"registers": 99}, r"more registers \(99\) than image tokens \(16\)"),
        ({"stride": 5}, "above patch_size 4"),
        ({"stem": "conv", "patch_size": 2}, "stem conv needs a patch_size of 4, 8, 16"),
        ({"image_size": (16, 18)}, "image_size 18 is not a multiple of patch_size 4; use 16 or 20"),
        ({"directions": "attn*3", "d_head": 5}, "multiple of d_head 5"),
        ({"directions": "pair*2 bi", "fuse": "concat"}, "pair layers combine paths by fuse mean or sum, not concat"),
        ({"backward_ramp": (20, 10)}, "the first one earlier"),
        ({"stages": (Stage(depth=1, d_model=16),)}, "set cls_token: none and registers: 0"),
        (
            {"stages": (Stage(depth=1, d_model=8), Stage(depth=1, d_model=8, downsample=3)), "cls_token": "none"},
            "multiple of 12",
        ),
        ({"d_state": 0}, "d_state is 0; it must be at least 1"),
    ],
)
def test_an_impossible_shape_is_refused_with_a_fix(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
