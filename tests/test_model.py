"""VisionMamba: the published sizes, its parts, and what its configuration refuses."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vimscale.model import PRESETS, VimConfig, VisionMamba
from vimscale.model.vim import flops

SMALL = VimConfig(num_classes=5, image_size=16, patch_size=4, d_model=16, depth=3, d_state=4, directions="bi fwd bwd")


def _model(config: VimConfig = SMALL) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(config)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("vim_tiny", 7_148_008), ("vim_small", 25_796_584), ("vim_base", 97_598_440)]
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VisionMamba(PRESETS[preset]).parameters()) == parameters


def test_directions_decide_which_paths_a_layer_has() -> None:
    mixers = [block.mixer for block in _model().blocks]
    assert [mixer.reverse for mixer in mixers] == [(False, True), (False,), (True,)]
    assert [len(mixer.A_log) for mixer in mixers] == [2, 1, 1]


@pytest.mark.parametrize(("cls_token", "index", "tokens"), [("none", None, 16), ("first", 0, 17), ("middle", 8, 17)])
def test_the_class_token_stands_where_it_is_told(cls_token: str, index: int | None, tokens: int) -> None:
    config = dataclasses.replace(SMALL, cls_token=cls_token)
    assert (config.cls_index, config.tokens) == (index, tokens)
    model = _model(config)
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 5)
    if model.cls_token is not None:
        (grad,) = torch.autograd.grad(model(images).sum(), model.cls_token)
        assert grad.abs().sum() > 0


def test_a_forward_layer_does_not_let_early_tokens_see_late_ones() -> None:
    model = _model(dataclasses.replace(SMALL, directions="fwd*3", cls_token="first"))
    before = model(torch.zeros(1, 3, 16, 16))
    late = torch.zeros(1, 3, 16, 16)
    late[..., 12:, 12:] = 1
    torch.testing.assert_close(model(late), before)


def test_drop_path_drops_the_images_it_was_told_to() -> None:
    model = _model(dataclasses.replace(SMALL, drop_path=0.5))
    images = torch.randn(4, 3, 16, 16)
    kept = torch.ones(4, 3)
    dropped = kept.clone()
    dropped[1, 2] = 0.0
    differs = (model(images, dropped) != model(images, kept)).any(dim=1)
    assert differs.tolist() == [False, True, False, False]
    assert model.drop_rates().tolist() == [0.0, 0.25, 0.5]


def test_the_last_layers_contribution_is_scaled_up_when_kept() -> None:
    config = dataclasses.replace(SMALL, depth=1, directions="bi", drop_path=0.0)
    assert _model(config).drop_rates().tolist() == [0.0]
    assert torch.equal(
        _model(config)(torch.ones(1, 3, 16, 16), torch.zeros(1, 1)), _model(config)(torch.ones(1, 3, 16, 16))
    )


def test_both_directions_start_with_the_step_sizes_that_were_meant() -> None:
    mixer = _model().blocks[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    forward, backward = _model(dataclasses.replace(SMALL, init="published")).blocks[0].mixer.dt_bias
    assert backward.abs().sum() == 0
    assert forward.abs().sum() > 0


def test_weight_decay_spares_the_scans_own_parameters() -> None:
    spared = _model().no_decay()
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.mixer.A_log"} <= spared
    assert {"blocks.1.mixer.D", "blocks.2.mixer.dt_bias", "blocks.2.mixer.conv_bias"} <= spared
    assert not {"head.weight", "patch_embed.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.x_proj"} & spared


def test_flops_agree_with_a_count_of_the_matrix_products() -> None:
    """torch counts products, and not what is inside our ops: the scan and its convolution are written out here."""
    config = dataclasses.replace(SMALL, directions="bi*3")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _model(config)(torch.zeros(1, 3, 16, 16))
    counted = counter.get_total_flops()
    rows = config.d_inner * 2 * config.depth * config.tokens
    ours = 9 * config.d_state * rows + 2 * config.d_conv * rows
    assert abs(flops(config) - ours - counted) <= 0.01 * counted


def test_faults_of_a_configuration_are_told_together() -> None:
    with pytest.raises(ValueError, match="multiple of patch_size") as caught:
        VimConfig(image_size=30, patch_size=16, depth=2, directions="bi*3", drop_path=1.5)
    assert len(str(caught.value).splitlines()) == 3


def test_bf16_autocast_keeps_the_scan_in_fp32_and_the_logits_close() -> None:
    model, images = _model(), torch.randn(2, 3, 16, 16)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert rounded.dtype == torch.float32
    # a few products rounded to 8 bits each, of logits around 0.1
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
