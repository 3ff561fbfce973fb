"""Layers of kind `ssd`: what they compute, backward paths that change, packed images, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vimscale.errors import RecipeError
from vimscale.launch.commands.app import app
from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.cost import parameters
from vimscale.model.ssd import Ssd
from vimscale.model.tokens import Tokens

BASE = VimConfig(
    num_classes=5, image_size=16, patch_size=4, d_model=16, depth=2, directions="ssd*2", d_head=8, ssd_state=4
)
FORMS = ["separate", "shared", "quasiseparable"]


def _model(**changes: Any) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(dataclasses.replace(BASE, **changes))
    for p in model.parameters():  # no factor at its neutral value
        p.data += 0.05 * torch.randn(p.shape)
    return model


def _mixer(model: VisionMamba) -> Ssd:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Ssd)
    return mixer


def _images(b: int = 2) -> Tensor:
    return torch.randn(b, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence of the paper, token by token: x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, n)."""
    state, outputs = x.new_zeros(*x.shape[::2], x.shape[3], B.shape[-1]), []
    for t in range(x.shape[1]):
        decay, added = (dt[:, t] * A).exp(), (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        state = decay[..., None, None] * state + added
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t]))
    return torch.stack(outputs, dim=1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal, depthwise: x (b, l, e), weight (e, w), bias (e)."""
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight)).mT


def _by_hand(mixer: Ssd, u: Tensor) -> Tensor:
    """The layer in plain torch, with flipped copies for the backward direction."""
    form, heads, n, e = mixer.form, mixer.heads, mixer.states, mixer.widths[0]
    z, xbc, dt = mixer.in_proj(u).split(mixer.widths, dim=-1)
    x, total = xbc, torch.zeros_like(z)
    if form == "quasiseparable":
        first, second = (
            _conv(t, w, b) for t, w, b in zip((xbc, xbc.flip(1)), mixer.conv_weight, mixer.conv_bias, strict=True)
        )
        mixed = F.silu(first + second.flip(1))
        x = mixed[..., :e]
    elif form == "shared":
        mixed = F.silu(_conv(xbc, mixer.conv_weight[0], mixer.conv_bias[0]))
    for k, reverse in enumerate((False, True)):
        own = 0 if form == "quasiseparable" else k

        def turned(t: Tensor, reverse: bool = reverse) -> Tensor:
            return t.flip(1) if reverse else t

        if form == "separate":
            convolved = F.silu(_conv(turned(xbc), mixer.conv_weight[k], mixer.conv_bias[k]))
        else:
            convolved = turned(mixed)
        offset = e + 2 * n * k if form == "quasiseparable" else e
        raw = dt[..., heads * k : heads * (k + 1)] if form == "quasiseparable" else dt
        B, C = convolved[..., offset : offset + n], convolved[..., offset + n : offset + 2 * n]
        of_heads = convolved[..., :e].unflatten(-1, (heads, -1))
        step = F.softplus(turned(raw) + mixer.dt_bias[own])
        y = _scan(of_heads, step, -mixer.A_log[own].exp(), B, C)
        if form == "quasiseparable":
            y = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
        else:
            y = y + mixer.D[own][:, None] * of_heads
        total = total + turned(y.flatten(2)) / 2
    if mixer.D_proj is not None:
        factor = mixer.D_proj(x) + mixer.D[0]
        total = total + (x.unflatten(-1, (heads, -1)) * factor.unsqueeze(-1)).flatten(2)
    gated = total * F.silu(z)
    assert mixer.ssm_norm is not None
    return mixer.out_proj(F.rms_norm(gated, gated.shape[-1:], mixer.ssm_norm, BASE.norm_eps))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_computes_the_published_formula(form: str) -> None:
    mixer = _mixer(_model(ssd_form=form))
    u = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(2))
    tokens = Tokens(mixer.config, (((4, 4),),), 17, u.device)
    torch.testing.assert_close(mixer(u, tokens), _by_hand(mixer, u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", ["scan", "block"])
def test_recomputation_does_not_change_a_bit(form: str, level: Any) -> None:
    outcomes = []
    for recompute in ("none", level):
        model = _model(ssd_form=form)
        model.recompute = [recompute] * 2
        loss = model(_images(), backward=[0.5, 1.0]).square().sum()
        outcomes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("images", [(16, 16), (16, 8), (8, 24)])
def test_packed_images_get_the_logits_that_they_get_alone(form: str, images: tuple[int, int]) -> None:
    model = _model(ssd_form=form, directions="ssd ssd@column")
    several = [_images()[0], torch.randn(3, *images), torch.randn(3, 8, 8)]
    alone = torch.cat([model(image[None]) for image in several])
    torch.testing.assert_close(model(several), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_and_a_tensor_are_the_same_factor_on_the_backward_path(form: str) -> None:
    model = _model(ssd_form=form)
    for factor in (0.0, 0.25, 1.0):
        as_tensor = model(_images(), backward=[torch.tensor(factor)] * 2)
        torch.testing.assert_close(model(_images(), backward=[factor] * 2), as_tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", ["mean", "sum", "gate", "concat"])
def test_without_its_backward_path_a_layer_looks_back_only(fuse: Any) -> None:
    model = _model(fuse=fuse)
    mixer, u = _mixer(model), torch.randn(1, 17, 16)
    changed = u.clone()
    changed[:, 10:] += 1
    tokens = Tokens(mixer.config, (((4, 4),),), 17, u.device)
    for backward, same in ((0.0, True), (1.0, False)):
        before, after = (mixer(t, tokens, backward)[:, :10] for t in (u, changed))
        assert torch.allclose(before, after, atol=1e-6) == same


def test_backward_slices_are_those_of_the_backward_path() -> None:
    names = {form: {*_model(ssd_form=form, depth=1, directions="ssd").backward_slices()} for form in FORMS}
    separate = {f"blocks.0.mixer.{name}" for name in ("conv_weight", "conv_bias", "dt_bias", "A_log", "D")}
    assert names["separate"] == separate
    assert names["shared"] == {f"blocks.0.mixer.{name}" for name in ("dt_bias", "A_log", "D")}
    assert names["quasiseparable"] == set()


@pytest.mark.parametrize("form", FORMS)
def test_probes_have_the_steps_the_state_and_the_gate(form: str) -> None:
    model = _model(ssd_form=form, backward_gate=True)
    model.probes = {}
    model(_images())
    for probe in model.probes.values():
        assert {"rms", "dt_min", "dt_max", "state", "gate"} == probe.keys()
        assert 0 < probe["dt_min"] <= probe["dt_max"]
        assert probe["state"] > 0


def test_initial_values_are_those_of_mamba_2() -> None:
    torch.manual_seed(0)
    mixer = _mixer(VisionMamba(dataclasses.replace(BASE, d_model=512)))
    A, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16
    assert 9e-4 < steps.min() < 2e-3
    assert 5e-2 < steps.max() < 0.11
    assert (mixer.D == 1).all()


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_presets_have_about_as_many_parameters_as_vims(size: str) -> None:
    assert 0.9 < parameters(PRESETS[f"ssd_{size}"]) / parameters(PRESETS[f"vim_{size}"]) < 1.0


VIT = {"tiny": 5.717e6, "small": 22.05e6, "base": 86.57e6, "large": 304.3e6}
"""Parameters of DeiT (arXiv:2012.12877) and of ViT-L/16 (arXiv:2010.11929) at 224 pixels."""


@pytest.mark.parametrize("size", VIT)
def test_presets_with_mlps_have_about_as_many_parameters_as_vits(size: str) -> None:
    assert 0.9 < parameters(PRESETS[f"ssd_mlp_{size}"]) / VIT[size] < 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_head": 24}, "ssd layers need an expand x d_model that is a multiple of d_head 24"),
        ({"ssd_state": 0}, "ssd_state is 0; it must be at least 1"),
        (
            {"ssd_form": "quasiseparable", "fuse": "concat"},
            "quasiseparable ssd layers combine paths by fuse mean or sum, not concat",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.d_head=24", "ssd layers need an expand x d_model that is a multiple of d_head 24"),
        ("model.ssd_state=0", "ssd_state is 0; it must be at least 1"),
        ("model.ssd_state=5000", "ssd_state is 5000; it must be at most 4,096"),
        ("model.directions=ssd_pair*4", "'ssd_pair' is not a kind of layer"),
        ("model.directions=ssd_cross*4", "'ssd_cross' is not a kind of layer"),
    ],
)
def test_a_recipe_that_does_not_fit_gets_one_message(change: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        app(["show", "vim_digits_cpu", "model.directions=ssd*4", change], standalone_mode=False)
    assert len(refused.value.faults) == 1
    assert message in str(refused.value)


@pytest.mark.parametrize(("kind", "path"), [("ssd_fwd", 0), ("ssd_bwd", 1)])
def test_one_direction_is_a_path_of_both(kind: str, path: int) -> None:
    both, one = _model(directions="ssd*2", fuse="sum"), _model(directions=f"{kind}*2")
    state = {
        name: t[path : path + 1] if name.split(".")[-1] in _mixer(both).path_parameters else t
        for name, t in both.state_dict().items()
    }
    one.load_state_dict(state)
    for block in both.blocks:  # the other path contributes nothing
        block.mixer.D.data[1 - path] = 0
        e, n = block.mixer.widths[0], block.mixer.states
        block.mixer.conv_weight.data[1 - path, e + n :] = 0  # C
        block.mixer.conv_bias.data[1 - path, e + n :] = 0
    images = _images()
    torch.testing.assert_close(one(images), both(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ssd_fwd", "ssd_bwd"])
def test_one_direction_of_a_quasiseparable_layer_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="write ssd, not ssd_fwd or ssd_bwd"):
        dataclasses.replace(BASE, directions=f"{kind}*2", ssd_form="quasiseparable")
